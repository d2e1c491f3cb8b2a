"""A plain ViT of timm, by name, as a checkpoint or in a folder, is the SuperViT that has it for a backbone."""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from timm.data import create_transform, resolve_data_config

from timm_supervit.cli import main
from timm_supervit.loading.load import load_supervit
from timm_supervit.results.fingerprint import source_of

TINY = dict(embed_dim=32, num_heads=2, depth=4)
# The names of plain networks, their settings beside TINY, what train.py was told of sizes, and the size that that is.
VITS = {
    'a size for the network': ('vit_small_patch14_dinov2', dict(img_size=56), {}, 56),
    'a size for both': ('vit_small_patch14_reg4_dinov2.lvd142m', dict(img_size=56), dict(img_size=56), 56),
    'a size for the images': ('vit_small_patch14_dinov2', dict(dynamic_img_size=True), dict(img_size=56), 56),
    'a rectangle': ('vit_small_patch14_dinov2', dict(img_size=(56, 28)), dict(input_size=[3, 56, 28]), (56, 28)),
    'its own size': ('deit_tiny_distilled_patch16_224', {}, {}, 224),
    'rotary': ('eva02_tiny_patch14_224', dict(img_size=56), {}, 56),
    'rotary, of any size': ('vit_small_patch16_dinov3', {}, dict(img_size=64), 64),
    'rotary with learned positions': ('vit_small_patch16_rope_ape_224', dict(img_size=64), {}, 64),
    'other tokens in training': ('vit_tiny_patch16_224', dict(img_size=64, patch_drop_rate=0.5), {}, 64),
}


def supervit(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def create(name, **settings):
    """Return a plain network whose tokens differ clearly."""
    model = timm.create_model(name, **{**TINY, 'num_classes': 3, **settings}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write(path, model, name, settings, **args):
    """Write a checkpoint as train.py does."""
    known = dict(model=name, model_kwargs={**TINY, **settings}, num_classes=3, in_chans=None, input_size=None, gp=None,
                 img_size=None, data_dir='', dataset='', train_split='train', class_map='')
    torch.save({'state_dict': model.state_dict(), 'epoch': 0, 'args': argparse.Namespace(**known | args)}, path)
    return path


@pytest.fixture
def plain(tmp_path):
    """A plain network of 4 x 4 patches and its checkpoint."""
    model = create('vit_small_patch14_dinov2', img_size=56)
    return model, write(tmp_path / 'last.pth.tar', model, 'vit_small_patch14_dinov2', dict(img_size=56), img_size=56)


@pytest.fixture
def photos(tmp_path):
    pixels = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / 'photos' / 'validation' / f'{i % 3}' / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (60, 70, 3), np.uint8)).save(path)
    return tmp_path / 'photos'


@pytest.mark.parametrize('case', VITS)
def test_a_checkpoint_of_a_plain_vit_is_that_vit_at_the_size_that_it_was_trained_at(case, tmp_path):
    name, settings, args, size = VITS[case]
    expected = create(name, **settings)
    model = load_supervit(str(write(tmp_path / 'last.pth.tar', expected, name, settings, **args)))
    assert model.img_sizes[-1] == size and len(model.img_sizes) > 1
    assert model.drop_layers == (1, 2, 3)
    images = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected(images))
        assert not torch.allclose(model(images, keep_rate=0.5), expected(images))
    assert resolve_data_config({}, model=model)['mean'] == resolve_data_config({}, model=expected)['mean']
    assert source_of(model).plain == name.split('.')[0]


