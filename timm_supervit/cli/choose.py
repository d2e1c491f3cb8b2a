"""``supervit choose``: the subnet for a budget, from saved results."""
from dataclasses import asdict, replace

import click

from . import options
from .stdout import echo, print_json


@options.json_option
@click.command(cls=options.Command)
@click.argument('results', nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option('--latency-ms', type=float, metavar='MS', help='Median latency of a batch, at most.')
@click.option('--macs', type=float, metavar='N', help='Multiply-accumulates for one image, at most, as in 2.5e9.')
@click.option('--throughput', type=float, metavar='N', help='Images per second, at least.')
@options.where_option
@options.output_option
def command(
        results: tuple[str, ...],
        latency_ms: float | None,
        macs: float | None,
        throughput: float | None,
        where: dict[str, object],
        output: str | None,
) -> None:
    """Choose the most accurate subnet inside a budget, from the JSON files of evaluate and profile.

    Prints the Pareto front, and last the subnet as SIZE:RATE. --output writes the front as choose.json and choose.csv,
    or choose-partial where a file is of an interrupted run, which is said too.

    \b
    supervit choose results/evaluate.json results/profile.json --latency-ms 20 --where batch_size=1
    """
    from ..tools.choose import best_subnet, merge_results, pareto_front
    from ..tools.results import save_results, subnet_of
    from .tables import list_table, print_table

    merged = merge_results(results, where)
    rows = merged.rows
    cost = 'latency_ms' if latency_ms else 'throughput' if throughput else 'macs'
    best = best_subnet(rows, latency_ms, macs, throughput)
    front = pareto_front(rows, cost)
    columns = ['img_size', 'keep_rate', 'top1', 'macs', 'latency_ms', 'throughput']
    shown = [key for key in columns if any(row.get(key) is not None for row in front)]
    chosen = replace(merged, rows=front, info=merged.info | {'best': best})
    if output:
        save_results(chosen, output, 'choose')
    for path, info in merged.info['sources'].items():
        if info.get('partial'):
            echo(f'PARTIAL: {path} is of an interrupted run.')
    print_json(asdict(chosen))
    print_table(list_table(front, shown, title='Pareto front'))
    echo(str(subnet_of(best)))
