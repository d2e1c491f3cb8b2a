"""Accuracy of all subnets of a network in one pass over a data set, as exact counts."""
import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from timm.task import evaluation_sample_limit
from torch import Tensor

from ..fingerprint import fingerprint
from ..models.supervit import SuperVisionTransformer
from ..subnets import Subnet
from .data import ReadableImages, count_missing
from .progress import Progress, silent
from .results import Results

__all__ = ['bad_images', 'check_complete', 'check_finite', 'count_hits', 'evaluate']


def evaluate(
        model: SuperVisionTransformer,
        loader: Any,
        subnets: Sequence[tuple[int, float]] | None = None,
        *,
        name: str = '',
        amp_dtype: torch.dtype | None = None,
        skip_bad_images: bool = False,
        progress: Progress = silent,
) -> Results:
    """Count what each subnet gets right in one pass over the data, all subnets on each batch.

    Where ``torch.distributed`` is initialized, each rank evaluates its share and all return the sum; images that timm's
    sampler repeats to make the shares equal are not counted. Interrupted by Ctrl-C, it returns what was counted so far,
    with ``info['partial']`` True, or raises ``KeyboardInterrupt`` if that is nothing.

    Args:
        model: A SuperViT.
        loader: Batches of images [B, C, H, W] and classes [B] on the model's device, from ``create_evaluation_loader``.
        subnets: Pairs (img_size, keep_rate) (default: all of ``model.subnets``).
        name: Name of the model for the results.
        amp_dtype: Run in mixed precision with this dtype.
        skip_bad_images: Pass over unreadable images and name them in ``info['skipped']``.
        progress: Follows the batches, such as ``tqdm.tqdm``.

    Returns:
        One row for each subnet, with ``macs``, ``top1``, ``top5``, ``correct1``, ``correct5`` and ``count``.

    Raises:
        OSError: If an image cannot be read and ``skip_bad_images`` is False; the message names it.
        RuntimeError: If a subnet's logits are not finite; the message names it.
        ValueError: If a class is none of the model's, or there is no such subnet.
    """
    chosen = model.subnets if subnets is None else [Subnet(*subnet) for subnet in subnets]
    macs = [model.macs(subnet) for subnet in chosen]  # first of all, since it checks the subnets
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, amp_dtype) if amp_dtype else contextlib.nullcontext()
    limit = evaluation_sample_limit(loader)
    correct = torch.zeros(len(chosen), 2, dtype=torch.int64, device=device)
    skipped: list[str] = []
    seen, partial = 0, False

    was_training = model.training
    model.eval()
    try:
        for images, target in progress(loader, 'Evaluating'):
            target = target if limit is None else target[:max(0, limit - seen)]
            bad = bad_images(target, model.num_classes, loader.dataset, skip_bad_images)
            with torch.inference_mode(), autocast:
                logits = [output[:len(target)] for output in model.forward_subnets(images, chosen)]
            check_finite(logits, chosen)
            hits = count_hits(logits, target)
            # In one go, so that an interrupt finds a whole number of batches.
            correct, seen, skipped = correct + hits, seen + len(target), skipped + bad
        check_complete(loader.dataset, seen, skip_bad_images)
    except KeyboardInterrupt:
        partial = True
    finally:
        model.train(was_training)

    count = torch.tensor([seen - len(skipped), partial], dtype=torch.int64, device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(correct)
        dist.all_reduce(count)
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, skipped)
        skipped = sorted(name for share in shares for name in share)
    total, interrupted = count.tolist()
    if interrupted and not total:
        raise KeyboardInterrupt
    rows = [
        {
            **subnet._asdict(),
            'macs': cost,
            'top1': 100 * correct1 / max(total, 1),
            'top5': 100 * correct5 / max(total, 1),
            'correct1': correct1,
            'correct5': correct5,
            'count': total,
        }
        for subnet, cost, (correct1, correct5) in zip(chosen, macs, correct.tolist(), strict=True)
    ]
    return Results(name, rows, {'partial': bool(interrupted), 'skipped': skipped}, fingerprint(model))


def check_finite(logits: Sequence[Tensor], subnets: Sequence[Subnet]) -> None:
    """Check that the logits of each subnet are numbers; the largest of NaN would count as class 0.

    Raises:
        RuntimeError: If they are not; the message names the first such subnet.
    """
    finite = torch.stack([output.isfinite().all() for output in logits]).tolist()
    if not all(finite):
        raise RuntimeError(
            f'subnet {subnets[finite.index(False)]} gives logits that are not finite; check the weights, and if it ran '
            f'in float16, take bfloat16 or float32')


def count_hits(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    """Return how many targets [B] are the first, and among the first five, of each subnet's logits [B, classes]."""
    counts = []
    for output in logits:
        hits = output.topk(min(5, output.shape[1]), dim=1).indices == target.unsqueeze(1)
        counts.append(torch.stack([hits[:, 0].sum(), hits.sum()]))
    return torch.stack(counts)


def bad_images(target: Tensor, num_classes: int, dataset: Any, skip: bool | None) -> list[str]:
    """Return the names of the images of a batch that could not be read, or raise what is wrong with them.

    Args:
        target: Classes of the images, from ``create_evaluation_loader``.
        num_classes: Classes of the model.
        dataset: The data set.
        skip: Whether to pass over unreadable images; None where no option can ask for that.
    """
    faulty = target[(target < 0) | (target >= num_classes)].tolist()
    if faulty and not (isinstance(dataset, ReadableImages) and max(faulty) < 0):
        raise ValueError(f'class {max(faulty)} of an image is none of the {num_classes} classes of the model')
    names = [dataset.name(-1 - mark) for mark in faulty]
    if names and not skip:
        reason = ''
        try:
            dataset.read(-1 - faulty[0])
        except Exception as error:
            reason = f' ({error})'
        remedy = '' if skip is None else ', or pass over such images with --skip-bad-images'
        raise OSError(f'image {names[0]} cannot be read{reason}; mend or remove it{remedy}')
    return names


def check_complete(dataset: Any, seen: int, skip: bool) -> None:
    """Check that a stream has delivered all images that it says it holds.

    Raises:
        OSError: If some are missing and ``skip`` is False.
    """
    missing = count_missing(dataset, seen)
    if missing and not skip:
        raise OSError(
            f'{missing} of {seen + missing} images were not delivered: timm passes over what it cannot read of a '
            f'stream, with a warning; mend or remove them, correct the number of images in --split, or pass over such '
            f'images with --skip-bad-images')
