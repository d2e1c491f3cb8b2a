"""``supervit predict``: what images show."""
import contextlib
import json
import os
from datetime import timedelta
from typing import Any

import click

from ..subnets import Subnet
from . import options
from .stdout import echo, note, wants_json, write


@options.json_option
@click.command(cls=options.Command)
@options.model_options
@click.argument('paths', nargs=-1, type=click.Path(exists=True), metavar='IMAGE|FOLDER...')
@click.option('--data-dir', metavar='DIR', help='Folder of a data set, in the place of IMAGE|FOLDER.')
@click.option('--dataset', default='', metavar='NAME', help='Kind and name, as in timm\'s scripts (default: folders).')
@click.option('--split', default='validation', show_default=True, metavar='NAME', help='Split of the data set.')
@click.option('--subnet', type=options.SubnetType(), help='The subnet to run (default: the active one).')
@options.cascade_option
@click.option('--top', default=5, show_default=True, type=click.IntRange(1), help='Classes to name of each image.')
@click.option('-b', '--batch-size', default=64, show_default=True, type=click.IntRange(1), help='Images of a batch.')
@click.option('-j', '--workers', default=0, show_default=True, type=click.IntRange(0), help='Processes reading images.')
@options.class_names_option
@options.device_option
@options.amp_options
@click.option(
    '--output', type=click.Path(dir_okay=False), metavar='FILE.jsonl',
    help='Write JSON lines to this file, as they come; a file of a run that was stopped is gone on with.')
@click.pass_context
def command(
        ctx: click.Context,
        paths: tuple[str, ...],
        data_dir: str | None,
        dataset: str,
        split: str,
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

    MODEL is a name, a checkpoint of train.py, or a file of "supervit export". Images are files, folders with all in
    them, or a data set of timm's with --dataset and --data-dir. They are prepared as for "supervit evaluate". With
    --output a run that was stopped goes on where it was when called again, and each process under torchrun takes its
    share of the images and writes a file of its own, FILE-RANK-of-SIZE.jsonl. --json prints the same lines. Images that
    cannot be read are named on stderr, and the exit code is then 1.

    \b
    supervit predict local-dir:output/digits photo.png --subnet 16:0.7 --top 3
    supervit predict supervit_small --checkpoint model_best.pth.tar --data-dir imagenet --output predictions.jsonl
    """
    import torch

    from ..cascade import Cascade
    from ..subnets import check_subnet
    from ..tools.data import count_missing, open_dataset
    from ..tools.predict import (
        Share,
        digest_run,
        open_images,
        open_log,
        predict,
        read_program_cascade,
        run_cascade,
        run_program_cascade,
        run_subnet,
        share_path,
    )
    from ..tools.program import Program
    from ..tools.progress import silent
    from .progress import track
    from .tables import list_table, print_table

    if bool(paths) == bool(data_dir or dataset):
        raise click.UsageError('Give either IMAGE|FOLDER..., or a data set with --data-dir and --dataset.')
    if cascade and subnet:
        raise click.UsageError('--cascade and --subnet exclude each other; leave one out.')
    share = Share(int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1)))
    if share.size > 1 and not output:
        raise click.UsageError('Several processes need --output.')
    images = open_images(paths) if paths else open_dataset(data_dir, dataset, split)
    where = options.resolve_device(device)
    if where == 'cuda' and share.size > 1:
        where = f'cuda:{os.environ.get("LOCAL_RANK", share.rank)}'
    model, names = _load(where, **model_options)
    how: Any
    if cascade and isinstance(model, Program):
        with options.warnings_shown():
            how = read_program_cascade(model, cascade)
        classify = run_program_cascade(model, *how)
    elif cascade:
        with options.warnings_shown():
            stages = Cascade.load(model, cascade)
        classify, how = run_cascade(stages), (stages.stages, stages.thresholds)
    else:
        chosen = check_subnet(subnet or model.subnet, model.img_sizes)
        classify, how = run_subnet(model, chosen), chosen
    precision = amp_dtype if amp else 'float32'

    failed: list[str] = []
    shown: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        log = None
        if output:
            log = stack.enter_context(open_log(
                share_path(output, share), digest_run(model, how, names, top, precision, share.size), images, share))
            failed += log.failed
            if log.done and share.rank == 0:
                note(f'{log.done} images are in {log.path} already.')
        done = log.done if log else 0
        for rows in predict(
                classify, model, images, names, top=top, share=share, start=done,
                batch_size=batch_size, num_workers=workers, device=where,
                amp_dtype=getattr(torch, amp_dtype) if amp else None, progress=silent if share.rank else track):
            done += len(rows)
            if log:
                log.write(rows)
            if wants_json():
                write(''.join(json.dumps(row) + '\n' for row in rows))
            elif not log:
                shown += rows
            for row in rows:
                if 'error' in row:
                    echo(f'{row["image"]} cannot be read: {row["error"]}', err=True)
                    failed.append(row['image'])
    if shown:
        print_table(list_table(_lines(shown), ['image', 'subnet', 'class', 'probability']))
    _wait_for_others(share.size)
    if missing := count_missing(images, done, *share):
        raise click.ClickException(
            f'{missing} images were not delivered: timm passes over what it cannot read of a stream, with a warning; '
            f'all others were predicted')
    if failed:
        raise click.ClickException(f'{len(failed)} images could not be read; all others were predicted')


def _load(device: str, model: str, class_names: str | None, **settings: Any) -> tuple[Any, list[str]]:
    """Return a network, or an exported file, and the names of its classes."""
    from ..tools.class_names import class_names as names_of
    from ..tools.class_names import read_class_names
    from ..tools.program import is_program, load_program

    if is_program(model):
        if any(settings.values()):
            raise click.UsageError(f'{model} is complete; leave out --checkpoint, --num-classes and settings.')
        network: Any = load_program(model, device)
        names = read_class_names(class_names, network.num_classes) if class_names else network.class_names
    else:
        network = options.load_network(model, class_names=class_names, **settings).model.to(device)
        names = names_of(network)
    return network, names or [f'class {i}' for i in range(network.num_classes)]


def _lines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a line of a table for each class of each image, the first of which names the image."""
    lines = []
    for row in rows:
        for i, prediction in enumerate(row.get('predictions', [])):
            named = {'image': row['image'], 'subnet': row['subnet']} if i == 0 else {'image': '', 'subnet': ''}
            lines.append({**named, **prediction})
    return lines


def _wait_for_others(size: int) -> None:
    """Wait for all processes that torchrun has started, since it ends them all when one fails, as this one may do."""
    import torch.distributed as dist

    if size > 1 and 'MASTER_ADDR' in os.environ:
        dist.init_process_group('gloo', timeout=timedelta(days=7))
        dist.barrier()
        dist.destroy_process_group()
