"""Accuracy: of all subnets in one pass over a data set, after each epoch of a training run, and of a cascade."""
import functools
import os
import re
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.task import evaluation_sample_limit

from ..cascade import Cascade, cascade_text
from ..images.datasets import DEFAULT_WORKERS, Images, create_evaluation_loader, open_images
from ..images.passes import bad_images, check_complete, check_finite, count_hits, evaluation_mode, inference
from ..loading.checkpoints import CheckpointError, read_checkpoint
from ..loading.load import check_no_model_folder, load_weights, model_of
from ..results.fingerprint import source_of
from ..results.rows import Results, Row, results_of, subnet_of
from ..runner import SubnetRunner, check_predicts, setting_of
from ..subnets import Size
from . import Progress, silent


def evaluate(
        model: SubnetRunner,
        images: Any,
        subnets: Sequence[tuple[Size, float]] | None = None,
        *,
        batch_size: int = 256,
        workers: int = DEFAULT_WORKERS,
        precision: str = 'float32',
        skip_bad_images: bool = False,
        progress: Progress = silent,
) -> Results:
    """Count what each subnet gets right in one pass over images, all subnets on each batch.

    Where ``torch.distributed`` is initialized, each rank evaluates its share and all return the sum; images that timm's
    sampler repeats to make the shares equal are not counted. Interrupted by Ctrl-C, it returns what was counted so far,
    with ``info['partial']`` True, or raises ``KeyboardInterrupt`` if that is nothing.

    Args:
        model: A SuperViT or an exported file.
        images: The images, see ``open_images``.
        subnets: Pairs (img_size, keep_rate) (default: all of the grid).
        batch_size: Images of a batch.
        workers: Processes that read images.
        precision: ``float32``, or ``bfloat16`` or ``float16`` by autocast.
        skip_bad_images: Pass over unreadable images and name them in ``info['skipped']``.
        progress: Follows the batches, such as ``tqdm.tqdm``.

    Returns:
        One row for each subnet, with ``macs``, ``top1``, ``top5``, ``correct1``, ``correct5`` and ``count``. Those of
        an int8 file say so, and of how many images a batch was where it finds its ranges in each batch anew.

    Raises:
        OSError: If an image cannot be read and ``skip_bad_images`` is False; the message names it.
        RuntimeError: If a subnet's logits are not finite; the message names it.
        ValueError: If a class is none of the model's, it has no two, or there is no such subnet.
    """
    images = open_images(images, model)
    check_predicts(model)
    macs = model.subnet_macs(subnets)  # first of all, since it checks the subnets
    chosen = list(macs)
    is_distributed = dist.is_available() and dist.is_initialized()
    loader = create_evaluation_loader(images, model, batch_size, workers, is_distributed)
    limit = evaluation_sample_limit(loader)
    correct = torch.zeros(len(chosen), 2, dtype=torch.int64, device=model.device)
    skipped: list[str] = []
    seen, partial = 0, False
    try:
        with evaluation_mode(model):
            for batch, target in progress(loader, 'Evaluating'):
                target = target if limit is None else target[:max(0, limit - seen)]
                bad = bad_images(target, model.num_classes, loader.dataset, skip_bad_images)
                with inference(model, precision):
                    logits = [output[:len(target)] for output in model.forward_subnets(batch, chosen)]
                check_finite(logits, chosen)
                hits = count_hits(logits, target)
                # In one go, so that an interrupt finds a whole number of batches.
                correct, seen, skipped = correct + hits, seen + len(target), skipped + bad
        check_complete(loader.dataset, seen, skip_bad_images)
    except KeyboardInterrupt:
        partial = True

    count = torch.tensor([seen - len(skipped), partial], dtype=torch.int64, device=model.device)
    if is_distributed:
        dist.all_reduce(correct)
        dist.all_reduce(count)
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, skipped)
        skipped = sorted(name for share in shares for name in share)
    total, interrupted = count.tolist()
    if interrupted and not total:
        raise KeyboardInterrupt
    rows = [
        {**subnet._asdict(), **_int8_setting(model, batch_size), 'macs': cost, **_accuracy(hits, total)}
        for (subnet, cost), hits in zip(macs.items(), correct.tolist(), strict=True)
    ]
    return _results(model, rows, bool(interrupted), skipped, images, precision)


def _int8_setting(model: SubnetRunner, batch_size: int) -> Row:
    if setting_of(model)['precision'] != 'int8':
        return {}
    is_calibrated = getattr(model, 'facts', {}).get('calibrated')
    return {'precision': 'int8'} | ({} if is_calibrated else {'batch_size': batch_size})


def _accuracy(correct: Sequence[int], count: int) -> Row:
    top1, top5 = (100 * number / max(count, 1) for number in correct)
    return {'top1': top1, 'top5': top5, 'correct1': correct[0], 'correct5': correct[1], 'count': count}