def test_every_command_takes_it_and_says_what_it_made_of_it(plain, photos, tmp_path):
    expected, path = plain
    photo, subnet = next(photos.rglob('*.png')), ['--subnet', '56:1', '--device', 'cpu']
    for command, *arguments in [
        ['evaluate', '--data-dir', photos, '-j', 0, *subnet],
        ['profile', '--rounds', 2, *subnet],
        ['predict', photo, *subnet],
        ['visualize', photo, '--subnet', '42:0.5'],
        ['export', '--format', 'pt2', *subnet],
        ['convert'],
    ]:
        output = tmp_path / command if command != 'predict' else tmp_path / 'predictions.jsonl'
        result = supervit(command, path, *arguments, '--output', output)
        assert result.exit_code == 0, (command, result.output)
        note, = [line for line in result.stderr.splitlines() if 'vit_small_patch14_dinov2' in line]
        assert all(word in note for word in ('28, 42, 56', '1, 2, 3', 'not super-trained', '--model-kwargs'))
    transform = create_transform(**resolve_data_config({'img_size': 56}, model=expected), is_training=False)
    with torch.no_grad():
        correct = sum(
            int(expected(transform(Image.open(file).convert('RGB'))[None]).argmax()) == int(file.parent.name)
            for file in photos.rglob('*.png'))
    row, = json.loads((tmp_path / 'evaluate' / 'evaluate.json').read_text())['rows']
    assert (row['correct1'], row['count']) == (correct, 12)
    # What was converted is a SuperViT for good.
    result = supervit('profile', f'local-dir:{tmp_path / "convert"}', '--rounds', 2, *subnet)
    assert result.exit_code == 0 and 'vit_small' not in result.stderr
    assert 'not super-trained' in (tmp_path / 'convert' / 'README.md').read_text()


def test_a_run_of_a_plain_vit_is_evaluated_after_each_epoch(plain, photos, tmp_path):
    (tmp_path / 'run').mkdir()
    plain[1].rename(tmp_path / 'run' / 'checkpoint-0.pth.tar')
    result = supervit('evaluate', tmp_path / 'run', '--data-dir', photos, '-j', 0, '--subnet', '56:1')
    assert result.exit_code == 0, result.output
    assert 'not super-trained' in result.stderr


def test_its_grid_can_be_chosen_and_nothing_that_the_file_says(plain):
    expected, path = plain
    images = torch.randn(2, 3, 42, 42)
    chosen = dict(img_sizes=(14, 42), drop_layers=(1,), keep_rates=(0.5,), img_size=42)
    for name in (None, 'supervit', 'vit_small_patch14_dinov2', 'vit_small_patch14_dinov2.lvd142m'):
        for backbone in ({}, {'backbone': 'vit_small_patch14_dinov2'}):
            model = load_supervit(name, path, settings=chosen | backbone)
            assert (model.img_sizes, model.drop_layers, model.keep_rates) == ((14, 42), (1,), (0.5,))
    expected.set_input_size(42)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected(images))
    for name, settings, message in [
        (None, dict(embed_dim=64), 'embed_dim=64 contradicts last.pth.tar, whose network has embed_dim=32'),
        (None, dict(backbone='vit_small_patch16_224'), 'contradicts last.pth.tar'),
        ('vit_small_patch16_224', {}, 'vit_small_patch16_224 contradicts last.pth.tar'),
        ('resnet18', {}, 'resnet18 contradicts last.pth.tar'),
    ]:
        with pytest.raises(ValueError, match=message):
            load_supervit(name, path, settings=settings)


def test_another_supervit_may_start_from_it(tmp_path):
    expected = create('vit_tiny_patch16_224', img_size=64)
    path = write(tmp_path / 'last.pth.tar', expected, 'vit_tiny_patch16_224', dict(img_size=64))
    model = load_supervit('supervit_tiny', path, settings=dict(img_sizes=(32, 64), drop_layers=(1,)))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected(images))
    assert (source_of(model).plain, model.img_sizes) == ('', (32, 64))


@pytest.mark.parametrize(('name', 'reason'), [
    ('resnet18', r'resnet18.* is no SuperViT.*no VisionTransformer \(ResNet\)'),
    ('vit_base_patch16_siglip_224', 'is no SuperViT.*no class token'),
    ('swin_tiny_patch4_window7_224', 'is no SuperViT.*no VisionTransformer'),
])
def test_what_can_be_no_backbone_is_refused_with_the_reason(name, reason, tmp_path):
    args = argparse.Namespace(model=name, model_kwargs={}, num_classes=3)
    torch.save({'state_dict': {'x': torch.zeros(1)}, 'args': args}, tmp_path / 'last.pth.tar')
    for model in (name, str(tmp_path / 'last.pth.tar')):
        with pytest.raises(ValueError, match=reason):
            load_supervit(model, pretrained=False)


