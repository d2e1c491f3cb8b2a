"""What is in folders of images, or in the place of files: passed over by name, or refused, never waited for."""
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from timm_supervit import Cascade
from timm_supervit.cli import main
from timm_supervit.images.datasets import open_dataset
from timm_supervit.programs.program import load_program
from timm_supervit.results.files import fill_folder
from timm_supervit.results.rows import load_results
from timm_supervit.tools.evaluate import evaluate
from timm_supervit.tools.predict import find_images
from timm_supervit.training.label_maps import LabelMapDataset

ENDINGS = ['.png', '.jpg', '.JPEG', '.webp', '.bmp', '.TIF', '.tiff', '.gif', '.avif', '.jp2', '.ppm', '.jfif', '.tga']
SMALL = ['supervit_digits', '--num-classes', 2, '--model-kwargs', 'embed_dim=48', 'depth=2', 'drop_layers=(0,)']


@pytest.fixture(autouse=True)
def _waits_for_nothing() -> Iterator[None]:
    def end(*_: Any) -> None:
        raise AssertionError('it waits')

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def supervit(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def put_fifo(path: Path) -> None:
    os.mkfifo(path)


def put_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may have 100 letters
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def put_device(path: Path) -> None:
    path.symlink_to('/dev/zero')


KINDS: dict[str, Callable[[Path], None]] = {'a FIFO': put_fifo, 'a socket': put_socket, 'a device': put_device}


def save(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (32, 32), 'gray').save(path, format=None if path.suffix else 'png')
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model: Any = timm.create_model('supervit_digits', num_classes=2, embed_dim=48, depth=2, drop_layers=(0,))
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    return tmp_path / 'weights.pth'


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in 'ab':
        for i in range(2):
            save(tmp_path / 'data' / name / f'{i}.png')
    return tmp_path / 'data'


def test_a_folder_gives_all_images_that_pillow_reads(tmp_path: Path) -> None:
    endings = [ending for ending in ENDINGS if ending.lower() in Image.registered_extensions()]  # AVIF is new
    paths = [save(tmp_path / 'images' / f'image{ending}') for ending in endings]
    for name in ('notes.txt', 'table.h5', 'film.mpg', 'drawing.eps', 'image', '._image.png', '.image.png'):
        (tmp_path / 'images' / name).write_bytes(paths[0].read_bytes())
    images = find_images([tmp_path / 'images'])
    found = {images.dataset.filename(i) for i in range(len(images.dataset))}
    assert found == {str(path) for path in paths} | {str(tmp_path / 'images' / '.image.png')}
    assert {os.path.basename(path) for path in images.passed_over} == {
        'notes.txt', 'table.h5', 'film.mpg', 'drawing.eps', 'image', '._image.png'}
    assert all(images.dataset[i][0].size == (32, 32) for i in range(len(found)))


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_no_file_is_passed_over_in_folders_and_refused_alone(
        checkpoint: Path, data: Path, kind: str) -> None:
    KINDS[kind](data / 'a' / 'x.png')
    (data / 'a' / 'lost.png').symlink_to('nowhere')
    result = supervit('predict', *SMALL, data, '--checkpoint', checkpoint, '--json')
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == 5 and [row['image'] for row in rows if 'error' in row] == [str(data / 'a' / 'lost.png')]
    assert 'Passed over' in result.stderr and str(data / 'a' / 'x.png') in result.stderr
    for command in (['predict'], ['visualize', '--output', data.parent / 'out']):
        result = supervit(*command, *SMALL, data / 'a' / 'x.png', '--checkpoint', checkpoint)
        assert (result.exit_code, f'x.png is {kind}' in result.stderr.splitlines()[-1]) == (1, True), result.output


@pytest.mark.parametrize('kind', KINDS)
def test_evaluation_names_what_is_no_file_and_passes_over_it_only_if_asked_to(
        checkpoint: Path, data: Path, kind: str) -> None:
    KINDS[kind](data / 'a' / 'x.png')
    arguments = ['evaluate', *SMALL, '--checkpoint', checkpoint, '--data-dir', data, '-j', 0, '--json']
    result = supervit(*arguments)
    assert result.exit_code == 1 and f'x.png is {kind}' in result.stderr and '--skip-bad-images' in result.stderr
    content = json.loads(supervit(*arguments, '--skip-bad-images').stdout)
    assert content['info']['skipped'] == [str(data / 'a' / 'x.png')] and content['rows'][0]['count'] == 4
    result = supervit(*arguments, '--dataset', 'torch/image_folder')
    assert result.exit_code == 1 and f'x.png is {kind}' in result.stderr


def test_calibration_names_what_is_no_file(checkpoint: Path, data: Path) -> None:
    for i in range(2, 20):
        save(data / 'a' / f'{i}.png')
    put_fifo(data / 'a' / '0x.png')
    result = supervit(
        'export', *SMALL, '--checkpoint', checkpoint, '--format', 'onnx', '--quantize', 'int8', '--calibration-data',
        data, '-j', 0, '--output', data.parent / 'out', '--subnet', '12:1')
    assert result.exit_code == 1 and '0x.png is a FIFO' in result.stderr
    assert not (data.parent / 'out').exists() or not list((data.parent / 'out').iterdir())


def test_evaluation_says_how_many_images_the_scripts_pass_over(checkpoint: Path, data: Path) -> None:
    for name in ('a/x.webp', 'b/y.BMP', 'b/z.tif'):
        save(data / name)
    (data / 'a' / 'notes.txt').write_text('no image')
    result = supervit('evaluate', *SMALL, '--checkpoint', checkpoint, '--data-dir', data, '-j', 0, '--json')
    content = json.loads(result.stdout)
    assert (content['rows'][0]['count'], content['info']['passed_over']) == (4, 3)
    assert '3 images' in result.stderr
    for name in ('a/x.webp', 'b/y.BMP', 'b/z.tif'):
        (data / name).unlink()
    result = supervit('evaluate', *SMALL, '--checkpoint', checkpoint, '--data-dir', data, '-j', 0, '--json')
    assert json.loads(result.stdout)['info']['passed_over'] == 0 and 'passed over' not in result.stderr


def test_a_folder_that_evaluation_cannot_read_is_counted(data: Path, close: Callable[[Path], None]) -> None:
    close(data / 'a' / 'closed')
    assert open_dataset(str(data)).passed_over == [str(data / 'a' / 'closed')]


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_read_beside_images_is_a_file(data: Path, exported: Callable[..., Path], kind: str) -> None:
    path = data.parent / 'x.json'
    KINDS[kind](path)
    with pytest.raises(OSError, match=f'x.json is {kind}'):
        load_results(path)
    with pytest.raises(OSError, match=f'x.json is {kind}'):
        Cascade.load(timm.create_model('supervit_digits'), path)
    copy = data.parent / 'model.onnx'
    copy.write_bytes(exported().read_bytes())
    KINDS[kind](data.parent / 'model.onnx.json')
    with pytest.raises(OSError, match=f'model.onnx.json is {kind}'):
        load_program(copy)
    KINDS[kind](data.parent / 'weights.pth')
    result = supervit('predict', *SMALL, data, '--checkpoint', data.parent / 'weights.pth')
    assert result.exit_code == 1 and 'weights.pth is no file' in result.stderr
    KINDS[kind](data.parent / '0.pt')
    maps = LabelMapDataset(open_dataset(str(data / 'a')).dataset, data.parent, num_classes=2)
    with pytest.raises(ValueError, match=r'0\.pt is no file'):
        maps[0]


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_the_folder_of_a_model_holds_files(data: Path, name: str) -> None:
    model: Any = timm.create_model('supervit_digits', num_classes=2)
    timm.models.save_for_hf(model, str(data.parent / 'model'), safe_serialization=True)
    (data.parent / 'model' / name).unlink()
    put_fifo(data.parent / 'model' / name)
    result = supervit('predict', f'local-dir:{data.parent / "model"}', data)
    assert result.exit_code == 1 and f'{name} is a FIFO' in result.stderr


@pytest.mark.parametrize('kind', ['a FIFO', 'a socket'])
def test_what_is_no_file_is_not_written_over(checkpoint: Path, data: Path, kind: str) -> None:
    KINDS[kind](data / 'out.json')
    with pytest.raises(OSError, match=f'out.json is {kind}'), fill_folder(data) as new:
        (new / 'out.json').write_text('new')
    assert not (data / 'out.json').is_file()
    result = supervit('predict', *SMALL, data / 'a', '--checkpoint', checkpoint, '--output', data / 'out.json')
    assert result.exit_code == 1 and 'out.json is no file' in result.stderr


def test_a_model_in_training_is_switched_once_for_a_pass(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = timm.create_model('supervit_digits', num_classes=2, embed_dim=48, depth=2, drop_layers=(0,)).train()
    model.blocks[0].eval()
    modes = []
    monkeypatch.setattr(
        type(model), 'forward_subnets', lambda self, images, subnets: modes.append(self.training) or [
            images.new_zeros(len(images), 2)] * len(subnets))

    def follow(steps: Any, label: str) -> Any:
        for step in steps:
            modes.append(model.training)
            yield step

    evaluate(model, data, batch_size=1, workers=0, progress=follow)
    assert modes == [False] * 8
    assert model.training and model.blocks[1].training and not model.blocks[0].attn.training
