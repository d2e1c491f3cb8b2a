"""The networks compute what the official implementation computed from the same formula; see golden/README.md."""
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from formula import checksum, draw, draw_state, draw_target
from parity import LOGITS, build_official, list_grid
from timm.loss import SoftTargetCrossEntropy
from timm.task import ClassificationTask
from torch import nn

from timm_supervit import Subnet

Numbers = dict[str, Any]

MODELS = {'deit': 'supervit_tiny', 'lvvit': 'supervit_lvvit_small'}
CHECKED_ALONE = [(128, 0.5), (128, 1.0), (192, 0.7)]


def read_official(backbone: str) -> tuple[Any, Numbers]:
    """Return a network with the weights of the formula, and what the official one computed with them."""
    numbers = json.loads((Path(__file__).parent / 'golden' / f'{backbone}.json').read_text())
    model = build_official(MODELS[backbone], numbers['settings']).double()
    model.load_state_dict(draw_state({name: tuple(value.shape) for name, value in model.state_dict().items()}))
    return model, numbers


def draw_images() -> torch.Tensor:
    return draw('input', (2, 3, 224, 224))


def run_step(model: Any, numbers: Numbers, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the forward passes of the official training step."""
    settings = numbers['settings']
    box = settings.get('mix_token_box_14')
    monkeypatch.setattr('timm_supervit.training.token_labels.draw_box', lambda *_: tuple(box))
    task: Any = ClassificationTask(model.train(), SoftTargetCrossEntropy(), verbose=False)
    task.sample_subnets = lambda: [Subnet(*subnet) for subnet in settings['train_subnets']]
    num_classes = settings['config']['num_classes']
    return task(draw_images(), draw_target((2, num_classes, 2 + 14 * 14) if box else (2, num_classes)))


def assert_losses(result: dict[str, Any], expected: list[float]) -> None:
    losses = torch.stack([subnet_loss.loss for subnet_loss in result['subnet_losses']])
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=0)


def assert_checksums(tensors: dict[str, torch.Tensor], expected: dict[str, list[float] | None]) -> None:
    """Compare tensors by weighted sum and norm, to 1e-9 of the norm; None stands for zeros."""
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        weighted, norm = expected[name] or (0., 0.)
        assert checksum(name, tensor) == pytest.approx((weighted, norm), abs=1e-9 * norm, rel=0), name


def get_gradients(model: nn.Module) -> dict[str, Any]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize('share_prefix, dtype', [
    (True, torch.float64), pytest.param(False, torch.float64, marks=pytest.mark.slow), (True, torch.float32)])
@pytest.mark.parametrize('backbone', MODELS)
def test_every_subnet_gives_the_official_logits(backbone: str, share_prefix: bool, dtype: torch.dtype) -> None:
    model, numbers = read_official(backbone)
    model.to(dtype).share_prefix = share_prefix
    subnets, images = [Subnet(*subnet) for subnet in list_grid(model)], draw_images().to(dtype)
    assert {str(subnet) for subnet in subnets} == numbers['logits'].keys()
    expected = {subnet: torch.tensor(numbers['logits'][str(subnet)], dtype=torch.float64) for subnet in subnets}
    with torch.no_grad():
        together = model.eval().forward_subnets(images, subnets)
        alone = [model(images, img_size=img_size, keep_rate=keep_rate) for img_size, keep_rate in CHECKED_ALONE]
    for subnet, logits in zip([*subnets, *CHECKED_ALONE], [*together, *alone], strict=True):
        torch.testing.assert_close(logits.double(), expected[subnet], atol=LOGITS[dtype], rtol=0)


@pytest.mark.parametrize('share_prefix', [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize('backbone, distill_teacher', [
    ('deit', 'own_size'), ('lvvit', 'largest_size'), ('lvvit', 'own_size')])
def test_a_training_step_gives_the_official_losses_and_gradients(
        backbone: str,
        distill_teacher: str,
        share_prefix: bool,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, numbers = read_official(backbone)
    model.distill_teacher, model.share_prefix = distill_teacher, share_prefix
    result = run_step(model, numbers, monkeypatch)
    assert_losses(result, numbers[distill_teacher]['losses'])
    result['loss'].backward()
    assert_checksums(get_gradients(model), numbers[distill_teacher]['gradients'])


def test_each_backbone_has_the_teacher_of_its_official_loop() -> None:
    assert [read_official(backbone)[0].distill_teacher for backbone in MODELS] == ['own_size', 'largest_size']


def test_mixed_tokens_give_the_official_logits_and_averages_of_batchnorm(monkeypatch: pytest.MonkeyPatch) -> None:
    model, numbers = read_official('lvvit')
    model.share_prefix = False  # shared, BatchNorm sees two batches in a step and not four
    with torch.no_grad():
        result = run_step(model, numbers, monkeypatch)
    expected = torch.tensor(numbers['train_cls_logits'], dtype=torch.float64)
    torch.testing.assert_close(result['output'], expected, atol=1e-10, rtol=0)
    assert_losses(result, numbers['largest_size']['losses'])
    assert_checksums(dict(model.named_buffers()), numbers['buffers'])


def test_mixed_tokens_give_the_official_logits_of_every_patch() -> None:
    model, numbers = read_official('lvvit')
    settings = numbers['settings']
    with torch.no_grad():
        (_, token_logits), *_ = model.train().forward_subnets(
            draw_images(), settings['train_subnets'][:1], settings['mix_token_box_14'])
    assert_checksums({'train_token_logits': token_logits}, {'train_token_logits': numbers['train_token_logits']})
