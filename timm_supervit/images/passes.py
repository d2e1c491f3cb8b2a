"""What a pass of a model over images checks and counts."""
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ..runner import SubnetRunner
from ..subnets import Subnet
from .datasets import ReadableImages


@contextlib.contextmanager
def evaluation_mode(model: SubnetRunner) -> Iterator[None]:
    """Put a model into evaluation mode for a pass; those of its modules that were in training are in the end, too."""
    modules = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


@contextlib.contextmanager
def inference(model: SubnetRunner, precision: str = 'float32') -> Iterator[None]:
    """Let a model run on a batch without gradients and in a precision, the lower ones by autocast."""
    if precision != 'float32' and model.fixed_setting:
        raise ValueError('an exported file runs in its own precision; leave --amp out')
    dtype = getattr(torch, precision)
    with torch.inference_mode(), torch.autocast(model.device.type, dtype, enabled=precision != 'float32'):
        yield


def check_finite(logits: Sequence[Tensor], subnets: Sequence[Subnet]) -> None:
    """Check that the logits of each subnet are numbers; the largest of NaN would count as class 0."""
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
    """Check that a stream has delivered all images that it says it holds."""
    missing = count_missing(dataset, seen)
    if missing and not skip:
        raise OSError(
            f'{missing} of {seen + missing} images were not delivered: timm passes over what it cannot read of a '
            f'stream, with a warning; mend or remove them, correct the number of images in --split, or pass over such '
            f'images with --skip-bad-images')


def count_missing(dataset: Any, delivered: int, rank: int = 0, size: int = 1) -> int:
    """Return how many images a stream holds but has not delivered, since timm's readers pass over unreadable ones.

    Args:
        dataset: A data set; one that is no stream, or does not say how many images it holds, misses none.
        delivered: How many images were read.
        rank: Number of the process, from 0.
        size: How many processes there are, each of which takes its turn.
    """
    if not isinstance(dataset, IterableDataset) or not hasattr(dataset, '__len__'):
        return 0
    return max(0, len(range(rank, len(dataset), size)) - delivered)
