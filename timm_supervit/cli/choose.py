"""``supervit choose``: the subnet for a budget, from saved results."""
from dataclasses import asdict, replace
from typing import Any

import click

from . import options
from .stdout import echo, print_json


@options.json_option
@click.command(cls=options.Command)
@click.argument('results', nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option('--latency-ms', type=float, metavar='MS', help='Median latency of a batch, at most.')
@click.option('--latency-p90-ms', type=float, metavar='MS', help='90th percentile of the latency, at most.')
@click.option('--macs', type=float, metavar='N', help='Multiply-accumulates for one image, at most, as in 2.5e9.')
@click.option('--throughput', type=float, metavar='N', help='Images per second, at least.')
@click.option(
    '--compare', multiple=True, type=click.Path(exists=True, dir_okay=False), metavar='JSON',
    help='Results of another network, to print and draw beside the first; may be repeated.')
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
    """Choose the most accurate subnet inside a budget, from the JSON files of evaluate and profile.

    Cascades and int8 networks are among the choice where their results are given. Prints the Pareto front, and last the
    subnet as SIZE:RATE. --output writes the front as choose.json and choose.csv, and all points and the front as
    choose.png; choose-partial where a file is of an interrupted run, which is said too.

    \b
    supervit choose results/evaluate.json results/profile.json --latency-ms 20 --where batch_size=1
    supervit choose results/evaluate.json results/profile.json --latency-p90-ms 20 \\
        --compare other/evaluate.json --compare other/profile.json
    """
    from ..tools.choose import best_subnet, merge_results, pareto_front
    from ..tools.files import fill_folder
    from ..tools.pictures import draw_choice
    from ..tools.results import name_of, save_results
    from .tables import list_table, print_table

    merged = merge_results(results, where)
    other = merge_results(compare, where) if compare else None
    budgets = dict(latency_ms=latency_ms, latency_p90_ms=latency_p90_ms, throughput=throughput, macs=macs)
    cost = next((key for key, value in budgets.items() if value is not None), 'macs')
    best = best_subnet(merged.rows, latency_ms, macs, throughput, latency_p90_ms)
    front = pareto_front(merged.rows, cost)
    chosen = replace(merged, rows=front, info=merged.info | {'best': best})
    if output:
        with fill_folder(output) as folder:  # all of it or nothing
            path = save_results(chosen, folder, 'choose')[0]
            draw_choice([merged, *([other] if other else [])], path.with_suffix('.png'), cost)
    for path, info in {**merged.info['sources'], **(other.info['sources'] if other else {})}.items():
        if info.get('partial'):
            echo(f'PARTIAL: {path} is of an interrupted run.')
    print_json(asdict(chosen))
    print_table(list_table(front, _columns(front), title='Pareto front'))
    if other:
        rows = pareto_front(other.rows, cost)
        print_table(list_table(rows, _columns(rows), title=f'Pareto front of {other.model}'))
    echo(name_of(best))


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    columns = [
        'img_size', 'keep_rate', 'precision', 'cascade', 'top1', 'macs', 'latency_ms', 'latency_p90_ms', 'throughput']
    return [key for key in columns if any(row.get(key) is not None for row in rows)]
