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
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from timm_supervit.cli import main
from timm_supervit.loading.load import load_supervit
from timm_supervit.results.fingerprint import fingerprint
from timm_supervit.results.rows import Results, save_results
from timm_supervit.tools import convert as convert_file
from timm_supervit.tools.convert import convert, model_card

SETTINGS = dict(embed_dim=48, depth=3, drop_layers=(1,), keep_rates=(0.4, 1.0), num_classes=7)
FILES = {'README.md', 'config.json', 'model.safetensors'}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model('supervit_digits', **SETTINGS).eval()


def other_model():
    torch.manual_seed(1)
    return timm.create_model('supervit_digits', **SETTINGS).eval()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(('keys', 'use_ema'), [
    (('model', 'model_ema'), False),
    (('model_ema', 'model'), True),
    (('state_dict', 'state_dict_ema'), False),
    (('state_dict_ema', 'state_dict'), True),
])
def test_a_training_checkpoint_becomes_a_folder_that_timm_creates_the_same_model_from(model, tmp_path, keys, use_ema):
    wanted, unwanted = keys
    states = {wanted: model.state_dict(), unwanted: other_model().state_dict(), 'epoch': 3}
    torch.save(states, tmp_path / 'checkpoint.pth')
    read = load_supervit('supervit_digits', tmp_path / 'checkpoint.pth', use_ema=use_ema, settings=SETTINGS)
    assert convert(read, tmp_path / 'hub') == tmp_path / 'hub'
    loaded = timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True).eval()
    assert loaded.subnets == model.subnets
    images = torch.randn(2, 3, 24, 24)
    for img_size, keep_rate in model.subnets:
        subnet = dict(img_size=img_size, keep_rate=keep_rate)
        assert torch.equal(loaded(images, **subnet), model(images, **subnet))  # the weights are copied, not computed


@pytest.mark.parametrize('name', ['weights.safetensors', 'weights.pth'])
def test_a_bare_state_dict_is_converted_too(model, tmp_path, name):
    (save_file if name.endswith('safetensors') else torch.save)(model.state_dict(), tmp_path / name)
    convert(load_supervit('supervit_digits', tmp_path / name, settings=SETTINGS), tmp_path / 'hub')
    converted = load_file(tmp_path / 'hub' / 'model.safetensors')
    assert {path.name for path in (tmp_path / 'hub').iterdir()} == FILES
    assert all(torch.equal(converted[key], value) for key, value in model.state_dict().items())


@pytest.fixture
def older(model, tmp_path):
    return convert(model, tmp_path / 'hub')


def test_a_failure_while_writing_leaves_the_older_folder_as_it_was(older, tmp_path, monkeypatch):
    before = contents(older)

    def fill_disk(self, path):
        path.write_text('half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(convert_file.ModelCard, 'save', fill_disk)
    with pytest.raises(OSError, match='No space left'):
        convert(other_model(), older, overwrite=True)
    assert contents(older) == before
    assert [path.name for path in tmp_path.iterdir()] == ['hub']


def test_a_folder_that_holds_anything_is_refused_by_name(model, older, tmp_path):
    (tmp_path / 'mine.txt').write_text('mine')
    for folder, held in ((tmp_path, r'hub, mine\.txt'), (older, r'README\.md, config\.json, model\.safetensors')):
        before = {path.name for path in folder.iterdir()}
        with pytest.raises(FileExistsError, match=rf'{held};.*--overwrite'):
            convert(model, folder)
        assert {path.name for path in folder.iterdir()} == before


def test_overwriting_replaces_an_older_conversion_and_leaves_other_files(older):
    (older / 'mine.txt').write_text('mine')
    convert(other_model(), older, overwrite=True)
    assert torch.equal(load_file(older / 'model.safetensors')['cls_token'], other_model().cls_token)
    assert {path.name for path in older.iterdir()} == {*FILES, 'mine.txt'}
    assert (older / 'mine.txt').read_text() == 'mine'


def test_a_folder_that_cannot_be_written_to_is_named(model, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match=r"cannot write to the folder '.*file/hub'"):
        convert(model, tmp_path / 'file' / 'hub')


def test_a_failed_conversion_leaves_no_folder_behind(model, tmp_path):
    with pytest.raises(FileNotFoundError):
        convert(model, tmp_path / 'hub', results=tmp_path / 'there is none.json')
    assert list(tmp_path.iterdir()) == []


def test_a_folder_behind_a_symbolic_link_is_replaced_and_the_link_stays(older, tmp_path):
    (tmp_path / 'link').symlink_to(older)
    convert(other_model(), tmp_path / 'link', overwrite=True)
    assert (tmp_path / 'link').is_symlink()
    assert load_file(older / 'model.safetensors')['cls_token'].equal(other_model().cls_token)


def test_the_files_have_the_permissions_of_any_new_file(model, tmp_path):
    old = os.umask(0o027)
    try:
        convert(model, tmp_path / 'hub')
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / 'hub').iterdir()} == {0o640}


