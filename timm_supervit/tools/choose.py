"""Choosing a subnet from measured results: the most accurate one inside a budget, and the Pareto front."""
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..subnets import Subnet
from .results import Results, Row, load_results, quantity_of, subnet_of

__all__ = ['best_subnet', 'merge_results', 'pareto_front']

# What a user may ask for, and whether a subnet must stay below it or reach it.
_BUDGETS = {'latency_ms': 'at most', 'macs': 'at most', 'throughput': 'at least'}
_OUTCOMES = ('top1', 'top5', 'correct1', 'correct5', 'count')


class _Miss(NamedTuple):
    factor: float  # by how much the budget is missed, 1 = met
    row: Row


def merge_results(paths: Iterable[str | os.PathLike], where: Mapping[str, Any] | None = None) -> Results:
    """Join the results that ``supervit evaluate`` and ``supervit profile`` wrote, one row for each subnet.

    Args:
        paths: JSON files of one network.
        where: Take only rows with these values where they have the key, such as ``{'batch_size': 1}``.

    Returns:
        The rows of subnets, cheapest first where the MACs are known. ``info`` has that of each file under ``sources``,
        and ``partial`` is True if one of them is.

    Raises:
        ValueError: If the files are of different networks, or a subnet was measured in several settings and ``where``
            does not say which counts.
    """
    wanted = dict(where or {})
    merged: dict[Subnet, Row] = {}
    files = {os.fspath(path): load_results(path) for path in paths}
    for path, results in files.items():
        own: dict[Subnet, Row] = {}
        for row in results.rows:
            subnet = subnet_of(row)
            if subnet is None or any(row.get(key, value) != value for key, value in wanted.items()):
                continue
            if subnet in own:
                _raise_several(path, own[subnet], row)
            own[subnet] = row
            known = merged.setdefault(subnet, {})
            if known.get('macs', row.get('macs')) != row.get('macs', known.get('macs')):
                raise ValueError(
                    f'{path} is of another network: subnet {subnet.img_size}:{subnet.keep_rate:g} has {row["macs"]} '
                    f'MACs there and {known["macs"]} in the others; give results of one network')
            known.update(row)
        if not own:
            raise ValueError(f'{path} holds no subnet with {wanted}' if wanted else f'{path} holds no subnet')
    return Results(
        next(iter(files.values())).model,
        sorted(merged.values(), key=lambda row: row.get('macs', 0)),
        {'partial': any(results.partial for results in files.values()),
         'sources': {path: results.info for path, results in files.items()}},
    )


def _raise_several(path: str, first: Row, second: Row) -> None:
    measured = {'macs', 'latency_ms', 'latency_p90_ms', 'throughput', 'memory_mib', *_OUTCOMES}
    settings = [key for key in first if key not in measured and first[key] != second.get(key)]
    remedy = ' and '.join(f'{key}={first[key]} or {second.get(key)}' for key in settings) or 'remove one of them'
    raise ValueError(
        f'{path} measures subnet {first["img_size"]}:{first["keep_rate"]:g} in several settings; choose: {remedy}')


def best_subnet(
        table: Sequence[Row],
        latency_ms: float | None = None,
        macs: float | None = None,
        throughput: float | None = None,
) -> Row:
    """Return the row of the most accurate subnet inside a budget; where several are, the one furthest inside.

    Args:
        table: Rows with ``top1`` and what the budget is about, from the ``Results.rows`` of ``merge_results``.
        latency_ms: Median latency of a batch, at most this many milliseconds.
        macs: Multiply-accumulates for one image, at most.
        throughput: Images per second, at least.

    Raises:
        ValueError: If a column is missing, or nothing fits; the message names the nearest miss.
    """
    budget = {
        key: value for key, value in dict(latency_ms=latency_ms, macs=macs, throughput=throughput).items()
        if value is not None
    }
    for key, value in budget.items():
        if not value > 0:
            raise ValueError(f'{key} {value} is no budget; give a number above 0')
    for key in ('top1', *budget):
        if not any(row.get(key) is not None for row in table):
            command = 'evaluate' if key in ('top1', 'macs') else 'profile'
            raise ValueError(f'the results say nothing about {key}; add the file that "supervit {command}" wrote')
    rows = [row for row in table if all(row.get(key) is not None for key in ('top1', *budget))]
    if not rows:
        raise ValueError(f'no subnet has all of {", ".join(("top1", *budget))}; measure the same subnets in all files')
    misses = [_Miss(max((_miss(row, key, value) for key, value in budget.items()), default=1), row) for row in rows]
    fitting = [miss for miss in misses if miss.factor <= 1]
    if not fitting:
        nearest = min(misses, key=lambda miss: miss.factor).row
        reached = _describe(table, {key: nearest[key] for key in budget})
        raise ValueError(
            f'no subnet has {_describe(table, budget, _BUDGETS)}; '
            f'the nearest is {nearest["img_size"]}:{nearest["keep_rate"]:g} with {reached}')
    return min(fitting, key=lambda miss: (-miss.row['top1'], miss.factor, miss.row.get('macs', 0))).row


def _miss(row: Row, key: str, value: float) -> float:
    return row[key] / value if _BUDGETS[key] == 'at most' else value / max(row[key], 1e-12)


def _describe(rows: Sequence[Row], values: Mapping[str, float], words: Mapping[str, str] | None = None) -> str:
    parts = []
    for key, value in values.items():
        quantity = quantity_of(rows, key)
        word = f'{words[key]} ' if words else ''
        parts.append(f'{word}{value / quantity.scale:.{quantity.digits}f} {quantity.title}')
    return ' and '.join(parts)


def pareto_front(table: Sequence[Row], cost: str = 'macs') -> list[Row]:
    """Return the rows that no other one beats in both cost and top-1, cheapest first.

    Args:
        table: Rows with ``top1`` and ``cost``; others are left out.
        cost: Key that should be low, or ``throughput``, which should be high.
    """
    sign = -1 if cost == 'throughput' else 1
    rows = [row for row in table if row.get('top1') is not None and row.get(cost) is not None]
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (sign * row[cost], -row['top1'])):
        if not front or row['top1'] > front[-1]['top1']:
            front.append(row)
    return front
