"""Choosing from measured results the most accurate point inside a budget, and the Pareto front.

A point is a subnet, one of an int8 network, or a cascade.
"""
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..results.rows import COLUMNS, Results, Row, column_of, difference, load_results, name_of, pareto_front


class Choice(NamedTuple):
    """What was chosen.

    Attributes:
        best: The row of the most accurate point inside the budget.
        cost: Key of the cost that the fronts are about.
        merged: All rows of the network, and beside it those of the one to compare, if any.
        fronts: The Pareto front of each.
    """

    best: Row
    cost: str
    merged: list[Results]
    fronts: list[list[Row]]


class _Miss(NamedTuple):
    factor: float  # by how much the budget is missed, 1 = met
    row: Row


def choose(
        results: Sequence[str | os.PathLike],
        *,
        compare: Sequence[str | os.PathLike] = (),
        where: Mapping[str, Any] | None = None,
        latency_ms: float | None = None,
        latency_p90_ms: float | None = None,
        throughput: float | None = None,
        macs: float | None = None,
) -> Choice:
    """Choose the most accurate point of a network inside a budget, from saved results, and find the Pareto front.

    Args:
        results: JSON files of "supervit evaluate", "cascade" and "profile", of one network.
        compare: Such files of another network, whose front to find too.
        where: See ``merge_results``.
        latency_ms: Median latency of a batch, at most this many milliseconds.
        latency_p90_ms: 90th percentile of the latency of a batch, at most.
        throughput: Images per second, at least.
        macs: Multiply-accumulates for one image, at most.

    Raises:
        ValueError: If the files are of different networks, say nothing of the budget or the same of one point twice,
            or nothing fits; the message then names the nearest miss.
    """
    budget = dict(latency_ms=latency_ms, latency_p90_ms=latency_p90_ms, throughput=throughput, macs=macs)
    cost = next((key for key, value in budget.items() if value is not None), 'macs')
    merged = [merge_results(paths, where) for paths in (results, compare) if paths]
    best = best_subnet(merged[0].rows, **budget)
    return Choice(best, cost, merged, [front_of(one.rows, cost) for one in merged])


def merge_results(paths: Iterable[str | os.PathLike], where: Mapping[str, Any] | None = None) -> Results:
    """Join the results that ``supervit evaluate``, ``cascade`` and ``profile`` wrote, one row for each point.

    Args:
        paths: JSON files of one network. Costs may be of other weights than the accuracy.
        where: Take only rows with these values where they have the key, such as ``{'batch_size': 1}``.

    Returns:
        The rows of subnets and cascades, cheapest first where the MACs are known. ``info`` has that of each file under
        ``sources``, and ``partial`` is True if one of them is.
    """
    wanted_setting = dict(where or {})
    settings = [key for key, column in COLUMNS.items() if column.kind == 'setting']
    if unknown := wanted_setting.keys() - set(settings):
        raise ValueError(f'{sorted(unknown)[0]} is no setting of results; use {", ".join(settings)}')
    files = {os.fspath(path): load_results(path) for path in paths}
    _check_one_network(files)
    merged: dict[str, Row] = {}
    origins: dict[tuple[str, str], str] = {}
    for path, results in files.items():
        points: set[str] = set()
        for row in results.rows:
            point = name_of(row)
            if row.get('model') or not all(_is(row.get(key, value), value) for key, value in wanted_setting.items()):
                continue
            joined = merged.setdefault(point, {})
            clashing = [key for key in row if row[key] != joined.get(key, row[key])]
            if point in points or clashing:
                raise ValueError(_describe_clash(
                    path if point in points else origins[point, clashing[0]], path, joined, row, clashing))
            points.add(point)
            joined.update(row)
            origins.update({(point, key): path for key in row})
        if not points:
            setting = ' and '.join(f'{key}={value}' for key, value in wanted_setting.items())
            kind, remedy = (f' with {setting}', ', or take another setting') if wanted_setting else ('', '')
            raise ValueError(f'{path} holds no subnet{kind}; leave it out{remedy}')
    return Results(
        next(iter(files.values())).model,
        sorted(merged.values(), key=lambda row: row.get('macs', 0)),
        {'partial': any(results.partial for results in files.values()),
         'sources': {path: results.info for path, results in files.items()}},
        max((results.network for results in files.values()), key=lambda network: bool(network.get('weights'))),
    )


def _is(value: Any, expected: Any) -> bool:
    # What looks like a number on the command line may be the name of an image.
    return value == expected or str(value) == str(expected)


def _check_one_network(files: Mapping[str, Results]) -> None:
    for (first, one), (second, other) in itertools.combinations(files.items(), 2):
        if what := difference(one, other):
            raise ValueError(
                f'{first} and {second} are of different networks: {what}; give results of one network')