def _results(
        model: SubnetRunner,
        rows: list[Row],
        partial: bool,
        skipped: list[str],
        images: Images,
        precision: str,
        weights: bool = True,
        **info: Any,
) -> Results:
    results = results_of(model, rows, {'partial': partial, 'skipped': skipped, **images.info}, weights)
    setting = {'device': str(model.device), 'precision': setting_of(model, precision)['precision']}
    results.info |= {'checkpoint': source_of(model).path, **setting, **info}
    return results


def evaluate_epochs(
        folder: str | os.PathLike,
        images: Any,
        subnets: Sequence[tuple[Size, float]] | None = None,
        *,
        use_ema: bool = False,
        settings: dict[str, Any] | None = None,
        device: torch.device | str = 'cpu',
        precision: str = 'float32',
        progress: Progress = silent,
        **kwargs: Any,
) -> Results:
    """Evaluate the checkpoint of each epoch that timm's ``train.py`` kept, see ``evaluate``.

    Interrupted by Ctrl-C, it returns the epochs that are complete, with ``info['partial']`` True, or raises
    ``KeyboardInterrupt`` if there is none.

    Args:
        folder: The output folder of ``train.py``. Its ``last.pth.tar`` counts too, if it is of one epoch more.
        images: The images, see ``open_images``.
        subnets: Pairs (img_size, keep_rate) (default: all of the grid).
        use_ema: Take the averaged weights of the checkpoints.
        settings: Settings of the model, see ``load_model``.
        device: Device to run on.
        precision: As for ``evaluate``.
        progress: Follows the batches, such as ``tqdm.tqdm``.
        **kwargs: Further arguments of ``evaluate``.

    Returns:
        One row for each epoch and subnet, as those of ``evaluate``, with ``epoch``. ``info['unread']`` has the error of
        each checkpoint that cannot be read or does not fit the model of those before it.

    Raises:
        CheckpointError: If that is so of all.
        FileNotFoundError: If there is no checkpoint of an epoch.
        ValueError: If only some checkpoints have averaged weights, or as ``evaluate``.
    """
    check_no_model_folder(os.fspath(folder))
    paths = find_checkpoints(folder)
    rows: list[Row] = []
    kinds: dict[str, Path] = {}
    model, partial, skipped = None, False, []
    failures: list[Exception] = []
    try:
        for path in paths:
            try:
                checkpoint = read_checkpoint(path, use_ema)
                epoch = checkpoint.epoch
                if epoch is None or any(row['epoch'] == epoch for row in rows):
                    continue
                kinds.setdefault(checkpoint.source('').weights_kind, path)
                if len(kinds) > 1:
                    raise ValueError(
                        f'{kinds["raw"]} has no averaged weights and {kinds["averaged"]} has; leave out --use-ema')
                if model is None:
                    model = model_of(checkpoint, settings=settings).to(device)
                    images = open_images(images, model)
                else:
                    load_weights(model, checkpoint)
            except (CheckpointError, FileNotFoundError) as error:  # a run that goes on removes its worst epochs
                failures.append(error)
                continue
            follow = functools.partial(_relabel, progress, epoch)
            counted = evaluate(model, images, subnets, precision=precision, progress=follow, **kwargs)
            partial = counted.partial
            if partial:
                break
            rows += [{'epoch': epoch, **row} for row in counted.rows]
            skipped = counted.info['skipped']
    except KeyboardInterrupt:
        partial = True
    if partial and not rows:
        raise KeyboardInterrupt
    if not rows and failures:
        raise failures[0]
    if model is None:
        raise FileNotFoundError(
            f'{os.fspath(folder)} holds no checkpoint-*.pth.tar of train.py; give the folder that has its summary.csv')
    results = _results(
        model, sorted(rows, key=lambda row: row['epoch']), partial, skipped, images, precision, weights=False)
    results.network['weights_kind'] = next(iter(kinds))
    results.info |= {
        'checkpoint': os.fspath(folder), 'epochs': len(paths), 'entry': source_of(model).entry,
        'other_entries': list(source_of(model).other_entries), 'unread': list(map(str, failures)),
        'plain': source_of(model).plain}
    return results


def _relabel(progress: Progress, epoch: int, steps: Iterable[Any], label: str) -> Iterable[Any]:
    return progress(steps, f'Epoch {epoch}')


def find_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Return the checkpoints of a run's folder in the order of their epochs, by their names; the last file once."""
    paths = sorted(Path(folder).glob('checkpoint-*.pth.tar'), key=lambda path: int(re.sub(r'\D', '', path.name) or 0))
    last = Path(folder, 'last.pth.tar')  # a second name of the newest one, or of an epoch that was not kept
    is_more = last.is_file() and not any(path.exists() and last.samefile(path) for path in paths)
    return [*paths, last] if is_more else paths


def table_of_epochs(results: Results) -> list[Row]:
    """Return one row for each epoch: the top-1 accuracy of each subnet under its name, and their ``mean``."""
    epochs: dict[int, Row] = {}
    for row in results.rows:
        epochs.setdefault(row['epoch'], {})[str(subnet_of(row))] = row['top1']
    return [{'epoch': epoch, **top1, 'mean': statistics.fmean(top1.values())} for epoch, top1 in epochs.items()]


