"""One reader of checkpoints: which weights of a file it reads, and how every command refuses what holds none."""
import os
import pickle

import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from timm_supervit.cli import main
from timm_supervit.loading.checkpoints import CheckpointError, read_checkpoint
from timm_supervit.loading.load import load_weights

SETTINGS = dict(embed_dim=48, depth=3, drop_layers=(1,), num_classes=2)


def create(seed=0):
    torch.manual_seed(seed)
    return timm.create_model('supervit_digits', **SETTINGS).eval()


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def cut(content):
    return content[:len(content) // 2]


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1:]


POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n'

# What stands in a file instead of a checkpoint: bytes, a change of the bytes of a good one, or what torch.save wrote.
DAMAGES = {
    'empty.pth': b'',
    'empty.safetensors': b'',
    'text.pth': b'error: not found\n',
    'page.pth': b'<html>Not found</html>',
    'pointer.pth': POINTER,
    'pointer.safetensors': POINTER,
    'noise.pth': bytes(range(256)) * 8,
    'stack.pth': b'\x80\x02.',
    'truncated.pth': cut,
    'truncated.safetensors': cut,
    'flipped.pth': flip,
    'torch-file.safetensors': lambda content: pickle.dumps({'a': 1}),
    'list.pth': [1, 2],
    'tensor.pth': torch.ones(3),
    'numbers.pth': {'epoch': 3},
    'string.pth': {'model': 'the weights'},
    'none.pth': {'model': None},
    'number.pth': {'state_dict': 3},
    'scalar.pth': {'model': torch.tensor(1.)},
    'scalar-ema.pth': {'state_dict_ema': torch.tensor(1.)},
    'strings.pth': {'model': {'cls_token': 'a', 'pos_embed': 'b'}},
    'numbered.pth': {'model': {0: torch.ones(1)}},
    'scalars.pth': {'model': {'pos_embed': torch.tensor(1.), 'cls_token': torch.tensor(1.)}},
    'flat.pth': {'model': {'pos_embed': torch.ones(17), 'cls_token': torch.ones(48)}},
    'module.pth': {'model': torch.nn.Linear(2, 2)},
}


def write(path, damage):
    if callable(damage):
        (save_file if path.suffix == '.safetensors' else torch.save)(create().state_dict(), path)
        path.write_bytes(damage(path.read_bytes()))
    elif isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        torch.save(damage, path)


@pytest.fixture(scope='module')
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp('images') / 'validation' / 'class0' / '0.png'
    path.parent.mkdir(parents=True)
    (path.parent.parent / 'class1').mkdir()
    Image.new('RGB', (24, 24)).save(path)
    Image.new('RGB', (24, 24)).save(path.parent.parent / 'class1' / '1.png')
    return path


def run(command, checkpoint, image, output, *more):
    settings = [f'{key}={value}' for key, value in SETTINGS.items() if key != 'num_classes']
    subnet = ['--subnet', '12:0.5']
    own = {
        'evaluate': [
            'supervit_digits', '--checkpoint', checkpoint, '--data-dir', image.parents[2], '--workers', '0', *subnet],
        'profile': ['supervit_digits', '--checkpoint', checkpoint, '--rounds', '2', *subnet],
        'visualize': ['supervit_digits', image, '--checkpoint', checkpoint, '--output', output, *subnet],
        'export': ['supervit_digits', '--checkpoint', checkpoint, '--output', output, '--format', 'pt2', *subnet],
        'convert': [checkpoint, '--model', 'supervit_digits', '--output', output],
    }[command]
    arguments = [command, *own, *more, '--num-classes', '2', '--model-kwargs', *settings]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize('command', ['evaluate', 'profile', 'visualize', 'export', 'convert'])
def test_every_command_refuses_every_damaged_file_by_name_in_one_line(command, image, tmp_path):
    for name, damage in DAMAGES.items():
        write(tmp_path / name, damage)
        result = run(command, tmp_path / name, image, tmp_path / 'output')
        assert isinstance(result.exception, SystemExit), (name, result.exception)
        assert (result.exit_code, result.stdout) == (1, ''), name
        assert result.stderr.splitlines()[-1].startswith(f'Error: {tmp_path / name}'), result.stderr


@pytest.mark.parametrize('form', ['zip', 'legacy', 'pickle'])
def test_a_file_that_wants_to_run_code_is_refused_and_does_not_run(tmp_path, form):
    state = {'model': {'weight': torch.ones(2)}, 'extra': RunsCode(tmp_path / 'ran')}
    path = tmp_path / 'evil.pth'
    if form == 'pickle':
        path.write_bytes(pickle.dumps(RunsCode(tmp_path / 'ran')))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == 'zip')
    with pytest.raises(CheckpointError, match=r'evil\.pth was refused: .* reading it could run code'):
        read_checkpoint(path)
    assert not (tmp_path / 'ran').exists()


def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(tmp_path):
    (tmp_path / 'model.pth').write_bytes(POINTER)
    with pytest.raises(CheckpointError, match='git lfs pull'):
        read_checkpoint(tmp_path / 'model.pth')


@pytest.mark.parametrize(('keys', 'use_ema', 'read'), [
    (('model', 'model_ema'), False, 'model'),
    (('model', 'model_ema'), True, 'model_ema'),
    (('state_dict', 'state_dict_ema'), False, 'state_dict'),
    (('state_dict', 'state_dict_ema'), True, 'state_dict_ema'),
    (('model',), True, 'model'),
    (('model_ema',), False, 'model_ema'),
    ((), False, ''),
])
def test_the_reader_says_which_weights_it_read(tmp_path, keys, use_ema, read):
    states = {key: create(seed).state_dict() for seed, key in enumerate(keys)}
    torch.save({**states, 'epoch': 3, 'optimizer': {}} if keys else create().state_dict(), tmp_path / 'file.pth')
    model = create(9)
    checkpoint = read_checkpoint(tmp_path / 'file.pth', use_ema)
    load_weights(model, checkpoint)
    assert checkpoint.entry == read
    assert checkpoint.other_entries == tuple(key for key in keys if key != read)
    for key, value in states.get(read, create().state_dict()).items():
        assert model.state_dict()[key].equal(value)


@pytest.mark.parametrize(('options', 'words'), [
    ([], ['model of official.pth', 'model_ema', '--use-ema']),
    (['--use-ema'], ['model_ema of official.pth', 'has model;', 'leaving out --use-ema']),
])
@pytest.mark.parametrize('command', ['evaluate', 'visualize', 'convert'])
def test_commands_show_which_weights_they_read(command, image, tmp_path, options, words):
    torch.save({'model': create().state_dict(), 'model_ema': create(1).state_dict()}, tmp_path / 'official.pth')
    result = run(command, tmp_path / 'official.pth', image, tmp_path / 'output', *options)
    assert result.exit_code == 0, result.output
    line, = [line for line in result.stderr.splitlines() if line.startswith('Weights')]
    assert all(word in line for word in words)
    assert 'Weights' not in result.stdout
