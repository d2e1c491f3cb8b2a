"""SuperViT computes what a straightforward reference computes, on grids that the official numbers do not have."""
from typing import Any

import pytest
import torch
from parity import LOGITS, assert_gradients, list_grid
from reference import ReferenceSuperViT, training_step
from timm.loss import SoftTargetCrossEntropy

from timm_supervit import SuperViTTask

# Names the grids by what is unusual in them.
GRIDS = {
    'dropping in two blocks': dict(),
    'dropping in the first and the last block': dict(drop_layers=(0, 3)),
    'dropping in every block': dict(drop_layers=(0, 1, 2, 3), keep_rates=(0.01, 0.5, 0.99, 1.0)),
    'dropping in no block': dict(drop_layers=()),
    'one size': dict(img_sizes=(64,)),
    'a patch of 8': dict(patch_size=8, img_sizes=(24, 40)),
    'register tokens': dict(reg_tokens=3),
    'rectangles': dict(img_sizes=((32, 16), (48, 32), (64, 32))),
    'squares and rectangles': dict(img_sizes=((16, 32), 32, (32, 48), (64, 32), 64)),
    'the reverse schedule': dict(
        depth=12, drop_layers=(0, 1, 2, 4, 5, 7, 8, 10, 11), keep_rates=(0.1, 0.5, 0.7, 1.0)),
}


def create_pair(small_model: Any, dtype: torch.dtype, **kwargs: Any) -> tuple[Any, ReferenceSuperViT]:
    model = small_model(**kwargs).to(dtype)
    reference = ReferenceSuperViT(
        img_sizes=model.img_sizes,
        drop_layers=model.drop_layers,
        patch_size=model.patch_embed.patch_size[0],
        embed_dim=48,
        depth=len(model.blocks),
        num_heads=3,
        num_classes=10,
        reg_tokens=kwargs.get('reg_tokens', 0),
    ).to(dtype)
    reference.load_state_dict(model.state_dict())
    return model, reference


def run_task(model: Any, images: torch.Tensor, target: torch.Tensor, subnets: list) -> list[torch.Tensor]:
    """Run one training step of chosen subnets; return their losses, leave the gradients in the model."""
    model.train()
    task = SuperViTTask(model, SoftTargetCrossEntropy(), verbose=False)
    task.sample_subnets = lambda: [type(model.subnet)(*subnet) for subnet in subnets]  # type: ignore[method-assign]
    result = task(images, target)
    result['loss'].backward()
    return [subnet_loss.loss.double() for subnet_loss in result['subnet_losses']]


@pytest.mark.parametrize('share_prefix', [True, False])
@pytest.mark.parametrize('dtype', LOGITS)
@pytest.mark.parametrize('grid', GRIDS)
def test_every_subnet_gives_the_logits_of_the_reference(
        small_model: Any,
        images: torch.Tensor,
        grid: str,
        dtype: torch.dtype,
        share_prefix: bool,
) -> None:
    model, reference = create_pair(small_model, dtype, share_prefix=share_prefix, **GRIDS[grid])
    images = images.to(dtype)
    subnets = list_grid(model)
    with torch.no_grad():
        together = model.forward_subnets(images, subnets)
        for subnet, output in zip(subnets, together, strict=True):
            expected = reference(images, *subnet)
            torch.testing.assert_close(output, expected, atol=LOGITS[dtype], rtol=0)
            torch.testing.assert_close(
                model(images, img_size=subnet[0], keep_rate=subnet[1]), expected, atol=LOGITS[dtype], rtol=0)


@pytest.mark.parametrize('share_prefix', [True, False])
@pytest.mark.parametrize('grid', GRIDS)
def test_a_training_step_gives_the_losses_and_gradients_of_the_reference(
        small_model: Any,
        images: torch.Tensor,
        grid: str,
        share_prefix: bool,
) -> None:
    model, reference = create_pair(small_model, torch.float64, share_prefix=share_prefix, **GRIDS[grid])
    images, target = images.double(), torch.rand(2, 10).double().softmax(dim=1)
    smallest, largest = model.img_sizes[0], model.img_sizes[-1]
    lowest, middle = model.keep_rates[:2]
    subnets = [(largest, 1.0), (largest, lowest)]
    if smallest != largest:
        subnets += [(smallest, 1.0), (smallest, middle)]
    losses = run_task(model, images, target, subnets)
    expected = training_step(reference, images, target, subnets)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), atol=1e-10, rtol=0)
    assert_gradients(model, {name: parameter.grad for name, parameter in reference.named_parameters()})


def test_the_reverse_schedule_goes_down_to_one_patch(small_model: Any, images: torch.Tensor) -> None:
    model, reference = create_pair(small_model, torch.float64, **GRIDS['the reverse schedule'])
    left = model.kept_patches(images.double(), img_size=64, keep_rate=0.1)
    assert {layer: kept.shape[1] for layer, kept in left.items()} == {0: 2, 1: 1}  # nothing more to drop from then on
    output = model(images.double(), img_size=64, keep_rate=0.1)
    torch.testing.assert_close(output, reference(images.double(), 64, 0.1), atol=1e-10, rtol=0)


def test_the_kept_tokens_are_those_that_the_class_token_attends_to_most(
        small_model: Any,
        images: torch.Tensor,
) -> None:
    model, reference = create_pair(small_model, torch.float64)
    images = images.double()
    first = model.kept_patches(images, img_size=64, keep_rate=0.3)[1]
    attention: list[torch.Tensor] = []
    reference.blocks[1].attn.register_forward_hook(lambda module, inputs, output: attention.append(output[1]))
    reference(images, 64, 0.3)
    scores = attention[0].mean(dim=1)[:, 0, 1:]
    count = -(-17 * 3 // 10)  # ceil(0.3 * (16 patches + class token))
    for kept, row in zip(first, scores, strict=True):
        assert sorted(kept.tolist()) == sorted(row.argsort(descending=True)[:count].tolist())


@pytest.mark.parametrize('img_size, keep_rate, tokens', [
    (224, 0.7, (139, 99, 71)), (224, 0.5, (100, 51, 27)), (128, 0.7, (47, 34, 25)), (128, 0.5, (34, 18, 10)),
])
def test_the_published_network_keeps_the_published_numbers_of_tokens(
        small_model: Any,
        img_size: int,
        keep_rate: float,
        tokens: tuple[int, ...],
) -> None:
    # Of 197 tokens at 0.7, the class token and ceil(0.7 * 197) = 138 patches are left, and so on.
    model = small_model(
        img_sizes=(128, 160, 192, 224), drop_layers=(3, 6, 9), embed_dim=12, depth=12, num_heads=1,
        keep_rates=(0.5, 0.7, 1.0))
    kept = model.kept_patches(torch.randn(1, 3, 224, 224), img_size=img_size, keep_rate=keep_rate)
    assert list(kept) == [3, 6, 9]
    assert tuple(1 + patches.shape[1] for patches in kept.values()) == tokens
