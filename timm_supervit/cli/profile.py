"""``supervit profile``: what each subnet costs on a machine."""
from typing import Any

import click

from ..subnets import Subnet
from . import base, loading, options


@base.json_option
@click.command(cls=base.Command)
@options.model_options
@options.subnet_option
@click.option(
    '--vs', 'peers', multiple=True, metavar='NAME|FILE',
    help='Measure another model of timm too, or an exported file of MODEL, in the same rounds; may be repeated.')
@click.option(
    '-b', '--batch-size', 'batch_sizes', multiple=True, default=[1], show_default=True, type=click.IntRange(1),
    help='Images in a batch; may be repeated.')
@click.option(
    '--precision', 'precisions', multiple=True, type=click.Choice(['float32', 'bfloat16', 'float16']),
    help='Precision, lower ones by autocast; may be repeated (default: float32).')
@click.option(
    '--runtime', 'runtimes', multiple=True, type=click.Choice(['eager', 'compile', 'onnx']),
    help='What runs the networks; may be repeated (default: eager).')
@click.option('--rounds', default=30, show_default=True, type=click.IntRange(2), help='Measurements of each network.')
@options.device_option
@options.output_option
def command(
        model: str,
        subnets: tuple[Subnet, ...],
        peers: tuple[str, ...],
        batch_sizes: tuple[int, ...],
        precisions: tuple[str, ...],
        runtimes: tuple[str, ...],
        rounds: int,
        device: str | None,
        output: str | None,
        **settings: Any,
) -> None:
    """Measure what the subnets of MODEL cost: MACs, latency, throughput and peak memory.

    MODEL is a name, a checkpoint of train.py, or a file of "supervit export", which runs in its own precision and
    runtime. Without a checkpoint the weights are random, which costs the same.

    All networks are measured in the same rounds, each time in a new order. Latency is the median over rounds for one
    batch, given with its 90th percentile and interquartile range. Images come in the largest size, so resizing them is
    part of it. Peak memory is the weights plus what one call allocates: on a CPU only through torch's allocator, and
    not at all for onnx and exported files.

    --output writes profile.json, profile.csv and, for each setting, a picture of latency against MACs. Ctrl-C keeps the
    rounds measured so far, saves them as profile-partial and exits with 130.

    A model of --vs gets images of MODEL's largest size, where it takes them; the table says the size. Latencies of two
    calls of this command do not compare on a machine that others use: what is to be compared goes into one.

    \b
    Examples:
      supervit profile supervit_small --vs deit_small_patch16_224 --output results
      supervit profile supervit_small -b 1 -b 64 --runtime eager --runtime compile --runtime onnx
      supervit profile exported/supervit_small.onnx --vs exported/supervit_small-int8.onnx
    """
    import logging
    import os

    os.environ.setdefault('KINETO_LOG_LEVEL', '9')  # torch's profiler, which sees the memory, logs each of its starts
    # What torch measures time with looks for compilers, and warns of a CUDA_HOME where there is no GPU.
    logging.getLogger('torch.utils.cpp_extension').addFilter(lambda record: 'No CUDA runtime' not in record.msg)

    from ..results.files import check_output_folder
    from ..results.pictures import draw_operating_points
    from ..results.rows import COLUMNS, name_of, subnet_of
    from ..subnets import format_size
    from ..tools.profile import find_overhead, profile
    from .progress import track
    from .report import report
    from .tables import list_table

    if output:
        check_output_folder(output)
    loaded = loading.load(
        model, pretrained=False, name_classes=False, device=loading.resolve_device(device), **settings)
    results = profile(
        loaded, subnets or None, peers=peers, batch_sizes=batch_sizes, precisions=precisions or ('float32',),
        runtimes=runtimes or ('eager',), rounds=rounds, progress=track)
    by_setting: dict[str, list[dict[str, Any]]] = {}
    for row in results.rows:
        by_setting.setdefault('batch {batch_size}, {precision}, {runtime}'.format(**row), []).append(row)

    def draw() -> dict[str, Any]:
        mark = ' (partial)' if results.partial else ''
        return {
            f'-{setting.replace(", ", "-").replace(" ", "-")}.png' if len(by_setting) > 1 else '.png':
            draw_operating_points(rows, y='latency_ms', title=f'{results.model}, {setting}{mark}')
            for setting, rows in by_setting.items()}

    def network_of(row: dict[str, Any]) -> str:
        return str(subnet_of(row) or f'{name_of(row)} at {format_size(row["img_size"])}')

    columns = [
        key for key, column in COLUMNS.items() if column.kind == 'cost' and any(key in row for row in results.rows)]
    compared: dict[str, dict[str, Any]] = {}
    tables = []
    for setting, rows in by_setting.items():
        shown = [{**row, 'network': network_of(row)} for row in rows]
        tables.append([list_table(shown, ['network', *columns], title=f'{results.model}, {setting}')])
        for row in shown:
            compared.setdefault(row['network'], {'network': row['network']})[setting] = row['latency_ms']
    if len(by_setting) > 1:
        tables.append([list_table(
            list(compared.values()), ['network', *by_setting], title=COLUMNS['latency_ms'].heading)])
    lines = []
    for row, other in find_overhead(results.rows):
        batch = row['batch_size']
        lines.append(
            f'At batch {batch}, {row["precision"]}, {row["runtime"]}, {subnet_of(row)} ({row["latency_ms"]:.2f} ms) is '
            f'not faster than {subnet_of(other)} ({other["latency_ms"]:.2f} ms), which has '
            f'{other["macs"] / row["macs"]:.1f} times its MACs: most of so short a call is overhead. '
            f'Larger batches show what subnets save, as -b {max(64, 8 * batch)}.')
    report(
        results, output, 'profile', draw, tables, lines, done=f'{results.info["rounds"]} of {rounds} rounds')