def test_a_folder_of_a_plain_vit_is_a_model_with_its_weights(plain, tmp_path):
    expected, _ = plain
    timm.models.save_for_hf(
        expected, str(tmp_path / 'plain'), model_config={'label_names': list('abc')}, safe_serialization=True)
    name, images = f'local-dir:{tmp_path / "plain"}', torch.randn(2, 3, 56, 56)
    model = load_supervit(name)
    assert (model.img_sizes, model.num_classes) == ((28, 42, 56), 3)
    assert list(model.pretrained_cfg['label_names']) == list('abc')
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected(images))
    assert load_supervit(name, settings=dict(img_sizes=(14, 56), drop_layers=(2,))).img_sizes == (14, 56)
    # A run that started from the folder.
    path = write(tmp_path / 'of-folder.pth.tar', expected, name, {})
    with torch.no_grad():
        torch.testing.assert_close(load_supervit(str(path))(images), expected(images))


def test_a_plain_name_is_profiled_as_a_supervit():
    result = supervit('profile', 'vit_tiny_patch16_224', '--model-kwargs', 'img_sizes=32,64', 'embed_dim=32',
                      'num_heads=2', 'depth=4', '--rounds', 2, '--json', '--device', 'cpu')
    assert result.exit_code == 0, result.output
    assert {row['img_size'] for row in json.loads(result.stdout)['rows']} == {32, 64}
    assert 'vit_tiny_patch16_224' in result.stderr


def test_what_a_file_names_on_the_hub_is_not_fetched(plain, tmp_path):
    path = write(tmp_path / 'hub.pth.tar', plain[0], 'hf-hub:timm/vit_small_patch14_dinov2.lvd142m', dict(img_size=56))
    with pytest.raises(ValueError, match='not fetched unasked'):
        load_supervit(str(path))


@pytest.mark.skipif(not os.environ.get('TIMM_SCRIPTS'), reason='TIMM_SCRIPTS does not name the folder of train.py')
@pytest.mark.parametrize(('name', 'size'), [('vit_small_patch14_dinov2', 56), ('eva02_tiny_patch14_224', 56)])
def test_a_plain_run_of_train_py_evaluates_to_what_the_script_logged(name, size, photos, tmp_path):
    (photos / 'train').symlink_to(photos / 'validation')
    train = subprocess.run(
        [sys.executable, Path(os.environ['TIMM_SCRIPTS'], 'train.py'), '--model', name, '--img-size', str(size),
         '--model-kwargs', f'img_size={size}', *(f'{key}={value}' for key, value in TINY.items()), '--num-classes', '3',
         '--data-dir', photos, '--train-split', 'train', '--val-split', 'validation', '-b', '4', '--epochs', '2',
         '--opt', 'adamw', '--lr', '1e-2', '--warmup-epochs', '0', '--device', 'cpu', '--workers', '0', '--output',
         tmp_path, '--experiment', 'run'],
        capture_output=True, text=True, timeout=240, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONSAFEPATH': '1'})
    assert train.returncode == 0, train.stderr[-2000:]
    logged = {row['epoch']: row['validation']['top1'] for row in json.loads(train.stdout.split('--result')[1])}
    result = supervit('evaluate', tmp_path / 'run' / 'last.pth.tar', '--data-dir', photos, '-j', 0, '--subnet',
                      f'{size}:1', '--json')
    assert result.exit_code == 0, result.output
    row, = json.loads(result.stdout)['rows']
    assert row['top1'] == pytest.approx(logged[1], abs=1e-3)


@pytest.mark.parametrize('args', [dict(img_size='x'), dict(img_size=-56), dict(input_size=[3, 56]),
                                  dict(img_size=10 ** 9), dict(input_size=[3, 'a', None])])
def test_a_size_that_is_none_is_refused_by_the_name_of_the_file(args, plain, tmp_path):
    path = write(tmp_path / 'odd.pth.tar', plain[0], 'vit_small_patch14_dinov2', {}, **args)
    with pytest.raises(ValueError, match=r'odd\.pth\.tar holds settings of no SuperViT: img_size'):
        load_supervit(str(path))


def test_a_folder_that_a_file_names_is_read_only_where_it_holds_files(plain, tmp_path):
    (tmp_path / 'folder').mkdir()
    os.mkfifo(tmp_path / 'folder' / 'config.json')  # which a reader would wait for
    path = write(tmp_path / 'of-folder.pth.tar', plain[0], f'local-dir:{tmp_path / "folder"}', {})
    with pytest.raises(OSError, match='is a FIFO'):
        load_supervit(str(path))
