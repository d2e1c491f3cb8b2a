"""A checkpoint of timm's train.py knows its model, settings, data and classes: commands need nothing else."""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner
from comparing import run_subnet
from PIL import Image

from timm_supervit.cli import main
from timm_supervit.loading.class_names import class_names
from timm_supervit.loading.load import CHANGEABLE, load_model, load_supervit
from timm_supervit.results.fingerprint import source_of

CLASSES = ['class2', 'class9', 'class10']  # in timm's order, in which numbers count as such
KWARGS = dict(embed_dim=48, depth=2, drop_layers=(1,))


def supervit(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def error_of(*arguments):
    result = supervit(*arguments)
    assert result.exit_code == 1
    return result.stderr.splitlines()[-1]


@pytest.fixture
def photos(tmp_path):
    for split in ('train', 'validation'):
        for i, name in enumerate(CLASSES):
            (tmp_path / 'photos' / split / name).mkdir(parents=True)
            Image.new('RGB', (24, 24), (90 * i, 20, 10)).save(tmp_path / 'photos' / split / name / '0.png')
    return tmp_path / 'photos'


@pytest.fixture
def train(photos, tmp_path):
    """Write a checkpoint as train.py does, of a run with other arguments where they are given."""

    def write(name='last.pth.tar', **changes):
        args = dict(
            model='supervit_digits', model_kwargs=KWARGS, num_classes=3, in_chans=None, input_size=None, gp=None,
            data_dir=str(photos), dataset='', train_split='train', class_map='', mean=None, std=None, interpolation='',
            crop_pct=None) | changes
        torch.manual_seed(0)
        model = timm.create_model(
            args['model'], num_classes=args['num_classes'], global_pool=args['gp'], **args['model_kwargs'])
        torch.save({'state_dict': model.state_dict(), 'args': argparse.Namespace(**args)}, tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def checkpoint(train):
    return train()


def test_every_command_takes_a_checkpoint_alone(checkpoint, photos, tmp_path):
    photo, subnet = photos / 'train' / 'class2' / '0.png', ['--subnet', '12:0.5', '--device', 'cpu']
    for command, *arguments in [
        ['evaluate', '--data-dir', photos, '--workers', 0, *subnet],
        ['visualize', photo, *subnet],
        ['export', '--format', 'pt2', *subnet],
        ['profile', '--rounds', 2, *subnet],
        ['convert'],
    ]:
        result = supervit(command, checkpoint, *arguments, '--output', tmp_path / command)
        assert result.exit_code == 0, (command, result.output)
        assert 'Weights: state_dict of last.pth.tar' in result.stderr.splitlines()
    for command in ('evaluate', 'visualize', 'profile'):
        content = json.loads((tmp_path / command / f'{command}.json').read_text())
        assert content['model'] == 'supervit_digits'
        assert [content['network'][key] for key in ('depth', 'drop_layers', 'num_classes')] == [2, [1], 3]
    assert json.loads((tmp_path / 'evaluate' / 'evaluate.json').read_text())['network']['weights_kind'] == 'raw'


def test_a_checkpoint_alone_is_the_network_that_all_its_settings_make(checkpoint, train):
    weights = torch.load(checkpoint, weights_only=False)['state_dict']
    expected = timm.create_model('supervit_digits', num_classes=3, **KWARGS).eval()
    expected.load_state_dict(weights)
    x = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        assert torch.equal(load_supervit(str(checkpoint))(x), expected(x))
        pooled = train('pooled.pth.tar', gp='avg')
        assert load_supervit(str(pooled)).global_pool == 'avg'


@pytest.mark.parametrize('options', [
    ['--num-classes', 3],
    ['--model-kwargs', 'embed_dim=48', 'num_heads=2', 'drop_layers=1,'],  # as in the file, as by default, as it is read
    ['--model-kwargs', 'keep_rates=(0.4,1.0)', 'img_size=16', 'share_prefix=False'],  # of no trained network
])
def test_options_may_repeat_the_checkpoint_and_choose_what_it_does_not_fix(checkpoint, photos, options):
    for model in ([checkpoint], ['supervit_digits', '--checkpoint', checkpoint]):
        result = supervit('evaluate', *model, '--data-dir', photos, '--workers', 0, '--subnet', '12:0.4', *options)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(('options', 'message'), [
    (['--model-kwargs', 'num_heads=8'], 'num_heads=8 contradicts last.pth.tar, whose network has num_heads=2; leave'),
    (['--model-kwargs', 'depth=4'], 'depth=4 contradicts last.pth.tar, whose network has depth=2; leave'),
    (['--model-kwargs', 'drop_layers=(0,)'], 'drop_layers=(0,) contradicts last.pth.tar, whose network has '
                                             'drop_layers=(1,); leave'),
    (['--model-kwargs', 'act_layer=relu'], 'act_layer=relu contradicts last.pth.tar, whose network has the model'),
    (['--num-classes', 4], 'num_classes=4 contradicts last.pth.tar, whose network has num_classes=3; leave'),
    (['--model-kwargs', 'num_heads=5'], 'num_heads=5 contradicts last.pth.tar, whose network has num_heads=2; leave'),
])
def test_options_that_contradict_the_checkpoint_are_named_with_what_it_says(checkpoint, tmp_path, options, message):
    for command in (['profile', checkpoint], ['profile', 'supervit_digits', '--checkpoint', checkpoint],
                    ['convert', checkpoint, '--output', tmp_path / 'hub']):
        assert message in error_of(*command, *options)


# Other values than those of the checkpoint, for each setting that may have one.
CHANGED = dict(
    img_size=16, keep_rate=0.5, keep_rates=(0.4, 1.0), train_subnets='all', distill_teacher='own_size',
    share_prefix=False, cls_weight=0.5, dense_weight=0.5, drop_rate=0.1, pos_drop_rate=0.1, proj_drop_rate=0.1,
    attn_drop_rate=0.1, drop_path_rate=0.1, weight_init='jax', fix_init=True)


@pytest.mark.parametrize('name', CHANGEABLE)
def test_a_setting_that_may_differ_from_the_checkpoint_changes_no_subnet(train, name):
    kwargs = dict(KWARGS, img_sizes=(16, 32), patch_size=8, num_heads=2)
    checkpoint = train(model='supervit_lvvit_tiny', model_kwargs=kwargs)
    plain, changed = load_supervit(str(checkpoint)), load_supervit(str(checkpoint), settings={name: CHANGED[name]})
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for subnet in plain.subnets:
            assert torch.equal(run_subnet(changed, x, subnet), run_subnet(plain, x, subnet))


def test_another_model_than_the_checkpoints_is_named_with_its_own(checkpoint, tmp_path):
    for command in (['profile', 'supervit_tiny', '--checkpoint', checkpoint],
                    ['convert', checkpoint, '--model', 'supervit_tiny', '--output', tmp_path / 'hub']):
        message = error_of(*command)
        assert 'supervit_tiny contradicts last.pth.tar' in message and 'supervit_digits' in message


def test_what_is_no_model_is_said_with_what_may_have_been_meant(checkpoint, tmp_path):
    assert 'did you mean supervit_small?' in error_of('profile', 'supervit_smal')
    assert f'there is no file {tmp_path}/none.pth' in error_of('profile', tmp_path / 'none.pth')
    assert 'both checkpoints; leave one out' in error_of('profile', checkpoint, '--checkpoint', checkpoint)
    torch.save(timm.create_model('supervit_digits').state_dict(), tmp_path / 'bare.pth')
    assert 'bare.pth does not say which model it is of' in error_of('profile', tmp_path / 'bare.pth')


def test_weights_of_other_classes_are_refused(photos, tmp_path):
    # timm would draw a new head.
    model = timm.create_model('supervit_digits', num_classes=3)
    timm.models.save_for_hf(model, str(tmp_path / 'model'), safe_serialization=True)
    assert 'num_classes=2 contradicts the weights of local-dir:' in error_of(
        'evaluate', f'local-dir:{tmp_path / "model"}', '--data-dir', photos, '--num-classes', 2)
    assert supervit('profile', f'local-dir:{tmp_path / "model"}', '--num-classes', 2, '--rounds', 2).exit_code == 0


def test_the_folder_of_a_model_is_told_how_to_be_named(photos, tmp_path):
    timm.models.save_for_hf(timm.create_model('supervit_digits'), str(tmp_path / 'model'), safe_serialization=True)
    for command in (['evaluate', tmp_path / 'model', '--data-dir', photos], ['profile', tmp_path / 'model']):
        assert f'give local-dir:{tmp_path / "model"}' in error_of(*command)


@pytest.mark.parametrize('command', ['visualize', 'export'])
def test_an_exported_file_is_no_model_that_can_be_looked_into(photos, tmp_path, command):
    (tmp_path / 'model.onnx').write_bytes(b'')
    arguments = {'visualize': [photos / 'train' / 'class2' / '0.png'], 'export': ['--format', 'onnx']}[command]
    message = error_of(command, tmp_path / 'model.onnx', *arguments, '--output', tmp_path / 'out')
    assert 'model.onnx is an exported file' in message and 'give that' in message


@pytest.mark.parametrize('given', [dict(use_ema=True), dict(settings={'depth': 2}), dict(checkpoint='x.pth')])
def test_an_exported_file_takes_no_settings(tmp_path, given):
    (tmp_path / 'model.onnx').write_bytes(b'')
    with pytest.raises(ValueError, match=r'model\.onnx is complete; leave out'):
        load_model(str(tmp_path / 'model.onnx'), **given)


def test_a_split_that_is_not_there_is_no_other_one(checkpoint, photos):
    message = error_of('evaluate', checkpoint, '--data-dir', photos, '--split', 'test')
    assert "no split 'test'" in message and 'train, validation; choose one with --split' in message
    assert supervit('evaluate', checkpoint, '--data-dir', photos, '--split', 'val', '-j', 0).exit_code == 0


def test_a_model_from_a_folder_that_is_gone_can_be_named_anew(train, tmp_path):
    path = train()
    content = torch.load(path, weights_only=False)
    content['args'].model = f'local-dir:{tmp_path}/gone'
    torch.save(content, path)
    message = error_of('profile', path)
    assert f'local-dir:{tmp_path}/gone' in message and str(path) in message
    assert load_supervit('supervit_digits', path).num_classes == 3


def test_a_file_cannot_choose_more_than_settings_of_the_model(train):
    path = train()
    content = torch.load(path, weights_only=False)
    for key in ('checkpoint_path', 'pretrained', 'pretrained_cfg_overlay', 'cache_dir'):
        content['args'].model_kwargs = {key: 'x'}
        torch.save(content, path)
        assert f'no setting {key!r}' in error_of('profile', path)


def test_images_are_prepared_as_in_the_validation_of_the_run(train):
    plain = load_supervit(str(train())).pretrained_cfg
    model = load_supervit(str(train(mean=[0.4], std=[0.1, 0.2, 0.3], crop_pct=0.5, interpolation='bilinear')))
    config = timm.data.resolve_model_data_config(model)
    assert (config['mean'], config['std']) == ((0.4, 0.4, 0.4), (0.1, 0.2, 0.3))
    assert (config['crop_pct'], config['interpolation']) == (0.5, 'bilinear')
    assert plain['crop_pct'] != 0.5


# The names of its classes


def test_a_converted_checkpoint_knows_the_names_of_its_classes_for_ever(checkpoint, photos, tmp_path):
    assert supervit('convert', checkpoint, '--output', tmp_path / 'hub').exit_code == 0
    assert json.loads((tmp_path / 'hub' / 'config.json').read_text())['label_names'] == CLASSES
    photos.rename(tmp_path / 'elsewhere')
    assert class_names(timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True)) == CLASSES
    assert class_names(timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True, num_classes=2)) is None


