"""Every attention and every block is called as a module: what a user hooks, patches or wraps acts in each of them."""
import copy
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from comparing import ROUNDING
from parity import import_fully_shard
from processes import run_ranks
from timm.layers import set_fused_attn
from timm.task import ClassificationTask
from timm.utils import AttentionExtract
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from timm_supervit.models.token_keeping import TokenKeepingAttention, rank_tokens

BACKBONES = ['supervit_tiny', 'supervit_lvvit_small']
CALLS: dict[str, Callable[..., Any]] = {
    'forward': lambda model, images: model(images, keep_rate=0.3),
    'forward of all tokens': lambda model, images: model(images, keep_rate=1.0),
    'forward_subnets': lambda model, images: model.forward_subnets(images, [(64, 1.0), (64, 0.3), (64, 0.6)]),
    'forward_features': lambda model, images: model.forward_features(images, keep_rate=0.3),
    'forward_intermediates': lambda model, images: model.forward_intermediates(images, keep_rate=0.3),
    'kept_patches': lambda model, images: model.kept_patches(images, keep_rate=0.3),
}


def run_all(model: Any, images: Tensor) -> Tensor:
    """Return the logits of a rate that drops, of one that does not, and of both together."""
    outputs = [model(images, keep_rate=0.3), model(images, keep_rate=1.0)]
    return torch.stack([*outputs, *model.forward_subnets(images, [(64, 0.3), (64, 1.0)])])


# --- hooks ---


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('call', CALLS)
def test_hooks_on_a_block_and_its_parts_fire_in_every_block(
        small_model: Any,
        images: Tensor,
        call: str,
        training: bool,
) -> None:
    model = small_model().train(training)
    fired: Counter[str] = Counter()
    parts = ('', '.attn', '.attn.qkv', '.attn.attn_drop', '.attn.proj', '.norm1', '.norm2', '.mlp', '.mlp.fc1')
    for i, block in enumerate(model.blocks):
        block.attn.fused_attn = False
        for part in parts:
            name = f'blocks.{i}{part}'
            model.get_submodule(name).register_forward_hook(lambda *_, name=name: fired.update([name]))
    CALLS[call](model, images)
    assert {name for name, _ in model.named_modules() if name.startswith('blocks.')} >= fired.keys()
    for i in range(4):
        assert len({fired[f'blocks.{i}{part}'] for part in parts}) == 1, fired
        assert fired[f'blocks.{i}'] >= 1


def test_a_hook_that_changes_the_output_acts_in_every_block(small_model: Any, images: Tensor) -> None:
    for part in ('mlp', 'attn.proj', 'attn.qkv', 'norm1'):
        model = small_model()
        before = run_all(model, images)
        for i in range(4):
            hook = model.get_submodule(f'blocks.{i}.{part}').register_forward_hook(lambda *args: 1.5 * args[2])
            after = run_all(model, images)
            assert not any(torch.allclose(a, b, **ROUNDING) for a, b in zip(after, before, strict=True)), (part, i)
            torch.testing.assert_close(after[:2], after[2:], **ROUNDING)
            hook.remove()


@pytest.mark.parametrize('method', ['hook', 'fx'])
@pytest.mark.parametrize('name', BACKBONES)
def test_attention_extract_gives_a_map_of_every_block(small_model: Any, images: Tensor, name: str, method: str) -> None:
    maps = {}
    for keep_rate in (0.3, 1.0):
        model = small_model(name, keep_rate=keep_rate)
        for block in model.blocks:
            block.attn.fused_attn = False
        maps[keep_rate] = list(AttentionExtract(model, method=method)(images).values())
    assert [tuple(m.shape) for m in maps[1.0]] == [(2, 3, 17, 17)] * 4
    assert [tuple(m.shape) for m in maps[0.3]] == [(2, 3, 17, 17)] * 2 + [(2, 3, 7, 7), (2, 3, 4, 4)]
    for attention in maps[0.3]:
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:-1]))


# --- attention that is not fused ---


