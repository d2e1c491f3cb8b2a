"""``supervit predict``: what images show."""
import json
import os
from typing import Any

import click

from ..subnets import Subnet
from . import base, loading, options
from .stdout import echo, note, wants_json, write


@base.json_option
@click.command(cls=base.Command)
@options.model_options
@click.argument('paths', nargs=-1, type=click.Path(exists=True), metavar='IMAGE|FOLDER...')
@click.option('--data-dir', metavar='DIR', help='Folder of a data set, instead of IMAGE|FOLDER.')
@options.dataset_options
@click.option('--subnet', type=options.SubnetType(), help='The subnet to run (default: the active one).')
@options.cascade_option
@click.option('--top', default=5, show_default=True, type=click.IntRange(1), help='Classes to name for each image.')
@click.option('-b', '--batch-size', default=64, show_default=True, type=click.IntRange(1), help='Images in a batch.')
@click.option(
    '-j', '--workers', default=0, show_default=True, type=click.IntRange(0), help='Processes that read images.')
@options.class_names_option
@options.device_option
@options.amp_options
@click.option(
    '--output', type=click.Path(dir_okay=False), metavar='FILE.jsonl',
    help='Write JSON lines to this file as they come; a run that was stopped continues there.')
@click.pass_context
def command(
        ctx: click.Context,
        paths: tuple[str, ...],
        data_dir: str | None,
        data: dict[str, Any],
        subnet: Subnet | None,
        cascade: str | None,
        top: int,
        batch_size: int,
        workers: int,
        device: str | None,
        amp: bool,
        amp_dtype: str,
        output: str | None,
        **model_options: Any,
) -> None:
    """Say what images show: the most probable classes, and which subnet of MODEL answered.

    MODEL is a name, a checkpoint of train.py, or a file of "supervit export". Images are files, folders, of which all
    images count, or one of timm's data sets, with --dataset and --data-dir. They are prepared as for
    "supervit evaluate".

    With --output, a run that was stopped continues where it was when it is called again, and each process under
    torchrun takes its share of the images and writes a file of its own, FILE-RANK-of-SIZE.jsonl. --json prints the same
    lines. Images that cannot be read are named on stderr, and the exit code is then 1.

    \b
    supervit predict local-dir:output/digits photo.png --subnet 16:0.7 --top 3
    supervit predict supervit_small --checkpoint model_best.pth.tar --data-dir imagenet --output predictions.jsonl
    """
    from ..cascade import Cascade
    from ..images.datasets import check_data, open_dataset
    from ..tools.predict import find_images, predict
    from .progress import track
    from .tables import list_table, print_table

    if bool(paths) == bool(data_dir or data['dataset']):
        raise click.UsageError('Give either IMAGE|FOLDER..., or a data set with --data-dir and --dataset.')
    if cascade and subnet:
        raise click.UsageError('--cascade and --subnet exclude each other; leave one out.')
    share = loading.read_share()
    if share.size > 1 and not output:
        raise click.UsageError('Several processes need --output.')
    if not paths:
        check_data(data_dir, data['dataset'])
    files = find_images(paths)._replace(img_mode=data['input_img_mode']) if paths else None
    where = loading.resolve_device(device)
    if where == 'cuda' and share.size > 1:
        where = f'cuda:{os.environ.get("LOCAL_RANK", share.rank)}'
    model = loading.load(**model_options, device=where)
    images = files or open_dataset(data_dir, model=model, **data)
    if images.passed_over:
        loading.show_passed_over(images.passed_over)
    if cascade:
        with loading.warnings_shown():
            model = Cascade.load(model, cascade)
    predictions = predict(
        model, images, subnet, top=top, output=output, share=share, batch_size=batch_size, workers=workers,
        precision=loading.precision_of(amp, amp_dtype), progress=track)
    if predictions.num_resumed:
        note(f'{predictions.num_resumed} images are in {predictions.path} already.')
    shown = []
    for row in predictions:
        if wants_json():
            write(json.dumps(row) + '\n', saved='what was predicted so far is')
        elif not output:
            shown.append(row)
        if 'error' in row:
            echo(f'{row["image"]} cannot be read: {row["error"]}', err=True)
    if shown:
        print_table(list_table(_lines(shown), ['image', 'subnet', 'class', 'probability']))
    if predictions.num_missing:
        raise click.ClickException(
            f'{predictions.num_missing} images were not delivered: timm passes over what it cannot read of a stream, '
            f'with a warning; all others were predicted')
    if predictions.failed:
        raise click.ClickException(f'{len(predictions.failed)} images could not be read; all others were predicted')


def _lines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a line of a table for each class of each image, the first of which names the image."""
    lines = []
    for row in rows:
        for i, prediction in enumerate(row.get('predictions', [])):
            named = {'image': row['image'], 'subnet': row['subnet']} if i == 0 else {'image': '', 'subnet': ''}
            lines.append({**named, **prediction})
    return lines