def test_pictures_name_the_class(checkpoint, photos, tmp_path):
    photo = photos / 'train' / 'class2' / '0.png'
    result = supervit('visualize', checkpoint, photo, '--subnet', '12:0.5', '--output', tmp_path / 'out')
    row, = json.loads((tmp_path / 'out' / 'visualize.json').read_text())['rows']
    assert row['prediction'] in CLASSES and row['prediction'] in result.stdout


def test_a_class_map_comes_before_the_folders(train, photos):
    names = ['class10', 'class2', 'class9']
    (photos / 'train' / 'map.txt').write_text('\n'.join(names))
    for class_map in (str(photos / 'train' / 'map.txt'), 'map.txt'):  # by its path, or inside the split as timm looks
        assert class_names(load_supervit(str(train(class_map=class_map)))) == names
    model = load_supervit(str(train(class_map='gone.txt')))
    assert class_names(model) is None
    assert 'gone.txt' in source_of(model).unnamed


@pytest.mark.parametrize(('changes', 'reason'), [
    (dict(data_dir='/nowhere'), "'/nowhere' does not exist"),
    (dict(data_dir=None), 'does not exist'),
    (dict(dataset='hfds/x'), '--dataset hfds/x, which keeps no folder for each class'),
    (dict(num_classes=4), 'has 3 classes, and the network 4'),
])
def test_where_the_names_are_not_known_the_reason_is_said_and_an_option_names_them(
        train, photos, tmp_path, changes, reason):
    path = train(**changes)
    result = supervit('convert', path, '--output', tmp_path / 'hub')
    assert result.exit_code == 0
    last = result.stderr.splitlines()[-1]
    assert reason in last and '--class-names says where they are' in last
    assert 'label_names' not in json.loads((tmp_path / 'hub' / 'config.json').read_text())
    if 'num_classes' in changes:
        assert 'has 3 classes, and the network 4' in error_of(
            'convert', path, '--output', tmp_path / 'hub', '--class-names', photos)
        return
    (tmp_path / 'names.txt').write_text('\n'.join(CLASSES) + '\n')
    for source in (photos, photos / 'validation', tmp_path / 'names.txt'):
        result = supervit('convert', path, '--output', tmp_path / 'hub', '--overwrite', '--class-names', source)
        assert result.exit_code == 0
        assert 'Classes' not in result.stderr
        assert json.loads((tmp_path / 'hub' / 'config.json').read_text())['label_names'] == CLASSES


