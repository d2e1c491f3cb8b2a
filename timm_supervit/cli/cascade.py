"""``supervit cascade``: stages and thresholds for a cascade, found on held-out images."""
import math
import os
from dataclasses import asdict
from typing import Any

import click

from . import options
from .stdout import echo, print_json


@options.json_option
@click.command(cls=options.Command)
@options.model_options
@options.data_options
@click.option(
    '--calibration-dir', metavar='DIR',
    help='Calibrate on this folder and report on the whole of --data-dir (default: --data-dir is split).')
@click.option(
    '--calibration-share', default=0.5, show_default=True, type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help='Share of the images of --data-dir to calibrate on; the others are reported.')
@click.option('--seed', default=0, show_default=True, type=click.IntRange(0), help='Which images are of which share.')
@click.option('--macs', type=float, metavar='N', help='Mean multiply-accumulates of an image, at most, as in 2.5e9.')
@click.option(
    '--latency-ms', type=float, metavar='MS', help='Mean latency of an image, at most, estimated from --profile.')
@click.option(
    '--profile', type=click.Path(exists=True, dir_okay=False), metavar='JSON',
    help='Results of "supervit profile" for --latency-ms.')
@options.where_option
@click.option('--accuracy', type=float, metavar='PERCENT', help='Top-1 on the calibration images, at least.')
@options.output_option
def command(
        data_dir: str | None,
        dataset: str,
        split: str,
        batch_size: int,
        workers: int,
        skip_bad_images: bool,
        device: str | None,
        amp: bool,
        amp_dtype: str,
        calibration_dir: str | None,
        calibration_share: float,
        seed: int,
        macs: float | None,
        latency_ms: float | None,
        profile: str | None,
        where: dict[str, object],
        accuracy: float | None,
        output: str | None,
        **model_options: Any,
) -> None:
    """Find a cascade of MODEL: two to four subnets, and how sure each must be of an image to let it stop there.

    All subnets see all images once. Cascades are searched on one part of the images, and what is printed is reached on
    the other. --macs, --latency-ms with --profile, or --accuracy choose one; without them it is the cheapest that is as
    accurate as the full network, if there is one. It is said if cascades are no better than single subnets of the same
    cost. --output writes the chosen one as cascade.json, for "supervit evaluate", "supervit predict" and
    timm_supervit.Cascade, and the front as cascade-front.json, .csv and .png.

    \b
    supervit cascade local-dir:output/digits --data-dir output/digits --macs 3e6 --output results
    """
    import torch

    from ..fingerprint import fingerprint
    from ..tools.cascade import (
        calibrate,
        collect_answers,
        latency_costs,
        mac_costs,
        save_cascade,
        split_answers,
    )
    from ..tools.choose import merge_results, pareto_front
    from ..tools.data import count_common, create_evaluation_loader, open_dataset
    from ..tools.files import check_output_folder, fill_folder
    from ..tools.pictures import draw_operating_points
    from ..tools.results import Results, difference, save_results, subnet_of
    from .progress import track
    from .tables import list_table, print_table

    if sum(value is not None for value in (macs, latency_ms, accuracy)) > 1:
        raise click.UsageError('--macs, --latency-ms and --accuracy exclude each other; give one.')
    for option, value in (('--macs', macs), ('--latency-ms', latency_ms)):
        if value is not None and not 0 < value < math.inf:
            raise click.UsageError(f'{option} {value:g} is no budget; give a number above 0.')
    if accuracy is not None and not 1 <= accuracy <= 100:
        raise click.UsageError(f'--accuracy {accuracy:g} is no percentage from 1 to 100, as in 95.')
    if (latency_ms is None) != (profile is None):
        raise click.UsageError('--latency-ms and --profile belong together; give both.')
    if where and not profile:
        raise click.UsageError('--where says which rows of --profile count; give that too, or leave it out.')
    if calibration_dir and data_dir and os.path.realpath(calibration_dir) == os.path.realpath(data_dir):
        raise click.UsageError('--calibration-dir is --data-dir; leave it out, so that the images are split.')
    if output:
        check_output_folder(output)
    folders = [data_dir, *([calibration_dir] if calibration_dir else [])]
    datasets = [open_dataset(folder, dataset, split) for folder in folders]
    if calibration_dir and (common := count_common(*datasets)):
        raise ValueError(f'{common} images of --calibration-dir are in --data-dir too; leave --calibration-dir out, so '
                         f'that the images are split, or give other images')
    network = options.load_network(**model_options, name_classes=False)
    model = network.model.to(options.resolve_device(device))
    known = fingerprint(model)
    costs = model_costs = mac_costs(model)
    if profile:
        measured = merge_results([profile], where)
        other = difference(Results(network.name, [], {}, known), measured)
        if measured.network and other:
            raise ValueError(f'{profile} is of another network: {other}; profile this one')
        costs = latency_costs(model_costs, model.subnets, measured.rows)
    answers = [
        collect_answers(
            model,
            create_evaluation_loader(images, model, batch_size, workers, next(model.parameters()).device),
            amp_dtype=getattr(torch, amp_dtype) if amp else None,
            skip_bad_images=skip_bad_images,
            progress=track,
        )
        for images in datasets]
    report, calibration = answers if calibration_dir else split_answers(answers[0], calibration_share, seed)[::-1]
    found = calibrate(calibration, report, costs, model_costs, budget=macs or latency_ms, accuracy=accuracy)
    info = {
        'data_dir': data_dir, 'dataset': dataset, 'split': split, 'calibration_dir': calibration_dir,
        'calibration_share': None if calibration_dir else calibration_share, 'seed': seed,
        'calibration_images': calibration.num_images, 'report_images': report.num_images,
        'top1': 100 * found.chosen.accuracy, costs.key: found.chosen.cost}
    kind = {'weights_kind': network.weights_kind}
    results = Results(network.name, found.front, info, known | kind)
    if output:
        with fill_folder(output) as folder:  # all of it or nothing
            save_cascade(folder / 'cascade.json', model, network.name, answers[0], found, info)
            save_results(results, folder, 'cascade-front')
            draw_operating_points([*found.singles, *found.front], folder / 'cascade-front.png', title=network.name)
    print_json(asdict(results) | {'chosen': found.row})
    cost = [costs.key] if profile else []
    print_table(
        list_table(found.front, ['cascade', 'top1', 'macs', *cost], 'Cascades'),
        list_table(pareto_front(found.singles), ['img_size', 'keep_rate', 'top1', 'macs', *cost], 'Single subnets'))
    gain, p_value = found.comparison
    echo(f'On {report.num_images} images that calibration never saw, the cascades are '
         f'{"" if found.comparison.is_significant else "NOT significantly "}better than single subnets of the same '
         f'cost: by {gain:+.2f} points on average, p = {p_value:.2g}.'
         f'{"" if found.comparison.is_significant else " A single subnet is the simpler choice."}')
    row, full = found.row, found.full
    echo(f'Chosen on {calibration.num_images} images: {row["cascade"]}, {row["top1"]:.2f} % at '
         f'{row["macs"] / full["macs"]:.3f} of the MACs of {subnet_of(full)}, which reaches '
         f'{full["top1"]:.2f} %; only the one is right on {found.only_one_right[0]} images, only the other on '
         f'{found.only_one_right[1]}.')
