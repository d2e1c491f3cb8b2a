import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
import timm
import torch
from click.testing import CliRunner
from hub_server import COMMIT, hub_environment, serve
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from timm_supervit.cli import main
from timm_supervit.tools import convert
from timm_supervit.tools.checkpoints import CheckpointError
from timm_supervit.tools.convert import convert_checkpoint
from timm_supervit.tools.results import Results

SETTINGS = dict(embed_dim=48, depth=3, drop_layers=(1,), keep_rates=(0.4, 1.0), num_classes=7)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model('supervit_digits', **SETTINGS).eval()


def other_model():
    torch.manual_seed(1)
    return timm.create_model('supervit_digits', **SETTINGS).eval()


def save(state, path, **kwargs):
    torch.save(state, path, **kwargs)
    return path


@pytest.mark.parametrize(('keys', 'use_ema'), [
    (('model', 'model_ema'), False),
    (('model_ema', 'model'), True),
    (('state_dict', 'state_dict_ema'), False),
    (('state_dict_ema', 'state_dict'), True),
])
def test_a_training_checkpoint_becomes_a_folder_that_timm_creates_the_same_model_from(model, tmp_path, keys, use_ema):
    wanted, unwanted = keys
    states = {wanted: model.state_dict(), unwanted: other_model().state_dict(), 'epoch': 3}
    path = save(states, tmp_path / 'checkpoint.pth')
    convert_checkpoint(path, other_model(), tmp_path / 'hub', use_ema=use_ema)
    loaded = timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True).eval()
    assert loaded.subnets == model.subnets
    images = torch.randn(2, 3, 24, 24)
    for img_size, keep_rate in model.subnets:
        subnet = dict(img_size=img_size, keep_rate=keep_rate)
        assert torch.equal(loaded(images, **subnet), model(images, **subnet))  # the weights are copied, not computed


@pytest.mark.parametrize('name', ['weights.safetensors', 'weights.pth'])
def test_a_bare_state_dict_is_converted_too(model, tmp_path, name):
    (save_file if name.endswith('safetensors') else torch.save)(model.state_dict(), tmp_path / name)
    convert_checkpoint(tmp_path / name, other_model(), tmp_path / 'hub')
    converted = load_file(tmp_path / 'hub' / 'model.safetensors')
    assert {path.name for path in (tmp_path / 'hub').iterdir()} == {'README.md', 'config.json', 'model.safetensors'}
    assert all(torch.equal(converted[key], value) for key, value in model.state_dict().items())


@pytest.fixture
def older(model, tmp_path):
    convert_checkpoint(save(model.state_dict(), tmp_path / 'older.pth'), other_model(), tmp_path / 'hub')
    return tmp_path / 'hub'


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_weights_of_another_model_are_refused_and_the_older_folder_stays(model, older, tmp_path):
    before = contents(older)
    path = save(timm.create_model('supervit_digits', depth=4, drop_layers=(1,)).state_dict(), tmp_path / 'deep.pth')
    with pytest.raises(CheckpointError, match=r'deep\.pth: These weights do not fit'):
        convert_checkpoint(path, model, older)
    assert contents(older) == before


