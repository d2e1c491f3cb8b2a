"""``supervit choose``: the subnet for a budget, from saved results."""
from dataclasses import replace
from typing import Any

import click

from . import base, options


@base.json_option
@click.command(cls=base.Command)
@click.argument('results', nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option('--latency-ms', type=float, metavar='MS', help='At most this median latency of a batch.')
@click.option('--latency-p90-ms', type=float, metavar='MS', help='At most this 90th percentile of the latency.')
@click.option('--macs', type=float, metavar='N', help='At most so many MACs per image, as in 2.5e9.')
@click.option('--throughput', type=float, metavar='N', help='At least so many images per second.')
@click.option(
    '--compare', multiple=True, type=click.Path(exists=True, dir_okay=False), metavar='JSON',
    help='File of results of another network, to print and draw beside the first; may be repeated.')
@options.where_option
@options.output_option
def command(
        results: tuple[str, ...],
        latency_ms: float | None,
        latency_p90_ms: float | None,
        macs: float | None,
        throughput: float | None,
        compare: tuple[str, ...],
        where: dict[str, object],
        output: str | None,
) -> None:
    """Choose the most accurate subnet within a budget, from the JSON files of evaluate and profile.

    Cascades and int8 files take part if their results are given too. Prints the Pareto front, and in the last line the
    subnet as SIZE:RATE. --output writes the front as choose.json and choose.csv, and all points with the front as
    choose.png; if a file is from an interrupted run, they are called choose-partial.

    \b
    supervit choose results/evaluate.json results/profile.json --latency-ms 20 --where batch_size=1
    supervit choose results/evaluate.json results/profile.json --latency-p90-ms 20 \\
        --compare other/evaluate.json --compare other/profile.json
    """
    from ..results.pictures import draw_choice
    from ..results.rows import name_of
    from ..tools.choose import choose
    from .report import report
    from .tables import list_table

    chosen = choose(
        results, compare=compare, where=where, latency_ms=latency_ms, latency_p90_ms=latency_p90_ms,
        throughput=throughput, macs=macs)
    merged, front = chosen.merged[0], chosen.fronts[0]
    titles = ['Pareto front', *(f'Pareto front of {other.model}' for other in chosen.merged[1:])]
    report(
        replace(merged, rows=front, info=merged.info | {'best': chosen.best}), output, 'choose',
        lambda: {'.png': draw_choice(chosen.merged, chosen.fronts, chosen.cost)},
        [[list_table(rows, _columns(rows), title)] for title, rows in zip(titles, chosen.fronts, strict=True)],
        [name_of(chosen.best)],
        warnings=[
            f'PARTIAL: {path} is of an interrupted run.' for one in chosen.merged
            for path, info in one.info['sources'].items() if info.get('partial')])


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    columns = [
        'img_size', 'keep_rate', 'precision', 'cascade', 'top1', 'macs', 'latency_ms', 'latency_p90_ms', 'throughput']
    return [key for key in columns if any(row.get(key) is not None for row in rows)]
