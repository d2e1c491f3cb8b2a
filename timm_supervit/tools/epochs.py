"""Accuracy of all subnets over the epochs of a training run, from the checkpoints that timm's ``train.py`` kept."""
import functools
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..fingerprint import fingerprint
from ..models.supervit import SuperVisionTransformer
from .checkpoints import load_checkpoint, read_checkpoint
from .evaluate import evaluate
from .progress import Progress, silent
from .results import Results, Row, subnet_of

__all__ = ['evaluate_epochs', 'find_epochs', 'table_of_epochs']


def find_epochs(folder: str | os.PathLike) -> dict[int, Path]:
    """Return the checkpoints in a run's folder by their epochs, in order; ``last.pth.tar`` too, if it is one more.

    Args:
        folder: The output folder of ``train.py``.

    Raises:
        CheckpointError: If a file cannot be read.
        FileNotFoundError: If there is no checkpoint of an epoch.
    """
    found: dict[int, Path] = {}
    for path in [*Path(folder).glob('checkpoint-*.pth.tar'), *Path(folder).glob('last.pth.tar')]:
        epoch = read_checkpoint(path).epoch
        if epoch is not None:
            found.setdefault(epoch, path)
    if not found:
        raise FileNotFoundError(
            f'{os.fspath(folder)} holds no checkpoint-*.pth.tar of train.py; give the folder that has its summary.csv')
    return dict(sorted(found.items()))


def evaluate_epochs(
        model: SuperVisionTransformer,
        epochs: dict[int, Path],
        loader: Any,
        subnets: Sequence[tuple[int, float]] | None = None,
        *,
        use_ema: bool = False,
        progress: Progress = silent,
        **kwargs: Any,
) -> Results:
    """Evaluate the checkpoint of each epoch, see ``evaluate``.

    Interrupted by Ctrl-C, it returns the epochs that are complete, with ``info['partial']`` True, or raises
    ``KeyboardInterrupt`` if there is none.

    Args:
        model: A SuperViT with the settings of the checkpoints; it gets their weights.
        epochs: The checkpoints, from ``find_epochs``.
        loader: The images, see ``evaluate``.
        subnets: Pairs (img_size, keep_rate) (default: all of ``model.subnets``).
        use_ema: Take the averaged weights of the checkpoints.
        progress: Follows the batches, such as ``tqdm.tqdm``.
        **kwargs: Further arguments of ``evaluate``.

    Returns:
        One row for each epoch and subnet, as those of ``evaluate``, with ``epoch``.

    Raises:
        CheckpointError: If weights cannot be read or do not fit the model.
        ValueError: If only some checkpoints have averaged weights, or as ``evaluate``.
    """
    rows: list[Row] = []
    kinds: dict[str, Path] = {}
    results = None
    for epoch, path in epochs.items():
        kinds.setdefault(load_checkpoint(model, path, use_ema).kind, path)
        if len(kinds) > 1:
            raise ValueError(f'{kinds["raw"]} has no averaged weights and {kinds["averaged"]} has; leave out --use-ema')
        try:
            found = evaluate(
                model, loader, subnets, progress=functools.partial(_follow, progress, f'Epoch {epoch}'), **kwargs)
        except KeyboardInterrupt:
            found = None
        if found is None or found.partial:
            if results is None:
                raise KeyboardInterrupt
            results.info['partial'] = True
            return results
        rows += [{'epoch': epoch, **row} for row in found.rows]
        results = Results(found.model, rows, found.info, fingerprint(model, weights=False))
    if results is None:
        raise ValueError('there is no epoch to evaluate')
    return results


def _follow(progress: Progress, label: str, steps: Iterable[Any], _: str) -> Iterable[Any]:
    return progress(steps, label)


def table_of_epochs(results: Results) -> list[Row]:
    """Return one row for each epoch: the top-1 accuracy of each subnet under its name, and their ``mean``."""
    epochs: dict[int, Row] = {}
    for row in results.rows:
        epochs.setdefault(row['epoch'], {})[str(subnet_of(row))] = row['top1']
    return [{'epoch': epoch, **top1, 'mean': statistics.fmean(top1.values())} for epoch, top1 in epochs.items()]
