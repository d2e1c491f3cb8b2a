"""timm's scripts and the command line on SuperViTs of timm's own vision transformers."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from timm_supervit.cli import main

TIMM_SCRIPTS = os.environ.get('TIMM_SCRIPTS')
SMALL = ['embed_dim=32', 'num_heads=2', 'depth=4']


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """Three classes that differ in colour, of a train and a validation split."""
    folder, noise = tmp_path_factory.mktemp('photographs'), np.random.default_rng(0)
    for split in ('train', 'validation'):
        for label in range(3):
            (folder / split / str(label)).mkdir(parents=True)
            for i in range(16):
                pixels = noise.integers(100, size=(40, 40, 3), dtype=np.uint8)
                pixels[..., label] += 60
                Image.fromarray(pixels).save(folder / split / str(label) / f'{i}.png')
    return folder


def invoke(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def run_script(name, *options):
    result = subprocess.run(
        [sys.executable, Path(TIMM_SCRIPTS, name), '--device', 'cpu', '--workers', '0', '-b', '8', *map(str, options)],
        capture_output=True, text=True, timeout=240, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONSAFEPATH': '1'})
    assert result.returncode == 0, result.stderr[-2000:]
    return result


@pytest.mark.skipif(not TIMM_SCRIPTS, reason='TIMM_SCRIPTS does not name the folder of train.py')
@pytest.mark.parametrize('backbone, img_sizes', [
    ('vit_small_patch14_reg4_dinov2', '28,42'), ('deit_tiny_distilled_patch16_224', '32,48'),
    ('vit_tiny_r_s16_p8_224', '64,96'), ('vit_small_patch16_dinov3', '32,48'), ('eva02_tiny_patch14_224', '28,42'),
    ('vit_small_patch16_rope_mixed_ape_224', '32,48'),
])
def test_train_py_super_trains_from_a_backbones_weights_and_all_agree_on_the_result(
        backbone, img_sizes, photographs, tmp_path):
    largest = int(img_sizes.split(',')[-1])
    plain = timm.create_model(backbone, img_size=largest, num_classes=7, embed_dim=32, num_heads=2, depth=4)
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    model = ['--model', 'supervit', '--model-kwargs', f'backbone={backbone}', f'img_sizes={img_sizes}', *SMALL]
    train = [
        *model, '--num-classes', '3', '--pretrained', '--pretrained-path', tmp_path / 'plain.pth', '--data-dir',
        photographs, '--train-split', 'train', '--val-split', 'validation', '--output', tmp_path, '--experiment', 'run',
        '--opt', 'adamw', '--lr', '1e-2', '--warmup-epochs', '0', '--log-interval', '1', '--train-crop-mode', 'rrc']
    log = run_script('train.py', *train, '--epochs', '1').stderr
    assert f'Super-training img_sizes ({", ".join(img_sizes.split(","))})' in log
    last = tmp_path / 'run' / 'last.pth.tar'
    if 'distilled' in backbone:  # for one is enough
        log = run_script('train.py', *train, '--epochs', '2', '--resume', last).stderr
        assert {int(epoch) for epoch in re.findall(r'Train: (\d+) \[', log)} == {1}

    smallest = img_sizes.split(',')[0]
    output = run_script(
        'validate.py', *model, f'img_size={smallest}', 'keep_rate=0.5', '--num-classes', '3', '--checkpoint', last,
        '--data-dir', photographs, '--split', 'validation', '--img-size', largest).stdout
    validated = json.loads(output[output.index('{'):])['top1']
    invoke('evaluate', last, '--data-dir', photographs, '-j', '0', '--output', tmp_path / 'results')
    rows = json.loads((tmp_path / 'results' / 'evaluate.json').read_text())['rows']
    found = [row['top1'] for row in rows if str(row['img_size']) == smallest and row['keep_rate'] == 0.5]
    assert found == [pytest.approx(validated, abs=0.01)]


def test_every_command_takes_a_backbone(photographs, tmp_path):
    settings = ['--model-kwargs', 'backbone=vit_tiny_r_s16_p8_224', 'img_sizes=64,96', *SMALL, 'num_classes=3']
    model = timm.create_model(
        'supervit', backbone='vit_tiny_r_s16_p8_224', img_sizes=(64, 96), embed_dim=32, num_heads=2, depth=4,
        num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    weights = ['supervit', '--checkpoint', tmp_path / 'weights.pth', *settings]
    invoke('evaluate', *weights, '--data-dir', photographs, '-j', '0', '--output', tmp_path / 'results')
    invoke('profile', 'supervit', *settings, '--batch-size', '1', '--subnet', '64:0.5', '--rounds', '2')
    photograph = next((photographs / 'validation').rglob('*.png'))
    invoke('visualize', *weights, photograph, '--subnet', '96:0.5', '--output', tmp_path / 'pictures')
    invoke('export', *weights, '--subnet', '64:0.5', '--format', 'onnx', '--output', tmp_path / 'exported')
    invoke('convert', tmp_path / 'weights.pth', '--model', 'supervit', *settings, '--output', tmp_path / 'folder')
    invoke('choose', tmp_path / 'results' / 'evaluate.json')
    again = timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True).eval()
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(again(images, keep_rate=0.5), model(images, keep_rate=0.5))
