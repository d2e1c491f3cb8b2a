"""Numbers and names in files that are written by hand or to do harm: one line that names the file, and no memory."""
import argparse
import json
import math
import re
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from timm_supervit.cli import main
from timm_supervit.loading.load import load_supervit
from timm_supervit.programs.program import FACTS, load_program

TINY: dict[str, Any] = dict(img_sizes=(8, 16), depth=1, drop_layers=(0,), embed_dim=8, num_heads=1)
HUGE, DEEP = 10 ** 400, '[' * 100_000


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    """Let what takes more than two gigabytes beside what there is fail; nothing here needs them."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path('/proc/self/statm').read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2 ** 31, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / 'images').mkdir()
    Image.new('RGB', (16, 16), 'gray').save(tmp_path / 'images' / 'a.png')
    return tmp_path / 'images'


def save(path: Path, settings: dict[str, Any] | None = None, **args: Any) -> Path:
    """Write a checkpoint of a tiny network as train.py does, that says of itself what is given."""
    recorded = dict(model='supervit_digits', num_classes=10, model_kwargs={**TINY, **(settings or {})}) | args
    state_dict = timm.create_model('supervit_digits', **TINY).state_dict()
    torch.save(dict(state_dict=state_dict, epoch=HUGE, args=argparse.Namespace(**recorded)), path)
    return path


def assert_one_line(path: Path, *arguments: Any) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if not re.match(r'W\d', line)]  # a note of torch's, once
    assert len(lines) == 1 and path.name in lines[0], result.stderr
    return result.stderr


@pytest.mark.parametrize('args', [
    dict(crop_pct=HUGE), dict(crop_pct=math.nan), dict(crop_pct=-1), dict(crop_pct='wide'), dict(crop_pct=[1]),
    dict(crop_pct=1e-9), dict(interpolation='evil'), dict(interpolation=[1]), dict(mean=[math.nan] * 3), dict(mean=5),
    dict(mean='text'), dict(std=[0., 0., 0.]), dict(std=[HUGE] * 3), dict(num_classes=10 ** 12), dict(num_classes=HUGE),
    dict(num_classes=[1]), dict(in_chans=10 ** 12), dict(in_chans=math.inf), dict(input_size=[HUGE, 8, 8]),
], ids=repr)
def test_arguments_of_a_checkpoint_that_nobody_trained_with_are_refused(
        folder: Path, tmp_path: Path, args: dict[str, Any]) -> None:
    path = save(tmp_path / 'odd.pth', **args)
    assert_one_line(path, 'predict', path, folder, '--device', 'cpu')


@pytest.mark.parametrize('settings', [
    dict(depth=10 ** 9), dict(depth=100_000), dict(depth=HUGE), dict(depth=math.nan), dict(embed_dim=10 ** 6),
    dict(embed_dim=HUGE), dict(num_heads=-1), dict(patch_size=50_000, img_sizes=(100_000,)), dict(img_sizes=(100_000,)),
    dict(img_sizes=(8, HUGE)), dict(img_sizes='8'), dict(mlp_ratio=1e12), dict(reg_tokens=10 ** 10),
    dict(keep_rates=(HUGE,)), dict(keep_rate=math.nan), dict(keep_rate=HUGE),
], ids=repr)
def test_a_network_that_a_checkpoint_cannot_fill_is_not_made(
        folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    path = save(tmp_path / 'large.pth', settings)
    assert_one_line(path, 'predict', path, folder, '--device', 'cpu')


def test_a_checkpoint_that_says_what_is_true_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / 'true.pth', crop_pct=0.5, mean=[0.5], interpolation='random', input_size=[3, 16, 16])
    config = load_supervit(str(path)).pretrained_cfg
    assert (config['crop_pct'], config['mean'], config['interpolation']) == (0.5, (0.5,) * 3, 'random')


@pytest.mark.parametrize('change', [
    dict(model='hf-hub:user/name'), dict(model='hf_hub:user/name'), dict(model='modelscope:user/name'),
    dict(model='supervit', model_kwargs=dict(backbone='hf-hub:user/name')),
], ids=repr)
def test_a_checkpoint_fetches_nothing_that_its_user_has_not_named(
        folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *args, **_: asked.append(args) or [])
    path = save(tmp_path / 'far.pth', **change)
    assert 'name it' in assert_one_line(path, 'predict', path, folder, '--device', 'cpu')
    assert not asked


@pytest.mark.parametrize('content', [
    dict(thresholds=[HUGE]), dict(thresholds=[math.nan]), dict(thresholds=['0.5']), dict(thresholds=0.5),
    dict(stages=[[8, HUGE], [16, 1.0]]), dict(stages=[[HUGE, 0.5], [16, 1.0]]), dict(stages=[[8, math.nan], [16, 1.]]),
    dict(stages='text'), dict(stages=[{}, []]), dict(network=[]), dict(network={'architecture': 'two\nlines'}),
    dict(network='text'),
], ids=lambda content: repr(content)[:40])
def test_a_cascade_of_no_numbers_is_refused(folder: Path, tmp_path: Path, content: dict[str, Any]) -> None:
    from timm_supervit.results.fingerprint import fingerprint

    checkpoint, path = save(tmp_path / 'model.pth'), tmp_path / 'cascade.json'
    network = fingerprint(load_supervit(str(checkpoint)))
    path.write_text(json.dumps(dict(stages=[[8, 0.5], [16, 1.]], thresholds=[0.5], network=network) | content))
    assert_one_line(path, 'predict', checkpoint, folder, '--cascade', path, '--device', 'cpu', '-q')


@pytest.mark.parametrize('row', [
    dict(keep_rate=HUGE), dict(keep_rate=math.nan), dict(img_size=HUGE), dict(img_size=[8, 'a']), dict(macs=HUGE),
    dict(macs=[1]), dict(top1=math.nan), dict(top1='much'), dict(count=math.inf), dict(latency_ms={}),
], ids=lambda row: repr(row)[:40])
def test_results_of_no_numbers_are_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / 'results.json'
    good = dict(img_size=8, keep_rate=0.5, top1=50., macs=1000, count=10)
    path.write_text(json.dumps(dict(model='supervit_digits', rows=[good | row])))
    assert_one_line(path, 'choose', path)


@pytest.mark.parametrize('content', [DEEP, '[]', '{"sha256": 1e999}', '{"sha256": []}', '"text"', '\0'])
def test_a_manifest_of_another_kind_is_refused(
        exported: Callable[..., Path], tmp_path: Path, content: str) -> None:
    path = tmp_path / 'model.onnx'
    shutil.copy(exported('onnx'), path)
    Path(f'{path}.json').write_text(content)
    assert_one_line(path, 'profile', path)


@pytest.mark.parametrize('change', [
    dict(img_sizes=[100_000]), dict(img_sizes=HUGE), dict(subnets=[dict(img_size=8, keep_rate=HUGE, macs=1)]),
    dict(subnets=[dict(img_size=8, keep_rate=1., macs=math.nan)]), dict(class_names=[1] * 10), dict(class_names='ten'),
    dict(network=3), dict(preprocessing=[]), dict(inputs=[]), dict(outputs=dict(logits=dict(shape=[]))),
    dict(preprocessing=dict(crop_pct=1e-9)), dict(preprocessing=dict(mean=[HUGE])), dict(model=[1]),
], ids=lambda change: repr(change)[:50])
def test_an_exported_file_that_says_what_cannot_be_is_refused(
        exported: Callable[..., Path], tmp_path: Path, change: dict[str, Any]) -> None:
    import onnx

    proto = onnx.load(exported('onnx'))
    entry, = (entry for entry in proto.metadata_props if entry.key == FACTS)
    facts = json.loads(entry.value)
    if isinstance(change.get('preprocessing'), dict):
        change = dict(preprocessing=facts['preprocessing'] | change['preprocessing'])
    entry.value = json.dumps(facts | change)
    (tmp_path / 'odd.onnx').write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match=r'odd.onnx does not say'):
        load_program(tmp_path / 'odd.onnx')


def test_a_condition_of_any_depth_is_text(tmp_path: Path) -> None:
    path = tmp_path / 'results.json'
    path.write_text(json.dumps(dict(model='supervit_digits', rows=[])))
    for text in (DEEP, '-' * 100_000 + '1', '{[]: 1}'):
        assert_one_line(path.with_name('batch_size'), 'choose', path, '--where', f'batch_size={text}')
