"""All subnets over the epochs of a run, from the folder of its checkpoints."""
import argparse
import csv
import functools
import json
import shutil

import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from timm_supervit.cli import main
from timm_supervit.tools.choose import merge_results

SETTINGS = dict(embed_dim=32, depth=2, drop_layers=(1,), img_sizes=(12, 24), keep_rates=(0.5, 1.0))


def supervit(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'photos'
    for i in range(6):
        path = folder / 'validation' / f'class{i % 3}' / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((24, 24), 20 * i + 1).convert('RGB').save(path)
    return folder


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Write the folder of a run: epochs 2 and 10 as ranked checkpoints, 11 as the last one alone."""
    folder = tmp_path_factory.mktemp('run')
    for epoch, name in [(10, 'checkpoint-10'), (2, 'checkpoint-2'), (11, 'last'), (2, 'model_best')]:
        states = []
        for seed in (epoch, 100 + epoch):
            torch.manual_seed(seed)
            states.append(timm.create_model('supervit_digits', num_classes=3, **SETTINGS).state_dict())
        args = argparse.Namespace(model='supervit_digits', model_kwargs=SETTINGS, num_classes=3)
        torch.save({'epoch': epoch, 'state_dict': states[0], 'state_dict_ema': states[1], 'args': args},
                   folder / f'{name}.pth.tar')
    return folder


def evaluate(model, photos, *options):
    result = supervit('evaluate', model, '--data-dir', photos, '--workers', 0, '-b', 2, '--device', 'cpu', *options)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize('options', [[], ['--use-ema'], ['--subnet', '12:0.5', '--subnet', '24:1']])
def test_every_epoch_has_the_accuracies_of_its_checkpoint_alone(run, photos, tmp_path, options):
    lines = iter(evaluate(run, photos, '--output', tmp_path / 'out', *options).splitlines())
    rows = json.loads((tmp_path / 'out' / 'epochs.json').read_text())['rows']
    header = next(line for line in lines if line.startswith('epoch')).split()
    for epoch, name in [(2, 'checkpoint-2'), (10, 'checkpoint-10'), (11, 'last')]:
        alone = json.loads(evaluate(run / f'{name}.pth.tar', photos, '--json', *options))['rows']
        assert [row for row in rows if row['epoch'] == epoch] == [{'epoch': epoch, **row} for row in alone]
        subnets = [f'{row["img_size"]}:{row["keep_rate"]:g}' for row in alone]
        assert header == ['epoch', *subnets, 'mean']
        mean = sum(row['top1'] for row in alone) / len(alone)
        line = next(line for line in lines if line.split()[:1] == [str(epoch)])
        assert line.split()[1:] == [f'{row["top1"]:.2f}' for row in alone] + [f'{mean:.2f}']
    with (tmp_path / 'out' / 'epochs.csv').open() as file:
        assert [(row['epoch'], row['img_size']) for row in csv.DictReader(file)] == [
            (str(row['epoch']), str(row['img_size'])) for row in rows]
    with Image.open(tmp_path / 'out' / 'epochs.png') as picture:
        assert picture.size == (1600, 1000)


@pytest.mark.parametrize(('options', 'words'), [
    ([], ['Weights: state_dict of', '--use-ema']), (['--use-ema'], ['Weights: state_dict_ema of', 'leaving out'])])
def test_it_is_said_which_weights_of_each_epoch_were_read(run, photos, options, words):
    arguments = ['--data-dir', photos, '--workers', 0, '--device', 'cpu', '--subnet', '12:0.5', *options]
    shown = supervit('evaluate', run, *arguments).stderr
    assert all(word in shown for word in words)


def test_one_epoch_of_the_results_can_be_chosen_from_and_a_model_card_takes_none(run, photos, tmp_path):
    evaluate(run, photos, '--output', tmp_path)
    with pytest.raises(ValueError, match='choose: epoch=2 or 10'):
        merge_results([tmp_path / 'epochs.json'])
    assert {row['epoch'] for row in merge_results([tmp_path / 'epochs.json'], {'epoch': 10}).rows} == {10}
    result = supervit(
        'convert', run / 'last.pth.tar', '--results', tmp_path / 'epochs.json', '--output', tmp_path / 'hub')
    assert result.exit_code == 1
    assert 'several epochs' in result.stderr


def test_an_interrupt_keeps_the_epochs_that_are_complete(run, photos, tmp_path, monkeypatch):
    def interrupt_epoch_10(steps, label):
        for step in steps:
            yield step
            if label == 'Epoch 10':
                raise KeyboardInterrupt

    monkeypatch.setattr('timm_supervit.cli.progress.track', interrupt_epoch_10)
    arguments = ['--data-dir', photos, '--workers', 0, '--device', 'cpu', '--output', tmp_path / 'out']
    result = supervit('evaluate', run, *arguments)
    assert result.exit_code == 130
    assert 'PARTIAL' in result.stdout and '1 of 3 epochs' in result.stdout
    content = json.loads((tmp_path / 'out' / 'epochs-partial.json').read_text())
    assert {row['epoch'] for row in content['rows']} == {2}


def test_a_folder_without_checkpoints_and_averages_of_only_some_epochs_are_named(run, photos, tmp_path):
    arguments = ['--data-dir', photos, '--workers', 0, '--device', 'cpu']
    result = supervit('evaluate', photos, *arguments)
    assert result.exit_code == 1
    assert 'photos holds no checkpoint-*.pth.tar of train.py' in result.stderr
    some = shutil.copytree(run, tmp_path / 'some')
    content = torch.load(some / 'last.pth.tar', weights_only=False)
    del content['state_dict_ema']
    torch.save(content, some / 'last.pth.tar')
    result = supervit('evaluate', some, '--use-ema', *arguments)
    assert result.exit_code == 1
    assert f'{some}/last.pth.tar has no averaged weights' in result.stderr


def cut(path):
    path.write_bytes(path.read_bytes()[:-2000])


def retrain(path):
    """Write what another network of this name would have."""
    content = torch.load(path, weights_only=False)
    content['state_dict'] = timm.create_model('supervit_digits', num_classes=3, **SETTINGS | {'depth': 3}).state_dict()
    torch.save(content, path)


DAMAGES = {
    'cut': cut, 'empty': lambda path: path.write_bytes(b''), 'text': lambda path: path.write_text('no weights'),
    'a folder': lambda path: (path.unlink(), path.mkdir()), 'gone': lambda path: (path.unlink(), path.symlink_to('x')),
    'another network': retrain,
}


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('name', ['checkpoint-2', 'checkpoint-10', 'last'])
def test_a_damaged_checkpoint_is_named_and_the_other_epochs_are_evaluated(run, photos, tmp_path, name, damage):
    folder = shutil.copytree(run, tmp_path / 'run')
    DAMAGES[damage](folder / f'{name}.pth.tar')
    result = supervit(
        'evaluate', folder, '--data-dir', photos, '--workers', 0, '--device', 'cpu', '--output', tmp_path / 'out')
    content = json.loads((tmp_path / 'out' / 'epochs.json').read_text())
    if name == 'last' and damage in ('a folder', 'gone'):  # as in a run that has none beside its best
        assert (result.exit_code, content['info']['unread']) == (0, [])
    else:
        unread, = content['info']['unread']
        assert (result.exit_code, len(result.stderr.splitlines())) == (1, 2)
        assert f'{folder / name}.pth.tar' in unread and f'Error: {unread}' in result.stderr
    epochs = {'checkpoint-2': 2, 'checkpoint-10': 10, 'last': 11}
    assert content['rows'] == [
        {'epoch': epoch, **row} for other, epoch in epochs.items() if other != name
        for row in json.loads(expected_of(run, photos, other))['rows']]


@functools.cache
def expected_of(run, photos, name):
    return evaluate(run / f'{name}.pth.tar', photos, '--json')


def test_a_folder_of_which_no_checkpoint_can_be_read_is_an_error(run, photos, tmp_path):
    folder = shutil.copytree(run, tmp_path / 'run')
    for path in folder.iterdir():
        cut(path)
    result = supervit('evaluate', folder, '--data-dir', photos, '--device', 'cpu', '--output', tmp_path / 'out')
    assert result.exit_code == 1
    assert 'checkpoint-2.pth.tar was refused' in result.stderr
    assert not list((tmp_path / 'out').glob('*'))
