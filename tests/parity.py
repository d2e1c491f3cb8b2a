"""What the two backbones' comparisons with the official and the reference numbers have in common.

In float64 logits and losses agree to 1e-10 and gradients to 1e-6, in float32 logits to 5e-5, what rounding alone
explains over the resizing and the blocks.
"""
from typing import Any

import pytest
import timm
import torch

LOGITS = {torch.float64: 1e-10, torch.float32: 5e-5}


def list_grid(model: Any) -> list[tuple[int, float]]:
    return [(img_size, keep_rate) for img_size in model.img_sizes for keep_rate in model.keep_rates]


def build_official(name: str, settings: dict[str, Any]) -> Any:
    """Build the network that official numbers were taken from."""
    config = settings['config']
    extra = {key: config[key] for key in ('mlp_ratio', 'skip_lam') if key in config}
    extra |= {key: settings[key] for key in ('cls_weight', 'dense_weight') if key in settings}
    return timm.create_model(
        name, img_sizes=config['img_size_list'], keep_rates=settings['keep_rates'], drop_layers=settings['drop_layers'],
        patch_size=config['patch_size'], embed_dim=config['embed_dim'], depth=config['depth'],
        num_heads=config['num_heads'], num_classes=config['num_classes'], **extra)


def assert_gradients(model: Any, expected: dict[str, torch.Tensor | None]) -> None:
    """Compare gradients; a parameter that the reference gave none must have one of zeros."""
    for name, parameter in model.named_parameters():
        gradient = expected.get(name)
        gradient = torch.zeros_like(parameter) if gradient is None else gradient.to(parameter.dtype)
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=0, msg=lambda m, n=name: f'{n}: {m}')


def import_fully_shard() -> Any:
    """Return FSDP2's function that shards a module; skip the test where torch is older than 2.6."""
    fsdp = pytest.importorskip('torch.distributed.fsdp')
    if not hasattr(fsdp, 'fully_shard'):
        pytest.skip('this torch has no fully_shard')
    return fsdp.fully_shard
