"""Accuracy, cost and latency of a cascade in one pass over a data set."""
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cascade import Cascade
from ..fingerprint import fingerprint
from .cascade import cascade_text
from .evaluate import bad_images, check_complete, check_finite, count_hits
from .progress import Progress, silent
from .results import Results

__all__ = ['count_calibration_images', 'evaluate_cascade']


def evaluate_cascade(
        cascade: Cascade,
        loader: Any,
        *,
        name: str = '',
        amp_dtype: torch.dtype | None = None,
        skip_bad_images: bool = False,
        progress: Progress = silent,
) -> Results:
    """Count what a cascade gets right, where images stop, and how long it takes.

    Args:
        cascade: The cascade.
        loader: Batches of images and classes, from ``create_evaluation_loader``. Latencies are of its batches.
        name: Name of the model for the results.
        amp_dtype: Run in mixed precision with this dtype.
        skip_bad_images: Pass over unreadable images and name them in ``info['skipped']``.
        progress: Follows the batches, such as ``tqdm.tqdm``.

    Returns:
        One row with ``macs``, the mean of an image, ``top1``, ``top5``, ``correct1``, ``correct5`` and ``count``;
        ``shares``, the percent of the images that stop at each stage; ``latency_ms`` and ``latency_p90_ms`` of a batch,
        and ``latency_mean_ms`` of an image. Interrupted by Ctrl-C, it is of the images so far, and ``info['partial']``
        is True.

    Raises:
        OSError: If an image cannot be read and ``skip_bad_images`` is False; the message names it.
        RuntimeError: If logits are not finite.
        ValueError: If a class is none of the model's.
    """
    model = cascade.model
    device = next(model.parameters()).device
    correct = torch.zeros(2, dtype=torch.int64, device=device)
    stopped = torch.zeros(len(cascade.stages), dtype=torch.int64, device=device)
    seconds: list[tuple[float, int]] = []  # of each batch, and its images
    skipped: list[str] = []
    partial = False
    cascade.eval()
    try:
        for images, target in progress(loader, 'Evaluating'):
            bad = bad_images(target, model.num_classes, loader.dataset, skip_bad_images)
            with torch.inference_mode(), torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                if not seconds:
                    cascade(images)  # to warm up
                start = _now(device)
                logits, exits = cascade(images, return_exits=True)
                duration = _now(device) - start
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
    correct1, correct5 = correct.tolist()
    row = {
        'cascade': cascade_text(cascade.stages, cascade.thresholds),
        'macs': sum(count * cost for count, cost in zip(stopped.tolist(), cascade.macs, strict=True)) / max(total, 1),
        'top1': 100 * correct1 / max(total, 1),
        'top5': 100 * correct5 / max(total, 1),
        'correct1': correct1,
        'correct5': correct5,
        'count': total,
        'shares': [round(100 * count / max(total, 1), 2) for count in stopped.tolist()],
        'batch_size': seconds[0][1] if seconds else 0,
        'precision': str(amp_dtype or torch.float32).removeprefix('torch.'),
        'runtime': 'eager',
        'latency_ms': median,
        'latency_p90_ms': p90,
        'latency_mean_ms': 1e3 * sum(duration for duration, _ in seconds) / max(sum(size for _, size in seconds), 1),
    }
    return Results(name, [row], {'partial': partial, 'skipped': skipped}, fingerprint(model))


def count_calibration_images(path: str | os.PathLike, data_dir: str | None, dataset: str, split: str) -> int:
    """Return how many images of a data set a cascade was calibrated on, as its file says."""
    info = json.loads(Path(path).read_text(encoding='utf-8')).get('calibration')
    if not isinstance(info, dict):
        return 0
    folder = info.get('calibration_dir') or info.get('data_dir')
    same = os.path.realpath(str(folder or '')) == os.path.realpath(data_dir or '')
    known = info.get('calibration_images')
    return known if same and (info.get('dataset'), info.get('split')) == (dataset, split) and known else 0


def _now(device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()
