"""README and docs: every command and snippet runs as it stands, in the order of the pages, in one empty folder.

What can't be had in a test has a stand-in: large data sets, a photograph, training for minutes. Commands of timm's
scripts are run in ``test_training.py``; here is what such a run leaves.
"""
import argparse
import glob
import json
import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner

from timm_supervit import Cascade, load_model
from timm_supervit.cli import main
from timm_supervit.programs.writing import write_program
from timm_supervit.results.fingerprint import fingerprint
from timm_supervit.tools import export
from timm_supervit.tools.quickstart import quickstart

ROOT = Path(__file__).parents[1]
PAGES = ['README.md', *(f'docs/{name}.md' for name in (
    'method', 'backbones', 'training', 'measured', 'deployment', 'python', 'registration', 'benchmarks', 'serving'))]

# Commands that other checks run: the installation and the tests by ``.ci/run``, servers by ``test_serving.py``, the
# benchmarks by whoever measures.
ELSEWHERE = ('pip install', 'pytest', 'python tests/', 'OMP_NUM_THREADS=1', '.ci/run', 'serve run', 'curl')
# Whose snippets ``test_deployment.py`` and ``test_serving.py`` run.
RUN_BY_TESTS = ('docs/deployment.md', 'docs/serving.md')
PHOTOGRAPHS = 'cifar10-subset'  # no part of this project; what was measured with them is told, with its commands
SCRIPTS = re.compile(r'(torchrun --nproc-per-node \d+ |python )(train|validate)\.py')


def list_blocks() -> list[Any]:
    """Return all commands and snippets, as (page, language, text)."""
    found = []
    for page in PAGES:
        path = ROOT / page
        for language, text in re.findall(r'^```(\w+)\n(.*?)^```$', path.read_text(), re.S | re.M):
            found.append((page, language, text))
    return found


# What a reader has to put in, and what stands in for it here.
STAND_INS = {
    '/path/to/imagenet': 'output/digits',
    '/path/to/folders': 'output/digits',
    'output/train/NAME': 'output/train/run',
    '--data-dir DIR': '--data-dir output/digits',
    '--data-dir imagenet': '--data-dir output/digits',
    'photo.jpg': 'output/digits/validation/7/000.png',
    '--rounds 100': '--rounds 2',
    ' --vs deit_tiny_patch16_224 --vs deit_small_patch16_224 --vs swin_tiny_patch4_window7_224 --vs pvt_v2_b2'
    ' --vs tnt_s_patch16_224': ' --subnet 128:0.5 --rounds 2',  # seconds in the place of minutes
    '--latency-ms 10': '--latency-ms 1000',
}


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Who reads the pages in an empty folder, and runs what they say there; a model is exported once, not each time."""
    monkeypatch.chdir(tmp_path)
    written: dict[tuple[str, str], bytes] = {}

    def write_once(module: Any, images: Any, path: Path, format: str, facts: dict[str, Any]) -> None:
        key = format, json.dumps(facts)
        if key not in written:
            write_program(module, images, path, format, facts)
            written[key] = Path(path).read_bytes()
        Path(path).write_bytes(written[key])

    monkeypatch.setattr(export, 'write_program', write_once)
    return Reader()


class Reader:
    """Runs commands and snippets; snippets of one page go on from each other."""

    def __init__(self) -> None:
        self.variables: dict[str, dict[str, Any]] = {}

    def run_shell(self, text: str) -> list[str]:
        """Run the commands of a block; return those that were run."""
        lines = text.replace('\\\n', ' ').splitlines()
        commands = [command.strip() for line in lines for command in without_comment(line).split(' && ')]
        return [command for command in commands if command and self.run_command(command)]

    def run_command(self, command: str) -> bool:
        for placeholder, stand_in in STAND_INS.items():
            command = command.replace(placeholder, stand_in)
        if command.startswith(ELSEWHERE) or SCRIPTS.match(command) or PHOTOGRAPHS in command:
            return False
        command, _, target = command.partition(' > ')
        program, *arguments = [
            path for word in shlex.split(command)
            for path in (sorted(glob.glob(word)) if '*' in word else [word])]
        assert program == 'supervit', f'{command}: who runs this?'
        if arguments[0] == 'quickstart':
            if not Path('output/digits').exists():
                self.start_quickly()
            return True
        result = CliRunner().invoke(main, arguments)
        if result.exit_code == 3 and arguments[0] == 'cascade':  # which one epoch does not make better than a subnet
            self.write_cascade()
        else:
            assert result.exit_code == 0, f'{command}\n{result.output}'
        if target:
            Path(target).write_text(result.stdout)
        return True

    def start_quickly(self) -> None:
        """Do what ``supervit quickstart`` does, in one epoch, and leave what a run of ``train.py`` would."""
        quickstart('output/digits', epochs=1)
        model: Any = timm.create_model('local-dir:output/digits', pretrained=True)
        run = Path('output/train/run')
        run.mkdir(parents=True)
        saver = timm.utils.CheckpointSaver(
            model, torch.optim.SGD(model.parameters(), lr=0.1), checkpoint_dir=str(run), recovery_dir=str(run),
            args=argparse.Namespace(
                model='supervit_digits', model_kwargs={}, num_classes=10, data_dir='output/digits', dataset='',
                train_split='validation', val_split='validation', class_map='', input_img_mode=None),
            model_ema=timm.utils.ModelEmaV3(model))
        for epoch in range(2):
            saver.save_checkpoint(epoch, metric=50. + epoch)

    def write_cascade(self) -> None:
        model = load_model('local-dir:output/digits')
        cascade = Cascade(model, [(12, 0.5), (24, 1.0)], [0.5])
        Path('results/cascade.json').write_text(cascade.to_json(fingerprint(model), {}))

    def run_python(self, page: str, text: str) -> None:
        """Run a snippet in the variables of its page, of which ``images`` is a batch."""
        for placeholder, stand_in in STAND_INS.items():
            text = text.replace(placeholder, stand_in)
        exec(compile(text, page, 'exec'), self.variables.setdefault(page, {'images': torch.randn(2, 3, 24, 24)}))


def without_comment(line: str) -> str:
    """Return a line of a shell without its comment."""
    return re.split(r'(?:^|\s)#\s', line)[0]


@pytest.mark.slow
def test_every_command_and_snippet_runs_in_order(reader: Reader) -> None:
    ran = []
    for page, language, text in list_blocks():
        start = time.perf_counter()
        if language == 'bash':
            ran += reader.run_shell(text)
        elif language == 'python' and page not in RUN_BY_TESTS:
            reader.run_python(page, text)
        print(f'{time.perf_counter() - start:5.1f} s  {page}: {text.splitlines()[0]}')
    commands = {command.split()[1] for command in ran}
    assert {'quickstart', 'evaluate', 'profile', 'choose', 'cascade', 'predict', 'visualize', 'export'} <= commands


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, 'CONTRIBUTING.md']:
        text = (ROOT / page).read_text()
        for link in re.findall(r'\]\(([^)#]+)(?:#[^)]*)?\)', text):
            if not link.startswith('http'):
                assert (ROOT / page).parent.joinpath(link).exists(), f'{page} links to {link}'


def test_the_readme_is_short() -> None:
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 120