def test_turning_fused_attention_off_acts_everywhere(
        small_model: Any,
        images: Tensor,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused = small_model()
    expected = run_all(fused, images)
    set_fused_attn(False)
    try:
        model = small_model()
    finally:
        set_fused_attn(True)
    model.load_state_dict(fused.state_dict())
    refuse = lambda *_, **__: pytest.fail('fused attention ran')  # noqa: E731
    monkeypatch.setattr(nn.functional, 'scaled_dot_product_attention', refuse)
    torch.testing.assert_close(run_all(model, images), expected, **ROUNDING)
    for call in CALLS.values():
        call(model, images)


def test_without_fused_attention_scores_are_read_from_the_matrix(
        small_model: Any,
        images: Tensor,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_model()
    for block in model.blocks:
        block.attn.fused_attn = False
    monkeypatch.setattr(
        'timm_supervit.models.token_keeping.class_attention', lambda *_: pytest.fail('the row was computed again'))
    assert model(images, keep_rate=0.3).isfinite().all()


@pytest.mark.parametrize('name', BACKBONES)
def test_second_and_forward_mode_derivatives_work_without_fused_attention(small_model: Any, name: str) -> None:
    model = small_model(name, keep_rate=0.3).double()
    for block in model.blocks:
        block.attn.fused_attn = False
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), x)[0].abs().sum() > 0
    direction = torch.randn_like(x)
    _, slope = torch.func.jvp(model, (x.detach(),), (direction,))
    step = 1e-6  # the kept tokens do not change on it
    finite = (model(x + step * direction) - model(x - step * direction)) / (2 * step)
    torch.testing.assert_close(slope, finite.detach(), atol=1e-6, rtol=1e-4)


# --- another attention in its place ---


