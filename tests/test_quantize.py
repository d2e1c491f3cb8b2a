"""int8 files, and how they are compared with float32."""
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from PIL import Image

from timm_supervit.cli import main
from timm_supervit.tools.data import create_evaluation_loader, open_dataset
from timm_supervit.tools.export import export_model
from timm_supervit.tools.program import load_program
from timm_supervit.tools.quantize import _Tracer
from timm_supervit.tools.results import load_results

SETTINGS = dict(img_sizes=(8, 16, 24), depth=2, drop_layers=(0, 1), num_classes=2)
IMAGES = 20


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('int8')
    torch.manual_seed(0)
    model: Any = timm.create_model('supervit_digits', **SETTINGS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    torch.save(model.state_dict(), folder / 'model.pth')
    pixels = np.random.default_rng(0)
    for i in range(IMAGES):
        (folder / 'data' / f'{i % 2}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (6, 6, 3), np.uint8)).save(folder / 'data' / f'{i % 2}' / f'{i}.png')
    return folder


@pytest.fixture(scope='module')
def model(folder: Path) -> Any:
    model: Any = timm.create_model('supervit_digits', **SETTINGS)
    model.load_state_dict(torch.load(folder / 'model.pth', weights_only=True))
    return model.eval()


def export(folder: Path, output: Path, *arguments: Any) -> Result:
    return CliRunner().invoke(main, [
        'export', 'supervit_digits', '--checkpoint', str(folder / 'model.pth'), '--format', 'onnx',
        '--model-kwargs', *(f'{key}={value}' for key, value in SETTINGS.items()),
        '--output', str(output), '--quantize', 'int8', '--workers', '0', *map(str, arguments)])


@pytest.fixture(scope='module', params=['elastic', 'fixed'])
def quantized(request: pytest.FixtureRequest, folder: Path) -> tuple[Path, str]:
    """An elastic file with ranges found at each call, or a fixed one with ranges found in advance; what was printed."""
    output = folder / request.param
    fixed = ['--subnet', '24:0.7', '--calibration-data', folder / 'data'] if request.param == 'fixed' else []
    result = export(folder, output, '--data-dir', folder / 'data', *fixed)
    assert result.exit_code == 0, result.output
    stem = 'supervit_digits-24-0.7-int8' if request.param == 'fixed' else 'supervit_digits-int8'
    assert sorted(path.name for path in output.iterdir()) == [
        f'{stem}-compared.csv', f'{stem}-compared.json', f'{stem}.onnx', f'{stem}.onnx.json']
    return output / f'{stem}.onnx', result.stdout


def test_it_computes_nearly_the_same(quantized: tuple[Path, str], model: Any, folder: Path) -> None:
    program = load_program(quantized[0])
    (images, _), = create_evaluation_loader(open_dataset(str(folder / 'data')), model, num_workers=0)
    assert program.facts['precision'] == 'int8'
    for subnet in program.subnets:
        with torch.no_grad():
            expected = model(images, img_size=subnet.img_size, keep_rate=1. if program.is_elastic else 0.7)
        actual = program(images, subnet.img_size, 1.) if program.is_elastic else program(images)
        error = (actual - expected).norm() / expected.norm()
        assert 0 < error < 0.1, f'{subnet}: {error}'


def test_only_products_with_weights_are_quantized(quantized: tuple[Path, str]) -> None:
    import onnx

    graph = onnx.load(quantized[0]).graph
    kept = {node.op_type for node in graph.node}
    assert {'Conv', 'MatMul', 'LayerNormalization', 'Softmax'} <= kept  # the patch embedding, and attention
    weights = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and tensor.dims]
    assert sum(len(tensor.dims) == 2 for tensor in weights) == 4 * SETTINGS['depth'] + 1  # type: ignore[operator]


def test_accuracy_is_counted_on_the_given_images_for_both(
        quantized: tuple[Path, str], model: Any, folder: Path) -> None:
    path, printed = quantized
    program, rows = load_program(path), load_results(path.with_name(f'{path.stem}-compared.json')).rows
    assert rows == json.loads(Path(f'{path}.json').read_text())['comparison']
    assert [row['precision'] for row in rows] == ['float32', 'int8'] * len(program.subnets)
    assert 'same patches kept' in ' '.join(printed.split())
    (images, target), = create_evaluation_loader(open_dataset(str(folder / 'data')), model, num_workers=0)
    for one, other, subnet in zip(rows[::2], rows[1::2], program.subnets, strict=True):
        with torch.no_grad():
            expected = model(images, img_size=subnet.img_size, keep_rate=subnet.keep_rate).argmax(1)
        assert one['correct1'] == int((expected == target).sum())
        assert other['correct1'] == int((program(images, *subnet).argmax(1) == target).sum())
        assert one['count'] == other['count'] == IMAGES
        assert 50 < other['kept_same'] <= 100
        assert other['kept_same'] == 100 or subnet.keep_rate < 1


def test_what_was_kept_is_what_the_model_keeps(folder: Path, model: Any, tmp_path: Path) -> None:
    (manifest,) = export_model(model, tmp_path, 'onnx')
    tracer, images = _Tracer(model, tmp_path / manifest['file']), torch.randn(3, 3, 24, 24)
    for subnet in model.subnets:
        _, kept = tracer(images, subnet)
        with torch.no_grad():
            places = model.kept_patches(images, img_size=subnet.img_size, keep_rate=subnet.keep_rate)
        expected = np.ones(kept.shape, bool)
        if places:
            expected[:] = False
            np.put_along_axis(expected, places[max(places)].numpy(), True, 1)
        assert (kept == expected).all()


def test_a_changed_file_is_refused(quantized: tuple[Path, str], tmp_path: Path) -> None:
    path = quantized[0]
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    (tmp_path / path.name).write_bytes(content)
    (tmp_path / f'{path.name}.json').write_bytes(Path(f'{path}.json').read_bytes())
    with pytest.raises(ValueError, match='is damaged'):
        load_program(tmp_path / path.name)


@pytest.mark.parametrize(('option', 'number', 'message'), [
    ('--calibration-data', 0, 'Found 0 images'),
    ('--calibration-data', 1, 'holds 1 image, and static quantization takes the ranges of all activations from them'),
    ('--data-dir', 0, 'Found 0 images'),
])
def test_a_folder_of_too_few_images_is_refused_before_anything_is_done(
        folder: Path, tmp_path: Path, option: str, number: int, message: str) -> None:
    (tmp_path / 'few' / '0').mkdir(parents=True)
    for i in range(number):
        Image.new('RGB', (8, 8)).save(tmp_path / 'few' / '0' / f'{i}.png')
    result = export(folder, tmp_path / 'out', option, tmp_path / 'few')
    assert result.exit_code == 1
    assert message in ' '.join(result.stderr.split())
    assert not list((tmp_path / 'out').iterdir())


def test_a_file_that_the_quantizer_wrote_in_part_is_an_error(
        folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its writer does not notice a full disk.
    monkeypatch.setattr(
        'onnxruntime.quantization.quantize_dynamic', lambda source, target, **_: target.write_bytes(b'\x08\x07\xff'))
    result = export(folder, tmp_path, '--subnet', '24:0.7')
    assert result.exit_code == 1 and 'needs room for four copies' in result.stderr
    assert not any(tmp_path.iterdir())


def test_images_that_cannot_be_read_do_not_calibrate_or_compare(folder: Path, tmp_path: Path) -> None:
    for path in sorted((folder / 'data').rglob('*.png')):
        copy = tmp_path / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    copy.write_text('no image')
    for option in ('--calibration-data', '--data-dir'):
        result = export(folder, tmp_path / 'out', '--subnet', '24:0.7', option, tmp_path / 'data')
        message = result.stderr.splitlines()[-1]
        assert result.exit_code == 1 and f'image {copy} cannot be read' in message
        assert 'skip-bad' not in message and 'Errno' not in message
