"""What subnets that drop tokens learn from one that keeps all: it is of the form of the criterion that labels have.

Each form is lowest where a subnet says what its teacher says, so what weighs, smooths or rounds labels is left out.
"""
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import (
    AsymmetricLossMultiLabel,
    AsymmetricLossSingleLabel,
    BinaryCrossEntropy,
    DistributionBalancedLoss,
    JsdCrossEntropy,
    LabelSmoothingCrossEntropy,
    PolyBinaryCrossEntropy,
    PolyCrossEntropy,
    SoftTargetCrossEntropy,
)
from torch import Tensor, nn

# Criteria of one class out of several, of labels of which any may be true, and of numbers.
_CLASSES = (
    nn.CrossEntropyLoss, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy, JsdCrossEntropy, PolyCrossEntropy,
    AsymmetricLossSingleLabel, F.cross_entropy)
_LABELS = (
    nn.BCEWithLogitsLoss, BinaryCrossEntropy, PolyBinaryCrossEntropy, AsymmetricLossMultiLabel,
    DistributionBalancedLoss, F.binary_cross_entropy_with_logits)
_NUMBERS = (
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)

Loss = Callable[[Tensor, Tensor], Tensor]  # of two outputs [B, classes], a number []


def choose_distillation(criterion: Any, num_classes: int) -> Loss:
    """Return what a subnet that drops tokens learns from its teacher by: a loss of its logits and the teacher's.

    - Criteria of one class out of several, such as cross-entropy: KL divergence, ``distillation_loss``.
    - Of labels of which any may be true, such as binary cross-entropy: that to the teacher's probabilities, with the
      criterion's weights of classes and summed or averaged as it is.
    - Of numbers, such as ``MSELoss``: the criterion itself, to the teacher's output.

    Any other callable is taken for one of the first kind, with a warning.

    Args:
        criterion: What the subnets that keep all tokens learn from the labels by.
        num_classes: Classes of the network.

    Raises:
        ValueError: If there is none, because the criterion is another of torch's or timm's, or classes are missing.
    """
    if _is_one_of(criterion, _NUMBERS):
        return lambda logits, teacher_logits: criterion(*_in_full_precision(logits, teacher_logits))
    name, least = _function_of(criterion), 1 if _is_one_of(criterion, _LABELS) else 2
    name = getattr(name, '__name__', type(name).__name__)
    if num_classes < least:
        raise ValueError(
            f'{name} with num_classes={num_classes} leaves subnets that drop tokens nothing to learn from those that '
            f'keep all (of one class the probability is always 1); use num_classes={least} or more, '
            f'BCEWithLogitsLoss for yes or no, MSELoss for a number, or train_subnets="active"')
    if least == 1:
        return functools.partial(_label_distillation_loss, criterion)
    if not _is_one_of(criterion, _CLASSES):
        remedy = 'train_subnets="active", or a subclass of SuperViTTask with its own choose_distillation'
        if getattr(_function_of(criterion), '__module__', '').startswith(('torch.', 'timm.')):
            raise ValueError(
                f'{name} says not what subnets that drop tokens learn from those that keep all; use a cross-entropy '
                f'for one class out of several, BCEWithLogitsLoss or timm\'s BinaryCrossEntropy for labels of which '
                f'any may be true, MSELoss, L1Loss or HuberLoss for numbers, {remedy}')
        warnings.warn(
            f'{name} is taken for a criterion of one class out of several: subnets that drop tokens learn the softmax '
            f'of those that keep all. If that is wrong, use {remedy}', stacklevel=4)
    return distillation_loss


def distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return KL(softmax(teacher) || softmax(logits)), summed over classes and averaged over the batch.

    Args:
        logits: The student's logits [B, classes].
        teacher_logits: The teacher's logits [B, classes]; no gradient flows into them.
    """
    student, teacher = (x.log_softmax(dim=-1) for x in _in_full_precision(logits, teacher_logits))
    return F.kl_div(student, teacher, reduction='batchmean', log_target=True)


def _label_distillation_loss(criterion: Any, logits: Tensor, teacher_logits: Tensor) -> Tensor:
    get: Any = criterion.keywords.get if isinstance(criterion, functools.partial) else functools.partial(
        getattr, criterion)
    student, teacher = _in_full_precision(logits, teacher_logits)
    losses = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), get('weight', None), reduction='none')
    if get('sum_classes', False) or get('reduction', '') == 'batchmean':
        return losses.sum() / len(losses)
    return losses.sum() if get('reduction', '') == 'sum' else losses.mean()


def _in_full_precision(logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)  # autocast on a CPU would stay in half precision
    return logits.to(dtype), teacher_logits.detach().to(dtype)


def _function_of(criterion: Any) -> Any:
    return criterion.func if isinstance(criterion, functools.partial) else criterion


def _is_one_of(criterion: Any, kinds: tuple[Any, ...]) -> bool:
    function = _function_of(criterion)
    return any(isinstance(function, kind) if isinstance(kind, type) else function is kind for kind in kinds)
