"""The command line: light to start, one line for what went wrong, exit codes."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from timm_supervit.cli import main
from timm_supervit.models.supervit import SuperVisionTransformer
from timm_supervit.results.rows import Results, load_results, save_results
from timm_supervit.tools import export, quickstart

COMMANDS = main.list_commands(click.Context(main))


def supervit(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run_python(code):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)


def save_rows(folder, *others, **info):
    """Save results of one subnet and perhaps others; return the file."""
    rows = [dict(img_size=12, keep_rate=0.5, macs=10, top1=80.0), *others]
    return folder / save_results(Results('m', rows, info), folder, 'evaluate')


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights') / 'model.pth'
    torch.save(timm.create_model('supervit_digits', num_classes=2).state_dict(), path)
    return path


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    for i in range(5):
        path = folder / 'validation' / f'class{i % 2}' / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (24, 24), (50 * i, 20, 10)).save(path)
    return folder


@pytest.mark.parametrize('arguments', [['--help'], ['--version'], ['evaluate', '--help'], ['choose', '--help']])
def test_help_imports_nothing_heavy(arguments):
    assert heavy_imports(arguments) == []


def test_reading_results_imports_no_torch(tmp_path):
    assert not {'torch', 'timm'} & set(heavy_imports(['choose', str(save_rows(tmp_path))]))


def heavy_imports(arguments):
    """Run a command in a process of its own; return what it imported of what takes long."""
    result = run_python(
        'import sys\n'
        'from timm_supervit.cli import main\n'
        'try:\n'
        f'    main({arguments!r})\n'
        'finally:\n'
        '    heavy = {"torch", "timm", "numpy", "matplotlib", "rich", "sklearn"} & set(sys.modules)\n'
        '    print("\\n", *sorted(heavy))\n')
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1].split()


def test_help_lists_every_command_and_each_has_an_example():
    listing = supervit('--help').output
    for name in COMMANDS:
        assert name in listing
    for name in ('quickstart', 'evaluate', 'choose'):
        assert f'  supervit {name} ' in supervit(name, '--help').output


@pytest.mark.parametrize(('missing', 'arguments'), [
    ('click', ['--help']), ('rich', ['choose', '{results}']),
    ('matplotlib', ['choose', '{results}', '--output', '{folder}'])])
def test_a_missing_extra_is_one_line(missing, arguments, tmp_path):
    arguments = [argument.format(results=save_rows(tmp_path), folder=tmp_path / 'out') for argument in arguments]
    code = f'import sys; sys.modules[{missing!r}] = None; from timm_supervit.cli import main; main({arguments!r})'
    result = run_python(code)
    assert result.returncode == 1
    assert result.stderr.count('\n') == 1
    assert 'pip install "timm-supervit[tools]"' in result.stderr


def test_a_missing_extra_of_one_command_is_one_line(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition('.')[0] == 'sklearn']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, quickstart.__name__)  # which has imported it already
    monkeypatch.setitem(sys.modules, 'sklearn', None)
    result = supervit('quickstart', '--output', tmp_path)
    assert result.exit_code == 1
    assert result.stderr.count('\n') == 1
    assert 'pip install "timm-supervit[tools]"' in result.stderr


def test_evaluate_prints_the_table_and_writes_the_files(checkpoint, images, tmp_path):
    result = supervit(
        'evaluate', 'supervit_digits', '--checkpoint', checkpoint, '--num-classes', 2, '--data-dir', images,
        '--workers', 0, '--output', tmp_path, '--device', 'cpu', '--amp', '--amp-dtype', 'bfloat16',
        '--model-kwargs', 'keep_rates=(0.4,1.0)', 'drop_layers=(2,)', '--subnet', '16:0.4', '--subnet', '24:1')
    assert result.exit_code == 0, result.output
    assert 'top-1 of 5 images [%]' in result.stdout and 'MACs per image [M]' in result.stdout
    content = json.loads((tmp_path / 'evaluate.json').read_text())
    points = [(row['img_size'], row['keep_rate'], row['count']) for row in content['rows']]
    assert points == [(16, 0.4, 5), (24, 1.0, 5)]
    assert content['info']['precision'] == 'bfloat16'
    assert {path.name for path in tmp_path.iterdir()} == {'evaluate.json', 'evaluate.csv', 'evaluate.png'}


@pytest.mark.parametrize(('arguments', 'code', 'message'), [
    (['--subnet', '160-0.7'], 2, "'160-0.7' is no subnet SIZE:RATE"),
    (['--subnet', '12:1.5'], 2, 'keep_rate 1.5 is not in'),
    (['--subnet', '13:0.5'], 1, 'img_size 13 is none of img_sizes'),
    (['--num-classes', '3'], 1, 'the data set has 2 classes and the model 3'),
    (['--data-dir', '/nowhere'], 1, "'/nowhere' does not exist"),
    (['--checkpoint', '/nowhere'], 2, "'/nowhere' does not exist"),
    (['--output', '/dev/null/x'], 1, "cannot write to the folder '/dev/null/x'"),
    (['--model-kwargs', 'keep_rate'], 2, "'keep_rate' is not KEY=VALUE"),
    (['--model-kwargs', 'img_sizes=(12,17)'], 1, '17 is not divisible by the patch size 4'),
    (['--unknown'], 2, 'No such option'),
])
def test_what_is_wrong_is_one_line_and_an_exit_code(checkpoint, images, arguments, code, message):
    defaults = {'--data-dir': images, '--num-classes': 2, '--checkpoint': checkpoint, '--workers': 0}
    given = [str(item) for pair in defaults.items() if pair[0] not in arguments for item in pair]
    if '--num-classes' in arguments:
        given = [item for item in given if item not in ('--checkpoint', str(checkpoint))]
        path = checkpoint.with_name('three.pth')
        torch.save(timm.create_model('supervit_digits', num_classes=3).state_dict(), path)
        given += ['--checkpoint', str(path)]
    result = supervit('evaluate', 'supervit_digits', *given, *arguments)
    assert (result.exit_code, result.stdout) == (code, '')
    assert message in result.stderr.splitlines()[-1]


def test_a_model_that_is_no_supervit_or_has_no_weights_is_refused(checkpoint, images):
    for model, message in [
        ('resnet18', 'resnet18 is no SuperViT'),
        ('supervit_digits', 'has no pretrained weights; give trained ones with --checkpoint'),
        ('supervit_unknown', 'Unknown model'),
    ]:
        arguments = ['--checkpoint', checkpoint] if model.startswith('resnet') else []
        result = supervit('evaluate', model, '--data-dir', images, *arguments)
        assert result.exit_code == 1
        assert message in result.stderr


def test_an_interrupted_evaluation_prints_what_it_has_and_exits_with_130(checkpoint, images, tmp_path, monkeypatch):
    forward, calls = SuperVisionTransformer.forward_subnets, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return forward(*args)

    monkeypatch.setattr(SuperVisionTransformer, 'forward_subnets', interrupted)
    (tmp_path / 'evaluate.json').write_text('complete')
    result = supervit(
        'evaluate', 'supervit_digits', '--checkpoint', checkpoint, '--num-classes', 2, '-b', 1, '--data-dir', images,
        '--workers', 1, '--device', 'cpu', '--output', tmp_path)
    assert result.exit_code == 130 == 128 + signal.SIGINT
    path = tmp_path / 'evaluate-partial.json'
    line = result.stdout.splitlines()[0]
    assert 'PARTIAL' in line and '2 of 5 images' in line and str(path) in line
    assert json.loads(path.read_text())['info']['partial']
    assert (tmp_path / 'evaluate.json').read_text() == 'complete'
    assert {path.name for path in tmp_path.iterdir()} == {
        'evaluate.json', 'evaluate-partial.json', 'evaluate-partial.csv', 'evaluate-partial.png'}


# Results are saved before they are shown


@pytest.fixture
def saving(checkpoint, images, tmp_path):
    """Each command that writes to --output, in its shortest form, and what it writes."""
    model = ['supervit_digits', '--checkpoint', checkpoint, '--num-classes', 2, '--device', 'cpu']
    tables = [f'{{name}}.{ending}' for ending in ('csv', 'json', 'png')]
    image = next(images.glob('*/*/*.png'))
    commands = {
        'evaluate': ([*model, '--data-dir', images, '--workers', 0, '--subnet', '12:0.5'], tables),
        'profile': ([*model, '--subnet', '12:0.5', '--rounds', 2], tables),
        'choose': ([save_rows(tmp_path)], tables),
        'cascade': ([*model, '--data-dir', images, '--workers', 0, '--model-kwargs', 'keep_rates=(1.0,)'],
                    [f'cascade-front.{ending}' for ending in ('csv', 'json', 'png')]),  # no cascade is better here
        'visualize': ([*model, image, '--subnet', '12:0.5'], tables),
        'export': ([*model, '--format', 'pt2', '--subnet', '12:0.5'],
                   ['supervit_digits-12-0.5.pt2', 'supervit_digits-12-0.5.pt2.json']),
        'convert': ([checkpoint, '--model', 'supervit_digits', '--num-classes', 2],
                    ['README.md', 'config.json', 'model.safetensors']),
        'quickstart': (['--seed', 3], [*tables, 'config.json', 'model.safetensors', 'validation']),
    }
    return {
        name: ([name, *map(str, arguments), '--output', str(tmp_path / 'new')],
               sorted(file.format(name='evaluate' if name == 'quickstart' else name) for file in files))
        for name, (arguments, files) in commands.items()}


@pytest.fixture
def run_into(monkeypatch):
    """Run a command with a file as its stdout, which it may break; return the exit code."""
    digits = [(Image.new('RGB', (24, 24)), 0)]
    monkeypatch.setattr(quickstart, 'load_digits', lambda size: (digits, digits))
    monkeypatch.setattr(quickstart, 'train', lambda *args: None)
    written = []
    monkeypatch.setattr(
        export, 'write_program', lambda module, images, path, *_: [written.append(module), path.touch()])
    monkeypatch.setattr(export, 'load_program', lambda path: lambda images, *subnet: written[-1](images))

    def run(file, arguments):
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'stdout', file)
            with pytest.raises(SystemExit) as end:
                main(arguments)
        return end.value.code

    return run


@pytest.mark.parametrize(
    'name', ['evaluate', 'profile', 'choose', 'cascade', 'visualize', 'export', 'convert', 'quickstart'])
def test_results_are_complete_on_disk_where_nobody_reads_what_is_shown(saving, run_into, name, tmp_path, capsys):
    arguments, files = saving[name]
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, 'w') as pipe:
        assert run_into(pipe, arguments) == 141 == 128 + signal.SIGPIPE
    assert 'rror' not in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / 'new').iterdir()) == files


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_where_stdout_is_full_the_message_says_where_the_results_are(saving, run_into, tmp_path, capsys):
    arguments, files = saving['choose']
    with open('/dev/full', 'w') as full:
        assert run_into(full, arguments) == 1
    message, = capsys.readouterr().err.splitlines()
    assert 'No space left on device' in message and f'complete in {tmp_path / "new"}' in message
    assert sorted(path.name for path in (tmp_path / 'new').iterdir()) == files


def test_every_command_with_an_output_is_tested_so(saving):
    group = click.Context(main)
    with_output = {
        name for name in main.list_commands(group)
        if any(param.name == 'output' and param.type.dir_okay for param in main.get_command(group, name).params)}
    assert with_output == set(saving)


@pytest.mark.parametrize(('target', 'codes', 'errors'), [
    ('> /dev/full', {1}, ['No space left on device']),
    ('| true', {141}, []),
    ('| head -1', {0, 141}, []),  # all may be written before head ends
])
@pytest.mark.parametrize(('command', 'unbuffered'), [
    ('recipe deit_small_in1k', ''), ('recipe deit_small_in1k', '1'), ('choose {results}', '')])
def test_what_a_shell_sees_of_a_stdout_that_takes_no_more(command, target, codes, errors, unbuffered, tmp_path):
    command = command.format(results=save_rows(tmp_path))
    result = subprocess.run(
        ['bash', '-c', f'set -o pipefail; {sys.executable} -m timm_supervit {command} {target}'],
        capture_output=True, text=True, env={**os.environ, 'PYTHONUNBUFFERED': unbuffered})
    assert result.returncode in codes
    for line, error in zip(result.stderr.splitlines(), errors, strict=True):
        assert error in line


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
def test_what_a_terminal_cannot_encode_is_escaped_and_said(saving, run_into, encoding, tmp_path, capsys):
    arguments = [*saving['convert'][0][:-1], str(tmp_path / '数')]
    with open(tmp_path / 'terminal', 'w', encoding=encoding) as terminal:
        assert run_into(terminal, arguments) == 0
    assert (tmp_path / 'terminal').read_text().splitlines()[0] == f'{tmp_path}/\\u6570'
    assert f'stdout is {encoding}, which lacks some characters' in capsys.readouterr().err
    assert (tmp_path / '数' / 'model.safetensors').exists()


def test_choose_prints_the_subnet_last_or_the_nearest_miss(tmp_path):
    path = save_rows(tmp_path, dict(img_size=24, keep_rate=1.0, macs=20, top1=90.0))
    result = supervit('choose', path, '--macs', 15)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, '12:0.5')
    result = supervit('choose', path, '--macs', 15, '--output', tmp_path)
    assert json.loads((tmp_path / 'choose.json').read_text())['info']['best']['img_size'] == 12
    result = supervit('choose', path, '--macs', 5)
    assert (result.exit_code, result.stdout) == (1, '')
    assert 'the nearest is 12:0.5' in result.stderr
    path.write_text('{}')
    assert supervit('choose', path).exit_code == 1


def test_choose_says_what_is_partial_and_marks_what_it_writes(tmp_path):
    path = save_rows(tmp_path, partial=True)
    result = supervit('choose', path, '--output', tmp_path / 'chosen')
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, '12:0.5')
    assert f'PARTIAL: {path}' in result.stdout
    assert {path.name for path in (tmp_path / 'chosen').iterdir()} == {
        'choose-partial.json', 'choose-partial.csv', 'choose-partial.png'}
    assert load_results(tmp_path / 'chosen' / 'choose-partial.json').partial
