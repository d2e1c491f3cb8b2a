"""Weights arrive whole by every route that timm has, and what does not fit is refused before anything changes.

Downloads and uploads go through the real ``huggingface_hub`` client, to a server on the loopback.
"""
import argparse
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from comparing import EXACT, ROUNDING
from hub_server import hub_environment, serve
from huggingface_hub import load_torch_model, save_torch_model
from parity import import_fully_shard
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import load_checkpoint, resume_checkpoint, save_for_hf
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

from timm_supervit import Subnet

SETTINGS = dict(img_sizes=(32, 48, 64), drop_layers=(1, 2), embed_dim=48, depth=4, num_heads=3, num_classes=10)


def assert_same_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], **EXACT)


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def create(small_model: Callable[..., Any]) -> Callable[..., Any]:
    """Build a network of the small settings with weights of its own."""

    def create_model(name: str = 'supervit_tiny', **kwargs: Any) -> Any:
        return timm.create_model(name, **{**SETTINGS, **kwargs}).eval()

    return create_model


@pytest.fixture
def deit(images: Tensor) -> Any:
    """A plain DeiT of the small settings, for images of 64 pixels."""
    model = timm.create_model(
        'deit_tiny_patch16_224', img_size=64, embed_dim=48, depth=4, num_heads=3, num_classes=10).eval()
    nn.init.normal_(model.pos_embed)
    return model


# --- every route ---

ROUTES = ('load_state_dict', 'load_checkpoint', 'checkpoint_path', 'pretrained file', 'safetensors')


def load_by(route: str, create: Callable[..., Any], weights: dict[str, Tensor], folder: Path, **kwargs: Any) -> Any:
    """Return a model that took its weights by one of the routes of a timm user."""
    path = folder / ('weights.safetensors' if route == 'safetensors' else 'weights.pth')
    save_file(weights, path) if route == 'safetensors' else torch.save(weights, path)
    if route == 'load_state_dict':
        model = create(**kwargs)
        model.load_state_dict(weights)
        return model
    if route == 'load_checkpoint':  # validate.py --checkpoint
        model = create(**kwargs)
        load_checkpoint(model, str(path))
        return model
    if route == 'pretrained file':  # train.py --pretrained --pretrained-path
        return create(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=10), **kwargs)
    return create(checkpoint_path=str(path), **kwargs)  # --initial-checkpoint


@pytest.mark.parametrize('route', ROUTES)
def test_it_reads_its_own_weights(create: Any, tmp_path: Path, route: str) -> None:
    weights = create().state_dict()
    assert_same_weights(load_by(route, create, weights, tmp_path), weights)


@pytest.mark.parametrize('route', ROUTES)
def test_it_reads_plain_weights_with_positions_resampled_to_each_size(
        create: Any,
        deit: Any,
        images: Tensor,
        tmp_path: Path,
        route: str,
) -> None:
    weights = deit.state_dict()
    model = load_by(route, create, weights, tmp_path, img_sizes=(32, 64, 80))
    for pos_embed, grid_size in zip(model.pos_embed_list, (2, 4, 5), strict=True):
        expected = resample_abs_pos_embed(deit.pos_embed, new_size=[grid_size] * 2, num_prefix_tokens=1)
        torch.testing.assert_close(pos_embed, expected)
    torch.testing.assert_close(model(images, img_size=64), deit(images), **ROUNDING)
    others = {name: value for name, value in model.state_dict().items() if 'pos_embed' not in name}
    for name, value in others.items():
        torch.testing.assert_close(value, weights[name], **EXACT)
    assert 'pos_embed' in weights  # the caller's weights are left alone
    assert not any('pos_embed_list' in name for name in weights)


# For each image size of the new grid the place of the nearest one in the grid (32, 48, 64).
OTHER_GRIDS: dict[str, tuple[tuple[Any, ...], list[int]]] = {
    'more sizes': ((32, 48, 64, 80), [0, 1, 2, 2]),
    'fewer sizes': ((32, 64), [0, 2]),
    'one size': ((48,), [1]),
    'as many others': ((48, 64, 96), [1, 2, 2]),
    'rectangles': (((32, 16), (48, 32), 64), [0, 0, 2]),
}


