"""What subnets that drop tokens learn from those that keep all, with criteria of classes, of labels and of numbers."""
import functools
import warnings
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from comparing import EXACT
from timm.loss import (
    AsymmetricLossMultiLabel,
    BinaryCrossEntropy,
    JsdCrossEntropy,
    LabelSmoothingCrossEntropy,
    PolyBinaryCrossEntropy,
    PolyCrossEntropy,
    SoftTargetCrossEntropy,
    TwoWayLoss,
)
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch import Tensor, nn

from timm_supervit import SuperViTTask

NAMES = pytest.mark.parametrize('name', ['supervit_tiny', 'supervit_lvvit_small'])


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    p = teacher.softmax(dim=1)
    return (p * (p.log() - student.softmax(dim=1).log())).sum(dim=1).mean()


def binary(student: Tensor, teacher: Tensor, weight: Any = 1.) -> Tensor:
    """Return the cross-entropy to each label's probability [B, classes], by its definition."""
    p, q = teacher.sigmoid(), student.sigmoid()
    return -(p * q.log() + (1 - p) * (1 - q).log()) * weight


WEIGHT = torch.linspace(0.5, 2, 10).double()
HARD, SOFT = torch.tensor([3, 7]), torch.rand(2, 10, generator=torch.Generator().manual_seed(5)).double()
CASES: dict[str, tuple[Any, Tensor, Any]] = {
    'cross-entropy': (nn.CrossEntropyLoss(), HARD, kl),
    'its function': (F.cross_entropy, HARD, kl),
    'smoothed': (LabelSmoothingCrossEntropy(0.1), HARD, kl),
    'soft targets': (SoftTargetCrossEntropy(), SOFT.softmax(dim=1), kl),
    'poly loss': (PolyCrossEntropy(), HARD, kl),
    'views of an image': (JsdCrossEntropy(num_splits=2), HARD, kl),
    'labels': (nn.BCEWithLogitsLoss(), SOFT, lambda s, t: binary(s, t).mean()),
    'their function': (F.binary_cross_entropy_with_logits, SOFT, lambda s, t: binary(s, t).mean()),
    'labels summed': (nn.BCEWithLogitsLoss(reduction='sum'), SOFT, lambda s, t: binary(s, t).sum()),
    'labels weighed': (
        nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=2 * WEIGHT), SOFT, lambda s, t: binary(s, t, WEIGHT).mean()),
    'their function with arguments': (
        functools.partial(F.binary_cross_entropy_with_logits, weight=WEIGHT, reduction='sum'), SOFT,
        lambda s, t: binary(s, t, WEIGHT).sum()),
    'classes as labels': (BinaryCrossEntropy(smoothing=0.1), HARD, lambda s, t: binary(s, t).mean()),
    'summed over classes': (BinaryCrossEntropy(sum_classes=True), HARD, lambda s, t: binary(s, t).sum(dim=1).mean()),
    'rounded': (BinaryCrossEntropy(target_threshold=0.2), SOFT, lambda s, t: binary(s, t).mean()),
    'asymmetric': (AsymmetricLossMultiLabel(), SOFT, lambda s, t: binary(s, t).sum(dim=1).mean()),
    'poly loss of labels': (PolyBinaryCrossEntropy(), SOFT, lambda s, t: binary(s, t).mean()),
    'numbers': (nn.MSELoss(), SOFT, lambda s, t: ((s - t) ** 2).mean()),
    'numbers summed': (nn.MSELoss(reduction='sum'), SOFT, lambda s, t: ((s - t) ** 2).sum()),
    'distances': (nn.L1Loss(), SOFT, lambda s, t: (s - t).abs().mean()),
    'small distances': (nn.SmoothL1Loss(), SOFT, lambda s, t: F.smooth_l1_loss(s, t)),
    'large distances': (
        functools.partial(F.huber_loss, delta=0.3), SOFT, lambda s, t: F.huber_loss(s, t, delta=0.3)),
}


@NAMES
@pytest.mark.parametrize('case', CASES)
def test_a_subnet_learns_in_the_form_of_the_criterion(small_model: Any, name: str, case: str) -> None:
    criterion, target, expected = CASES[case]
    model = small_model(name, img_sizes=(32,), keep_rates=(0.3, 1.0), train_subnets='all').double()
    images = torch.randn(2, 3, 32, 32).double()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        task = ClassificationTask(model, criterion, verbose=False)
        outputs: Any = []
        task.trainable_module.register_forward_hook(lambda module, args, output: outputs.extend(output))
        losses = task(images, target)
    (_, role, _), (_, other, loss) = losses['subnet_losses']
    assert (role, other) == ('label', 'distill')
    teacher = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    torch.testing.assert_close(loss, expected(outputs[1], teacher).detach(), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize('case', CASES)
def test_nothing_is_left_to_learn_where_a_subnet_says_what_its_teacher_says(small_model: Any, case: str) -> None:
    task: Any = ClassificationTask(small_model().double(), CASES[case][0], verbose=False)
    teacher = torch.randn(4, 10).double().requires_grad_()
    student = teacher.detach().clone().requires_grad_()
    task.choose_distillation()(student, teacher).backward()
    torch.testing.assert_close(student.grad, torch.zeros(4, 10).double(), atol=1e-15, rtol=0)
    assert teacher.grad is None


@pytest.mark.parametrize('criterion', [nn.BCEWithLogitsLoss(), nn.MSELoss(), nn.CrossEntropyLoss()])
def test_half_precision_is_compared_in_full(small_model: Any, criterion: Any) -> None:
    task: Any = ClassificationTask(small_model(), criterion, verbose=False)
    student, teacher = (torch.randn(2, 4, 10) / 8).bfloat16()
    expected = task.choose_distillation()(student.double(), teacher.double())
    with torch.autocast('cpu', torch.bfloat16):
        actual = task.choose_distillation()(student, teacher)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)