def _describe_clash(first: str, second: str, one: Row, other: Row, clashing: Sequence[str]) -> str:
    files = first if first == second else f'{first} and {second}'
    point = f'{"cascade" if "cascade" in one else "subnet"} {name_of(one)}'
    settings = [f'{key}={one[key]} or {other[key]}' for key in clashing if column_of((), key).kind == 'setting']
    if settings:
        return f'{files}: {point} in several settings; choose: {" and ".join(settings)}'
    measured = [f'{key} {one[key]} and {other[key]}' for key in clashing]
    return f'{files}: {point} is measured twice, {", ".join(measured) or "alike"}; give one of the two'


def best_subnet(
        table: Sequence[Row],
        latency_ms: float | None = None,
        macs: float | None = None,
        throughput: float | None = None,
        latency_p90_ms: float | None = None,
) -> Row:
    """Return the row of the most accurate point inside a budget; where several are, the one furthest inside.

    Args:
        table: Rows with ``top1`` and what the budget is about, from the ``Results.rows`` of ``merge_results``.
        latency_ms: Median latency of a batch, at most this many milliseconds.
        macs: Multiply-accumulates for one image, at most.
        throughput: Images per second, at least.
        latency_p90_ms: 90th percentile of the latency of a batch, at most this many milliseconds.
    """
    budget = {
        key: value for key, value in dict(
            latency_ms=latency_ms, latency_p90_ms=latency_p90_ms, macs=macs, throughput=throughput).items()
        if value is not None
    }
    for key, value in budget.items():
        if not value > 0:
            raise ValueError(f'{key} {value} is no budget; give a number above 0')
    for key in ('top1', *budget):
        if not any(row.get(key) is not None for row in table):
            command = 'evaluate' if COLUMNS[key].kind == 'outcome' else 'profile'
            raise ValueError(f'the results say nothing about {key}; add the file that "supervit {command}" wrote')
    rows = [row for row in table if all(row.get(key) is not None for key in ('top1', *budget))]
    if not rows:
        raise ValueError(f'no subnet has all of {", ".join(("top1", *budget))}; measure the same subnets in all files')
    for key in budget:
        _check_comparable(rows, key)
    misses = [_Miss(max((_miss(row, key, value) for key, value in budget.items()), default=1), row) for row in rows]
    fitting = [miss for miss in misses if miss.factor <= 1]
    if not fitting:
        nearest = min(misses, key=lambda miss: miss.factor).row
        reached = _describe(table, {key: nearest[key] for key in budget}, limits=False)
        raise ValueError(
            f'no subnet has {_describe(table, budget)}; the nearest is {name_of(nearest)} with {reached}')
    return min(fitting, key=lambda miss: (-miss.row['top1'], miss.factor, miss.row.get('macs', 0))).row


def _check_comparable(rows: Sequence[Row], cost: str) -> None:
    """Check that a cost was measured in one setting. A network of lower precision is another one, and comparable."""
    if cost == 'macs':
        return
    for key in ('batch_size', 'runtime'):
        values = sorted({row[key] for row in rows if row.get(key) is not None})
        if len(values) > 1:
            raise ValueError(
                f'{COLUMNS[cost].title} is of {" and ".join(f"{key}={value}" for value in values)}, which do not '
                f'compare; choose one with --where, or measure all alike')


def _miss(row: Row, key: str, value: float) -> float:
    return value / max(row[key], 1e-12) if COLUMNS[key].more_is_better else row[key] / value


def _describe(rows: Sequence[Row], values: Mapping[str, float], limits: bool = True) -> str:
    parts = []
    for key, value in values.items():
        column = column_of(rows, key)
        limit = ('at least ' if column.more_is_better else 'at most ') if limits else ''
        shown = column.text(value)
        shown = shown if float(shown) else f'{value / column.scale:.2g}'  # not "at most 0.00 ms"
        parts.append(f'{column.title} {limit}{shown} {column.unit}')
    return ' and '.join(parts)


def front_of(table: Sequence[Row], cost: str = 'macs') -> list[Row]:
    """Return the rows that no other one beats in both cost and top-1, cheapest first.

    Args:
        table: Rows with ``top1`` and ``cost``; others are left out.
        cost: Key of a cost; ``throughput`` should be high, the others low.
    """
    sign = -1 if column_of((), cost).more_is_better else 1
    rows = [row for row in table if row.get('top1') is not None and row.get(cost) is not None]
    _check_comparable(rows, cost)
    return pareto_front(rows, lambda row: sign * row[cost], lambda row: row['top1'])