def test_a_failure_while_writing_leaves_the_older_folder_as_it_was(model, older, tmp_path, monkeypatch):
    before = contents(older)

    def fill_disk(self, path):
        path.write_text('half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(convert.ModelCard, 'save', fill_disk)
    with pytest.raises(OSError, match='No space left'):
        convert_checkpoint(save(other_model().state_dict(), tmp_path / 'new.pth'), model, older)
    assert contents(older) == before
    assert {path.name for path in tmp_path.iterdir()} == {'hub', 'older.pth', 'new.pth'}


def test_an_older_conversion_is_replaced(model, older, tmp_path):
    new = other_model().state_dict()
    convert_checkpoint(save(new, tmp_path / 'new.pth'), model, older)
    assert torch.equal(load_file(older / 'model.safetensors')['cls_token'], new['cls_token'])


def test_a_folder_with_other_files_is_not_replaced(model, tmp_path):
    path = save(model.state_dict(), tmp_path / 'checkpoint.pth')
    with pytest.raises(FileExistsError, match=r'checkpoint\.pth, which would be lost'):
        convert_checkpoint(path, model, tmp_path)
    assert path.is_file()


def write_model_of_another(folder):
    shutil.rmtree(folder)
    timm.models.save_for_hf(other_model(), str(folder), safe_serialization=True)
    (folder / 'README.md').write_text('# Mine')


def edit_card(folder):
    (folder / 'README.md').write_text((folder / 'README.md').read_text().replace('## Use', '## How I use it'))


def append_to_card(folder):
    with (folder / 'README.md').open('a') as file:
        file.write('One more line.')


def edit_config(folder):
    (folder / 'config.json').write_text((folder / 'config.json').read_text() + '\n')


def train_on(folder):
    save_file(load_file(folder / 'model.safetensors') | {'head.bias': torch.ones(7)}, folder / 'model.safetensors')


def remove_card(folder):
    (folder / 'README.md').unlink()


@pytest.mark.parametrize(
    'change', [write_model_of_another, edit_card, append_to_card, edit_config, train_on, remove_card])
def test_a_folder_of_the_same_file_names_is_not_replaced_if_it_is_not_as_it_was_written(model, older, change):
    change(older)
    before = contents(older)
    with pytest.raises(FileExistsError, match='which would be lost'):
        convert_checkpoint(older.parent / 'older.pth', model, older)
    assert contents(older) == before


def test_the_folder_is_tried_before_the_checkpoint_is_read(model, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match=r"cannot write to the folder '.*file/hub'"):
        convert_checkpoint(tmp_path / 'there is none.pth', model, tmp_path / 'file' / 'hub')


def test_a_failed_conversion_leaves_no_folder_behind(model, tmp_path):
    with pytest.raises(FileNotFoundError):
        convert_checkpoint(tmp_path / 'there is none.pth', model, tmp_path / 'hub')
    assert list(tmp_path.iterdir()) == []


def test_a_folder_behind_a_symbolic_link_is_replaced_and_the_link_stays(model, older, tmp_path):
    (tmp_path / 'link').symlink_to(older)
    new = other_model().state_dict()
    convert_checkpoint(save(new, tmp_path / 'new.pth'), model, tmp_path / 'link')
    assert (tmp_path / 'link').is_symlink()
    assert load_file(older / 'model.safetensors')['cls_token'].equal(new['cls_token'])


def test_the_files_have_the_permissions_of_any_new_file(model, tmp_path):
    old = os.umask(0o027)
    try:
        convert_checkpoint(save(model.state_dict(), tmp_path / 'checkpoint.pth'), model, tmp_path / 'hub')
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / 'hub').iterdir()} == {0o640}


ON_A_SMALL_DISK = """
import os, shutil, sys
import timm, torch
from timm_supervit.tools.convert import convert_checkpoint
hub = sys.argv[1]
def convert(seed):
    torch.manual_seed(seed)
    model = timm.create_model("supervit_digits", embed_dim=48, depth=3, drop_layers=(1,))
    torch.save(model.state_dict(), sys.argv[2])
    convert_checkpoint(sys.argv[2], timm.create_model("supervit_digits", embed_dim=48, depth=3, drop_layers=(1,)), hub)
    return model.cls_token
def read():
    return timm.create_model("local-dir:" + hub, pretrained=True).cls_token
os.mkdir(hub + "/lost+found")
assert convert(1).equal(read())
new = convert(2)
assert new.equal(read())
with open(hub + "/lost+found/full", "wb") as file:
    file.write(bytes(shutil.disk_usage(hub).free - 100_000))
try:
    convert(3)
except OSError as error:
    assert "is as it was" in str(error), error
else:
    raise AssertionError("the disk was not full")
assert new.equal(read())
assert sorted(os.listdir(hub)) == ["README.md", "config.json", "lost+found", "model.safetensors"]
"""


def test_convert_replaces_its_folder_on_a_mounted_disk_and_a_full_one_leaves_it_as_it_was(tmp_path):
    (tmp_path / 'hub').mkdir()
    # In a namespace of its own, where users may mount: the folder, then what to run.
    mount = 'folder=$1; shift; mount -t tmpfs -o size=4m none "$folder" && exec "$@"'
    mounted = ['unshare', '-rm', 'sh', '-c', mount, 'sh', tmp_path / 'hub']
    if not shutil.which('unshare') or subprocess.run([*mounted, 'true'], capture_output=True).returncode:
        pytest.skip('no file system can be mounted here')
    result = subprocess.run(
        [*mounted, sys.executable, '-c', ON_A_SMALL_DISK, tmp_path / 'hub', tmp_path / 'checkpoint.pth'],
        capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / 'hub').iterdir()) == []


def results_of(network, **changes):
    rows = [dict(img_size=s.img_size, keep_rate=s.keep_rate, macs=network.macs(s), top1=50. + i)
            for i, s in enumerate(network.subnets)]
    return Results(**{'model': 'supervit_digits', 'rows': rows, **changes})


def test_the_model_card_lists_the_operating_points(model):
    card = convert.model_card(model, 'hf-hub:someone/net', results_of(model))
    lines = [line.split() for line in card.text.splitlines() if line.startswith('|')]
    assert len(lines) == 2 + len(model.subnets)
    for line, (img_size, keep_rate), top1 in zip(lines[2:], model.subnets, range(50, 70), strict=False):
        assert line[1:4:2] == [str(img_size), f'{keep_rate:g}']
        assert line[7] == f'{top1:.2f}'
    assert card.data.library_name == 'timm'
    assert "timm.create_model('hf-hub:someone/net', pretrained=True)" in card.text