def test_class_names_that_are_given_count_and_the_training_folder_is_not_looked_at(
        checkpoint, photos, tmp_path, monkeypatch):
    (tmp_path / 'names.txt').write_text('a\nb\nc\n')

    def watch(name, function):
        def watched(path='.', *args, **kwargs):
            assert not os.fspath(path).startswith(str(photos)), f'{name} of {path}'
            return function(path, *args, **kwargs)

        monkeypatch.setattr(os, name, watched)

    for name in ('scandir', 'listdir', 'stat', 'walk'):
        watch(name, getattr(os, name))
    model = load_supervit(str(checkpoint), class_names=tmp_path / 'names.txt')
    assert class_names(model) == ['a', 'b', 'c']


def test_names_of_wordnet_become_words_and_others_stay(small_model):
    model = small_model(num_classes=2)
    assert class_names(model) is None
    model.pretrained_cfg['label_names'] = ['n02099601', 'n02123045']
    assert class_names(model) == ['golden retriever', 'tabby']
    model.pretrained_cfg['label_names'] = {'1': 'cats, small'}  # as JSON has it where some are not named
    assert class_names(model) == ['class 0', 'cats, small']
    assert class_names(small_model(num_classes=1000))[207] == 'golden retriever'


@pytest.mark.skipif(not os.environ.get('TIMM_SCRIPTS'), reason='TIMM_SCRIPTS does not name the folder of train.py')
def test_a_checkpoint_of_train_py_evaluates_to_what_the_script_logged(photos, tmp_path):
    run = tmp_path / 'run'
    train = subprocess.run(
        [sys.executable, Path(os.environ['TIMM_SCRIPTS'], 'train.py'), '--model', 'supervit_digits', '--num-classes',
         '3', '--model-kwargs', 'embed_dim=48', 'depth=2', 'drop_layers=1,', '--data-dir', photos, '--train-split',
         'train', '--val-split', 'validation', '-b', '3', '--epochs', '4', '--opt', 'adamw', '--lr', '2e-3', '--mean',
         '0.2', '--device', 'cpu', '--workers', '0', '--output', tmp_path, '--experiment', 'run'],
        capture_output=True, text=True, timeout=240, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONSAFEPATH': '1'})
    assert train.returncode == 0, train.stderr[-2000:]
    logged = {row['epoch']: row['validation']['top1'] for row in json.loads(train.stdout.split('--result')[1])}
    assert sorted(logged) == [0, 1, 2, 3]
    for model, name in ((run / 'last.pth.tar', 'evaluate'), (run, 'epochs')):
        result = supervit('evaluate', model, '--data-dir', photos, '--workers', 0, '--subnet', '24:1', '--output',
                          tmp_path / 'out', '--device', 'cpu')
        assert result.exit_code == 0, result.output
        rows = json.loads((tmp_path / 'out' / f'{name}.json').read_text())['rows']
        assert [row.get('epoch', 3) for row in rows] == ([0, 1, 2, 3] if model == run else [3])
        for row in rows:
            assert row['top1'] == pytest.approx(logged[row.get('epoch', 3)], abs=1e-3)  # float32 in the script
    assert class_names(load_supervit(str(run / 'last.pth.tar'))) == CLASSES