ON_A_SMALL_DISK = """
import os, shutil, sys
import timm, torch
from timm_supervit.tools.convert import convert
hub = sys.argv[1]
def write(seed, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model("supervit_digits", embed_dim=48, depth=3, drop_layers=(1,))
    convert(model, hub, **kwargs)
    return model.cls_token
def read():
    return timm.create_model("local-dir:" + hub, pretrained=True).cls_token
os.mkdir(hub + "/lost+found")
assert write(1).equal(read())
new = write(2, overwrite=True)
assert new.equal(read())
with open(hub + "/lost+found/full", "wb") as file:
    file.write(bytes(shutil.disk_usage(hub).free - 100_000))
try:
    write(3, overwrite=True)
except OSError as error:
    assert "is as it was" in str(error), error
else:
    raise AssertionError("the disk was not full")
assert new.equal(read())
assert sorted(os.listdir(hub)) == ["README.md", "config.json", "lost+found", "model.safetensors"]
"""


@pytest.mark.slow
def test_convert_replaces_its_folder_on_a_mounted_disk_and_a_full_one_leaves_it_as_it_was(tmp_path):
    (tmp_path / 'hub').mkdir()
    # In a namespace of its own, where users may mount: the folder, then what to run.
    mount = 'folder=$1; shift; mount -t tmpfs -o size=4m none "$folder" && exec "$@"'
    mounted = ['unshare', '-rm', 'sh', '-c', mount, 'sh', tmp_path / 'hub']
    if not shutil.which('unshare') or subprocess.run([*mounted, 'true'], capture_output=True).returncode:
        pytest.skip('no file system can be mounted here')
    result = subprocess.run(
        [*mounted, sys.executable, '-c', ON_A_SMALL_DISK, tmp_path / 'hub'], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / 'hub').iterdir()) == []


def results_of(network, **changes):
    rows = [dict(img_size=s.img_size, keep_rate=s.keep_rate, macs=network.macs(s), top1=50. + i)
            for i, s in enumerate(network.subnets)]
    return Results(**{'model': 'supervit_digits', 'rows': rows, 'network': fingerprint(network), **changes})


def test_the_model_card_lists_the_operating_points(model):
    card = model_card(model, 'hf-hub:someone/net', results_of(model))
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
        model_card(model, 'local-dir:net', results_of(model, **change))


def test_results_of_other_weights_are_refused(model, tmp_path):
    save_results(results_of(other_model()), tmp_path, 'others')
    with pytest.raises(ValueError, match=r'weights.*evaluate the checkpoint'):
        convert(model, tmp_path / 'hub', results=tmp_path / 'others.json')
    save_results(results_of(model), tmp_path, 'own')
    convert(model, tmp_path / 'hub', results=tmp_path / 'own.json')
    assert ModelCard.load(tmp_path / 'hub' / 'README.md').text.count('\n|') == 2 + len(model.subnets)


@pytest.fixture
def arguments(model, tmp_path):
    torch.save({'model': model.state_dict()}, tmp_path / 'official.pth')
    kwargs = ['embed_dim=48', 'depth=3', 'drop_layers=(1,)', 'keep_rates=(0.4,1.0)']
    return [
        'convert', str(tmp_path / 'official.pth'), '--model', 'supervit_digits', '--output', str(tmp_path / 'hub'),
        '--model-kwargs', *kwargs]


def test_the_command_converts_and_says_how_to_upload(arguments, tmp_path):
    result = CliRunner().invoke(main, [*arguments, '--num-classes', '7'])
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / 'hub').iterdir()} == FILES
    assert result.stdout.splitlines()[-1].endswith(f'hf upload USER/NAME {tmp_path / "hub"}')


def test_the_command_replaces_a_folder_where_it_is_asked_to(arguments, tmp_path):
    (tmp_path / 'hub').mkdir()
    (tmp_path / 'hub' / 'config.json').write_text('{}')
    refused = CliRunner().invoke(main, [*arguments, '--num-classes', '7'])
    assert refused.exit_code == 1
    assert '--overwrite' in refused.stderr
    assert contents(tmp_path / 'hub') == {'config.json': b'{}'}
    assert CliRunner().invoke(main, [*arguments, '--num-classes', '7', '--overwrite']).exit_code == 0
    assert {path.name for path in (tmp_path / 'hub').iterdir()} == FILES


def test_weights_of_another_model_are_refused_and_nothing_is_written(arguments, tmp_path):
    failed = CliRunner().invoke(main, arguments)  # ten classes, where the file has seven
    assert failed.exit_code == 1
    assert 'official.pth' in failed.stderr
    assert 'head.weight' in failed.stderr
    assert not (tmp_path / 'hub').exists()


def test_a_missing_checkpoint_is_a_usage_error(arguments, tmp_path):
    (tmp_path / 'official.pth').unlink()
    assert CliRunner().invoke(main, arguments).exit_code == 2


@pytest.mark.parametrize('license', [None, 'cc-by-nc-4.0'])
def test_the_licence_is_what_the_user_says(model, tmp_path, license):
    convert(model, tmp_path / 'net', license=license)
    card = ModelCard.load(tmp_path / 'net' / 'README.md')
    assert card.data.license == license
    assert json.loads((tmp_path / 'net' / 'config.json').read_text())['pretrained_cfg'].get('license') == license
    timm.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True)


def test_a_card_names_the_backbone(tmp_path):
    model = timm.create_model('supervit', backbone='deit_tiny_patch16_224', embed_dim=12, depth=4)
    assert '`supervit` of `deit_tiny_patch16_224`, a Super' in model_card(model, 'local-dir:net').text
