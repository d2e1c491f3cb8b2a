"""``supervit evaluate``: accuracy and cost of every subnet."""
import functools
from pathlib import Path
from typing import Any

import click

from . import base, loading, options


@base.json_option
@click.command(cls=base.Command)
@options.model_options
@options.data_options
@options.subnet_option
@options.cascade_option
@options.output_option
def command(
        model: str,
        data_dir: str | None,
        data: dict[str, Any],
        subnets: tuple[Any, ...],
        cascade: str | None,
        device: str | None,
        amp: bool,
        amp_dtype: str,
        output: str | None,
        batch_size: int,
        workers: int,
        skip_bad_images: bool,
        **model_options: Any,
) -> None:
    """Measure the accuracy of all subnets of MODEL in one pass over a data set.

    MODEL is a name, a checkpoint of train.py, which knows its model and settings, or a file of "supervit export".

    MODEL may also be the output folder of train.py. Then every epoch whose checkpoint is still there is evaluated: the
    table shows the top-1 accuracy of all subnets after each, and --output writes epochs.json, epochs.csv and
    epochs.png. train.py keeps the ten best epochs, or as many as --checkpoint-hist says. A checkpoint that cannot be
    read is named, and the exit code is then 1.

    Prints top-1 and top-5 accuracy and the multiply-accumulates of each subnet. --output writes evaluate.json,
    evaluate.csv and evaluate.png. Ctrl-C prints what has been counted so far, saves it as evaluate-partial and exits
    with 130.

    --cascade evaluates a cascade instead: its accuracy and mean MACs, how many images stop at each stage, and the mean
    latency per image in batches of the given size. --output then writes evaluate-cascade.json and .csv.

    \b
    supervit evaluate model_best.pth.tar --data-dir imagenet --output results
    supervit evaluate output/train/NAME --use-ema --data-dir imagenet --output results
    supervit evaluate exported/supervit_small.onnx --data-dir imagenet
    torchrun --nproc-per-node 4 --no-python supervit evaluate supervit_small --data-dir imagenet
    """
    import torch

    from ..cascade import Cascade
    from ..images.datasets import check_data, open_dataset
    from ..results.files import check_output_folder
    from ..tools.evaluate import evaluate, evaluate_cascade, evaluate_epochs
    from .progress import track

    is_run = Path(model).is_dir()
    if cascade and subnets:
        raise click.UsageError('--cascade and --subnet exclude each other; leave one out.')
    if cascade and is_run:
        raise click.UsageError(f'{model} holds several epochs, and a cascade is of one; give its checkpoint.')
    if is_run and model_options['checkpoint']:
        raise click.UsageError(f'{model} holds checkpoints, and --checkpoint is another one; leave one out.')
    if output:
        check_output_folder(output)
    check_data(data_dir, data['dataset'])
    torch.backends.cuda.matmul.allow_tf32 = True  # as validate.py
    with loading.processes(device) as (device, is_first):
        run: dict[str, Any] = dict(
            batch_size=batch_size, workers=workers, precision=loading.precision_of(amp, amp_dtype),
            skip_bad_images=skip_bad_images, progress=track)
        if is_run:
            settings = loading.parse_settings(model_options['num_classes'], model_options['model_kwargs'])
            results = evaluate_epochs(
                model, functools.partial(open_dataset, data_dir, **data), subnets or None,
                use_ema=model_options['use_ema'], settings=settings, device=device, **run)
        else:
            loaded = loading.load(model, device=device, **model_options)
            images = open_dataset(data_dir, model=loaded, **data)
            if cascade:
                with loading.warnings_shown():
                    loaded = Cascade.load(loaded, cascade)
                results = evaluate_cascade(loaded, images, **run)
            else:
                results = evaluate(loaded, images, subnets or None, **run)
    if is_first and is_run:
        _show_epochs(results, output)
    elif is_first:
        show = _show_cascade if cascade else _show_subnets
        show(results, output, f'{results.rows[0]["count"]} of {len(images.dataset)} images')


def _show_subnets(results: Any, output: str | None, done: str) -> None:
    from ..results.pictures import draw_operating_points
    from .report import report
    from .tables import grid_table

    report(
        results, output, 'evaluate', lambda: {'.png': draw_operating_points(results.rows, title=_title(results))},
        [[grid_table(results.rows, key) for key in ('top1', 'top5', 'macs')]], notes=_skipped(results), done=done)


def _show_epochs(results: Any, output: str | None) -> None:
    from ..results.pictures import draw_operating_points
    from ..tools.evaluate import table_of_epochs
    from .report import report
    from .tables import list_table

    table = table_of_epochs(results)
    loading.show_weights(results.info['checkpoint'], results.info['entry'], results.info['other_entries'])
    loading.show_plain(results.info['plain'], results.network['img_sizes'], results.network['drop_layers'])
    report(
        results, output, 'epochs',
        lambda: {'.png': draw_operating_points(results.rows, 'epoch', title=_title(results))},
        [[list_table(table, list(table[0]), title=f'{results.model}, top-1 [%]')]], notes=_skipped(results),
        done=f'{len(table)} of {results.info["epochs"]} epochs')
    if results.info['unread']:
        raise click.ClickException('; '.join(results.info['unread']))


def _show_cascade(results: Any, output: str | None, done: str) -> None:
    from .report import report
    from .tables import list_table

    row, stages = results.rows[0], results.info['stages']
    seen = results.info['calibration_images']
    notes = [f'{seen} of these images calibrated the cascade, which flatters it; "supervit cascade" said what it '
             f'reaches on the others.'] if seen else []
    report(
        results, output, 'evaluate-cascade',
        tables=[[list_table([row], ['cascade', 'top1', 'top5', 'macs', 'batch_size', 'latency_mean_ms'])],
                [list_table(stages, list(stages[0]), 'Images that stop at each stage')]],
        notes=[*notes, *_skipped(results)], done=done)


def _title(results: Any) -> str:
    return f'{results.model} (partial)' if results.partial else results.model


def _skipped(results: Any) -> list[str]:
    from ..results.text import visible

    skipped = results.info['skipped']
    return [f'{len(skipped)} unreadable images were skipped:', '\n'.join(map(visible, skipped))] if skipped else []