def evaluate_cascade(
        cascade: Cascade,
        images: Any,
        *,
        batch_size: int = 256,
        workers: int = DEFAULT_WORKERS,
        precision: str = 'float32',
        skip_bad_images: bool = False,
        progress: Progress = silent,
) -> Results:
    """Count what a cascade gets right, where images stop, and how long it takes.

    Args:
        cascade: The cascade.
        images: The images, see ``open_images``.
        batch_size: Images of a batch. Latencies are of such batches.
        workers: Processes that read images.
        precision: ``float32``, or ``bfloat16`` or ``float16`` by autocast.
        skip_bad_images: Pass over unreadable images and name them in ``info['skipped']``.
        progress: Follows the batches, such as ``tqdm.tqdm``.

    Returns:
        One row with ``macs``, the mean of an image, ``top1``, ``top5``, ``correct1``, ``correct5`` and ``count``;
        ``shares``, the percent of the images that stop at each stage; ``latency_ms`` and ``latency_p90_ms`` of a batch,
        and ``latency_mean_ms`` of an image. ``info`` has a row for each of its ``stages``, and says how many of the
        images it was calibrated on (``calibration_images``). Interrupted by Ctrl-C, it is of the images so far, and
        ``info['partial']`` is True.

    Raises:
        OSError: If an image cannot be read and ``skip_bad_images`` is False; the message names it.
        RuntimeError: If logits are not finite.
        ValueError: If a class is none of the model's, or there are several processes.
    """
    if dist.is_available() and dist.is_initialized():
        raise ValueError('a cascade is evaluated in one process, for its latency; leave torchrun out')
    images = open_images(images, cascade)
    loader = create_evaluation_loader(images, cascade, batch_size, workers)
    correct = torch.zeros(2, dtype=torch.int64, device=cascade.device)
    stopped = torch.zeros(len(cascade.stages), dtype=torch.int64, device=cascade.device)
    seconds: list[tuple[float, int]] = []  # of each batch, and its images
    skipped: list[str] = []
    partial = False
    try:
        with evaluation_mode(cascade):
            for batch, target in progress(loader, 'Evaluating'):
                bad = bad_images(target, cascade.num_classes, loader.dataset, skip_bad_images)
                with inference(cascade, precision):
                    if not seconds:
                        cascade(batch)  # to warm up
                    start = _now(cascade.device)
                    logits, exits = cascade(batch, return_exits=True)
                    duration = _now(cascade.device) - start
                check_finite([logits], cascade.stages[-1:])
                hits, stops = count_hits([logits], target)[0], exits[target >= 0].bincount(minlength=len(stopped))
                # In one go, so that an interrupt finds a whole number of batches.
                correct, stopped, seconds, skipped = (
                    correct + hits, stopped + stops, [*seconds, (duration, len(target))], skipped + bad)
        check_complete(loader.dataset, sum(size for _, size in seconds), skip_bad_images)
    except KeyboardInterrupt:
        if not seconds:
            raise
        partial = True
    total = int(stopped.sum())
    whole = [1e3 * duration for duration, size in seconds if size == seconds[0][1]]
    median, p90 = np.percentile(whole, [50, 90]).tolist() if whole else (None, None)
    stage_macs = [cost for cost in cascade.macs if cost is not None]
    row = {
        'cascade': cascade_text(cascade.stages, cascade.thresholds),
        'macs': sum(count * cost for count, cost in zip(stopped.tolist(), stage_macs, strict=True)) / max(total, 1)
        if len(stage_macs) == len(cascade.stages) else None,
        **_accuracy(correct.tolist(), total),
        'shares': [round(100 * count / max(total, 1), 2) for count in stopped.tolist()],
        'batch_size': seconds[0][1] if seconds else 0,
        **setting_of(cascade, precision),
        'latency_ms': median,
        'latency_p90_ms': p90,
        'latency_mean_ms': 1e3 * sum(duration for duration, _ in seconds) / max(sum(size for _, size in seconds), 1),
    }
    stages = [
        {'stage': str(stage), 'threshold': threshold, 'images [%]': share, 'macs': cost}
        for stage, threshold, share, cost in zip(
            cascade.stages, [*cascade.thresholds, None], row['shares'], cascade.macs, strict=True)]
    return _results(
        cascade, [row], partial, skipped, images, precision,
        stages=stages, calibration_images=_count_calibrated(cascade, images))


def _count_calibrated(cascade: Cascade, images: Images) -> int:
    """Return how many of the images a cascade was calibrated on, as its file says."""
    info = cascade.calibration
    folders = [os.path.realpath(str(folder or '')) for folder in (
        info.get('calibration_dir') or info.get('data_dir'), images.data_dir)]
    same = folders[0] == folders[1] and (info.get('dataset'), info.get('split')) == (images.name, images.split)
    return info.get('calibration_images') or 0 if same else 0


def _now(device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()