@pytest.mark.parametrize(('change', 'message'), [
    ({'model': 'supervit_small'}, 'these results are of supervit_small'),
    ({'rows': [{'img_size': 12, 'keep_rate': 0.9, 'top1': 1.}]}, 'with other settings than this supervit_digits'),
    ({'info': {'partial': True}}, 'interrupted'),
])
def test_results_that_are_not_the_models_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        convert.model_card(model, 'local-dir:net', results_of(model, **change))


def run_push(address, home, **folders):
    code = (
        'import sys\n'
        'from timm_supervit.tools.convert import push_folder\n'
        'for name, folder in zip(sys.argv[1::2], sys.argv[2::2]):\n'
        '    print(push_folder(folder, f"someone/{name}"))\n')
    arguments = [str(item) for pair in folders.items() for item in pair]
    return subprocess.run(
        [sys.executable, '-c', code, *arguments], env=hub_environment(address, home), capture_output=True, text=True)


def test_pushing_uploads_folders_as_they_are_the_weights_as_large_files_whole_or_in_parts(older, tmp_path):
    small = timm.create_model('supervit_digits', **{**SETTINGS, 'embed_dim': 8, 'num_heads': 1})
    convert_checkpoint(save(small.state_dict(), tmp_path / 'small.pth'), small, tmp_path / 'small')
    requests, part_size = [], 60_000
    with serve(tmp_path / 'remote', requests, part_size) as address:
        result = run_push(address, tmp_path / 'home', small=tmp_path / 'small', net=older)
    commits = [f'{address}/someone/{name}/commit/{COMMIT}' for name in ('small', 'net')]
    assert result.stdout.splitlines() == commits, result.stderr
    expected = []
    for name, folder in (('small', tmp_path / 'small'), ('net', older)):
        assert contents(tmp_path / 'remote' / 'someone' / name) == contents(folder)
        weights = (folder / 'model.safetensors').read_bytes()
        url = f'/lfs/{hashlib.sha256(weights).hexdigest()}'
        parts = -(-len(weights) // part_size)
        expected += [url] if parts == 1 else [f'{url}/{i + 1}' for i in range(parts)]
    assert len(expected) > 3
    assert [path for method, path in requests if method == 'PUT'] == expected


def test_a_hub_out_of_reach_is_reported_with_what_to_do(older, tmp_path):
    result = run_push('http://127.0.0.1:9', tmp_path / 'home', net=older)  # port 9, discard: nothing listens
    assert result.returncode == 1
    assert 'hub is complete but was not uploaded to someone/net' in result.stderr.splitlines()[-1]


@pytest.mark.parametrize('name', ['', 'net', 'someone/net/more', 'some one/net', '/net'])
def test_a_push_to_what_is_no_repository_is_refused_before_the_work(model, tmp_path, name):
    path = save(model.state_dict(), tmp_path / 'checkpoint.pth')
    arguments = ['convert', str(path), '--model', 'supervit_digits', '--output', str(tmp_path / 'hub'), '--push', name]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert f'{name!r} is no repository USER/NAME' in result.stderr.splitlines()[-1]
    assert not (tmp_path / 'hub').exists()


def test_the_command_converts_and_tells_usage_from_failure(model, tmp_path):
    path = save({'model': model.state_dict()}, tmp_path / 'official.pth')
    kwargs = ['embed_dim=48', 'depth=3', 'drop_layers=(1,)', 'keep_rates=(0.4,1.0)']
    arguments = ['--model', 'supervit_digits', '--output', str(tmp_path / 'hub'), '--model-kwargs', *kwargs]
    result = CliRunner().invoke(main, ['convert', str(path), '--num-classes', '7', *arguments])
    assert result.exit_code == 0, result.output
    assert (tmp_path / 'hub' / 'model.safetensors').is_file()
    failed = CliRunner().invoke(main, ['convert', str(path), *arguments])  # ten classes, where the file has seven
    assert failed.exit_code == 1
    assert 'head.weight' in failed.stderr
    assert CliRunner().invoke(main, ['convert', str(tmp_path / 'none.pth'), *arguments]).exit_code == 2


@pytest.mark.parametrize('license', [None, 'cc-by-nc-4.0'])
def test_the_licence_is_what_the_user_says(tmp_path, license):
    model = timm.create_model('supervit_digits', **SETTINGS)
    convert_checkpoint(save(model.state_dict(), tmp_path / 'net.pth'), model, tmp_path / 'net', license=license)
    card = ModelCard.load(tmp_path / 'net' / 'README.md')
    assert card.data.license == license
    assert json.loads((tmp_path / 'net' / 'config.json').read_text())['pretrained_cfg'].get('license') == license
    timm.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True)


def test_a_card_names_the_backbone(tmp_path):
    model = timm.create_model('supervit', backbone='deit_tiny_patch16_224', embed_dim=12, depth=4)
    assert '`supervit` of `deit_tiny_patch16_224`, a Super' in convert.model_card(model, 'local-dir:net').text
