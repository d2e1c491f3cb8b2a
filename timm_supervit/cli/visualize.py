"""``supervit visualize``: which patches of an image each subnet keeps."""
from typing import Any

import click

from ..subnets import Subnet
from . import base, loading, options


@base.json_option
@click.command(cls=base.Command)
@options.model_options
@options.class_names_option
@click.argument('images', nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False), metavar='IMAGE...')
@options.subnet_option
@click.option('--output', type=click.Path(file_okay=False), metavar='DIR', required=True, help='Folder to write to.')
@options.device_option
def command(
        model: str,
        images: tuple[str, ...],
        subnets: tuple[Subnet, ...],
        output: str,
        device: str | None,
        **settings: Any,
) -> None:
    """Draw which patches of each IMAGE the subnets of MODEL keep.

    MODEL is a name or a checkpoint of train.py, which knows its model and settings.

    There is one row for each image and subnet: the image at the subnet's size, then what is left of it after each block
    that drops tokens, under the prediction and the cost. By default these are the largest and the smallest size at the
    lowest keep rate, or the largest size alone if there are several images. --output writes visualize.png, with four
    rows to a picture visualize-2.png and so on, and the predictions as visualize.json and visualize.csv.

    \b
    Example:
      supervit visualize model_best.pth.tar photo.jpg \\
          --subnet 224:0.7 --subnet 128:0.5 --output pictures
    """
    from ..results.files import check_output_folder
    from ..tools.visualize import visualize
    from .report import report
    from .tables import list_table

    check_output_folder(output)
    loaded = loading.load(model, takes_files=False, device=loading.resolve_device(device), **settings)
    results, pictures = visualize(loaded, images, subnets or None)
    report(
        results, output, 'visualize',
        lambda: {f'-{i}.png' if i > 1 else '.png': picture for i, picture in enumerate(pictures, start=1)},
        [[list_table(results.rows, ['image', 'img_size', 'keep_rate', 'macs', 'prediction', 'probability'])]])
