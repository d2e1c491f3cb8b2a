"""SuperViT is a vision transformer of timm with subnets: what a call may and may not do, and all that a ViT does."""
import argparse
import copy
import io
import pickle
import re
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import timm
import torch
from parity import list_grid
from reference import ReferenceSuperViT
from timm.layers import GluMlp, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import Block, VisionTransformer
from timm.optim import create_optimizer_v2
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode  # documented, in spite of its place
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from timm_supervit import Subnet, SuperVisionTransformer

EXACT = dict(atol=0, rtol=0)
# Two ways to compute the same in float32: sums in another order, some hundreds of terms of size 1.
ROUNDING = dict(atol=2e-5, rtol=1e-4)


def run_subnet(model: Any, images: Tensor, subnet: tuple[int, float]) -> Tensor:
    return model(images, img_size=subnet[0], keep_rate=subnet[1])


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


# --- a call changes nothing ---


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything a call could change: attributes of all modules, parameters, buffers, hooks."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ('_parameters', '_buffers'):
                state |= {f'{name}.{k}': None if v is None else v.detach().clone() for k, v in value.items()}
            elif key != '_modules':
                state[f'{name}.{key}'] = repr(value)
    return state


def test_images_of_a_size_that_is_not_in_the_grid_are_one_warning(small_model: Any) -> None:
    model, x = small_model(img_size=48, keep_rate=0.6), torch.zeros(1, 3, 40, 40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('default')
        for _ in range(3):
            model(x)
    assert len(caught) == 1
    for part in ('40 x 40', '(32, 48, 64)', '48:0.6', '--model-kwargs img_size='):
        assert part in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model(x, img_size=32)  # who names a size knows
        for size in model.img_sizes:
            model(torch.zeros(1, 3, size, size))
    with pytest.warns(UserWarning, match='every subnet resizes them'):
        model.forward_subnets(x, model.subnets)


@pytest.mark.parametrize('call', ['forward', 'forward_subnets', 'forward_intermediates', 'kept_patches'])
@pytest.mark.parametrize('training', [False, True])
def test_a_call_changes_nothing_on_the_model(small_model: Any, images: Tensor, call: str, training: bool) -> None:
    model = small_model().train(training)
    before = snapshot(model)
    if call == 'forward_subnets':
        model.forward_subnets(images, model.subnets)
    else:
        getattr(model, call)(images, img_size=32, keep_rate=0.3)
    after = snapshot(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(after[name], value, **EXACT)
        else:
            assert after[name] == value, name


def test_a_failing_call_changes_nothing_on_the_model(small_model: Any, images: Tensor) -> None:
    model = small_model()
    expected = model(images)
    with pytest.raises(ValueError, match='keep_rate'):
        model(images, img_size=32, keep_rate=2.0)
    assert model.subnet == Subnet(64, 1.0)
    torch.testing.assert_close(model(images), expected, **EXACT)


def test_eight_threads_run_eight_subnets_of_one_model(small_model: Any) -> None:
    model = small_model()
    subnets = list_grid(model)[:8]
    inputs = [torch.randn(2, 3, 64, 64) for _ in subnets]
    with torch.no_grad():
        alone = [run_subnet(model, x, subnet) for x, subnet in zip(inputs, subnets, strict=True)]
    barrier, together = threading.Barrier(8), [[torch.empty(0)] * 20 for _ in subnets]

    def work(i: int) -> None:
        barrier.wait()
        with torch.no_grad():  # per thread
            together[i] = [run_subnet(model, inputs[i], subnets[i]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, outputs in zip(alone, together, strict=True):
        for output in outputs:
            torch.testing.assert_close(output, expected, **EXACT)


# --- forward_subnets ---


def test_forward_subnets_answers_in_the_order_asked_with_repeats(small_model: Any, images: Tensor) -> None:
    model = small_model()
    asked = [(32, 0.6), (64, 1.0), (32, 0.6), (48, 0.3), (32, 1.0), (64, 0.77)]
    outputs = model.forward_subnets(images, asked)
    assert isinstance(outputs, list)
    for subnet, output in zip(asked, outputs, strict=True):
        torch.testing.assert_close(output, run_subnet(model, images, subnet), **ROUNDING)
    assert model.forward_subnets(images, []) == []


@pytest.mark.parametrize('training', [False, True])
def test_subnets_of_one_size_share_what_they_have_in_common(
        small_model: Any,
        images: Tensor,
        training: bool,
) -> None:
    model = small_model().train(training)  # drops in blocks 1 and 2 of 0 to 3
    calls = dict.fromkeys(('patch_embed', *(f'blocks.{i}.{part}' for i in range(4) for part in ('attn.qkv', 'mlp'))), 0)

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1
        return hook

    for name in calls:
        model.get_submodule(name).register_forward_hook(count(name))
    model.forward_subnets(images, [(64, 1.0), (48, 0.6), (64, 0.3), (48, 1.0), (64, 0.6), (64, 0.6)])
    # Three subnets of 64 and two of 48 pixels, of which one is asked for twice.
    assert calls == {
        'patch_embed': 2,
        'blocks.0.attn.qkv': 2, 'blocks.0.mlp': 2,
        'blocks.1.attn.qkv': 2, 'blocks.1.mlp': 2,
        'blocks.2.attn.qkv': 5, 'blocks.2.mlp': 5,
        'blocks.3.attn.qkv': 5, 'blocks.3.mlp': 5,
    }


@pytest.mark.parametrize('settings, tokens', [
    (dict(), 1), (dict(reg_tokens=2), 3), (dict(drop_layers=(3,)), 1), (dict(init_values=0.1), 1),
    (dict(global_pool='avg'), 9), (dict(global_pool='map'), 9), (dict(global_pool=''), 9),
])
def test_forward_subnets_computes_in_the_last_block_what_the_head_reads(
        small_model: Any,
        images: Tensor,
        settings: dict[str, Any],
        tokens: int,
) -> None:
    model = small_model(**settings)
    shapes = []
    model.blocks[-1].mlp.register_forward_hook(lambda _module, _args, output: shapes.append(tuple(output.shape[:2])))
    for training in (False, True):
        model.train(training).forward_subnets(images, [(64, 0.6)])
        features = model.forward_features_subnets(images, [(64, 0.6)])[0]
        assert shapes == [(2, tokens), features.shape[:2]]
        torch.testing.assert_close(features, model.forward_features(images, keep_rate=0.6))
        shapes.clear()


class LowRankAdapter(nn.Module):
    """Adds a trained correction to a linear layer, as adapters do that take a layer's place."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2)
        self.up = nn.Linear(2, layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class WrappedTensor(Tensor):
    """Stands for quantized or distributed weights."""


def _adapt(attn: Any) -> None:
    attn.qkv = LowRankAdapter(attn.qkv)


def _offload(attn: Any) -> None:
    # As libraries do that bring the weights to a device for the call alone.
    weight, bias = attn.qkv.weight.detach(), attn.qkv.bias.detach()
    attn.qkv.to('meta').forward = lambda x: 2 * nn.functional.linear(x, weight, bias)


PROJECTIONS: dict[str, Any] = {
    'an adapter': _adapt,
    'a parametrization': lambda attn: parametrize.register_parametrization(attn.qkv, 'weight', Double()),
    'pruning': lambda attn: prune.random_unstructured(attn.qkv, 'weight', amount=0.5),
    'weights of another kind': lambda attn: setattr(
        attn.qkv, 'weight', nn.Parameter(2 * attn.qkv.weight.as_subclass(WrappedTensor))),
    'a hook': lambda attn: attn.qkv.register_forward_hook(lambda _module, _args, output: 2 * output),
    'a hook before': lambda attn: attn.qkv.register_forward_pre_hook(lambda _module, args: 2 * args[0]),
    'a hook behind': lambda attn: attn.q_norm.register_forward_hook(lambda _module, _args, output: 2 * output),
    'offloading': _offload,
}


@pytest.mark.parametrize('change', PROJECTIONS)
def test_a_changed_projection_of_the_last_block_acts_in_forward_subnets(
        small_model: Any,
        images: Tensor,
        change: str,
) -> None:
    model = small_model()
    before = model.forward_subnets(images, [(64, 0.6)])[0]
    PROJECTIONS[change](model.blocks[-1].attn)
    output = model.forward_subnets(images, [(64, 0.6)])[0]
    torch.testing.assert_close(output, run_subnet(model, images, (64, 0.6)), **ROUNDING)
    assert not torch.allclose(output, before, **ROUNDING)


@pytest.mark.parametrize('register', ['register_full_backward_hook', 'register_full_backward_pre_hook'])
def test_a_backward_hook_on_the_last_projection_is_called_in_forward_subnets(
        small_model: Any,
        images: Tensor,
        register: str,
) -> None:
    model = small_model()
    calls = []
    getattr(model.blocks[-1].attn.qkv, register)(lambda *_: calls.append(1) or None)
    model.forward_subnets(images, [(64, 0.6)])[0].sum().backward()
    assert len(calls) == 1


def test_an_empty_batch_gives_no_logits(small_model: Any, images: Tensor) -> None:
    for output in small_model().forward_subnets(images[:0], [(64, 1.0), (64, 0.6), (32, 0.3)]):
        assert output.shape == (0, 10)


def test_dropout_of_attention_acts_in_the_last_block_of_forward_subnets(small_model: Any, images: Tensor) -> None:
    model = small_model(attn_drop_rate=0.5)
    last = model.blocks[-1].train()
    x = torch.randn(2, 17, 48)
    assert not torch.equal(last(x, prefix_only=True), last(x, prefix_only=True))
    last.eval()
    torch.testing.assert_close(last(x, prefix_only=True), last(x)[:, :1], **ROUNDING)


def test_rates_that_keep_the_same_tokens_for_a_while_part_later(small_model: Any, images: Tensor) -> None:
    # 16 patches: both rates keep 9 of them in block 1, but 5 and 6 in block 2.
    model = small_model(drop_layers=(1, 2))
    rates = (0.5, 0.529)
    kept = [[p.shape[1] for p in model.kept_patches(images, img_size=64, keep_rate=r).values()] for r in rates]
    assert kept == [[9, 5], [9, 6]]
    outputs = model.forward_subnets(images, [(64, rate) for rate in rates])
    for rate, output in zip(rates, outputs, strict=True):
        torch.testing.assert_close(output, run_subnet(model, images, (64, rate)), **ROUNDING)


def test_a_rate_that_drops_nothing_is_the_plain_network(small_model: Any, images: Tensor) -> None:
    model = small_model()
    torch.testing.assert_close(model(images, keep_rate=0.999), model(images, keep_rate=1.0), **EXACT)
    torch.testing.assert_close(model(images, keep_rate=1), model(images, keep_rate=1.0), **EXACT)


@pytest.mark.parametrize('keep_rate', [1e-9, 0.05, 1 / 3, 0.5, 0.7, 0.95, 1.0])
def test_any_rate_is_allowed(small_model: Any, images: Tensor, keep_rate: float) -> None:
    model = small_model()
    tokens = model.forward_features(images, keep_rate=keep_rate)
    assert 2 <= tokens.shape[1] <= 17
    assert model(images, keep_rate=keep_rate).isfinite().all()


class RecordOperators(TorchDispatchMode):
    """Takes down the name and the shapes of the results of everything that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        self.shapes += [tuple(t.shape) for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        return result


def test_dropping_makes_no_attention_matrix(small_model: Any, images: Tensor) -> None:
    model = small_model()
    with torch.no_grad(), RecordOperators() as record:
        model(images, keep_rate=0.6)  # 17, 12 and 9 tokens
    assert not any(shape[-2:] in ((17, 17), (12, 12), (9, 9)) for shape in record.shapes)
    assert record.names.count('index_select') == 2
    assert not {'gather', 'take_along_dim'} & set(record.names)
    assert sum('scaled_dot_product' in name for name in record.names) == 4


# --- gradients ---


@pytest.mark.parametrize('call', ['forward', 'forward_subnets', 'forward_features', 'forward_intermediates'])
@pytest.mark.parametrize('kwargs', [dict(), dict(reg_tokens=2), dict(global_pool='avg'), dict(no_embed_class=True)])
def test_every_parameter_gets_a_gradient_from_any_training_forward(
        small_model: Any,
        images: Tensor,
        call: str,
        kwargs: dict[str, Any],
) -> None:
    model = small_model(**kwargs).train()
    if call == 'forward_subnets':
        sum(output.sum() for output in model.forward_subnets(images, [(32, 1.0), (32, 0.3)])).backward()
    elif call == 'forward_intermediates':
        model.forward_head(model.forward_intermediates(images, img_size=32, keep_rate=0.3)[0]).sum().backward()
    elif call == 'forward_features':
        model.forward_head(model.forward_features(images, img_size=32, keep_rate=0.3)).sum().backward()
    else:
        run_subnet(model, images, (32, 0.3)).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    used, *unused = model.pos_embed_list
    assert used.grad.abs().sum() > 0
    for pos_embed in unused:
        torch.testing.assert_close(pos_embed.grad, torch.zeros_like(pos_embed), **EXACT)


def test_gradients_in_evaluation_mode_are_those_of_training_mode(small_model: Any, images: Tensor) -> None:
    model = small_model()
    gradients = []
    for training in (False, True):
        model.zero_grad()
        run_subnet(model.train(training), images, (48, 0.6)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], **ROUNDING)


@pytest.mark.parametrize('call', ['forward', 'forward_subnets'])
@pytest.mark.parametrize('drop_path_rate', [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(
        small_model: Any,
        images: Tensor,
        call: str,
        drop_path_rate: float,
) -> None:
    model = small_model(drop_path_rate=drop_path_rate).train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)  # the same blocks are left out
        subnets = [(64, 1.0), (64, 0.3), (32, 0.6)]
        outputs = model.forward_subnets(images, subnets) if call == 'forward_subnets' else [
            run_subnet(model, images, subnets[1])]
        sum(output.square().sum() for output in outputs).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], **ROUNDING)


def test_gradient_checkpointing_runs_the_blocks_again(small_model: Any, images: Tensor) -> None:
    model = small_model().train()
    model.set_grad_checkpointing()
    calls = []
    model.blocks[2].attn.qkv.register_forward_hook(lambda *_: calls.append(1))
    run_subnet(model, images, (64, 0.3)).sum().backward()
    assert len(calls) == 2


# --- the same as a vision transformer of timm ---

VARIANTS: dict[str, dict[str, Any]] = {
    'plain': dict(),
    'register tokens': dict(reg_tokens=2),
    'positions for patches alone': dict(no_embed_class=True, reg_tokens=2),
    'average pooling': dict(global_pool='avg'),
    'average pooling with the prefix': dict(global_pool='avg', pool_include_prefix=True),
    'maximum pooling': dict(global_pool='max'),
    'both poolings': dict(global_pool='avgmax'),
    'attention pooling': dict(global_pool='map'),
    'no pooling': dict(global_pool=''),
    'query and key norm': dict(qk_norm=True),
    'norms of attention and FFN': dict(scale_attn_norm=True, scale_mlp_norm=True),
    'layer scale': dict(init_values=0.5),
    'a norm before': dict(pre_norm=True),
    'no bias': dict(qkv_bias=False, proj_bias=False),
    'no norm after': dict(final_norm=False),
    'features alone': dict(num_classes=0),
    'grey images': dict(in_chans=1),
    'another norm and activation': dict(norm_layer='rmsnorm', act_layer='relu'),
    'a narrow FFN': dict(mlp_ratio=1.5),
}


@pytest.mark.parametrize('variant', VARIANTS)
def test_at_rate_one_it_is_a_vision_transformer_of_timm(small_model: Any, variant: str) -> None:
    kwargs = VARIANTS[variant]
    model = small_model(**kwargs)
    images = torch.randn(2, model.in_chans, 64, 64)
    for i, img_size in enumerate(model.img_sizes):
        settings = dict(embed_dim=48, depth=4, num_heads=3, num_classes=10) | kwargs
        vit = VisionTransformer(img_size=img_size, patch_size=16, **settings).eval()
        weights = {key: value for key, value in model.state_dict().items() if not key.startswith('pos_embed_list')}
        vit.load_state_dict(weights | {'pos_embed': model.pos_embed_list[i]})
        resized = nn.functional.interpolate(images, size=(img_size,) * 2, mode='bilinear', align_corners=True)
        for method in ('forward_features', 'forward'):
            torch.testing.assert_close(
                getattr(model, method)(images, img_size=img_size), getattr(vit, method)(resized), **ROUNDING)
        for output_fmt in ('NCHW', 'NLC'):
            kwargs_fmt = dict(output_fmt=output_fmt, norm=True, return_prefix_tokens=True, intermediates_only=True)
            ours = model.forward_intermediates(images, img_size=img_size, **kwargs_fmt)
            for features, expected in zip(ours, vit.forward_intermediates(resized, **kwargs_fmt), strict=True):
                for tensor, theirs in zip(features, expected, strict=True):
                    torch.testing.assert_close(tensor, theirs, **ROUNDING)


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('variant', VARIANTS)
def test_a_dropping_block_attends_as_a_block_of_timm_does(small_model: Any, variant: str, fused: bool) -> None:
    model = small_model(**VARIANTS[variant])
    for block in model.blocks:
        x = torch.randn(2, 10, 48)
        attn = block.attn
        attn.fused_attn = fused
        expected = Block.forward(block, x)
        everything, _, order = block(x, rank=True)
        torch.testing.assert_close(everything, expected, **ROUNDING)
        torch.testing.assert_close(block(x, prefix_only=True), expected[:, :block.num_prefix_tokens], **ROUNDING)
        num_prefix = block.num_prefix_tokens
        assert order[:, :num_prefix].tolist() == [list(range(num_prefix))] * 2
        torch.testing.assert_close(
            block(x, num_keep=4), torch.stack([e[o[:num_prefix + 4]] for e, o in zip(expected, order, strict=True)]),
            **ROUNDING)
        out, scores = attn(block.norm1(x), return_scores=True)
        torch.testing.assert_close(out, attn(block.norm1(x)), **ROUNDING)
        assert scores.shape == (2, 10)
        torch.testing.assert_close(scores.sum(dim=1), torch.ones(2), **ROUNDING)
        for row, places in zip(scores, order[:, num_prefix:], strict=True):
            assert row[places].tolist() == sorted(row[num_prefix:].tolist(), reverse=True)
        # An independent attention matrix gives the same scores.
        qkv = attn.qkv(block.norm1(x)).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        query, key = attn.q_norm(qkv[0]), attn.k_norm(qkv[1])
        expected = (query @ key.transpose(2, 3) / 4.).softmax(dim=3)[:, :, 0].mean(dim=1)
        torch.testing.assert_close(scores, expected, **ROUNDING)


def test_stochastic_depth_acts_in_a_dropping_block_as_in_one_of_timm(small_model: Any) -> None:
    block = small_model(drop_path_rate=0.5).blocks[-1].train()
    x = torch.randn(8, 10, 48)
    results = []
    for run in (
            lambda: Block.forward(block, x),
            lambda: block(x, rank=True)[0],
            lambda: block(x, num_keep=9).sort(dim=1).values,
    ):
        torch.manual_seed(0)
        results.append(run())
    torch.testing.assert_close(results[1], results[0], **ROUNDING)
    torch.testing.assert_close(results[2], results[0].sort(dim=1).values, **ROUNDING)


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_variant_runs_every_subnet_in_training_and_evaluation(small_model: Any, variant: str) -> None:
    model = small_model(**VARIANTS[variant])
    images = torch.randn(2, model.in_chans, 64, 64)
    subnets = list_grid(model)
    for training in (False, True):
        outputs = model.train(training).forward_subnets(images, subnets)
        for subnet, output in zip(subnets, outputs, strict=True):
            torch.testing.assert_close(output, run_subnet(model, images, subnet), **ROUNDING)


def test_drop_rates_act_in_training_alone(small_model: Any, images: Tensor) -> None:
    rates = dict(drop_path_rate=0.5, drop_rate=0.2, proj_drop_rate=0.1, attn_drop_rate=0.1, pos_drop_rate=0.1)
    model, plain = small_model(**rates), small_model()
    plain.load_state_dict(model.state_dict())
    for keep_rate in (0.3, 1.0):
        torch.testing.assert_close(model(images, keep_rate=keep_rate), plain(images, keep_rate=keep_rate), **EXACT)
    model.train()
    assert not torch.equal(model(images, keep_rate=0.3), model(images, keep_rate=0.3))


def test_stochastic_depth_acts_in_forward_subnets_as_in_a_single_call(small_model: Any, images: Tensor) -> None:
    model = small_model(drop_path_rate=0.5).double().train()
    results = []
    for run in (run_subnet, lambda model, images, subnet: model.forward_subnets(images, [subnet])[0]):
        torch.manual_seed(0)
        model.zero_grad()
        output = run(model, images.double(), (64, 0.6))
        output.square().sum().backward()
        results.append([output, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_subnets_of_one_size_share_the_masks_of_stochastic_depth(small_model: Any, images: Tensor) -> None:
    model = small_model(drop_path_rate=0.9, drop_layers=(3,)).train()
    # Both keep all there is, up to the attention of the last block: the same draws give the same results.
    first, second = model.forward_subnets(images, [(64, 1.0), (64, 0.999)])
    torch.testing.assert_close(first, second, **EXACT)


# --- dense features ---


def trace_tokens(reference: ReferenceSuperViT, images: Tensor, img_size: int, keep_rate: float) -> dict[str, list]:
    """Follow each token of each image by itself: its last value after each block, and which ones are left."""
    steps: dict[str, list] = {'dense': [], 'left': []}
    size = (img_size, img_size)
    x = nn.functional.interpolate(images, size, mode='bilinear', align_corners=True)
    x = reference.patch_embed['proj'](x).flatten(2).transpose(1, 2)
    x = torch.cat([reference.cls_token.expand(len(x), 1, -1), x], dim=1)
    x = x + reference.pos_embed_list[reference.img_sizes.index(img_size)]
    values = [dict(enumerate(image)) for image in x]  # place 0 is the class token
    alive = [list(range(x.shape[1])) for _ in x]
    for layer, block in enumerate(reference.blocks):
        for b in range(len(x)):
            tokens = torch.stack([values[b][place] for place in alive[b]])[None]
            out, attention = block.attn(block.norm1(tokens))
            tokens = (tokens + out)[0]
            values[b] |= dict(zip(alive[b], tokens, strict=True))
            if layer in reference.drop_layers and keep_rate < 1:
                count = min(len(alive[b]) - 1, -int(-keep_rate * len(alive[b]) // 1))
                scores = dict(zip(alive[b][1:], attention[0].mean(dim=0)[0, 1:].tolist(), strict=True))
                alive[b] = [0, *sorted(scores, key=scores.__getitem__, reverse=True)[:count]]
            for place in alive[b]:
                values[b][place] = values[b][place] + block.mlp(block.norm2(values[b][place]))
        steps['dense'].append(torch.stack([torch.stack([v[p] for p in range(x.shape[1])]) for v in values]))
        steps['left'].append([sorted(place - 1 for place in places if place) for places in alive])
    return steps


@pytest.fixture
def traced(small_model: Any, images: Tensor) -> tuple[Any, Tensor, dict[str, list]]:
    model = small_model().double()
    reference = ReferenceSuperViT(
        img_sizes=model.img_sizes, drop_layers=model.drop_layers, embed_dim=48, depth=4, num_heads=3, num_classes=10)
    reference.double().load_state_dict(model.state_dict())
    with torch.no_grad():
        return model, images.double(), trace_tokens(reference, images.double(), 64, 0.3)


def test_a_dropped_position_holds_the_last_value_of_its_token(traced: Any) -> None:
    model, images, steps = traced
    intermediates = model.forward_intermediates(
        images, keep_rate=0.3, output_fmt='NLC', return_prefix_tokens=True, intermediates_only=True)
    for (patches, prefix), expected in zip(intermediates, steps['dense'], strict=True):
        torch.testing.assert_close(torch.cat([prefix, patches], dim=1), expected, atol=1e-10, rtol=0)
    maps = model.forward_intermediates(images, keep_rate=0.3, indices=[3], intermediates_only=True)
    torch.testing.assert_close(  # row-major
        maps[0], steps['dense'][3][:, 1:].transpose(1, 2).reshape(2, 48, 4, 4), atol=1e-10, rtol=0)


def test_kept_patches_are_numbered_in_the_grid_of_the_subnet(traced: Any) -> None:
    model, images, steps = traced
    kept = model.kept_patches(images, keep_rate=0.3)
    assert list(kept) == [1, 2]
    for layer, patches in kept.items():
        assert [sorted(row) for row in patches.tolist()] == steps['left'][layer]
    assert model.kept_patches(images, keep_rate=1.0) == {}


@pytest.mark.parametrize('keep_rate', [0.3, 1.0])
def test_forward_intermediates_gives_what_forward_features_gives(
        small_model: Any,
        images: Tensor,
        keep_rate: float,
) -> None:
    model = small_model()
    for img_size in model.img_sizes:
        subnet = dict(img_size=img_size, keep_rate=keep_rate)
        final, maps = model.forward_intermediates(images, **subnet)
        torch.testing.assert_close(
            model.forward_head(final), model.forward_head(model.forward_features(images, **subnet)), **ROUNDING)
        side = img_size // 16
        assert [tuple(m.shape) for m in maps] == [(2, 48, side, side)] * 4


def test_forward_intermediates_takes_the_arguments_of_timm(small_model: Any, images: Tensor) -> None:
    model = small_model(keep_rate=0.6)
    maps = model.forward_intermediates(images, intermediates_only=True)
    for indices, chosen in ((2, [2, 3]), ([0, 2], [0, 2]), ((1,), [1]), (None, [0, 1, 2, 3])):
        for stop_early in (False, True):
            some = model.forward_intermediates(images, indices, stop_early=stop_early, intermediates_only=True)
            for tensor, i in zip(some, chosen, strict=True):
                torch.testing.assert_close(tensor, maps[i], **EXACT)
    named = model.forward_intermediates(images, [1], output_dict=True, return_prefix_tokens=True)
    assert set(named) == {'image_features', 'image_intermediates', 'image_intermediates_prefix'}
    assert named['image_intermediates_prefix'][0].shape == (2, 1, 48)
    only = model.forward_intermediates(images, [1], output_dict=True, intermediates_only=True)
    assert set(only) == {'image_intermediates'}
    with pytest.raises(ValueError, match='NHWC'):
        model.forward_intermediates(images, output_fmt='NHWC')


def test_get_intermediate_layers_is_dense_too(small_model: Any, images: Tensor) -> None:
    model = small_model(keep_rate=0.3)
    layers = model.get_intermediate_layers(images, n=[1, 3], reshape=True)
    maps = model.forward_intermediates(images, [1, 3], intermediates_only=True)
    for layer, expected in zip(layers, maps, strict=True):
        torch.testing.assert_close(layer, expected, **EXACT)


@pytest.mark.parametrize('keep_rate', [0.3, 1.0])
def test_pruned_layers_leave_the_others_as_they_are(small_model: Any, images: Tensor, keep_rate: float) -> None:
    model = small_model(keep_rate=keep_rate)
    before = model.forward_intermediates(images, [0, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    assert len(model.blocks) == 3
    after = model.forward_intermediates(images, [0, 2], intermediates_only=True)
    for tensor, expected in zip(after, before, strict=True):
        torch.testing.assert_close(tensor, expected, **EXACT)
    tokens = model(images)  # neither pooled nor classified
    torch.testing.assert_close(tokens, model.forward_features(images), **EXACT)
    model.prune_intermediate_layers([0], prune_norm=True)  # no dropping block is left
    assert model(images).shape == (2, 17, 48)


@pytest.mark.parametrize('keep_rate', [0.3, 1.0])
def test_features_only_gives_maps_of_the_active_subnet(small_model: Any, images: Tensor, keep_rate: float) -> None:
    model = small_model(img_size=48, keep_rate=keep_rate)
    backbone = small_model(img_size=48, keep_rate=keep_rate, features_only=True, out_indices=(1, 3))
    weights = {f'model.{key}': value for key, value in model.state_dict().items()}
    missing = backbone.load_state_dict(weights, strict=False).missing_keys
    assert missing == []
    maps = backbone(images)
    assert backbone.feature_info.channels() == [48, 48]
    assert backbone.feature_info.reduction() == [16, 16]
    for tensor, expected in zip(
            maps, model.forward_intermediates(images, [1, 3], intermediates_only=True), strict=True):
        torch.testing.assert_close(tensor, expected, **EXACT)


# --- changing a model ---


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


# --- masks ---


def test_a_mask_works_where_nothing_is_dropped(small_model: Any, images: Tensor) -> None:
    model = small_model(img_sizes=(64,))
    vit = VisionTransformer(img_size=64, embed_dim=48, depth=4, num_heads=3, num_classes=10).eval()
    weights = model.state_dict()
    vit.load_state_dict({k: v for k, v in weights.items() if k[:9] != 'pos_embed'} | {
        'pos_embed': weights['pos_embed_list.0']})
    mask = torch.rand(17, 17) > 0.3
    mask[:, 0] = True
    torch.testing.assert_close(model(images, attn_mask=mask), vit(images, attn_mask=mask), **ROUNDING)
    torch.testing.assert_close(model(images, is_causal=True), vit(images, is_causal=True), **ROUNDING)
    assert not torch.allclose(model(images, attn_mask=mask), model(images))
    torch.testing.assert_close(
        model.forward_intermediates(images, attn_mask=mask)[0], vit.forward_features(images, attn_mask=mask),
        **ROUNDING)


def test_a_mask_is_refused_where_tokens_are_dropped(small_model: Any, images: Tensor) -> None:
    model, mask = small_model(keep_rate=0.3), torch.ones(17, 17, dtype=torch.bool)
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=r'64:0\.3.*keep_rate=1\.0'):
            call(images, attn_mask=mask)
        with pytest.raises(ValueError, match=r'keep_rate=1\.0'):
            call(images, is_causal=True)


# --- compilers and tracers ---


@pytest.mark.parametrize('training', [False, True])
def test_every_subnet_compiles_to_one_graph(small_model: Any, images: Tensor, training: bool) -> None:
    model = small_model(depth=3, drop_layers=(1,)).train(training)
    subnets = [(64, 0.3), (32, 1.0)]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    for subnet in subnets:
        torch.testing.assert_close(run_subnet(compiled, images, subnet), run_subnet(model, images, subnet), **ROUNDING)
    together = torch.compile(model.forward_subnets, backend='eager', fullgraph=True)
    for output, subnet in zip(together(images, subnets), subnets, strict=True):
        torch.testing.assert_close(output, run_subnet(model, images, subnet), **ROUNDING)


def test_a_compiled_model_follows_the_active_subnet(small_model: Any, images: Tensor) -> None:
    model = small_model(depth=3, drop_layers=(1,))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    compiled(images)
    model.subnet = (32, 0.3)
    torch.testing.assert_close(compiled(images), model(images), **ROUNDING)


@pytest.mark.parametrize('subnet', [(64, 1.0), (48, 0.6)])
def test_a_subnet_exports_with_any_batch_size(small_model: Any, images: Tensor, subnet: tuple[int, float]) -> None:
    model = small_model(img_size=subnet[0], keep_rate=subnet[1])
    batch = torch.export.Dim('batch', min=1, max=1024)  # without a bound torch 2.5 finds fault with the largest integer
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch}, None, None)[:1]).module()
    for size in (1, 2, 5):
        x = torch.randn(size, 3, 64, 64)
        torch.testing.assert_close(program(x), model(x), **ROUNDING)


def test_a_subnet_given_in_the_call_exports(small_model: Any, images: Tensor) -> None:
    model = small_model()
    program = torch.export.export(model, (images,), kwargs=dict(img_size=48, keep_rate=0.3)).module()
    torch.testing.assert_close(
        program(images, img_size=48, keep_rate=0.3), run_subnet(model, images, (48, 0.3)), **ROUNDING)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('subnet', [(64, 1.0), (48, 0.6)])
@pytest.mark.filterwarnings('ignore:The nodes obtained by tracing the model in train mode')
def test_torchvision_extracts_features_of_the_active_subnet(
        small_model: Any,
        images: Tensor,
        subnet: tuple[int, float],
        training: bool,
) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model = small_model(img_size=subnet[0], keep_rate=subnet[1]).train(training)
    options = dict(tracer_kwargs=dict(
        leaf_modules=timm.models.get_notrace_modules(),
        autowrap_functions=timm.models.get_notrace_functions()))
    nodes = get_graph_node_names(model, **options)
    assert 'head' in nodes[0]
    extractor = create_feature_extractor(model, return_nodes=['norm', 'head'], **options)
    features = extractor(images)
    torch.testing.assert_close(features['norm'], model.forward_features(images), **ROUNDING)
    torch.testing.assert_close(features['head'], model(images), **ROUNDING)
    features['head'].sum().backward()


# --- bad input ---

BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    'a size that the patch does not divide': (
        dict(img_sizes=(32, 50)), r'50 is not divisible by the patch size 16; use 48 or 64'),
    'a size below the patch': (dict(img_sizes=(8, 32)), r'8 is not divisible by the patch size 16; use 16'),
    'descending sizes': (dict(img_sizes=(64, 32)), r'\(64, 32\).*use \(32, 64\)'),
    'repeated sizes': (dict(img_sizes=(32, 32, 64)), r'\(32, 32, 64\).*use \(32, 64\)'),
    'no sizes': (dict(img_sizes=()), r'img_sizes \(\).*at least one'),
    'one size that is no sequence': (dict(img_sizes=64), r'img_sizes 64.*at least one'),
    'a size of 0': (dict(img_sizes=(0, 32)), r'0 is neither a positive whole number'),
    'a size below 0': (dict(img_sizes=(-16, 32)), r'-16 is neither a positive whole number'),
    'a size that is not whole': (dict(img_sizes=(32.5, 64)), r'32\.5 is neither a positive whole number'),
    'an active size that is not in the grid': (dict(img_size=40), r'40 is none of img_sizes \(32, 48, 64\)'),
    'an active size of another shape': (dict(img_size=(32, 48)), r'\(32, 48\) is none of img_sizes \(32, 48, 64\)'),
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
    'images of dynamic size': (dict(dynamic_img_size=True), r'dynamic_img_size=False'),
    'dropped patches': (dict(patch_drop_rate=0.5), r'patch_drop_rate=0'),
}


@pytest.mark.parametrize('what', BAD_SETTINGS)
def test_a_bad_setting_is_refused_by_name_with_its_remedy(small_model: Any, what: str) -> None:
    kwargs, message = BAD_SETTINGS[what]
    with pytest.raises(ValueError, match=message):
        small_model(**kwargs)


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
