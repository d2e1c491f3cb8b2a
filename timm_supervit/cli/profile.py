"""``supervit profile``: what each subnet costs on a machine."""
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..subnets import Subnet
from .options import (
    INTERRUPTED,
    Command,
    amp_options,
    device_option,
    json_option,
    load_network,
    model_options,
    output_option,
    resolve_device,
    subnet_option,
)
from .stdout import echo, print_json

__all__ = ['command']


@json_option
@click.command(cls=Command)
@model_options
@subnet_option
@click.option(
    '--vs', 'peers', multiple=True, metavar='NAME', help='Measure another model of timm too; may be repeated.')
@click.option(
    '-b', '--batch-size', 'batch_sizes', multiple=True, default=[1], show_default=True, type=click.IntRange(1),
    help='Images of a batch; may be repeated.')
@click.option(
    '--precision', 'precisions', multiple=True, type=click.Choice(['float32', 'bfloat16', 'float16']),
    help='Precision, the lower ones by autocast; may be repeated (default: float32).')
@click.option(
    '--runtime', 'runtimes', multiple=True, type=click.Choice(['eager', 'compile', 'onnx']),
    help='What runs the networks; may be repeated (default: eager).')
@click.option('--compile', 'compiled', is_flag=True, help='The same as --runtime compile.')
@click.option('--rounds', default=30, show_default=True, type=click.IntRange(2), help='Measurements of each network.')
@device_option
@amp_options
@output_option
@click.pass_context
def command(
        ctx: click.Context,
        model: str,
        subnets: tuple[Subnet, ...],
        peers: tuple[str, ...],
        batch_sizes: tuple[int, ...],
        precisions: tuple[str, ...],
        runtimes: tuple[str, ...],
        compiled: bool,
        rounds: int,
        device: str | None,
        amp: bool,
        amp_dtype: str,
        output: str | None,
        **settings: Any,
) -> None:
    """Measure what the subnets of MODEL cost: MACs, latency, throughput and peak memory.

    MODEL is a name, or a checkpoint of train.py, which knows its model and settings.
    Without a checkpoint the weights are random, which costs the same. All networks are measured in the same rounds, in
    a new order each time. Latency is the median of a batch, and its 90th percentile and interquartile range; images
    come in the largest size, so resizing is part of it. Peak memory is the weights and what one call allocates; on a
    CPU through torch's allocator alone, and for onnx it is not measured. --output writes profile.json, profile.csv and
    a picture of latency against MACs for each setting. Ctrl-C keeps the rounds measured so far, writes them as
    profile-partial and exits with 130.

    \b
    Examples:
      supervit profile supervit_small --vs deit_small_patch16_224 --output results
      supervit profile supervit_small --runtime eager --runtime compile --runtime onnx
    """
    import os

    os.environ.setdefault('KINETO_LOG_LEVEL', '9')  # torch's profiler, which sees the memory, logs each of its starts

    from ..tools.files import check_output_folder, fill_folder
    from ..tools.pictures import draw_operating_points
    from ..tools.profile import profile
    from ..tools.results import COLUMNS, save_results
    from .progress import track
    from .tables import list_table, print_table

    if output:
        check_output_folder(output)
    network = load_network(model, pretrained=False, name_classes=False, **settings)
    name = network.name
    results = profile(
        network.model,
        subnets or None,
        name,
        peers,
        batch_sizes,
        precisions or ((amp_dtype,) if amp else ('float32',)),
        list(dict.fromkeys((*runtimes, *['compile'] * compiled))) or ('eager',),
        resolve_device(device),
        rounds,
        track,
    )
    by_setting: dict[str, list[dict[str, Any]]] = {}
    for row in results.rows:
        by_setting.setdefault('batch {batch_size}, {precision}, {runtime}'.format(**row), []).append(row)
    mark = ' (partial)' * results.partial
    saved = ''
    if output:
        with fill_folder(output) as folder:  # all of it or nothing
            path = save_results(results, folder, 'profile')[0]
            for setting, rows in by_setting.items():
                suffix = '-' + setting.replace(', ', '-').replace(' ', '-') if len(by_setting) > 1 else ''
                draw_operating_points(
                    rows, f'{path.with_suffix("")}{suffix}.png', y='latency_ms', title=f'{name}, {setting}{mark}')
        saved = f'; saved as {Path(output) / path.name}'
    if results.partial:
        echo(f'PARTIAL: interrupted after {results.info["rounds"]} of {rounds} rounds{saved}.')
    print_json(asdict(results))
    columns = [
        key for key, column in COLUMNS.items() if column.kind == 'cost' and any(key in row for row in results.rows)]
    compared: dict[str, dict[str, Any]] = {}
    for setting, rows in by_setting.items():
        shown = [{**row, 'network': _network(row)} for row in rows]
        print_table(list_table(shown, ['network', *columns], title=f'{name}, {setting}'))
        for row in shown:
            compared.setdefault(row['network'], {'network': row['network']})[setting] = row['latency_ms']
    if len(by_setting) > 1:
        print_table(list_table(list(compared.values()), ['network', *by_setting], title=COLUMNS['latency_ms'].heading))
    if results.partial:
        ctx.exit(INTERRUPTED)


def _network(row: dict[str, Any]) -> str:
    from ..tools.results import subnet_of

    return row.get('model') or str(subnet_of(row))
