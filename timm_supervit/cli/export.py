"""``supervit export``: a model as ONNX files or ``torch.export`` programs."""
from typing import Any

import click

from ..subnets import Subnet
from .options import (
    Command,
    SubnetType,
    class_names_option,
    create_model,
    device_option,
    json_option,
    model_options,
    resolve_device,
    workers_option,
)
from .stdout import echo, print_json

__all__ = ['command']


@json_option
@click.command(cls=Command)
@model_options
@class_names_option
@click.option('--format', type=click.Choice(['onnx', 'pt2']), required=True, help='Format of the files.')
@click.option(
    '--subnet', 'subnets', multiple=True, type=SubnetType(),
    help='Write this subnet as a file of static shapes; may be repeated (default: one file of all subnets).')
@click.option('--quantize', type=click.Choice(['int8']), help='Quantize linear layers, for format onnx.')
@click.option(
    '--calibration-data', type=click.Path(file_okay=False), metavar='DIR',
    help='Folder of images to find the ranges of activations by (default: find them at each call).')
@click.option(
    '--data-dir', metavar='DIR',
    help='Folder of a data set, a folder of images for each class, to compare the accuracy of int8 and float32 on.')
@workers_option
@click.option('--output', type=click.Path(file_okay=False), metavar='DIR', required=True, help='Folder for the files.')
@device_option
def command(
        model: str,
        format: str,
        subnets: tuple[Subnet, ...],
        quantize: str | None,
        calibration_data: str | None,
        data_dir: str | None,
        workers: int,
        output: str,
        device: str | None,
        **settings: Any,
) -> None:
    """Write MODEL as a file that runs all its subnets without this package.

    MODEL is a name, or a checkpoint of train.py, which knows its model and settings.

    The file takes images of any size and number, the image size and the keep rate of the subnet to run. With --subnet
    there is one file for each of these instead, which takes images of the model's largest size and resizes them.
    Beside each file is a manifest: how to prepare images, how to call it, MACs and SHA-256. Each file is loaded again
    and compared with the model before any is put into the folder. A pt2 program runs on the device that it was
    exported on. --quantize int8 prints how its latency and size compare with float32, and with --data-dir how its
    accuracy does, and what share of the kept patches is the same.

    \b
    Examples:
      supervit export model_best.pth.tar --format onnx --output exported
      supervit export model_best.pth.tar --format onnx --quantize int8 --data-dir imagenet --output exported
      supervit export model_best.pth.tar --format onnx --subnet 160:0.7 --subnet 224:1.0 --output exported
    """
    if not quantize and (calibration_data or data_dir):
        raise click.UsageError('--calibration-data and --data-dir are for --quantize int8; add it or leave them out.')

    from ..tools.data import create_evaluation_loader, open_dataset
    from ..tools.export import Int8, export_model
    from ..tools.files import check_output_folder
    from ..tools.quantize import create_calibration_loader
    from .progress import track
    from .tables import list_table, print_table

    check_output_folder(output)
    network = create_model(model, **settings).to(resolve_device('cpu' if quantize else device))
    int8 = None
    if quantize:
        int8 = Int8(
            create_calibration_loader(calibration_data, network, workers) if calibration_data else None,
            create_evaluation_loader(open_dataset(data_dir), network, 64, workers) if data_dir else None)
    manifests = export_model(network, output, format, subnets, int8, track)
    print_json(manifests)
    for manifest in manifests:
        print_table(list_table(_rows(manifest), _columns(manifest), title=manifest['file']))
        echo(_summary(manifest))


def _rows(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    compared = manifest.get('comparison')
    if not compared:
        return manifest['subnets']
    return [
        {**one, **{f'int8_{key}': other[key] for key in ('top1', 'latency_ms') if key in other},
         'kept_same': other.get('kept_same')}
        for one, other in zip(compared[::2], compared[1::2], strict=True)]


def _columns(manifest: dict[str, Any]) -> list[str]:
    compared = ['top1', 'int8_top1', 'kept_same', 'latency_ms', 'int8_latency_ms']
    return ['img_size', 'keep_rate', 'macs', *(key for key in compared if _rows(manifest)[0].get(key) is not None)]


def _summary(manifest: dict[str, Any]) -> str:
    text = f'{manifest["file"]}: {manifest["bytes"] / 2 ** 20:.1f} MiB'
    if manifest['precision'] == 'float32':
        return f'{text}, differs from the model by {max(manifest["max_difference"].values()):.1e} at most on logits'
    text += f', {manifest["bytes"] / manifest["float32_bytes"]:.2f} of float32'
    rows = _rows(manifest)
    if 'top1' in rows[0]:
        gain = sum(row['int8_top1'] - row['top1'] for row in rows) / len(rows)
        text += f'; top-1 {gain:+.2f} points in the mean over subnets, on {rows[0]["count"]} images'
    return text
