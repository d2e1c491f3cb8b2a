"""``supervit cascade``: stages and thresholds for a cascade, found on held-out images."""
import os
from typing import Any

import click

from . import base, loading, options

ANSWER_IS_NO = 3


@base.json_option
@click.command(cls=base.Command)
@options.model_options
@options.data_options
@click.option(
    '--calibration-dir', metavar='DIR',
    help='Calibrate on this folder, and report on all of --data-dir (default: --data-dir is split).')
@click.option(
    '--calibration-share', default=0.5, show_default=True, type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help='Share of --data-dir to calibrate on; the rest is reported.')
@click.option('--seed', default=0, show_default=True, type=click.IntRange(0), help='Seed of the random split.')
@click.option('--macs', type=float, metavar='N', help='At most this mean of MACs per image, as in 2.5e9.')
@click.option(
    '--latency-ms', type=float, metavar='MS', help='At most this mean latency per image, estimated from --profile.')
@click.option(
    '--profile', type=click.Path(exists=True, dir_okay=False), metavar='JSON',
    help='Results of "supervit profile", by which cost is latency; without them it is MACs.')
@options.where_option
@click.option('--accuracy', type=float, metavar='PERCENT', help='At least this top-1 on the calibration images.')
@options.output_option
def command(
        data_dir: str | None,
        data: dict[str, Any],
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
    """Find a cascade of MODEL: two to four subnets, and how sure each must be of an image to stop there.

    MODEL is a name, a checkpoint of train.py, or a file of "supervit export".

    All subnets see all images once. Cascades are searched on one part of the images, and the printed numbers are those
    on the other part. --macs, --latency-ms or --accuracy say which cascade to choose; otherwise it is the cheapest one
    that is as accurate as the full network. MACs are not time: stages come one after the other, and small networks or
    batches take longer than their MACs say. With --profile, measured at the batch size in use, latency counts instead;
    of several batch sizes, --where batch_size=8 says which.

    A cascade must be significantly better than single subnets of the same mean cost, on images that it was not chosen
    on. If it is not, none is written, the single subnet to use instead is named, and the exit code is 3.

    --output writes the chosen cascade as cascade.json, for "supervit evaluate", "supervit predict" and
    timm_supervit.Cascade, and the front as cascade-front.json, .csv and .png; both JSON files hold the verdict. If
    there is none, the cascade.json of an earlier run is removed.

    \b
    supervit cascade local-dir:output/digits --data-dir output/digits --macs 3e6 --output results
    supervit profile local-dir:output/digits -b 64 --output results
    supervit cascade local-dir:output/digits --data-dir output/digits --profile results/profile.json --output results
    """
    from ..images.datasets import check_data, open_dataset
    from ..results.files import check_output_folder
    from ..results.pictures import draw_operating_points
    from ..results.rows import name_of, subnet_of
    from ..tools.cascade import SIGNIFICANCE, calibrate, check_goal
    from ..tools.choose import front_of
    from .progress import track
    from .report import report
    from .tables import list_table

    goal: dict[str, Any] = dict(macs=macs, latency_ms=latency_ms, accuracy=accuracy, profile=profile, where=where)
    try:
        check_goal(**goal)
        if calibration_dir and data_dir and os.path.realpath(calibration_dir) == os.path.realpath(data_dir):
            raise ValueError('--calibration-dir is --data-dir; leave it out, so that the images are split')
    except ValueError as error:
        raise click.UsageError(f'{error}.') from error
    if output:
        check_output_folder(output)
    check_data(data_dir, data['dataset'])
    model = loading.load(**model_options, device=loading.resolve_device(device))
    images = open_dataset(data_dir, model=model, **data)
    others = open_dataset(calibration_dir, model=model, **data) if calibration_dir else None
    calibration = calibrate(
        model, images, calibration_images=others, calibration_share=calibration_share, seed=seed, **goal,
        batch_size=batch_size, workers=workers, precision=loading.precision_of(amp, amp_dtype),
        skip_bad_images=skip_bad_images, progress=track)
    results, row, full, verdict = calibration.results, calibration.row, calibration.full, calibration.verdict
    costs = ['macs', *(['latency_ms'] if profile else [])]

    def describe(point: dict[str, Any]) -> str:
        shares = [f'{point[key] / full[key]:.3f} of the {"MACs" if key == "macs" else "latency"}' for key in costs]
        return f'{name_of(point)}, {point["top1"]:.2f} % at {" and ".join(shares)} of {subnet_of(full)}'

    is_significant = verdict.p_value < SIGNIFICANCE
    lines = [
        f'On {verdict.images} images, each left out of the choice that it tests, cascades are '
        f'{"" if is_significant else "NOT significantly "}better than single subnets of the same cost: by '
        f'{verdict.gain:+.2f} points, p = {verdict.p_value:.2g}.',
        f'Chosen on {results.info["calibration_images"]} images: {describe(row)}, which reaches {full["top1"]:.2f} %; '
        f'only the one is right on {calibration.only_one_right[0]} images, only the other on '
        f'{calibration.only_one_right[1]}.']
    files = {}
    if verdict.is_better:
        files['cascade.json'] = calibration.cascade.to_json(results.network, row)
    else:
        lines.append(f'No cascade is written: {verdict.reason}. Use the single subnet {describe(verdict.single)}.')
    report(
        results, output, 'cascade-front', lambda: {
            **files, '.png': draw_operating_points([*calibration.singles, *results.rows], title=results.model)},
        [[list_table(results.rows, ['cascade', 'top1', *costs], 'Cascades'),
          list_table(front_of(calibration.singles), ['img_size', 'keep_rate', 'top1', *costs], 'Single subnets')]],
        lines,
        [] if profile else [
            'MACs are not time: measure that with "supervit profile MODEL -b N", where N is the batch size in use, and '
            'give its JSON as --profile.'],
        obsolete=() if verdict.is_better else ['cascade.json'],
        chosen=row, verdict=verdict._asdict())
    if not verdict.is_better:
        click.get_current_context().exit(ANSWER_IS_NO)
