"""Features are dense at every rate, in every form in which timm hands them out."""
from typing import Any

import pytest
import torch
from comparing import EXACT, ROUNDING
from reference import ReferenceSuperViT
from torch import Tensor, nn


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
