"""``supervit export``: a model as ONNX files or ``torch.export`` programs."""
from typing import Any

import click

from ..subnets import Subnet
from . import base, loading, options
from .stdout import echo, print_json


@base.json_option
@click.command(cls=base.Command)
@options.model_options
@options.class_names_option
@click.option('--format', type=click.Choice(['onnx', 'pt2']), required=True, help='Format of the files.')
@click.option(
    '--subnet', 'subnets', multiple=True, type=options.SubnetType(),
    help='Write this subnet as a file of static shapes; may be repeated (default: one file of all subnets).')
@click.option('--quantize', type=click.Choice(['int8']), help='Quantize linear layers, for format onnx.')
@click.option(
    '--calibration-data', metavar='DIR',
    help='Folder of the images by which to find the ranges of activations (default: find them in each batch).')
@options.dataset_options
@click.option(
    '--opset', type=int, metavar='NUMBER',
    help='Version of ONNX\'s operators, 18 or later, for an older runtime (default: that of torch\'s exporter).')
@options.workers_option
@click.option('--output', type=click.Path(file_okay=False), metavar='DIR', required=True, help='Folder for the files.')
@options.device_option
def command(
        model: str,
        format: str,
        subnets: tuple[Subnet, ...],
        quantize: str | None,
        calibration_data: str | None,
        data: dict[str, Any],
        opset: int | None,
        workers: int,
        output: str,
        device: str | None,
        **settings: Any,
) -> None:
    """Write MODEL as a file that runs all its subnets without this package.

    MODEL is a name or a checkpoint of train.py, which knows its model and settings.

    The file takes images of any size and number, and the image size and keep rate of the subnet to run. With --subnet
    there is one file for each of these instead, which takes images of the model's largest size and resizes them.
    Beside each file is a manifest: how to prepare images, how to call it, MACs and SHA-256. Every file is loaded again
    and compared with the model before any is put into the folder. A pt2 program runs on the device on which it was
    exported.

    "supervit evaluate", "profile", "cascade" and "predict" take the files as they take models: they tell what
    --quantize int8 gains and what it costs.

    \b
    Examples:
      supervit export model_best.pth.tar --format onnx --output exported
      supervit export model_best.pth.tar --format onnx --quantize int8 --output exported
      supervit export model_best.pth.tar --format onnx --subnet 160:0.7 --subnet 224:1.0 --output exported
    """
    calibrates = bool(calibration_data or data['dataset'])
    for name, value in {'calibration_data': calibration_data, **data}.items():
        purpose = '--calibration-data' if quantize else '--quantize int8'
        if value not in (None, 'validation') and not (quantize and calibrates):
            raise click.UsageError(f'--{name.replace("_", "-")} is for {purpose}; add it or leave it out.')

    from ..images.datasets import check_data, open_dataset
    from ..results.files import check_output_folder
    from ..tools.export import export
    from .progress import track
    from .tables import list_table, print_table

    check_output_folder(output)
    data['class_map'] = data['class_map'] or ''  # whatever the classes are, and not those that were trained on
    if calibrates:
        check_data(calibration_data, data['dataset'])
    loaded = loading.load(
        model, takes_files=False, device=loading.resolve_device('cpu' if quantize else device), **settings)
    images = open_dataset(calibration_data, model=loaded, **data) if calibrates else None
    manifests = export(
        loaded, output, format, subnets, quantize=quantize, calibration_data=images, opset=opset, workers=workers,
        progress=track)
    print_json(manifests)
    for manifest in manifests:
        print_table(list_table(manifest['subnets'], ['img_size', 'keep_rate', 'macs'], title=manifest['file']))
        echo(_summary(manifest))


def _summary(manifest: dict[str, Any]) -> str:
    size = f'{manifest["file"]}: {manifest["bytes"] / 2 ** 20:.1f} MiB'
    if manifest['precision'] == 'int8':
        size += f', {manifest["bytes"] / manifest["float32_bytes"]:.2f} of float32'
    largest = max(manifest['max_difference'].values())
    return f'{size}, differs from the model by {largest:.1e} at most on logits'
