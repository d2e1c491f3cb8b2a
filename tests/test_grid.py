"""The grid of subnets: what settings make, what a subnet costs, and what is refused."""
import argparse
import re
from typing import Any

import numpy as np
import pytest
import timm
import torch
from comparing import EXACT, ROUNDING, run_subnet
from parity import list_grid
from timm.layers import GluMlp, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from timm_supervit import Subnet, SuperVisionTransformer

# --- the grid of subnets ---


def test_the_settings_of_the_paper_are_the_defaults() -> None:
    model = timm.create_model('supervit_tiny')
    assert isinstance(model, SuperVisionTransformer)
    assert isinstance(model, VisionTransformer)
    assert model.img_sizes == (128, 160, 192, 224)
    assert model.keep_rates == (0.5, 0.7, 1.0)
    assert model.drop_layers == (3, 6, 9)
    assert model.train_subnets == 'sandwich'
    assert model.subnet == Subnet(224, 1.0)
    assert len(model.subnets) == 12


@pytest.mark.parametrize('name, width, heads', [
    ('supervit_tiny', 192, 3), ('supervit_small', 384, 6), ('supervit_base', 768, 12)])
def test_the_factories_have_the_widths_of_deit(name: str, width: int, heads: int) -> None:
    model = timm.create_model(name, device='meta')
    deit = timm.create_model(name.replace('supervit', 'deit') + '_patch16_224', device='meta')
    assert (model.embed_dim, model.blocks[0].attn.num_heads, len(model.blocks)) == (width, heads, 12)
    ours, theirs = (
        {n: p.shape for n, p in m.named_parameters() if not n.startswith('pos_embed')} for m in (model, deit))
    assert ours == theirs
    assert model.pos_embed_list[3].shape == deit.pos_embed.shape


