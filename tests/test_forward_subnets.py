"""Several subnets at once: what they share, compute and leave out, and any keep rate."""
from typing import Any

import pytest
import torch
from comparing import EXACT, ROUNDING, run_subnet
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode  # documented, in spite of its place
from torch.utils._pytree import tree_flatten


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
