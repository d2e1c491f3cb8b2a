"""A model after it was made: other heads, sizes, patches, copies, devices and number formats."""
import copy
import io
import pickle
import re
from typing import Any

import pytest
import timm
import torch
from comparing import EXACT, ROUNDING, run_subnet
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor

from timm_supervit import Subnet


def test_reset_classifier_changes_the_head_alone(small_model: Any, images: Tensor) -> None:
    model = small_model()
    features = model.forward_features(images, keep_rate=0.6)
    model.reset_classifier(4, 'avg')
    assert model(images, keep_rate=0.6).shape == (2, 4)
    torch.testing.assert_close(model.forward_features(images, keep_rate=0.6), features, **EXACT)
    model.reset_classifier(0)
    assert model(images).shape == (2, 48)
    assert all(output.shape == (2, 48) for output in model.forward_subnets(images, model.subnets))


def test_set_input_size_adds_a_size_and_leaves_the_others(small_model: Any, images: Tensor) -> None:
    model = small_model()
    before = {subnet: run_subnet(model, images, subnet) for subnet in model.subnets}
    model.set_input_size(96)
    assert model.img_sizes == (32, 48, 64, 96)
    assert model.subnet == Subnet(96, 1.0)
    for subnet, output in before.items():
        torch.testing.assert_close(run_subnet(model, images, subnet), output, **EXACT)
    assert model.pos_embed_list[3].shape == (1, 37, 48)
    assert torch.stack(model.forward_subnets(images, model.subnets)).isfinite().all()
    model.set_input_size(img_size=(48, 48))  # a known size: activates it
    assert (model.img_sizes, model.subnet) == ((32, 48, 64, 96), Subnet(48, 1.0))
    model.set_input_size(16)
    assert [p.shape[1] for p in model.pos_embed_list] == [2, 5, 10, 17, 37]
    assert model(images, img_size=16, keep_rate=0.5).isfinite().all()


def test_set_input_size_changes_the_patch_size_as_timm_does(small_model: Any, images: Tensor) -> None:
    model = small_model(img_sizes=(64,))
    vit = VisionTransformer(img_size=64, embed_dim=48, depth=4, num_heads=3, num_classes=10).eval()
    weights = model.state_dict()
    vit.load_state_dict({k: v for k, v in weights.items() if k[:9] != 'pos_embed'} | {
        'pos_embed': weights['pos_embed_list.0']})
    model.set_input_size(patch_size=8)
    vit.set_input_size(img_size=64, patch_size=8)
    assert model.pos_embed_list[0].shape == vit.pos_embed.shape == (1, 65, 48)
    torch.testing.assert_close(model(images), vit(images), **ROUNDING)
    assert model(images, keep_rate=0.3).isfinite().all()
    with pytest.raises(ValueError, match='64 is not divisible by the patch size 10'):
        model.set_input_size(patch_size=10)


def test_set_input_size_keeps_what_is_frozen_frozen_and_the_dtype(small_model: Any) -> None:
    model = small_model().to(torch.bfloat16)
    model.pos_embed_list.requires_grad_(False)
    model.set_input_size(96, patch_size=8)
    assert {(p.requires_grad, p.dtype) for p in model.pos_embed_list} == {(False, torch.bfloat16)}


def test_weight_decay_leaves_positions_tokens_and_norms_alone(small_model: Any) -> None:
    model = small_model(reg_tokens=1)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {group['weight_decay']: {names[id(p)] for p in group['params']} for group in optimizer.param_groups}
    assert set().union(*groups.values()) == set(names.values())
    spared = {'pos_embed_list.0', 'pos_embed_list.1', 'pos_embed_list.2', 'cls_token', 'reg_token'}
    assert spared <= groups[0.0]
    assert all(name in spared or name.endswith('.bias') or 'norm' in name for name in groups[0.0])
    assert all(name.endswith('.weight') for name in groups[0.05])


