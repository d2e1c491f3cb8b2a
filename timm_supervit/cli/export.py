"""``supervit export``: subnets as ONNX files or ``torch.export`` programs."""
from typing import Any

import click

from ..subnets import Subnet
from .options import (
    Command,
    class_names_option,
    create_model,
    device_option,
    json_option,
    model_options,
    resolve_device,
    subnet_option,
)
from .stdout import print_json

__all__ = ['command']


@json_option
@click.command(cls=Command)
@model_options
@class_names_option
@click.option('--format', type=click.Choice(['onnx', 'pt2']), required=True, help='Format of the files.')
@subnet_option
@click.option('--all', 'every', is_flag=True, help='Export all subnets, as without --subnet.')
@click.option('--output', type=click.Path(file_okay=False), metavar='DIR', required=True, help='Folder for the files.')
@device_option
def command(
        model: str,
        format: str,
        subnets: tuple[Subnet, ...],
        every: bool,
        output: str,
        device: str | None,
        **settings: Any,
) -> None:
    """Write subnets of MODEL as files that run without this package.

    MODEL is a name, or a checkpoint of train.py, which knows its model and settings.
    There is one file for each subnet and a manifest with their sizes, rates, MACs and SHA-256. A file takes a batch of
    any number of images of the model's largest size; the resizing is inside. Each file is loaded again and compared
    with the model before any is put into the folder. A pt2 program runs on the device that it was exported on.

    \b
    Example:
      supervit export model_best.pth.tar --format onnx --subnet 160:0.7 --subnet 224:1.0 --output exported
    """
    if subnets and every:
        raise click.UsageError('--subnet and --all exclude each other; leave one out.')

    from ..tools.export import export_subnets
    from .progress import track
    from .tables import list_table, print_table

    network = create_model(model, **settings).to(resolve_device(device))
    manifest = export_subnets(network, subnets or network.subnets, output, format, track)
    rows = [
        {**entry, 'MiB': entry['bytes'] / 2 ** 20, 'largest difference': f'{max(entry["max_difference"].values()):.1e}'}
        for entry in manifest['files']
    ]
    print_json(manifest)
    print_table(list_table(rows, ['img_size', 'keep_rate', 'macs', 'MiB', 'largest difference', 'file']))
