"""How the command behaves in shells and scripts: JSON, quiet and verbose, help, hints, progress without a terminal."""
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from PIL import Image
from timm.models import save_for_hf

from timm_supervit.cli import main, progress
from timm_supervit.loading import load as loaders
from timm_supervit.results.fingerprint import Source
from timm_supervit.results.rows import Results, save_results

COMMANDS = main.list_commands(click.Context(main))
SUBNETS = ['--subnet', '32:0.6', '--subnet', '64:1']


@pytest.fixture
def folder(small_model: Any, tmp_path: Path) -> str:
    save_for_hf(small_model(), str(tmp_path / 'network'), safe_serialization=True)
    return f'local-dir:{tmp_path / "network"}'


def run(*args: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


def test_json_is_all_that_is_printed(folder: str, tmp_path: Path) -> None:
    profile = run('profile', folder, *SUBNETS, '--rounds', 2, '--json')
    rows = json.loads(profile.stdout)['rows']
    assert [row['img_size'] for row in rows] == [32, 64]
    for i, row in enumerate(rows):
        row['top1'] = 50. + i
    save_results(Results('network', rows), tmp_path, 'evaluate')
    chosen = run('choose', tmp_path / 'evaluate.json', '--json')
    assert json.loads(chosen.stdout)['info']['best']['img_size'] == 64
    assert chosen.stderr == '64:1\n'


@pytest.mark.parametrize('name', [name for name in COMMANDS if name != 'recipe'])
def test_every_command_that_prints_results_has_the_same_manners(name: str) -> None:
    shown = run(name, '--help').stdout
    for option in ('--json', '-q, --quiet', '-v, --verbose'):
        assert option in shown


def test_quiet_prints_results_and_errors_alone(small_model: Any, folder: str, tmp_path: Path) -> None:
    save_for_hf(small_model(), str(tmp_path), safe_serialization=True)
    arguments = ('profile', folder, '--checkpoint', tmp_path / 'model.safetensors', *SUBNETS, '--rounds', 2)
    assert 'Weights:' in run(*arguments).stderr
    quiet = run(*arguments, '-q')
    assert quiet.stderr == ''
    assert '64:1' in quiet.stdout
    assert 'Error' in run('profile', 'supervit_smal', '-q', code=1).stderr


def test_verbose_shows_what_is_logged(folder: str) -> None:
    levels = {name: logging.getLogger(name).level for name in ('timm', 'timm_supervit')}
    try:
        run('profile', folder, *SUBNETS, '--rounds', 2, '-v')
        assert logging.getLogger('timm_supervit').level == logging.getLogger('timm').level == logging.INFO
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def test_alone_it_prints_help() -> None:
    shown = run().stdout
    assert shown == run('--help').stdout
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize('args, hint, code', [
    (('evalute',), "Did you mean 'evaluate'?", 2),
    (('profile', 'supervit_smal'), 'did you mean supervit_small?', 1),
    (('profile', 'supervit_small', '--model-kwargs', 'keep_rats=1'), 'did you mean keep_rates?', 2),
    (('profile', 'supervit_small', '--round', '2'), '--rounds', 2),
    (('evaluate', 'supervit_small'), 'give a folder of them with --data-dir', 1),
])
def test_what_is_mistyped_is_met_with_what_may_have_been_meant(args: Any, hint: str, code: int) -> None:
    assert hint in run(*args, code=code).stderr


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, '-m', 'timm_supervit', '--version']
    assert 'supervit, version' in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_progress_is_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    seconds = iter(range(0, 1000, 9))
    monkeypatch.setattr(progress.time, 'monotonic', lambda: next(seconds))
    assert list(progress.track(range(8), 'Measuring')) == list(range(8))
    lines = capsys.readouterr().err.splitlines()
    assert 'Measuring: 2 of 8' in lines[0] and '81 s' in lines[0]
    assert 1 < len(lines) < 8


def test_plain_weights_are_called_so(monkeypatch: pytest.MonkeyPatch, small_model: Any, tmp_path: Path) -> None:
    model = small_model()
    model.source = Source('supervit_small')
    for name in ('load_model', 'load_supervit'):
        monkeypatch.setattr(loaders, name, lambda *args, **kwargs: model)
    Image.new('RGB', (64, 64)).save(tmp_path / 'photo.png')
    shown = run('visualize', 'supervit_small', tmp_path / 'photo.png', *SUBNETS, '--output', tmp_path / 'out').stderr
    assert 'plain' in shown and 'not super-trained' in shown
    # Those that it measures are random, which costs the same.
    assert 'super-trained' not in run('profile', 'supervit_small', *SUBNETS, '--rounds', 2).stderr
