"""The main job: train on digits, evaluate, save, load again."""
import json
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from timm_supervit.cli import main
from timm_supervit.tools import quickstart as quickstart_file
from timm_supervit.tools.quickstart import load_digits, quickstart
from timm_supervit.tools.results import load_results


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits')
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


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(run, tmp_path):
    folder, results = run
    again = quickstart(tmp_path / 'a', seed=3, epochs=1)
    assert again.rows == results.rows
    weights = (folder / 'model.safetensors').read_bytes()
    assert (tmp_path / 'a' / 'model.safetensors').read_bytes() == weights
    quickstart(tmp_path / 'b', seed=4, epochs=1)
    assert (tmp_path / 'b' / 'model.safetensors').read_bytes() != weights


def test_an_interrupt_leaves_nothing_half_written(run, tmp_path):
    (tmp_path / 'evaluate.json').write_text('old')
    process = subprocess.Popen(
        [sys.executable, '-m', 'timm_supervit', 'quickstart', '--output', str(tmp_path)], stderr=subprocess.PIPE)
    while len(list(tmp_path.iterdir())) == 1 and process.poll() is None:
        time.sleep(0.05)  # until its temporary folder is there, so that it has begun
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.decode().splitlines()[-1]) == (130, 'Interrupted.')
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [('evaluate.json', 'old')]


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
