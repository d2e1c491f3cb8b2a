"""``supervit visualize``: which patches of an image each subnet keeps."""
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..subnets import Subnet
from .options import (
    Command,
    class_names_option,
    device_option,
    json_option,
    load_network,
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
@click.argument('images', nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False), metavar='IMAGE...')
@subnet_option
@click.option('--output', type=click.Path(file_okay=False), metavar='DIR', required=True, help='Folder to write to.')
@device_option
def command(
        model: str,
        images: tuple[str, ...],
        subnets: tuple[Subnet, ...],
        output: str,
        device: str | None,
        **settings: Any,
) -> None:
    """Draw which patches of each IMAGE the subnets of MODEL keep.

    MODEL is a name, or a checkpoint of train.py, which knows its model and settings.

    The picture has one row for each image and subnet, by default the largest and the smallest size at the lowest keep
    rate, or of several images the largest size alone: the image at the subnet's size, then what is left of it after
    each block that drops tokens; above it the prediction and the cost. --output gets visualize.png, with four rows to
    a picture visualize-2.png and so on, and the predictions as visualize.json and visualize.csv.

    \b
    Example:
      supervit visualize model_best.pth.tar photo.jpg \\
          --subnet 224:0.7 --subnet 128:0.5 --output pictures
    """
    from ..tools.files import check_output_folder, fill_folder
    from ..tools.results import save_results
    from ..tools.visualize import draw_kept_tokens, find_kept_tokens, pages, read_image, summarize, telling_subnets
    from .tables import list_table, print_table

    check_output_folder(output)
    network = load_network(model, **settings)
    supervit = network.model.to(resolve_device(device))
    found = []
    for path in images:
        found += find_kept_tokens(
            supervit, read_image(path, supervit), subnets or telling_subnets(supervit, len(images)), Path(path).stem)
    results = summarize(found, supervit, network.name)
    results.network['weights_kind'] = network.weights_kind
    with fill_folder(output) as folder:  # all of it or nothing
        save_results(results, folder, 'visualize')
        for i, rows in enumerate(pages(found), start=1):
            draw_kept_tokens(rows, folder / f'visualize{f"-{i}" if i > 1 else ""}.png')
    print_json(asdict(results))
    print_table(list_table(
        results.rows, ['image', 'img_size', 'keep_rate', 'macs', 'prediction', 'probability']))