def test_layer_decay_gives_the_positions_the_rate_of_the_stem(small_model: Any) -> None:
    model = small_model()
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    scale = {names[id(p)]: group['lr_scale'] for group in optimizer.param_groups for p in group['params']}
    assert set(scale) == set(names.values())
    assert len({scale[name] for name in scale if re.match('cls_token|pos_embed|patch_embed', name)}) == 1
    assert scale['pos_embed_list.2'] < scale['blocks.0.mlp.fc1.weight'] < scale['blocks.3.mlp.fc1.weight']
    assert scale['blocks.3.mlp.fc1.weight'] < scale['head.weight'] == 1.0


@pytest.mark.parametrize('how', ['deepcopy', 'pickle', 'torch.save'])
def test_a_copy_is_a_model_of_its_own(small_model: Any, images: Tensor, how: str) -> None:
    model = small_model(img_size=48, keep_rate=0.6)
    if how == 'deepcopy':
        other = copy.deepcopy(model)
    elif how == 'pickle':
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    torch.testing.assert_close(other(images), model(images), **EXACT)
    other.set_input_size(96)  # its weights are checked against its own sizes from now on
    other.load_state_dict(other.state_dict())
    other.load_state_dict(model.state_dict())
    assert [pos_embed.shape[1] for pos_embed in other.pos_embed_list] == [5, 10, 17, 37]
    assert model.img_sizes == (32, 48, 64)
    model.load_state_dict(model.state_dict())


def test_all_modes_of_initialization_start_the_positions(small_model: Any) -> None:
    for mode in ('', 'jax', 'jax_nlhb', 'moco', 'reset', 'skip'):
        model = timm.create_model('supervit_digits', weight_init=mode)
        for pos_embed in model.pos_embed_list:
            assert 0.015 < pos_embed.std() < 0.025
        assert model(torch.zeros(1, 3, 24, 24)).isfinite().all() or mode == 'skip'


def test_a_model_from_the_meta_device_is_initialized_as_any(images: Tensor) -> None:
    kwargs = dict(embed_dim=48, num_heads=3, reg_tokens=2)
    model = timm.create_model('supervit_tiny', device='meta', **kwargs)
    assert all(p.is_meta for p in model.parameters())
    assert model.subnets == timm.create_model('supervit_tiny', **kwargs).subnets
    model.to_empty(device='cpu')
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float('nan'))
    model.init_weights()
    expected = timm.create_model('supervit_tiny', **kwargs)
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert parameter.isfinite().all(), name
        # Drawn from the same distribution: the standard deviations agree to 20 %.
        torch.testing.assert_close(parameter.std(), other.std(), rtol=0.2, atol=1e-6, msg=name)
    assert model.eval()(images, img_size=128, keep_rate=0.5).isfinite().all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_device_and_dtype_are_those_asked_for(dtype: torch.dtype) -> None:
    model = timm.create_model('supervit_digits', device='cpu', dtype=dtype).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    outputs = model.forward_subnets(torch.randn(2, 3, 24, 24, dtype=dtype), model.subnets)
    assert {output.dtype for output in outputs} == {dtype}


@pytest.mark.parametrize('autocast', [False, True])
def test_bfloat16_gives_about_the_same_logits(small_model: Any, images: Tensor, autocast: bool) -> None:
    model = small_model()
    expected = model.forward_subnets(images, model.subnets)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast), torch.no_grad():
        if not autocast:
            model, images = model.to(torch.bfloat16), images.to(torch.bfloat16)
        outputs = model.forward_subnets(images, model.subnets)
        intermediates = model.forward_intermediates(images, keep_rate=0.3)[1]
    assert intermediates[-1].isfinite().all()
    for output, theirs, subnet in zip(outputs, expected, model.subnets, strict=True):
        # 8 bits of precision; and a token with nearly the score of another may change places with it.
        tolerance = 0.1 if subnet.keep_rate == 1 else 0.6
        assert (output.float() - theirs).abs().mean() < tolerance * theirs.abs().mean(), subnet


def test_channels_last_images_and_weights_give_the_same_logits(small_model: Any, images: Tensor) -> None:
    model = small_model()
    expected = model.forward_subnets(images, model.subnets)
    model = model.to(memory_format=torch.channels_last)
    outputs = model.forward_subnets(images.contiguous(memory_format=torch.channels_last), model.subnets)
    for output, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, theirs, **ROUNDING)
