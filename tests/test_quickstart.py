"""The main job: train on digits, evaluate, save, load again."""
import contextlib
import json
import os
import shlex
import signal
import time
from collections import Counter

import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from processes import forks

from timm_supervit import load_model
from timm_supervit.cli import main
from timm_supervit.results.rows import load_results
from timm_supervit.tools import quickstart as quickstart_file
from timm_supervit.tools.cascade import calibrate
from timm_supervit.tools.quickstart import load_digits, quickstart


@contextlib.contextmanager
def fewer_digits(num_train, num_test=360):
    examples, held_out = load_digits(24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart_file, 'load_digits', lambda img_size: (examples[:num_train], held_out[:num_test]))
        yield


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits')
    with fewer_digits(256):
        return folder, quickstart(folder, seed=3, epochs=1)


def test_the_split_of_the_digits_is_fixed_and_even():
    examples, held_out = load_digits(24)
    assert (len(examples), len(held_out)) == (1437, 360)
    assert all(image.size == (24, 24) and image.mode == 'RGB' for image, _ in held_out)
    assert set(Counter(target for _, target in held_out).values()) <= {34, 35, 36, 37}
    seen = {image.tobytes() for image, _ in examples}
    assert not any(image.tobytes() in seen for image, _ in held_out)


def test_every_subnet_is_in_the_table_and_the_picture_is_there(run):
    folder, results = run
    model = timm.create_model('supervit_digits')
    assert {(row['img_size'], row['keep_rate']) for row in results.rows} == set(model.subnets)
    assert all(row['count'] == 360 for row in results.rows)
    assert load_results(folder / 'evaluate.json') == results
    with Image.open(folder / 'evaluate.png') as picture:
        picture.verify()
    assert {path.name for path in folder.iterdir()} == {
        'config.json', 'evaluate.csv', 'evaluate.json', 'evaluate.png', 'model.safetensors', 'validation'}
    assert sum(1 for _ in (folder / 'validation').glob('*/*.png')) == 360


def test_the_folder_loads_as_the_model_that_was_evaluated(run):
    folder, results = run
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    config = timm.data.resolve_data_config({}, model=model)
    transform = timm.data.create_transform(**config)
    _, held_out = load_digits(24)
    images, targets = torch.stack([transform(image) for image, _ in held_out]), torch.tensor([t for _, t in held_out])
    for row in results.rows[::5]:
        with torch.no_grad():
            logits = model(images, img_size=row['img_size'], keep_rate=row['keep_rate'])
        assert int((logits.argmax(dim=1) == targets).sum()) == row['correct1']


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tmp_path):
    with fewer_digits(128, 40):
        results = {name: quickstart(tmp_path / name, seed, epochs=1) for name, seed in (('a', 3), ('b', 3), ('c', 4))}
    weights = {name: (tmp_path / name / 'model.safetensors').read_bytes() for name in results}
    assert results['a'].rows == results['b'].rows
    assert weights['a'] == weights['b'] != weights['c']


def run_command(arguments, errors):
    with errors.open('w') as file:
        os.dup2(file.fileno(), 2)
    main(arguments)


def test_an_interrupt_leaves_nothing_half_written(tmp_path):
    output, errors = tmp_path / 'digits', tmp_path / 'errors.txt'
    output.mkdir()
    (output / 'evaluate.json').write_text('old')
    process = forks.Process(target=run_command, args=(['quickstart', '--output', str(output)], errors))
    process.start()
    while len(list(output.iterdir())) == 1 and process.is_alive():
        time.sleep(0.05)  # until its temporary folder is there, so that it has begun
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    process.join(timeout=60)
    assert (process.exitcode, errors.read_text().splitlines()[-1]) == (130, 'Interrupted.')
    assert [(path.name, path.read_text()) for path in output.iterdir()] == [('evaluate.json', 'old')]


def test_an_interrupted_evaluation_is_saved_as_nothing_complete(tmp_path, monkeypatch):
    def interrupted(steps, label):
        for i, step in enumerate(steps):
            if label == 'Evaluating' and i == 1:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(quickstart_file, 'train', lambda *args: None)
    with pytest.raises(KeyboardInterrupt):
        quickstart(tmp_path, epochs=1, progress=interrupted)
    assert not any(tmp_path.iterdir())


def test_the_results_say_how_to_get_them_again(run):
    folder, _ = run
    content = json.loads((folder / 'evaluate.json').read_text())
    assert content['model'] == f'local-dir:{folder}'
    assert content['info']['seed'] == 3


def test_the_saved_images_give_the_same_results(run):
    folder, results = run
    command = ['evaluate', f'local-dir:{folder}', '--data-dir', str(folder), '--workers', '0', '--json', '-q']
    printed = CliRunner().invoke(main, command)
    assert json.loads(printed.stdout)['rows'] == results.rows


def test_the_next_steps_that_it_prints_can_be_taken(run, tmp_path, monkeypatch):
    folder, results = run
    monkeypatch.setattr(quickstart_file, 'quickstart', lambda output, seed, progress: results)
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(main, ['quickstart', '--output', str(folder)]).stdout
    commands = [shlex.split(line)[1:] for line in shown.splitlines() if line.startswith('  supervit ')]
    assert [command[0] for command in commands] == ['profile', 'choose']
    for command, faster in zip(commands, (['--rounds', '2'], ['--latency-ms', '1000']), strict=True):
        result = CliRunner().invoke(main, [*command, *faster])
        assert result.exit_code == 0, result.output
    assert {row['batch_size'] for row in load_results(tmp_path / 'results' / 'profile.json').rows} == {1, 64}


@pytest.mark.slow
def test_the_network_has_a_cascade_as_accurate_as_itself_at_two_fifths_of_its_macs(tmp_path):
    quickstart(tmp_path)
    for macs in (None, 2.8e6):
        found = calibrate(load_model(f'local-dir:{tmp_path}'), str(tmp_path), workers=0, macs=macs)
        assert found.verdict.is_better, found.verdict
        assert found.row['top1'] >= found.full['top1'] - 1 and found.row['macs'] <= 0.4 * found.full['macs']
