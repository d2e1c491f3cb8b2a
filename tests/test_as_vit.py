"""A SuperViT is a vision transformer of timm: at rate 1.0, in a block, with masks and stochastic depth."""
from typing import Any

import pytest
import torch
from comparing import EXACT, ROUNDING, run_subnet
from parity import list_grid
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

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
