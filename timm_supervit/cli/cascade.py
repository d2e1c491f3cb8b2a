"""``supervit cascade``: stages and thresholds for a cascade, found on held-out images."""
import os
from typing import Any

import click

from . import base, loading, options


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
    help='Results of "supervit profile" for --latency-ms.')
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
    on the other part. --macs, --latency-ms with --profile, or --accuracy say which cascade to choose; otherwise it is
    the cheapest one that is as accurate as the full network, if there is one. If cascades are no better than single
    subnets of the same cost, the command says so.

    --output writes the chosen cascade as cascade.json, for "supervit evaluate", "supervit predict" and
    timm_supervit.Cascade, and the front as cascade-front.json, .csv and .png.

    \b
    supervit cascade local-dir:output/digits --data-dir output/digits --macs 3e6 --output results
    """
    from ..cascade import cascade_text
    from ..images.datasets import check_data, open_dataset
    from ..results.files import check_output_folder
    from ..results.pictures import draw_operating_points
    from ..results.rows import subnet_of
    from ..tools.cascade import calibrate, check_goal
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
    results, row, full, (gain, p_value) = calibration.results, calibration.row, calibration.full, calibration.comparison
    columns = ['top1', 'macs', *(['latency_ms'] if profile else [])]
    is_better = calibration.comparison.is_significant
    report(
        results, output, 'cascade-front', lambda: {
            'cascade.json': calibration.cascade.to_json(results.network, row),
            '.png': draw_operating_points([*calibration.singles, *results.rows], title=results.model)},
        [[list_table(results.rows, ['cascade', *columns], 'Cascades'),
          list_table(front_of(calibration.singles), ['img_size', 'keep_rate', *columns], 'Single subnets')]],
        [f'On {results.info["report_images"]} images that calibration never saw, the cascades are '
         f'{"" if is_better else "NOT significantly "}better than single subnets of the same cost: by {gain:+.2f} '
         f'points on average, p = {p_value:.2g}.{"" if is_better else " A single subnet is the simpler choice."}',
         f'Chosen on {results.info["calibration_images"]} images: '
         f'{cascade_text(calibration.cascade.stages, calibration.cascade.thresholds)}, {row["top1"]:.2f} % at '
         f'{row["macs"] / full["macs"]:.3f} of the MACs of {subnet_of(full)}, which reaches {full["top1"]:.2f} %; only '
         f'the one is right on {calibration.only_one_right[0]} images, only the other on '
         f'{calibration.only_one_right[1]}.'],
        chosen=row)
