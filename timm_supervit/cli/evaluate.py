"""``supervit evaluate``: accuracy and cost of every subnet."""
import argparse
from pathlib import Path
from typing import Any

import click

from . import options
from .stdout import echo


@click.command(cls=options.Command)
@options.model_options
@click.option('--data-dir', metavar='DIR', help='Folder of the data set: a folder of images for each class.')
@click.option('--dataset', default='', metavar='NAME', help='Kind and name, as in timm\'s scripts (default: folders).')
@click.option('--split', default='validation', show_default=True, metavar='NAME', help='Split of the data set.')
@options.subnet_option
@click.option('-b', '--batch-size', default=256, show_default=True, type=click.IntRange(1), help='Images of a batch.')
@click.option('-j', '--workers', default=4, show_default=True, type=click.IntRange(0), help='Processes reading images.')
@click.option('--skip-bad-images', is_flag=True, help='Name and count unreadable images and go on without them.')
@options.device_option
@options.amp_options
@options.output_option
@click.pass_context
def command(
        ctx: click.Context,
        data_dir: str | None,
        dataset: str,
        split: str,
        subnets: tuple[Any, ...],
        batch_size: int,
        workers: int,
        skip_bad_images: bool,
        device: str | None,
        amp: bool,
        amp_dtype: str,
        output: str | None,
        **model_options: Any,
) -> None:
    """Evaluate all subnets of MODEL in one pass over a data set.

    MODEL is a name, or a checkpoint of train.py, which knows its model and settings.

    Prints top-1 and top-5 accuracy and the multiply-accumulates of each subnet. --output writes evaluate.json,
    evaluate.csv and evaluate.png. Ctrl-C prints what was counted so far, writes it as evaluate-partial and exits
    with 130.

    \b
    supervit evaluate model_best.pth.tar --data-dir imagenet --output results
    torchrun --nproc-per-node 4 --no-python supervit evaluate supervit_small --data-dir imagenet
    """
    import torch
    from timm.utils import init_distributed_device, is_primary

    from ..tools.data import create_evaluation_loader, open_dataset
    from ..tools.evaluate import evaluate
    from ..tools.files import check_output_folder, fill_folder
    from ..tools.pictures import draw_operating_points
    from ..tools.progress import silent
    from ..tools.results import save_results
    from ..tools.text import visible
    from .progress import track
    from .tables import print_grids

    if output:
        check_output_folder(output)
    images = open_dataset(data_dir, dataset, split)
    network = options.load_network(**model_options, name_classes=False)
    model = network.model
    torch.backends.cuda.matmul.allow_tf32 = True  # as validate.py
    setup = argparse.Namespace(device=options.resolve_device(device))
    init_distributed_device(setup)
    try:
        loader = create_evaluation_loader(
            images, model, batch_size, workers, setup.device, distributed=setup.distributed)
        results = evaluate(
            model.to(setup.device),
            loader,
            subnets or None,
            name=network.name,
            amp_dtype=getattr(torch, amp_dtype) if amp else None,
            skip_bad_images=skip_bad_images,
            progress=track if is_primary(setup) else silent,
        )
    finally:
        if setup.distributed:
            torch.distributed.destroy_process_group()
    if not is_primary(setup):
        return
    results.info |= {
        'data_dir': data_dir, 'dataset': dataset, 'split': split, 'checkpoint': network.path,
        'device': setup.device, 'precision': amp_dtype if amp else 'float32'}
    results.network['weights_kind'] = network.weights_kind
    saved = ''
    if output:
        with fill_folder(output) as folder:  # all of it or nothing
            path = save_results(results, folder, 'evaluate')[0]
            draw_operating_points(
                results.rows, path.with_suffix('.png'), title=results.model + ' (partial)' * results.partial)
        saved = f'; saved as {Path(output) / path.name}'
    if results.partial:
        echo(f'PARTIAL: interrupted after {results.rows[0]["count"]} of {len(images)} images{saved}.')
    print_grids(results, ['top1', 'top5', 'macs'])
    if results.info['skipped']:
        echo(f'{len(results.info["skipped"])} unreadable images were skipped:', err=True)
        echo('\n'.join(map(visible, results.info['skipped'])), err=True)
    if results.partial:
        ctx.exit(options.INTERRUPTED)