def test_subnets_are_named_pairs_cheapest_first(small_model: Any) -> None:
    model = small_model()
    assert sorted(model.subnets) == list_grid(model)
    assert all(subnet._fields == ('img_size', 'keep_rate') for subnet in model.subnets)
    costs = []
    for subnet in model.subnets:
        # The fused attention of a CPU is not counted.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run_subnet(model, torch.zeros(1, 3, *[subnet.img_size] * 2), subnet)
        costs.append(counter.get_total_flops() // 2)
    assert costs == sorted(costs)
    assert costs == [model.macs(subnet) for subnet in model.subnets]


MACS: dict[str, dict[str, Any]] = {
    'gated linear units': dict(mlp_layer=GluMlp), 'SwiGLU': dict(mlp_layer=SwiGLU),
    'SwiGLU in one': dict(mlp_layer=SwiGLUPacked), 'attention pooling': dict(global_pool='map'),
    'attention pooling with the prefix': dict(global_pool='map', pool_include_prefix=True, reg_tokens=2),
    'pooling by the tokens themselves': dict(global_pool='prr'), 'no pooling': dict(global_pool=''),
    'register tokens': dict(reg_tokens=3), 'no classes': dict(num_classes=0), 'grey images': dict(in_chans=1),
}


@pytest.mark.parametrize('name', ['supervit_tiny', 'supervit_lvvit_small'])
@pytest.mark.parametrize('kind', MACS)
def test_macs_are_what_torch_counts_for_every_kind(small_model: Any, kind: str, name: str) -> None:
    if name == 'supervit_lvvit_small' and 'pool' in kind:
        pytest.skip('its head is its own')
    model = small_model(name, **MACS[kind]).requires_grad_(False)  # the counter stumbles over a latent that learns
    images = torch.zeros(1, model.in_chans, 64, 64)
    for subnet in model.subnets:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run_subnet(model, images, subnet)
        assert counter.get_total_flops() // 2 == model.macs(subnet)


NUMBERS: dict[str, Any] = {
    'numpy': (np.int64(48), np.float64(0.6)), 'numpy in single precision': (np.int32(48), np.float32(0.5)),
    'a list': [48, 0.6], 'a whole number as a rate': (48, 1),
}


@pytest.mark.parametrize('kind', NUMBERS)
def test_numbers_of_any_kind_are_the_numbers_that_they_are(small_model: Any, images: Tensor, kind: str) -> None:
    model, (img_size, keep_rate) = small_model(), NUMBERS[kind]
    model.subnet = NUMBERS[kind]
    assert model.subnet == (48, float(keep_rate))
    assert [type(value) for value in model.subnet] == [int, float]
    expected = run_subnet(model, images, (48, float(keep_rate)))
    torch.testing.assert_close(run_subnet(model, images, (img_size, keep_rate)), expected, **EXACT)
    torch.testing.assert_close(model.forward_subnets(images, [NUMBERS[kind]])[0], expected, **ROUNDING)
    assert model.macs(NUMBERS[kind]) == model.macs(Subnet(48, float(keep_rate)))


@pytest.mark.parametrize('subnet', [(48.0, 0.5), '48:0.5', (48,), 48, (True, 0.5), (48, '0.5'), (np.float64(48), 0.5)])
def test_what_is_no_subnet_is_refused_at_once(small_model: Any, images: Tensor, subnet: Any) -> None:
    model = small_model()
    before = model.subnet
    for use in (lambda: setattr(model, 'subnet', subnet), lambda: model.macs(subnet),
                lambda: model.forward_subnets(images, [subnet])):
        with pytest.raises(ValueError, match=r'as in|is not in \(0, 1\]'):
            use()
    assert model.subnet == before


def test_the_costs_are_those_of_the_method() -> None:
    # Counted by hand from the schedule, in GMACs to two decimals.
    published = {
        128: (0.74, 0.97, 1.44), 160: (1.16, 1.51, 2.27), 192: (1.67, 2.19, 3.32), 224: (2.30, 3.01, 4.60)}
    model = timm.create_model('supervit_small', device='meta')
    assert {subnet: round(model.macs(subnet) / 1e9, 2) for subnet in model.subnets} == {
        (img_size, keep_rate): gmacs
        for img_size, row in published.items() for keep_rate, gmacs in zip((0.5, 0.7, 1.0), row, strict=True)}


def test_settings_arrive_through_create_model_in_any_order_and_as_lists(small_model: Any) -> None:
    model = small_model(
        img_sizes=[32, 64], keep_rates=[1.0, 0.25], drop_layers=[2, 0], img_size=32, keep_rate=0.25,
        train_subnets='all')
    assert (model.img_sizes, model.keep_rates, model.drop_layers) == ((32, 64), (0.25, 1.0), (0, 2))
    assert model.subnet == Subnet(32, 0.25)
    assert model.train_subnets == 'all'


def test_settings_arrive_through_the_model_kwargs_of_timm_s_scripts() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
    kwargs = parser.parse_args([
        '--model-kwargs', 'img_sizes=(12,24)', 'keep_rates=[0.3,1.0]', 'drop_layers=2,', 'img_size=12',
        'keep_rate=0.3', 'train_subnets=active']).model_kwargs
    model = timm.create_model('supervit_digits', **kwargs)
    assert (model.img_sizes, model.keep_rates, model.drop_layers) == ((12, 24), (0.3, 1.0), (2,))
    assert (model.subnet, model.train_subnets) == (Subnet(12, 0.3), 'active')


def test_the_active_subnet_is_assignable_and_is_what_a_call_runs(small_model: Any, images: Tensor) -> None:
    model = small_model()
    expected = {subnet: run_subnet(model, images, subnet) for subnet in model.subnets}
    for subnet, output in expected.items():
        model.subnet = subnet
        assert model.subnet == subnet
        torch.testing.assert_close(model(images), output, **EXACT)
    model.subnet = (32, 0.9)  # a rate that is not in the grid
    assert model.subnet == Subnet(32, 0.9)
    torch.testing.assert_close(
        timm.create_model('supervit_digits', img_size=12).eval()(torch.ones(1, 3, 24, 24)).shape,
        torch.Size((1, 10)))


def test_a_call_may_name_the_size_or_the_rate_alone(small_model: Any, images: Tensor) -> None:
    model = small_model(img_size=48, keep_rate=0.6)
    torch.testing.assert_close(model(images), run_subnet(model, images, (48, 0.6)), **EXACT)
    torch.testing.assert_close(model(images, img_size=32), run_subnet(model, images, (32, 0.6)), **EXACT)
    torch.testing.assert_close(model(images, keep_rate=0.3), run_subnet(model, images, (48, 0.3)), **EXACT)


def test_subnets_differ(small_model: Any, images: Tensor) -> None:
    model = small_model()
    outputs = torch.stack(model.forward_subnets(images, model.subnets))
    distances = torch.cdist(outputs.flatten(1), outputs.flatten(1))
    assert (distances + torch.eye(len(outputs))).min() > 1e-2


@pytest.mark.parametrize('shape', [(64, 64), (48, 48), (100, 80), (20, 30)])
def test_images_of_any_size_are_resized_inside(small_model: Any, shape: tuple[int, int]) -> None:
    model = small_model()
    images = torch.randn(1, 3, *shape)
    resized = nn.functional.interpolate(images, size=(48, 48), mode='bilinear', align_corners=True)
    torch.testing.assert_close(
        model(images, img_size=48, keep_rate=0.6), model(resized, img_size=48, keep_rate=0.6), **ROUNDING)


# --- bad input ---

BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    'a size that the patch does not divide': (
        dict(img_sizes=(32, 50)), r'50 .* 16; use 48 or 64'),
    'a size below the patch': (dict(img_sizes=(8, 32)), r'8 .* 16; use 16'),
    'descending sizes': (dict(img_sizes=(64, 32)), r'\(64, 32\).*use \(32, 64\)'),
    'repeated sizes': (dict(img_sizes=(32, 32, 64)), r'\(32, 32, 64\).*use \(32, 64\)'),
    'no sizes': (dict(img_sizes=()), r'img_sizes \(\).*at least one'),
    'one size that is no sequence': (dict(img_sizes=64), r'img_sizes 64.*at least one'),
    'a size of 0': (dict(img_sizes=(0, 32)), r'0 is neither a positive whole number'),
    'a size below 0': (dict(img_sizes=(-16, 32)), r'-16 is neither a positive whole number'),
    'a size that is not whole': (dict(img_sizes=(32.5, 64)), r'32\.5 is neither a positive whole number'),
    'an active size that is not in the grid': (dict(img_size=40), r'40 is none of img_sizes \(32, 48, 64\)'),
    'an active size of another shape': (dict(img_size=(32, 48)), r'\(32, 48\) is none of img_sizes \(32, 48, 64\)'),
    'one rate that is no sequence': (dict(keep_rates=0.5), r'keep_rates 0\.5 is no list.*at least one'),
    'no rates': (dict(keep_rates=()), r'keep_rates \(\).*at least one'),
    'a rate of 0': (dict(keep_rates=(0, 1.0)), r'keep_rate 0 is not in \(0, 1\]'),
    'a rate below 0': (dict(keep_rates=(-0.5, 1.0)), r'keep_rate -0\.5 is not in \(0, 1\]'),
    'a rate above 1': (dict(keep_rates=(0.5, 1.5)), r'keep_rate 1\.5 is not in \(0, 1\]'),
    'a rate that is not a number': (dict(keep_rates=(float('nan'),)), r'keep_rate nan is not in \(0, 1\]'),
    'a rate that is text': (dict(keep_rates=('0.5',)), r"keep_rate '0\.5' is not in \(0, 1\]"),
    'repeated rates': (dict(keep_rates=(0.5, 0.5, 1.0)), r'\(0\.5, 0\.5, 1\.0\) repeat a rate; use \(0\.5, 1\.0\)'),
    'an active rate of 0': (dict(keep_rate=0.), r'keep_rate 0\.0 is not in \(0, 1\]'),
    'an active rate that is not a number': (dict(keep_rate=float('nan')), r'keep_rate nan is not in \(0, 1\]'),
    'a dropping block outside the depth': (dict(drop_layers=(1, 4)), r'4 is no block.*from 0 to 3'),
    'a dropping block below 0': (dict(drop_layers=(-1,)), r'-1 is no block.*from 0 to 3'),
    'a dropping block that is not whole': (dict(drop_layers=(1.5,)), r'1\.5 is no block'),
    'a dropping block twice': (dict(drop_layers=(1, 1)), r'\(1, 1\) repeat a block; use \(1,\)'),
    'an unknown sampling': (dict(train_subnets='some'), r"train_subnets 'some' is unknown; use one of sandwich"),
    'an unknown teacher': (dict(distill_teacher='me'), r"distill_teacher 'me' is unknown; use one of own_size"),
    'no class token': (dict(class_token=False), r'class_token=True'),
    'dropped patches': (dict(patch_drop_rate=0.5), r'patch_drop_rate=0'),
}