# --- what is not defined


@NAMES
@pytest.mark.parametrize('criterion', [
    nn.CrossEntropyLoss(), LabelSmoothingCrossEntropy(0.1), F.cross_entropy, None, lambda output, target: output.sum()])
def test_one_output_has_no_classes_to_distill(small_model: Any, name: str, criterion: Any) -> None:
    for settings in (dict(train_subnets='sandwich'), dict(train_subnets='all', distill_teacher='largest_size')):
        with pytest.raises(ValueError, match=r'num_classes=1\b.*num_classes=2.*MSELoss.*train_subnets="active"'):
            ClassificationTask(small_model(name, num_classes=1, **settings), criterion, verbose=False)
    for settings in (dict(train_subnets='active'), dict(keep_rates=(1.0,))):  # where nothing is distilled
        task = ClassificationTask(small_model(name, num_classes=1, **settings), criterion, verbose=False)
        assert task(torch.randn(2, 3, 64, 64), torch.tensor([0, 0]))['loss'].isfinite()


@pytest.mark.parametrize('criterion', [nn.NLLLoss(), nn.MultiMarginLoss(), nn.KLDivLoss(), nn.BCELoss(), TwoWayLoss(),
                                       F.soft_margin_loss])
def test_a_criterion_without_a_distillation_is_refused_at_the_start(small_model: Any, criterion: Any) -> None:
    name = getattr(criterion, '__name__', type(criterion).__name__)
    with pytest.raises(ValueError, match=rf'{name}.*BCEWithLogitsLoss.*SuperViTTask'):
        ClassificationTask(small_model(), criterion, verbose=False)
    ClassificationTask(small_model(train_subnets='active'), criterion, verbose=False)


class Focal(nn.Module):
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, target) ** 2


def test_a_criterion_of_one_s_own_is_taken_for_one_of_classes_and_says_so(small_model: Any) -> None:
    with pytest.warns(UserWarning, match='Focal.*softmax.*choose_distillation'):
        task: Any = ClassificationTask(small_model(), Focal(), verbose=False)
    student, teacher = torch.randn(2, 4, 10)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.testing.assert_close(task.choose_distillation()(student, teacher), kl(student, teacher))


def test_a_task_of_one_s_own_may_distill_otherwise(small_model: Any, images: Tensor) -> None:
    class Task(SuperViTTask):
        def choose_distillation(self) -> Any:
            return lambda logits, teacher: 7 + 0 * logits.sum()

    with warnings.catch_warnings():
        warnings.simplefilter('error')
        task = Task(small_model(), Focal(), verbose=False)
        losses = task(images, torch.rand(2, 10))['subnet_losses']
    assert [loss.item() for _, role, loss in losses if role == 'distill'] == [7, 7]


def test_token_labels_are_distilled_as_they_are_learned(small_model: Any) -> None:
    model = small_model('supervit_lvvit_small', train_subnets='all').double()
    images, labels = torch.randn(2, 3, 64, 64).double(), torch.randn(2, 10, 18).double().softmax(dim=1)
    losses = []
    for criterion in (nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()):
        torch.manual_seed(0)
        losses.append(ClassificationTask(model, criterion, verbose=False)(images, labels)['loss'])
    torch.testing.assert_close(*losses, **EXACT)


# --- low rates learn


def learn(criterion: nn.Module, num_classes: int, target: Tensor) -> tuple[Any, Tensor]:
    """Train a tiny network on images with a stripe for each output; return it and all outputs [S, B, classes]."""
    model: Any = timm.create_model('supervit_digits', num_classes=num_classes)
    task = ClassificationTask(model.train(), criterion, verbose=False)
    stripes = (torch.arange(24) // 6).eq(torch.arange(num_classes).unsqueeze(1)).float()  # [classes, rows]
    images = torch.randn(len(target), 3, 24, 24) / 2 + 2 * (target @ stripes).view(-1, 1, 24, 1)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        result = task(images, target)
        result['loss'].backward()
        optimizer.step()
        assert all(loss > 0 for *_, loss in result['subnet_losses'])
    with torch.no_grad():
        return model, torch.stack(model.eval().forward_subnets(images, model.subnets))


@pytest.mark.parametrize('criterion', [nn.MSELoss(), nn.SmoothL1Loss()])
def test_one_number_is_learned_at_all_rates(criterion: nn.Module) -> None:
    target = torch.linspace(-2, 2, 16).unsqueeze(1)
    model, outputs = learn(criterion, 1, target)
    for subnet, output in zip(model.subnets, outputs, strict=True):
        assert (output - target).square().mean() < 0.3 * target.var(), subnet


@pytest.mark.parametrize('criterion', [nn.BCEWithLogitsLoss(), BinaryCrossEntropy(smoothing=0., sum_classes=True)])
@pytest.mark.parametrize('num_classes', [1, 4])
def test_labels_of_which_any_may_be_true_are_learned_at_all_rates(criterion: nn.Module, num_classes: int) -> None:
    target = (torch.arange(16).unsqueeze(1) >> torch.arange(num_classes) & 1).float()  # all, none and some are true
    model, outputs = learn(criterion, num_classes, target)
    for subnet, output in zip(model.subnets, outputs, strict=True):
        assert ((output > 0) == target.bool()).float().mean() >= 0.85, subnet