class Uniform(nn.Module):
    """Attends to all tokens alike, as an attention of timm without scores."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return x.mean(dim=1, keepdim=True).expand_as(x)


class ScoredUniform(Uniform):
    """The same with scores: later patches have higher ones."""

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False, return_scores: bool = False) -> Any:
        y = super().forward(x)
        return (y, torch.arange(x.shape[1]).expand(len(x), -1) / x.shape[1]) if return_scores else y


def replace_module(attn: Callable[[], nn.Module]) -> Callable[[Any], None]:
    return lambda block: setattr(block, 'attn', attn())


def replace_forward(attn: Callable[[], nn.Module]) -> Callable[[Any], None]:
    return lambda block: setattr(block.attn, 'forward', attn().forward)


@pytest.mark.parametrize('replace', [replace_module, replace_forward])
def test_a_replaced_attention_acts_in_every_block_or_is_refused(
        small_model: Any,
        images: Tensor,
        replace: Callable[[Any], Callable[[Any], None]],
) -> None:
    for i in range(4):
        model = small_model()
        before = run_all(model, images)
        replace(ScoredUniform)(model.blocks[i])
        assert not any(torch.allclose(a, b) for a, b in zip(run_all(model, images), before, strict=True)), i
        model = small_model()
        replace(Uniform)(model.blocks[i])
        plain = model(images, keep_rate=1.0)
        assert not torch.allclose(plain, before[1])
        torch.testing.assert_close(model.forward_subnets(images, [(64, 1.0)])[0], plain, **ROUNDING)
        if i in model.drop_layers:
            for call in set(CALLS) - {'forward of all tokens'}:
                with pytest.raises(TypeError, match=r'return_scores=True.*keep_rate=1\.0'):
                    CALLS[call](model, images)
    model = small_model(drop_layers=(3,))
    replace(ScoredUniform)(model.blocks[3])
    assert model.kept_patches(images, keep_rate=0.3)[3][0].tolist() == [15, 14, 13, 12, 11, 10]


@pytest.mark.parametrize('settings', [
    dict(qkv_bias=True), dict(qk_norm=True), dict(scale_norm=True), dict(proj_bias=False), dict(attn_head_dim=8),
    dict(gated=True), dict(gated=True, qk_norm=True, scale_norm=True), dict(attn_drop=0.5), dict(proj_drop=0.5),
])
@pytest.mark.parametrize('fused', [True, False])
def test_all_that_timm_s_attention_takes_acts_with_scores_too(settings: dict[str, Any], fused: bool) -> None:
    attn = TokenKeepingAttention(48, num_heads=3, norm_layer=nn.LayerNorm, **settings).train()
    attn.fused_attn = fused
    x = torch.randn(2, 10, 48)
    torch.manual_seed(0)
    expected = attn(x)
    torch.manual_seed(0)
    torch.testing.assert_close(attn(x, return_scores=True)[0], expected, **ROUNDING)
    torch.testing.assert_close(attn.eval()(x, num_queries=2), attn(x)[:, :2], **ROUNDING)


def test_a_part_that_timm_s_attention_may_get_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.layers.Attention.__init__

    def with_sink(self: Any, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        self.sink = nn.Linear(1, 1)

    monkeypatch.setattr(timm.layers.Attention, '__init__', with_sink)
    with pytest.raises(NotImplementedError, match='sink'):
        timm.create_model('supervit_digits')


@pytest.mark.parametrize('attn_layer', ['diff', nn.Identity, partial(TokenKeepingAttention)])
def test_an_attention_of_another_kind_is_refused_by_name(small_model: Any, attn_layer: Any) -> None:
    with pytest.raises(ValueError, match=r'attn_layer .* gives no scores'):
        small_model(attn_layer=attn_layer)
    assert isinstance(small_model(attn_layer='attn').blocks[0].attn, TokenKeepingAttention)


# --- ties ---


def test_of_equal_scores_the_earlier_patch_is_kept_on_every_path(small_model: Any, images: Tensor) -> None:
    model = small_model()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:48] = 0.  # no query: the class token attends to all tokens alike
            block.attn.qkv.bias[:48] = 0.
    kept = model.kept_patches(images, keep_rate=0.6)
    assert {layer: places.tolist() for layer, places in kept.items()} == {
        1: [list(range(11))] * 2, 2: [list(range(8))] * 2}
    expected = model(images, keep_rate=0.6)
    for others in ([], [(64, 1.0)], [(64, 0.3)], [(64, 0.9), (64, 0.3), (64, 1.0)]):
        output, *_ = model.forward_subnets(images, [(64, 0.6), *others])
        torch.testing.assert_close(output, expected, **ROUNDING)
    program = torch.export.export(model, (images,), dict(keep_rate=0.6)).module()
    torch.testing.assert_close(program(images, keep_rate=0.6), expected, **ROUNDING)


def test_zeros_of_half_precision_are_ranked_by_their_place() -> None:
    scores = torch.zeros(3, 200, dtype=torch.float16)
    scores[:, 150] = 0.5
    order = rank_tokens(scores, num_prefix_tokens=2)
    assert order.tolist() == [[0, 1, 150, *(place for place in range(2, 200) if place != 150)]] * 3


# --- wrappers ---


@pytest.mark.parametrize('implementation', list(CheckpointImpl))
@pytest.mark.parametrize('part', ['', 'attn'])
def test_checkpoint_wrappers_give_the_same_gradients(
        small_model: Any,
        images: Tensor,
        part: str,
        implementation: CheckpointImpl,
) -> None:
    plain = small_model().train()
    wrapped = copy.deepcopy(plain)
    for i, block in enumerate(wrapped.blocks):
        if part:
            block.attn = checkpoint_wrapper(block.attn, checkpoint_impl=implementation)
        else:
            wrapped.blocks[i] = checkpoint_wrapper(block, checkpoint_impl=implementation)
    for model in (plain, wrapped):
        sum(output.square().sum() for output in run_all(model, images.requires_grad_())).backward()
    for parameter, expected in zip(wrapped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, **ROUNDING)


def test_timm_s_own_checkpointing_runs_reentrant_too(
        small_model: Any,
        images: Tensor,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_model().train()
    outputs = run_all(model, images)
    model.set_grad_checkpointing()
    monkeypatch.setattr('timm.models._manipulate.use_reentrant_ckpt', lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch advises against it
        torch.testing.assert_close(run_all(model, images), outputs, **ROUNDING)


def shard_and_train(rank: int, folder: str, state: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Train on one of two ranks with each block and the rest sharded; save what comes out."""
    fully_shard = import_fully_shard()
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=2)
    model = timm.create_model('supervit_tiny', **settings)
    model.load_state_dict(state)
    mesh = dist.init_device_mesh('cpu', (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    outputs = torch.stack(model.eval().forward_subnets(images, [(64, 1.0), (64, 0.3), (48, 0.6)])).detach()
    task = ClassificationTask(model.train(), nn.CrossEntropyLoss(), verbose=False)
    task.draws.seed(0)
    task(images, torch.tensor([1, 2]))['loss'].backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    torch.save((outputs, gradients), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_sharded_blocks_train_and_run_several_subnets(small_model: Any, images: Tensor, tmp_path: Path) -> None:
    import_fully_shard()
    model = small_model()
    settings = dict(
        img_sizes=model.img_sizes, keep_rates=model.keep_rates, drop_layers=model.drop_layers, embed_dim=48, depth=4,
        num_heads=3, num_classes=10)
    run_ranks(shard_and_train, str(tmp_path), model.state_dict(), settings)
    expected = torch.stack(model.forward_subnets(images, [(64, 1.0), (64, 0.3), (48, 0.6)])).detach()
    task = ClassificationTask(model.train(), nn.CrossEntropyLoss(), verbose=False)
    task.draws.seed(0)
    task(images, torch.tensor([1, 2]))['loss'].backward()
    for rank in range(2):
        outputs, gradients = torch.load(tmp_path / f'{rank}.pt')
        torch.testing.assert_close(outputs, expected, **ROUNDING)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, **ROUNDING)
