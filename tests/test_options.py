"""What users type and download: whatever it is, a clear line and an exit code."""
import json
import sys

import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from timm_supervit.cli import main
from timm_supervit.images.datasets import open_dataset


def supervit(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result.exit_code, result.stderr.splitlines()[-1] if result.stderr else ''


@pytest.mark.parametrize(('setting', 'code', 'message'), [
    ('keep_rat=0.7', 2, "no setting 'keep_rat'; did you mean keep_rate?"),
    ('embed_dims=48', 2, 'did you mean embed_dim?'),
    ('drop_layer=(1,)', 2, 'did you mean drop_layers?'),
    ('zzz=1', 2, 'SuperViT has no setting'),
    ('=1', 2, 'SuperViT has no setting'),
    ('checkpoint_path=x.pth', 2, 'SuperViT has no setting'),  # past the reader of checkpoints
    ('share_prefix=false', 2, 'share_prefix=false should be True or False'),
    ('embed_dim=wide', 2, 'embed_dim=wide should be a whole number'),
    ('embed_dim=', 2, 'embed_dim= should be a whole number'),
    ('mlp_ratio=four', 2, 'mlp_ratio=four should be a number'),
    ('embed_dim=65', 1, 'cannot be created with embed_dim=65: dim should be divisible by num_heads'),
    ('global_pool=evil', 1, 'cannot be created with global_pool=evil: Only avg'),
    ('weight_init=evil', 1, "in ('jax', "),  # timm names no reason here; its condition does
    ('norm_layer=evil', 1, 'cannot be created with norm_layer=evil'),
    ('num_heads=0', 1, 'cannot be created with num_heads=0'),
    ('block_fn=evil', 1, 'cannot be created with block_fn=evil'),
    ('skip_lam=2', 1, 'cannot be created with skip_lam=2'),  # a setting of LV-ViT
    ('depth=' + '-' * 100_000 + '1', 1, 'created with depth='),
])
@pytest.mark.parametrize('command', ['profile', 'convert'])
def test_a_setting_that_does_not_exist_or_fit_is_named(tmp_path, command, setting, code, message):
    torch.save({}, tmp_path / 'x.pth')
    arguments = {
        'profile': ['profile', 'supervit_digits', '--rounds', '2'],
        'convert': ['convert', tmp_path / 'x.pth', '--model', 'supervit_digits', '--output', tmp_path / 'hub'],
    }[command]
    result, last = supervit(*arguments, '--model-kwargs', setting)
    assert result == code
    assert last.startswith('Error: ') and message in last


@pytest.mark.parametrize('arguments', [
    ['--model-kwargs', 'num_classes=3', 'num_classes=3'],
    ['--model-kwargs', 'num_classes=3', '--num-classes', '3'],
    ['--model-kwargs', 'depth=3', '--model-kwargs', 'depth=4'],
])
def test_a_setting_that_is_given_twice_is_named(arguments):
    code, last = supervit('profile', 'supervit_digits', *arguments)
    assert code == 2
    assert f'{arguments[1].partition("=")[0]} is given more than once' in last


def test_the_number_of_classes_is_a_setting_as_any_other(tmp_path):
    arguments = ['profile', 'supervit_digits', '--subnet', '12:0.5', '--rounds', '2', '--device', 'cpu', '--output']
    macs = []
    for name, classes in [('a', ['--num-classes', '3']), ('b', ['--model-kwargs', 'num_classes=3'])]:
        assert supervit(*arguments, tmp_path / name, *classes)[0] == 0
        macs.append(json.loads((tmp_path / name / 'profile.json').read_text())['rows'][0]['macs'])
    assert macs[0] == macs[1]


@pytest.mark.parametrize('device', ['cuda', 'cuda:1', 'evil'])
def test_a_device_that_is_not_there_is_named(monkeypatch, device):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    code, last = supervit('profile', 'supervit_digits', '--device', device)
    assert code == 1
    assert device in last


CONFIGS = [
    '', '[]', 'null', '3', '{}', '\x00', '{"architecture": 3}', '{"architecture": "nothing"}',
    '{"architecture": "supervit_digits", "model_args": [1], "pretrained_cfg": {}}',
    '{"architecture": "supervit_digits", "model_args": {"zzz": 1}, "pretrained_cfg": {}}',
    '{"architecture": "supervit_digits", "pretrained_cfg": null}',
    '{"architecture": "supervit_digits", "num_classes": "x", "pretrained_cfg": {}}',
]


def test_a_damaged_model_folder_is_named(tmp_path):
    folder = tmp_path / 'net'
    timm.models.save_for_hf(timm.create_model('supervit_digits'), str(folder), safe_serialization=True)
    arguments = ['visualize', f'local-dir:{folder}', tmp_path / 'a.png', '--output', tmp_path / 'out']
    Image.new('RGB', (24, 24)).save(tmp_path / 'a.png')
    config = (folder / 'config.json').read_text()
    for content in CONFIGS:
        (folder / 'config.json').write_text(content)
        code, last = supervit(*arguments)
        assert code == 1
        assert str(folder) in last, content
    (folder / 'config.json').write_text(config)
    for name in ('model.safetensors', 'pytorch_model.bin'):
        for content in (b'', b'error: not found', b'version https://git-lfs.github.com/spec/v1\n'):
            (folder / name).write_bytes(content)
            code, last = supervit(*arguments)
            assert code == 1
            assert str(folder) in last, (name, content)
        (folder / name).unlink()


def bomb(path):
    # A valid header of a GIF of 65,535 x 65,535 pixels.
    size = b'\xff' * 4
    path.write_bytes(b'GIF89a' + size + b'\x80\x00\x00' + bytes(6) + b',' + bytes(4) + size + b'\x00\x02\x00;')


def broken(path):
    Image.new('RGB', (64, 64)).save(path, 'PNG')
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize('damage', [bomb, broken])
def test_an_image_that_cannot_be_drawn_is_named(tmp_path, damage):
    damage(tmp_path / 'image.gif')
    timm.models.save_for_hf(timm.create_model('supervit_digits'), str(tmp_path / 'net'), safe_serialization=True)
    code, last = supervit(
        'visualize', f'local-dir:{tmp_path / "net"}', tmp_path / 'image.gif', '--output', tmp_path / 'out')
    assert code == 1
    assert 'image.gif cannot be read as an image' in last


@pytest.mark.parametrize(('dataset', 'module'), [
    ('hfds/mnist', 'datasets'), ('hfids/mnist', 'datasets'), ('tfds/mnist', 'tensorflow'), ('wds/mnist', 'webdataset')])
def test_a_data_set_whose_package_is_missing_says_what_to_install(monkeypatch, dataset, module):
    monkeypatch.setitem(sys.modules, module, None)
    readers = [f'timm.data.readers.reader_{name}' for name in ('hfds', 'hfids', 'tfds', 'wds')]
    for name in readers:
        monkeypatch.delitem(sys.modules, name, raising=False)
    code, last = supervit('evaluate', 'supervit_digits', '--dataset', dataset, '--data-dir', '/')
    assert code == 1
    assert module in last and 'pip install' in last
    for name in readers:  # which remember what was missing
        sys.modules.pop(name, None)


@pytest.mark.parametrize('dataset', ['torch/unknown', 'torch/cifar10', 'other/x'])
def test_a_data_set_that_does_not_exist_is_named(dataset):
    with pytest.raises(ValueError, match=f'data set {dataset!r} cannot be opened from None'):
        open_dataset(None, dataset)