@pytest.mark.parametrize('what', BAD_SETTINGS)
def test_a_bad_setting_is_refused_by_name_with_its_remedy(small_model: Any, what: str) -> None:
    kwargs, message = BAD_SETTINGS[what]
    with pytest.raises(ValueError, match=message):
        small_model(**kwargs)


def test_settings_may_be_arrays(small_model: Any) -> None:
    model = small_model(
        img_sizes=np.array([32, 64]), keep_rates=torch.tensor([0.5, 1.0]), drop_layers=np.array([1, 2]),
        keep_rate=np.array(0.5))
    assert (model.img_sizes, model.keep_rates, model.drop_layers) == ((32, 64), (0.5, 1.0), (1, 2))
    assert all(type(value) in (int, float) for value in (*model.img_sizes, *model.keep_rates, *model.drop_layers))
    assert model.subnet == (64, 0.5)


BAD_CALLS: dict[str, tuple[tuple[Any, Any], str]] = {
    'a size that is not in the grid': ((40, 1.0), r'40 is none of img_sizes \(32, 48, 64\)'),
    'a rate of 0': ((32, 0), r'keep_rate 0 is not in \(0, 1\]'),
    'a rate below 0': ((32, -1.), r'keep_rate -1\.0 is not in \(0, 1\]'),
    'a rate above 1': ((32, 1.01), r'keep_rate 1\.01 is not in \(0, 1\]'),
    'a rate that is not a number': ((32, float('nan')), r'keep_rate nan is not in \(0, 1\]'),
}


