"""SuperViTs of timm's own vision transformers: the same network at full size and rate 1.0, and what that asks for."""
import re
from collections import defaultdict
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from timm_supervit import Subnet

# The two networks differ in how attention is written, which on a CPU rounds alike; hundreds of terms of size 1.
ROUNDING = dict(atol=1e-6, rtol=1e-6)


def supervit(backbone: str, **kwargs: Any) -> Any:
    return timm.create_model('supervit', backbone=backbone, **kwargs)


def randomize(model: Any) -> Any:
    """Give a model weights that are large enough for each of them to show in the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.fill_(1.5)
    return model.eval()


def shapes(model: Any) -> dict[str, Any]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if 'pos_embed' not in name}


def kind_of(model: Any) -> Any:
    """Return what a network is made of, whatever its sizes: its parts and its parameters without their numbers."""
    modules = {
        (re.sub(r'\d+', '', name), type(module)) for name, module in model.named_modules()
        if not any(module.children()) and 'backbone' not in name}
    parameters = {re.sub(r'\d+', '', name) for name, _ in model.named_parameters() if 'backbone' not in name}
    stem = type(getattr(model.patch_embed, 'backbone', None))
    return type(model), stem, frozenset(modules), frozenset(parameters), model.global_pool, model.no_embed_class


OUTLINE = dict(depth=1, weight_init='skip', device='meta')  # of a network, without its numbers
EVAS = timm.list_models(module='eva')  # in test_rotary.py
VITS = timm.list_models(module=['vision_transformer', 'deit', 'vision_transformer_hybrid'])
RESNETS = [name for name in VITS if re.search(r'_r\d+_|_resnet', name)]  # have one of full size for a stem


def try_supervit(name: str) -> Any:
    """Create a SuperViT on a model of timm, as an outline; return None where it is refused with a reason."""
    try:
        return supervit(name, **OUTLINE)
    except ValueError as error:
        assert f'backbone {name!r} cannot become a SuperViT: it' in str(error)


@pytest.fixture(scope='module', params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=['', 'on ResNets'])
def vits(request: pytest.FixtureRequest) -> list[str]:
    return RESNETS if request.param else sorted({*VITS} - {*RESNETS})


@pytest.fixture(scope='module')
def kinds(vits: list[str]) -> dict[Any, list[str]]:
    """Create a SuperViT on every ViT of timm, and sort those that can be by their kinds."""
    kinds = defaultdict(list)
    for name in vits:
        model = try_supervit(name)
        if model is None:
            continue
        plain = timm.create_model(name, **OUTLINE)
        assert shapes(model) == shapes(plain), name
        assert model.pos_embed_list[-1].shape == plain.pos_embed.shape, name
        kinds[kind_of(plain)].append(name)
    return kinds


def test_every_vit_of_timm_becomes_a_supervit_of_the_same_weights_or_is_refused_with_reason(vits, kinds):
    print(f'\n{sum(map(len, kinds.values()))} names of {len(kinds)} kinds')
    accepted = {name for names in kinds.values() for name in names}
    for name in vits:
        if name not in accepted:
            plain = timm.create_model(name, **OUTLINE)
            block = plain.blocks[0]
            assert not (
                isinstance(plain, VisionTransformer) and plain.has_class_token and plain.pos_embed is not None
                and type(block) is Block and type(block.attn) is Attention), name
    assert len(accepted) > (10 if vits is RESNETS else 90)


def test_no_other_model_of_timm_becomes_a_supervit():
    others = {name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith('timm.')}
    others -= {*VITS, *EVAS}
    assert len(others) > 1000
    assert [name for name in others if try_supervit(name) is not None] == []


def small_settings(name: str) -> tuple[dict[str, Any], int]:
    """Return settings that make a backbone small, and the side of what it makes one patch of, in pixels."""
    plain = timm.create_model(name, **OUTLINE)
    settings = dict(depth=3, num_classes=10)
    if isinstance(plain.patch_embed.proj, nn.Conv2d):  # else the stem makes the tokens
        settings |= dict(embed_dim=32, num_heads=2)
    return settings, plain.feature_info[0]['reduction']


def test_each_kind_computes_what_its_backbone_does_and_super_trains(kinds):
    for names in kinds.values():
        name = names[0]
        settings, patch = small_settings(name)
        sizes = (2 * patch, 4 * patch)
        plain = randomize(timm.create_model(name, img_size=sizes[-1], **settings))
        model = supervit(name, img_sizes=sizes, keep_rates=(0.5, 1.0), drop_layers=(1, 2), **settings).eval()
        model.load_state_dict(plain.state_dict())
        images = torch.randn(2, 3, *[sizes[-1]] * 2)
        with torch.no_grad():
            expected = plain(images)
            torch.testing.assert_close(model(images), expected, **ROUNDING, msg=lambda m, name=name: f'{name}: {m}')
            assert not torch.allclose(model(images, keep_rate=0.5), expected)
        subnets = [Subnet(size, rate) for size in sizes for rate in (0.5, 1.0)]
        several = model.forward_subnets(images, subnets)
        for subnet, logits in zip(subnets, several, strict=True):
            alone = model(images, img_size=subnet.img_size, keep_rate=subnet.keep_rate)
            torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-4)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(images[:1], img_size=sizes[0], keep_rate=0.5)
        assert counter.get_total_flops() // 2 == model.macs((sizes[0], 0.5)), name
        sum(logits.square().mean() for logits in several).backward()
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None, (name, parameter_name)
            assert parameter.grad.isfinite().all(), (name, parameter_name)
            assert parameter.grad.any(), (name, parameter_name)


@pytest.mark.parametrize('backbone, img_sizes, drop_layers', [
    ('vit_base_patch16_224', (128, 160, 192, 224), (3, 6, 9)),
    ('vit_large_patch14_dinov2', (294, 364, 448, 518), (6, 12, 18)),
    ('vit_base_patch32_clip_256', (160, 192, 224, 256), (3, 6, 9)),
    ('vit_small_resnet26d_224', (128, 160, 192, 224), (2, 4, 6)),
    ('vit_tiny_r_s16_p8_384', (224, 288, 320, 384), (3, 6, 9)),
])
def test_the_grid_is_made_of_the_backbones_size_and_depth_unless_given(backbone, img_sizes, drop_layers):
    model = supervit(backbone, device='meta')
    assert (model.img_sizes, model.drop_layers) == (img_sizes, drop_layers)
    assert supervit(backbone, device='meta', img_sizes=(224, 448), drop_layers=[1]).img_sizes == (224, 448)


@pytest.mark.parametrize('backbone', [
    'vit_base_patch16_clip_quickgelu_224.openai', 'vit_base_patch16_clip_384.openai_ft_in12k_in1k',
    'vit_small_patch16_224.augreg_in21k', 'deit_tiny_distilled_patch16_224',
])
def test_the_backbones_configuration_carries_over(backbone):
    model = supervit(backbone, device='meta')
    expected = dict(timm.models.get_pretrained_cfg(backbone).to_dict(), architecture='supervit')
    assert model.pretrained_cfg == expected
    assert model.num_classes == expected['num_classes']