@pytest.mark.parametrize('name', ['supervit_tiny', 'supervit_lvvit_tiny'])
@pytest.mark.parametrize('route', [*ROUTES, 'local-dir', 'resume'])
@pytest.mark.parametrize('grid', OTHER_GRIDS)
def test_weights_move_to_another_grid(
        create: Any,
        tmp_path: Path,
        caplog: Any,
        route: str,
        grid: str,
        name: str,
) -> None:
    img_sizes, nearest = OTHER_GRIDS[grid]
    source = create(name)
    nn.init.normal_(source.pos_embed_list[0])
    with caplog.at_level('INFO', logger='timm_supervit'):
        if route == 'local-dir':
            save_for_hf(source, str(tmp_path), safe_serialization=True)
            model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_sizes=img_sizes)
        elif route == 'resume':
            model = create(name, img_sizes=img_sizes)
            torch.save({'state_dict': source.state_dict(), 'epoch': 3}, tmp_path / 'last.pth.tar')
            resume_checkpoint(model, str(tmp_path / 'last.pth.tar'))
        else:
            model = load_by(route, partial(create, name), source.state_dict(), tmp_path, img_sizes=img_sizes)
    for size, pos_embed, i in zip(model.img_sizes, model.pos_embed_list, nearest, strict=True):
        height, width = (size, size) if isinstance(size, int) else size
        expected = resample_abs_pos_embed(source.pos_embed_list[i], [height // 16, width // 16])
        torch.testing.assert_close(pos_embed, expected, **EXACT)
    others = {key: value for key, value in model.state_dict().items() if 'pos_embed' not in key}
    assert others.keys() == {key for key in source.state_dict() if 'pos_embed' not in key}
    torch.testing.assert_close(others, {key: source.state_dict()[key] for key in others}, **EXACT)
    assert sum('resampled for img_sizes' in record.message for record in caplog.records) == 1


def test_weights_of_rectangles_move_to_others_of_that_shape(create: Any) -> None:
    source, model = create(img_sizes=((32, 16), (96, 48))), create(img_sizes=((64, 32), (128, 64)))
    model.load_state_dict(source.state_dict())
    torch.testing.assert_close(
        model.pos_embed_list[1], resample_abs_pos_embed(source.pos_embed_list[1], [8, 4], [6, 3]), **EXACT)
    with pytest.raises(RuntimeError, match=r'2 patches are no square.* \[\(2, 2\)'):
        create().load_state_dict(source.state_dict())


@pytest.mark.parametrize('name', ['supervit_tiny', 'supervit_lvvit_tiny'])
def test_files_of_another_patch_size_are_resampled_as_timms_are(create: Any, tmp_path: Path, name: str) -> None:
    source, half = create(name, patch_size=8), 1 if name == 'supervit_tiny' else 2
    model = load_by('pretrained file', partial(create, name), source.state_dict(), tmp_path)
    kernel = resample_patch_embed(source.patch_embed.proj.weight, [16 // half, 16 // half])
    torch.testing.assert_close(model.patch_embed.proj.weight, kernel, **EXACT)
    for grid_size, pos_embed, own in zip((2, 3, 4), model.pos_embed_list, source.pos_embed_list, strict=True):
        torch.testing.assert_close(pos_embed, resample_abs_pos_embed(own, [grid_size] * 2), **EXACT)


@pytest.mark.parametrize('route', ['load_checkpoint', 'checkpoint_path', 'pretrained file'])
def test_it_reads_official_checkpoints_as_they_are(create: Any, tmp_path: Path, route: str) -> None:
    raw, averaged = create().state_dict(), create().state_dict()
    optimizer = torch.optim.AdamW(create().parameters())
    checkpoint = {
        'model': raw, 'model_ema': averaged, 'optimizer': optimizer.state_dict(), 'epoch': 299, 'scaler': {},
        'args': argparse.Namespace(lr=5e-4, output_dir=None, img_size_list=[128, 160, 192, 224]),
    }
    with pytest.warns(UserWarning, match=r'model_ema.* accuracies are of model\W'):
        assert_same_weights(load_by(route, create, checkpoint, tmp_path), averaged)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert_same_weights(load_by(route, create, {'state_dict': raw, 'state_dict_ema': averaged}, tmp_path), averaged)
        del checkpoint['model_ema']
        assert_same_weights(load_by(route, create, checkpoint, tmp_path), raw)


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', '_orig_mod.module.'])
def test_it_reads_weights_of_a_wrapped_model(create: Any, tmp_path: Path, prefix: str) -> None:
    weights = create().state_dict()
    torch.save({'state_dict': {prefix + name: value for name, value in weights.items()}}, tmp_path / 'wrapped.pth')
    assert_same_weights(create(checkpoint_path=str(tmp_path / 'wrapped.pth')), weights)


def test_it_reads_weights_inside_another_module(create: Any, deit: Any) -> None:
    source, wrapper = create(), nn.ModuleDict({'backbone': create()})
    wrapper.load_state_dict({f'backbone.{name}': value for name, value in source.state_dict().items()})
    assert_same_weights(wrapper['backbone'], source.state_dict())
    wrapper.load_state_dict({f'backbone.{name}': value for name, value in deit.state_dict().items()}, strict=False)
    torch.testing.assert_close(wrapper['backbone'].pos_embed_list[2], deit.pos_embed)


def test_it_reads_weights_without_the_counters_of_batch_norm_as_torch_does(create: Any) -> None:
    source, model = create('supervit_lvvit_tiny'), create('supervit_lvvit_tiny')
    weights = {name: value for name, value in source.state_dict().items() if 'num_batches_tracked' not in name}
    assert model.load_state_dict(weights) == nn.BatchNorm2d(1).load_state_dict(
        {'weight': torch.ones(1), 'bias': torch.ones(1), 'running_mean': torch.ones(1), 'running_var': torch.ones(1)})
    assert_same_weights(model, source.state_dict())


def test_weights_can_be_assigned_in_place_of_copied(create: Any) -> None:
    weights = {name: value.double() for name, value in create().state_dict().items()}
    model = timm.create_model('supervit_tiny', device='meta', **SETTINGS)
    model.load_state_dict(weights, assign=True)
    assert_same_weights(model, weights)


@pytest.mark.parametrize('kwargs', [dict(reg_tokens=2), dict(reg_tokens=2, no_embed_class=True)])
def test_it_reads_plain_weights_with_register_tokens(create: Any, images: Tensor, kwargs: dict[str, Any]) -> None:
    vit = timm.create_model(
        'vit_tiny_patch16_224', img_size=48, embed_dim=48, depth=4, num_heads=3, num_classes=10, **kwargs).eval()
    model = create(**kwargs)
    model.load_state_dict(vit.state_dict())
    small = nn.functional.interpolate(images, size=(48, 48), mode='bilinear', align_corners=True)
    torch.testing.assert_close(model(small, img_size=48), vit(small), **ROUNDING)


def test_another_number_of_classes_gets_a_new_head(create: Any, deit: Any, tmp_path: Path) -> None:
    torch.save(deit.state_dict(), tmp_path / 'deit.pth')
    overlay = dict(file=str(tmp_path / 'deit.pth'), num_classes=10)
    for num_classes in (0, 3):
        model = create(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes)
        torch.testing.assert_close(model.blocks[3].mlp.fc2.weight, deit.blocks[3].mlp.fc2.weight, **EXACT)
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, num_classes or 48)
    # What train.py gives with --pretrained-path: whatever head the file has is left out.
    model = create(pretrained=True, pretrained_cfg_overlay=overlay | dict(num_classes=-1))
    torch.testing.assert_close(model.blocks[0].mlp.fc1.weight, deit.blocks[0].mlp.fc1.weight, **EXACT)
    assert not torch.equal(model.head.weight, deit.head.weight)


@pytest.mark.parametrize('in_chans', [1, 4])
def test_another_number_of_channels_adapts_the_stem_as_timm_does(
        create: Any,
        deit: Any,
        tmp_path: Path,
        in_chans: int,
) -> None:
    torch.save(deit.state_dict(), tmp_path / 'deit.pth')
    overlay = dict(file=str(tmp_path / 'deit.pth'), num_classes=10)
    model = create(pretrained=True, pretrained_cfg_overlay=overlay, in_chans=in_chans)
    plain = timm.create_model(
        'deit_tiny_patch16_224', img_size=64, embed_dim=48, depth=4, num_heads=3, num_classes=10, in_chans=in_chans,
        pretrained=True, pretrained_cfg_overlay=overlay).eval()
    images = torch.randn(2, in_chans, 64, 64)
    torch.testing.assert_close(model(images), plain(images), **ROUNDING)


def test_features_only_takes_pretrained_weights(create: Any, deit: Any, images: Tensor, tmp_path: Path) -> None:
    torch.save(deit.state_dict(), tmp_path / 'deit.pth')
    kwargs = dict(
        pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'deit.pth'), num_classes=10),
        features_only=True, out_indices=(1, 3))
    model = create(**kwargs)
    for tensor, expected in zip(
            model(images), deit.forward_intermediates(images, [1, 3], intermediates_only=True), strict=True):
        torch.testing.assert_close(tensor, expected, **ROUNDING)


# --- folders: save_for_hf and local-dir ---


def change_nothing(model: Any) -> None:
    """Save the model as it was created."""


def change_subnet(model: Any) -> None:
    model.subnet = (48, 0.3)


def change_size(model: Any) -> None:
    model.set_input_size(96)


def change_patch(model: Any) -> None:
    model.set_input_size(patch_size=8)


def change_head(model: Any) -> None:
    model.reset_classifier(4, 'avg')


@pytest.mark.parametrize('change', [change_nothing, change_subnet, change_size, change_patch, change_head])
@pytest.mark.parametrize('kwargs', [
    dict(),
    dict(keep_rates=(0.25, 0.9), train_subnets='all', reg_tokens=2),
    dict(img_size=32, keep_rate=0.4, in_chans=1, share_prefix=False),
])
def test_a_saved_folder_gives_back_the_same_model(
        create: Any,
        tmp_path: Path,
        change: Callable[[Any], None],
        kwargs: dict[str, Any],
) -> None:
    model = create(**kwargs)
    change(model)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert {path.name for path in tmp_path.iterdir()} == {'model.safetensors', 'config.json'}
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    for name in ('img_sizes', 'keep_rates', 'drop_layers', 'subnet', 'subnets', 'train_subnets', 'share_prefix'):
        assert getattr(other, name) == getattr(model, name), name
    assert_same_weights(other, model.state_dict())
    images = torch.randn(2, model.in_chans, 64, 64)
    torch.testing.assert_close(other(images), model(images), **EXACT)
    assert timm.create_model(f'local-dir:{tmp_path}').subnet == model.subnet  # settings without weights


def test_a_saved_folder_is_loaded_with_other_settings_where_asked(create: Any, tmp_path: Path) -> None:
    model = create()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    other = timm.create_model(
        f'local-dir:{tmp_path}', pretrained=True, img_size=32, keep_rate=0.7, num_classes=3)
    assert other.subnet == Subnet(32, 0.7)
    assert other.num_classes == 3
    with pytest.raises(RuntimeError, match=re.escape(str(tmp_path)) + r'.*4 blocks of width 24'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True, embed_dim=24)


def test_the_default_model_is_saved_with_its_sizes(tmp_path: Path) -> None:
    model = timm.create_model('supervit_tiny', embed_dim=12, num_heads=1)
    model.subnet = (160, 0.5)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert other.subnet == Subnet(160, 0.5)
    assert other.img_sizes == (128, 160, 192, 224)
    # Images are loaded at the largest size and resized inside, whatever subnet is active.
    for m in (model, other):
        assert timm.data.resolve_data_config(model=m)['input_size'] == (3, 224, 224)


def test_the_loader_delivers_the_largest_size(create: Any) -> None:
    for kwargs in (dict(), dict(img_size=32), dict(keep_rate=0.5)):
        assert timm.data.resolve_data_config(model=create(**kwargs))['input_size'] == (3, 64, 64)


# --- the Hub ---

USE_HUB = '''
import json, timm, torch
from timm.models import push_to_hf_hub

result = {}
with torch.no_grad():
    images = torch.randn(1, 3, 224, 224)
    deit = timm.create_model('deit_tiny_patch16_224.fb_in1k', pretrained=True).eval()
    model = timm.create_model('supervit_tiny', pretrained=True).eval()
    result['starts as DeiT'] = torch.allclose(model(images), deit(images), atol=2e-5)
    tagged = timm.create_model('supervit_tiny.deit_in1k', pretrained=True).eval()
    result['the tag is the default'] = all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), tagged.state_dict().values()))
    other = timm.create_model('supervit_tiny', pretrained=True, num_classes=7, in_chans=1, img_sizes=(96, 256)).eval()
    result['other settings'] = list(other(images[:, :1]).shape) + list(other.pos_embed_list[1].shape)
    result['other weights'] = torch.equal(other.blocks[5].mlp.fc1.weight, deit.blocks[5].mlp.fc1.weight)
    features = timm.create_model('supervit_tiny', pretrained=True, features_only=True)
    maps = features.eval()(images)
    result['features'] = [list(m.shape) for m in maps]

    mine = timm.create_model(
        'supervit_digits', img_sizes=(12, 24), keep_rates=(0.4, 1.0), drop_layers=(2, 3), num_classes=5).eval()
    mine.set_input_size(32)
    mine.subnet = (12, 0.4)
    push_to_hf_hub(mine, 'me/mine', safe_serialization=True)
    back = timm.create_model('hf-hub:me/mine', pretrained=True).eval()
    result['settings'] = [back.img_sizes, back.keep_rates, back.drop_layers, back.subnet, back.num_classes]
    x = torch.randn(2, 3, 24, 24)
    result['same outputs'] = all(
        torch.equal(a, b) for a, b in zip(mine.forward_subnets(x, mine.subnets), back.forward_subnets(x, back.subnets)))
    try:
        timm.create_model('hf-hub:me/broken', pretrained=True)
    except RuntimeError as error:
        result['broken'] = str(error)
print(json.dumps(result))
'''


@pytest.fixture(scope='module')
def hub(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[tuple[str, str]], Path]:
    """What a process saw that used the Hub, what it asked for, and the folder that is served."""
    root, requests = tmp_path_factory.mktemp('hub'), []
    deit = timm.create_model('deit_tiny_patch16_224')
    save_for_hf(deit, str(root / 'timm/deit_tiny_patch16_224.fb_in1k'), safe_serialization=True)
    broken = root / 'me/broken'
    save_for_hf(timm.create_model('supervit_digits'), str(broken), safe_serialization=True)
    content = (broken / 'model.safetensors').read_bytes()
    (broken / 'model.safetensors').write_bytes(content[:len(content) // 2])
    with serve(root, requests) as url:
        result = subprocess.run(
            [sys.executable, '-c', USE_HUB], capture_output=True, text=True, check=False, cwd=root,
            env=hub_environment(url, tmp_path_factory.mktemp('cache')))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), requests, root


def test_pretrained_weights_are_those_of_deit_from_the_hub(hub: Any) -> None:
    seen, requests, _ = hub
    assert seen['starts as DeiT']
    assert seen['the tag is the default']
    assert ('GET', '/timm/deit_tiny_patch16_224.fb_in1k/resolve/main/model.safetensors') in requests


def test_pretrained_weights_serve_other_settings(hub: Any) -> None:
    seen, _, _ = hub
    assert seen['other settings'] == [1, 7, 1, 257, 192]
    assert seen['other weights']
    assert [shape[1:] for shape in seen['features']] == [[192, 14, 14]] * 3


@pytest.mark.parametrize('size', ['tiny', 'small', 'base'])
def test_each_factory_starts_from_the_deit_of_its_size(size: str) -> None:
    cfg = timm.models.get_pretrained_cfg(f'supervit_{size}.deit_in1k')
    assert cfg.hf_hub_id == f'timm/deit_{size}_patch16_224.fb_in1k'


def test_a_pushed_model_comes_back_the_same(hub: Any) -> None:
    seen, _, root = hub
    assert seen['settings'] == [[12, 24, 32], [0.4, 1.0], [2, 3], [12, 0.4], 5]
    assert seen['same outputs']
    assert {path.name for path in (root / 'me/mine').iterdir()} == {'model.safetensors', 'config.json', 'README.md'}
    assert json.loads((root / 'me/mine/config.json').read_text())['architecture'] == 'supervit_digits'
    assert len([name for name in load_file(root / 'me/mine/model.safetensors') if 'pos_embed_list' in name]) == 3


def test_a_broken_download_names_its_repository(hub: Any) -> None:
    seen, _, _ = hub
    assert 'me/broken' in seen['broken']
    assert 'download' in seen['broken']


# --- a part of the weights ---

PARTS: dict[str, Callable[[str], bool]] = {
    'biases': lambda name: name.endswith('bias'),
    'norms': lambda name: 'norm' in name,
    'one block': lambda name: name.startswith('blocks.2.'),
    'half of the blocks and one size': lambda name: name.startswith(('blocks.0.', 'blocks.1.', 'pos_embed_list.1')),
    'the trainable parameters': lambda name: name.startswith(('head.', 'blocks.3.')),
}


def check_partial_loading(model: Any, source: Any, part: str, wrapper: nn.Module, prefix: str = '') -> None:
    """Check that those of the source's weights that belong to a part arrive, and the others stay."""
    weights, before = source.state_dict(), copy_weights(model)
    given = {name: value for name, value in weights.items() if PARTS[part](name)}
    missing = {name for name in weights if name not in given and 'num_batches_tracked' not in name}  # torch needs none
    keys = wrapper.load_state_dict({prefix + name: value for name, value in given.items()}, strict=False)
    told = {key.replace('_checkpoint_wrapped_module.', '') for key in keys.missing_keys}
    assert (told, keys.unexpected_keys) == ({prefix + name for name in missing}, [])
    assert_same_weights(model, before | given)


@pytest.mark.parametrize('part', PARTS)
@pytest.mark.parametrize('name', ['supervit_tiny', 'supervit_lvvit_tiny'])
def test_lenient_loading_takes_what_is_there(create: Any, name: str, part: str) -> None:
    model = create(name)
    check_partial_loading(model, create(name), part, model)


def wrap_in_module(model: Any) -> tuple[nn.Module, str]:
    return nn.ModuleDict({'backbone': model}), 'backbone.'


def wrap_in_compile(model: Any) -> tuple[nn.Module, str]:
    wrapper: Any = torch.compile(model)
    return wrapper, '_orig_mod.'


def wrap_in_ddp(model: Any) -> tuple[nn.Module, str]:
    return nn.parallel.DistributedDataParallel(model), 'module.'


def wrap_blocks_in_checkpoints(model: Any) -> tuple[nn.Module, str]:
    apply_activation_checkpointing(model, check_fn=lambda module: module in list(model.blocks))
    return model, ''


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('wrap', [wrap_in_module, wrap_in_compile, wrap_in_ddp, wrap_blocks_in_checkpoints])
def test_lenient_loading_takes_what_is_there_inside_wrappers(create: Any, process_group: None, wrap: Any) -> None:
    model = create()
    wrapper, prefix = wrap(model)
    check_partial_loading(model, create(), 'half of the blocks and one size', wrapper, prefix)
    before = copy_weights(model)
    weights = {'cls_token': torch.zeros(1, 1, 48), 'blocks.3.norm1.weight': torch.zeros(1)}
    with pytest.raises(RuntimeError, match=rf'{prefix}blocks\.3\.norm1\.weight is \(1,\) and should be \(48,\)'):
        wrapper.load_state_dict({prefix + name: value for name, value in weights.items()}, strict=False)
    assert_same_weights(model, before)


@pytest.mark.parametrize('what', ['fewer blocks', 'more blocks'])
def test_lenient_loading_tells_what_is_missing_and_unknown(create: Any, what: str) -> None:
    weights, _ = make_misfit(what, create)
    model = create()
    before = copy_weights(model)
    keys = model.load_state_dict(weights, strict=False)
    assert set(keys.missing_keys) == before.keys() - weights.keys()
    assert set(keys.unexpected_keys) == weights.keys() - before.keys()
    assert_same_weights(model, before | {name: value for name, value in weights.items() if name in before})


@pytest.mark.skipif(huggingface_hub.__version__ < '2', reason='older ones load no shards strictly, of any module')
def test_a_folder_of_shards_is_loaded_shard_by_shard(create: Any, tmp_path: Path) -> None:
    source, model = create(), create()
    save_torch_model(source, tmp_path, max_shard_size='100KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 2
    load_torch_model(model, tmp_path, strict=True)
    assert_same_weights(model, source.state_dict())


def test_distributed_checkpoints_of_trainable_parameters_are_loaded(create: Any, process_group: None) -> None:
    fully_shard = import_fully_shard()

    def shard(model: Any) -> Any:
        mesh = init_device_mesh('cpu', (1,))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(PARTS['the trainable parameters'](name))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    source, model = create(), create()
    expected = copy_weights(model) | {
        name: value.clone() for name, value in source.state_dict().items() if PARTS['the trainable parameters'](name)}
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    weights = get_model_state_dict(shard(source), options=options)
    assert len(weights) == 14
    set_model_state_dict(shard(model), weights, options=options)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    torch.testing.assert_close(dict(full), expected, **EXACT)


# --- adapters ---


def make_adapter(peft: Any, kind: str) -> Any:
    if kind == 'IA3':
        return peft.IA3Config(target_modules=['qkv', 'fc2'], feedforward_modules=['fc2'])
    return peft.LoraConfig(target_modules=['qkv', 'fc1'], use_dora=kind == 'DoRA', modules_to_save=['head'])


def train_adapter(peft: Any, model: Any, kind: str) -> Any:
    adapted = peft.get_peft_model(model, make_adapter(peft, kind)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return adapted


@pytest.mark.parametrize('kind', ['LoRA', 'DoRA', 'IA3'])
@pytest.mark.parametrize('name', ['supervit_tiny', 'supervit_lvvit_tiny'])
def test_adapters_are_saved_and_loaded(create: Any, images: Tensor, tmp_path: Path, name: str, kind: str) -> None:
    peft = pytest.importorskip('peft')
    model, other = create(name), create(name)
    other.load_state_dict(model.state_dict())
    plain = model(images)
    adapted = train_adapter(peft, model, kind)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    assert not torch.allclose(adapted(images), plain, atol=1e-3)
    torch.testing.assert_close(loaded(images), adapted(images), **EXACT)
    torch.testing.assert_close(loaded.state_dict(), adapted.state_dict(), **EXACT)


@pytest.mark.parametrize('kind', ['LoRA', 'DoRA', 'IA3'])
def test_adapters_are_saved_and_loaded_inside_transformers(images: Tensor, tmp_path: Path, kind: str) -> None:
    peft, transformers = pytest.importorskip('peft'), pytest.importorskip('transformers')
    config = transformers.TimmWrapperConfig(
        architecture='supervit_tiny', model_args={k: v for k, v in SETTINGS.items() if k != 'num_classes'},
        num_labels=10)
    model = transformers.AutoModelForImageClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / 'model')
    adapted = train_adapter(peft, model, kind)
    adapted.save_pretrained(tmp_path / 'adapter')
    other = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'model')
    loaded = peft.PeftModel.from_pretrained(other, tmp_path / 'adapter').eval()
    torch.testing.assert_close(loaded(images).logits, adapted(images).logits, **EXACT)


# --- quantized networks ---


@pytest.mark.parametrize('name', ['supervit_tiny', 'supervit_lvvit_tiny'])
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_dynamically_quantized_weights_load_back(create: Any, images: Tensor, name: str) -> None:
    source, model = (
        torch.ao.quantization.quantize_dynamic(create(name), {nn.Linear}, dtype=torch.qint8) for _ in range(2))
    weights = source.state_dict()
    before = model(images)
    with pytest.raises(RuntimeError, match=r'blocks\.3\.attn\.qkv is missing'):
        model.load_state_dict({key: value for key, value in weights.items() if 'blocks.3.attn.qkv' not in key})
    torch.testing.assert_close(model(images), before, **EXACT)
    for strict in (True, False):
        model.load_state_dict(weights, strict=strict)
        torch.testing.assert_close(model(images), source(images), **EXACT)
    with pytest.raises(RuntimeError, match='nothing was loaded'):
        create(name).load_state_dict(weights)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_ranges_that_quantization_observed_load_back(create: Any, images: Tensor) -> None:
    source, model = create().train(), create().train()
    for m in (source, model):
        m.blocks[1].mlp.qconfig = torch.ao.quantization.get_default_qat_qconfig('fbgemm')
        torch.ao.quantization.prepare_qat(m, inplace=True)
    source(images)  # the observers of a new model hold nothing yet
    assert source.state_dict().keys() == model.state_dict().keys()
    model.load_state_dict(source.state_dict())
    assert_same_weights(model, source.state_dict())


@pytest.mark.parametrize('bits', ['qint8', pytest.param('qint4', marks=pytest.mark.slow)])  # compiles C++
@pytest.mark.parametrize('name', ['supervit_tiny', 'supervit_lvvit_tiny'])
def test_weights_quantized_by_quanto_load_back(create: Any, images: Tensor, name: str, bits: str) -> None:
    quanto = pytest.importorskip('optimum.quanto')
    source, plain = create(name), create(name)
    quanto.quantize(source, weights=getattr(quanto, bits))
    source.load_state_dict(plain.state_dict())  # a quantized model takes plain weights as long as it is not frozen
    quanto.freeze(source)
    weights = source.state_dict()
    for strict in (True, False):
        model = create(name)
        quanto.quantize(model, weights=getattr(quanto, bits))
        model.load_state_dict(weights, strict=strict)
        torch.testing.assert_close(model(images), source(images), **EXACT)
    model = create(name)
    quanto.requantize(model, weights, quanto.quantization_map(source))
    torch.testing.assert_close(model(images), source(images), **EXACT)
    before = copy_weights(plain)
    with pytest.raises(RuntimeError, match='nothing was loaded'):
        plain.load_state_dict(weights)
    assert_same_weights(plain, before)


# --- what does not fit ---

MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    'another width': (dict(embed_dim=24), r'\(1, 1, 24\) and should be \(1, 1, 48\).*of width 48'),
    'fewer blocks': (dict(depth=3), r'blocks\.3.*is missing.*hold 3 blocks.*has 4 blocks'),
    'more blocks': (dict(depth=5), r'blocks\.4.*has no place.*hold 5 blocks.*has 4 blocks'),
    'another patch': (dict(patch_size=8), r'patch_embed\.proj\.weight is \(48, 3, 8, 8\)'),
    'another FFN': (dict(mlp_ratio=2.), r'mlp\.fc1\.weight is \(96, 48\) and should be \(192, 48\)'),
    'another number of classes': (dict(num_classes=5), r'head\.weight is \(5, 48\) and should be \(10, 48\)'),
    'no head': (dict(num_classes=0), r'head\.bias is missing'),
    'register tokens': (dict(reg_tokens=2), r'reg_token has no place'),
}


def make_misfit(what: str, create: Callable[..., Any]) -> tuple[dict[str, Any], str]:
    kwargs, message = MISFITS[what]
    return create(**kwargs).state_dict(), message


@pytest.mark.parametrize('route', ['load_state_dict', 'load_checkpoint', 'safetensors'])
@pytest.mark.parametrize('what', MISFITS)
def test_weights_of_another_network_change_nothing(create: Any, tmp_path: Path, what: str, route: str) -> None:
    weights, message = make_misfit(what, create)
    model = create()
    before = copy_weights(model)
    message = rf'SuperVisionTransformer, and nothing was loaded: .*{message}.*Create it with the settings'
    if route == 'safetensors':
        with pytest.raises(RuntimeError, match=message):
            load_by(route, create, weights, tmp_path)
    else:
        with pytest.raises(RuntimeError, match=message):
            load_by(route, lambda: model, weights, tmp_path)
    assert_same_weights(model, before)


OTHER_SHAPES = ('another width', 'another patch', 'another FFN', 'another number of classes')


@pytest.mark.parametrize('what', OTHER_SHAPES)
def test_lenient_loading_of_another_shape_changes_nothing(create: Any, what: str) -> None:
    weights, message = make_misfit(what, create)
    model = create()
    before = copy_weights(model)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(weights, strict=False)
    assert_same_weights(model, before)


def test_lenient_loading_passes_over_a_head(create: Any) -> None:
    source, model = create(num_classes=0), create()
    head = model.head.weight.clone()
    keys = model.load_state_dict(source.state_dict(), strict=False)
    assert (sorted(keys.missing_keys), keys.unexpected_keys) == (['head.bias', 'head.weight'], [])
    torch.testing.assert_close(model.head.weight, head, **EXACT)
    torch.testing.assert_close(model.norm.weight, source.norm.weight, **EXACT)
    keys = source.load_state_dict(model.state_dict(), strict=False)
    assert sorted(keys.unexpected_keys) == ['head.bias', 'head.weight']


ODD_CONTENTS: dict[str, tuple[Any, str]] = {
    'not a square grid': (lambda w: w | {'pos_embed': torch.zeros(1, 8, 48)}, r'7 patches are no square.*reg_tokens'),
    'no tensor': (lambda w: w | {'norm.weight': None}, r'norm\.weight is no tensor but of type NoneType'),
    'nothing': (lambda w: {}, r'is missing.*hold 0 blocks'),
    'something else': (lambda w: {'conv1.weight': torch.zeros(1)}, r'conv1\.weight has no place.*hold 0 blocks'),
    'a whole checkpoint': (lambda w: {'model': w, 'epoch': 3}, r'epoch has no place; model has no place'),
}


@pytest.mark.parametrize('what', ODD_CONTENTS)
def test_odd_contents_change_nothing(create: Any, what: str) -> None:
    change, message = ODD_CONTENTS[what]
    model = create()
    weights = create().state_dict()
    if what == 'not a square grid':
        weights = {name: value for name, value in weights.items() if 'pos_embed' not in name}
    before = copy_weights(model)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(change(weights))
    assert_same_weights(model, before)


# Tensors of the right shape that torch cannot copy into a plain one.
UNCOPYABLE: dict[str, Callable[[Tensor], Tensor]] = {
    'sparse': lambda value: value.to_sparse(),
    'quantized': lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    'meta': lambda value: value.to('meta'),
    'of a bare dtype': lambda value: torch.zeros(value.shape, dtype=torch.uint8).view(torch.bits8),
    'of oneDNN': lambda value: value.to_mkldnn(),
}


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('what', UNCOPYABLE)
def test_tensors_that_cannot_be_copied_change_nothing(create: Any, deit: Any, what: str, strict: bool) -> None:
    model = create()
    before = copy_weights(model)
    weights = create().state_dict()
    weights['norm.weight'] = UNCOPYABLE[what](weights['norm.weight'])
    with pytest.raises(RuntimeError, match=r'nothing was loaded: norm\.weight cannot be copied: \S'):
        model.load_state_dict(weights, strict=strict)
    assert_same_weights(model, before)
    plain = deit.state_dict()
    plain['pos_embed'] = UNCOPYABLE[what](plain['pos_embed'])
    with pytest.raises(RuntimeError, match=r'nothing was loaded: pos_embed\S* cannot be (copied|resampled): \S'):
        model.load_state_dict(plain, strict=strict)
    assert_same_weights(model, before)


def test_tensors_that_cannot_be_assigned_change_nothing(create: Any) -> None:
    model = create()
    before = copy_weights(model)
    weights = create().state_dict()
    weights['norm.weight'] = torch.ones(48, dtype=torch.long)  # has no gradient
    with pytest.raises(RuntimeError, match=r'nothing was loaded: norm\.weight cannot be copied: \S'):
        model.load_state_dict(weights, assign=True)
    assert_same_weights(model, before)


HALVES: dict[str, Callable[[str], bool]] = {
    'no last block': lambda name: name.startswith('blocks.3.'),
    'torn in the last block': lambda name: name.startswith(('blocks.3.mlp', 'norm', 'head')),
    'torn after the blocks': lambda name: name.startswith(('norm', 'head')),
    'torn in the first block': lambda name: name.startswith(('blocks', 'norm', 'head')) and '0.norm1' not in name,
    'no class token': lambda name: name == 'cls_token',
    'no bias of the patches': lambda name: name == 'patch_embed.proj.bias',
    'one size less': lambda name: name == 'pos_embed_list.1',
}


@pytest.mark.parametrize('route', ['load_checkpoint', 'checkpoint_path', 'pretrained file', 'local-dir', 'resume'])
@pytest.mark.parametrize('half', HALVES)
def test_a_file_with_a_part_of_a_network_is_refused(create: Any, tmp_path: Path, half: str, route: str) -> None:
    source, model = create(), create()
    weights = {name: value for name, value in source.state_dict().items() if not HALVES[half](name)}
    before = copy_weights(model)
    with pytest.raises(RuntimeError, match=r'nothing was loaded: .* is missing'):
        if route == 'load_checkpoint':
            load_by(route, lambda: model, {'model': weights}, tmp_path)
        elif route == 'resume':
            torch.save({'state_dict': weights, 'epoch': 3}, tmp_path / 'last.pth.tar')
            resume_checkpoint(model, str(tmp_path / 'last.pth.tar'))
        elif route == 'local-dir':
            save_for_hf(source, str(tmp_path), safe_serialization=True)
            save_file(weights, tmp_path / 'model.safetensors')
            timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=3)  # timm is lenient then
        elif route == 'pretrained file':
            torch.save({'model': weights}, tmp_path / 'official.pth')
            overlay = dict(file=str(tmp_path / 'official.pth'), num_classes=10)
            create(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
        else:
            load_by(route, create, {'model': weights}, tmp_path)
    assert_same_weights(model, before)


@pytest.mark.parametrize('what', ['more blocks', 'register tokens', 'another FFN'])
def test_a_file_of_another_network_is_refused_for_other_classes(create: Any, tmp_path: Path, what: str) -> None:
    weights, message = make_misfit(what, create)
    torch.save(weights, tmp_path / 'weights.pth')
    overlay = dict(file=str(tmp_path / 'weights.pth'), num_classes=10)
    with pytest.raises(RuntimeError, match=message):
        create(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)


@pytest.mark.parametrize('pools', [('token', 'avg'), ('avg', 'token'), ('avg', 'avg')])
def test_a_file_of_another_pooling_is_a_start_for_other_classes(create: Any, tmp_path: Path, pools: Any) -> None:
    source = create(global_pool=pools[0])
    torch.save(source.state_dict() | {'mask_token': torch.zeros(1, 1, 48)}, tmp_path / 'weights.pth')
    overlay = dict(file=str(tmp_path / 'weights.pth'), num_classes=10)
    model = create(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, global_pool=pools[1])
    torch.testing.assert_close(model.blocks.state_dict(), source.blocks.state_dict(), **EXACT)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    'half of it': lambda content: content[:len(content) // 2],
    'all but the last bytes': lambda content: content[:-10],
    'the first bytes': lambda content: content[:20],
    'nothing': lambda content: b'',
    'a web page': lambda content: b'<!doctype html><title>404</title>',
}


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_a_damaged_file_changes_nothing_and_is_named(create: Any, tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f'damaged.{suffix}'
    weights = create().state_dict()
    save_file(weights, path) if suffix == 'safetensors' else torch.save(weights, path)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    model = create()
    before = copy_weights(model)
    with pytest.raises((RuntimeError, EOFError, SafetensorError)):  # timm's own reading, with the error of its reader
        load_checkpoint(model, str(path))
    assert_same_weights(model, before)
    with pytest.raises(RuntimeError, match=rf'(?s){re.escape(str(path))}: \S.*truncated or corrupt'):
        create(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=10))


def test_a_model_without_pretrained_weights_says_so() -> None:
    with pytest.raises(RuntimeError, match=r'^No pretrained weights exist for supervit_digits'):
        timm.create_model('supervit_digits', pretrained=True)