@pytest.mark.parametrize('what', BAD_CALLS)
def test_a_bad_subnet_is_refused_before_any_work(small_model: Any, images: Tensor, what: str) -> None:
    subnet, message = BAD_CALLS[what]
    model = small_model()
    model.patch_embed.register_forward_pre_hook(lambda *_: pytest.fail('work was done'))
    kwargs = dict(img_size=subnet[0], keep_rate=subnet[1])
    for call in (
            lambda: model(images, **kwargs),
            lambda: model.forward_features(images, **kwargs),
            lambda: model.forward_intermediates(images, **kwargs),
            lambda: model.kept_patches(images, **kwargs),
            lambda: model.forward_subnets(images, [(64, 1.0), subnet]),
            lambda: setattr(model, 'subnet', subnet)):
        with pytest.raises(ValueError, match=message):
            call()
    assert model.subnet == Subnet(64, 1.0)


@pytest.mark.parametrize('shape', [(2, 1, 64, 64), (2, 4, 64, 64), (3, 64, 64)])
def test_images_of_another_shape_are_refused_before_any_work(small_model: Any, shape: tuple[int, ...]) -> None:
    model = small_model()
    model.patch_embed.register_forward_pre_hook(lambda *_: pytest.fail('work was done'))
    message = re.escape(str(shape)) + r'.*\[B, 3, H, W\].*in_chans='
    for call in (model, model.forward_intermediates, model.kept_patches):
        with pytest.raises(ValueError, match=message):
            call(torch.zeros(shape))
    with pytest.raises(ValueError, match=message):
        model.forward_subnets(torch.zeros(shape), model.subnets)
