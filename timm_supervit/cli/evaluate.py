"""``supervit evaluate``: accuracy and cost of every subnet."""
import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from . import options
from .stdout import echo, print_json


@options.json_option
@click.command(cls=options.Command)
@options.model_options
@options.data_options
@options.subnet_option
@options.cascade_option
@options.output_option
@click.pass_context
def command(
        ctx: click.Context,
        data_dir: str | None,
        dataset: str,
        split: str,
        subnets: tuple[Any, ...],
        cascade: str | None,
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

    Of the folder that train.py wrote its checkpoints to, all epochs that are still there are evaluated: the table has
    the top-1 accuracy of all subnets after each, and --output gets epochs.json, epochs.csv and epochs.png. train.py
    keeps the ten best epochs, or --checkpoint-hist of them.

    Prints top-1 and top-5 accuracy and the multiply-accumulates of each subnet. --output writes evaluate.json,
    evaluate.csv and evaluate.png. Ctrl-C prints what was counted so far, writes it as evaluate-partial and exits
    with 130.

    --cascade evaluates a cascade instead: its accuracy and mean MACs, how many images stop at each stage, and the mean
    latency in batches of the given size. --output then writes evaluate-cascade.json and .csv.

    \b
    supervit evaluate model_best.pth.tar --data-dir imagenet --output results
    supervit evaluate output/train/NAME --use-ema --data-dir imagenet --output results
    torchrun --nproc-per-node 4 --no-python supervit evaluate supervit_small --data-dir imagenet
    """
    import torch
    from timm.utils import init_distributed_device, is_primary

    from ..cascade import Cascade
    from ..tools.data import create_evaluation_loader, open_dataset
    from ..tools.epochs import evaluate_epochs, find_epochs, table_of_epochs
    from ..tools.evaluate import evaluate
    from ..tools.evaluate_cascade import count_calibration_images, evaluate_cascade
    from ..tools.files import check_output_folder, fill_folder
    from ..tools.networks import check_no_model_folder
    from ..tools.pictures import draw_operating_points
    from ..tools.progress import silent
    from ..tools.results import save_results
    from ..tools.text import visible
    from .progress import track
    from .tables import list_table, print_grids, print_table

    if cascade and subnets:
        raise click.UsageError('--cascade and --subnet exclude each other; leave one out.')
    if output:
        check_output_folder(output)
    images = open_dataset(data_dir, dataset, split)
    given = model_options['model']
    check_no_model_folder(given)
    epochs = find_epochs(given) if Path(given).is_dir() else {}
    if cascade and epochs:
        raise click.UsageError(f'{given} holds several epochs, and a cascade is of one; give its checkpoint.')
    if epochs:
        model_options['model'] = str(epochs[max(epochs)])
    network = options.load_network(**model_options, name_classes=False)
    model = network.model
    torch.backends.cuda.matmul.allow_tf32 = True  # as validate.py
    setup = argparse.Namespace(device=options.resolve_device(device))
    init_distributed_device(setup)
    try:
        if cascade and setup.distributed:
            raise ValueError('a cascade is evaluated in one process, for its latency; leave torchrun out')
        loader = create_evaluation_loader(
            images, model, batch_size, workers, setup.device, distributed=setup.distributed)
        arguments: Any = dict(
            name=network.name,
            amp_dtype=getattr(torch, amp_dtype) if amp else None,
            skip_bad_images=skip_bad_images,
            progress=track if is_primary(setup) else silent,
        )
        model.to(setup.device)
        if epochs:
            results = evaluate_epochs(
                model, epochs, loader, subnets or None, use_ema=model_options['use_ema'], **arguments)
        elif cascade:
            with options.warnings_shown():
                stages = Cascade.load(model, cascade)
            results = evaluate_cascade(stages, loader, **arguments)
        else:
            results = evaluate(model, loader, subnets or None, **arguments)
    finally:
        if setup.distributed:
            torch.distributed.destroy_process_group()
    if not is_primary(setup):
        return
    results.info |= {
        'data_dir': data_dir, 'dataset': dataset, 'split': split, 'checkpoint': given if epochs else network.path,
        'device': setup.device, 'precision': amp_dtype if amp else 'float32'}
    results.network['weights_kind'] = network.weights_kind
    saved = ''
    if output:
        with fill_folder(output) as folder:  # all of it or nothing
            path = save_results(
                results, folder, 'epochs' if epochs else 'evaluate-cascade' if cascade else 'evaluate')[0]
            if not cascade:
                draw_operating_points(
                    results.rows, path.with_suffix('.png'), x='epoch' if epochs else 'macs',
                    title=results.model + ' (partial)' * results.partial)
        saved = f'; saved as {Path(output) / path.name}'
    if results.partial:
        rows, count = results.rows, len({row['epoch'] for row in results.rows}) if epochs else 0
        done = f'{count} of {len(epochs)} epochs' if epochs else f'{rows[0]["count"]} of {len(images)} images'
        echo(f'PARTIAL: interrupted after {done}{saved}.')
    print_json(asdict(results))
    if epochs:
        table = table_of_epochs(results)
        print_table(list_table(table, list(table[0]), title=f'{results.model}, top-1 [%]'))
    elif cascade:
        _print_cascade(results.rows[0], stages)
    else:
        print_grids(results, ['top1', 'top5', 'macs'])
    if cascade and (seen := count_calibration_images(cascade, data_dir, dataset, split)):
        echo(f'{seen} of these images calibrated the cascade, which flatters it; "supervit cascade" said what it '
             f'reaches on the others.', err=True)
    if results.info['skipped']:
        echo(f'{len(results.info["skipped"])} unreadable images were skipped:', err=True)
        echo('\n'.join(map(visible, results.info['skipped'])), err=True)
    if results.partial:
        ctx.exit(options.INTERRUPTED)


def _print_cascade(row: dict[str, Any], cascade: Any) -> None:
    from .tables import list_table, print_table

    stages = [
        {'stage': str(stage), 'threshold': threshold, 'images [%]': share, 'macs': macs}
        for stage, threshold, share, macs in zip(
            cascade.stages, [*cascade.thresholds, None], row['shares'], cascade.macs, strict=True)]
    print_table(list_table([row], ['cascade', 'top1', 'top5', 'macs', 'batch_size', 'latency_mean_ms']))
    print_table(list_table(stages, list(stages[0]), 'Images that stop at each stage'))
