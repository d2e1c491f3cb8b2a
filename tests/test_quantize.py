"""int8 files: what they compute, and that evaluate, profile and choose take them as networks of their own."""
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from PIL import Image

from timm_supervit import Subnet
from timm_supervit.cli import main
from timm_supervit.images.datasets import create_evaluation_loader, open_dataset
from timm_supervit.loading.load import load_supervit
from timm_supervit.programs.int8 import create_calibration_loader
from timm_supervit.programs.program import load_program
from timm_supervit.results.rows import load_results, name_of, subnet_of
from timm_supervit.tools import export as tool
from timm_supervit.tools.choose import choose

FIXED = Subnet(24, 0.5)
IMAGES = 20


def supervit(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope='module')
def model(model_to_export: Callable[..., Any]) -> Any:
    return model_to_export()


@pytest.fixture(scope='module')
def source(model: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp('model')
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return f'local-dir:{folder}'


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('data')
    pixels = np.random.default_rng(0)
    for i in range(IMAGES):
        (folder / f'{i % 10}').mkdir(exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (6, 6, 3), np.uint8)).save(folder / f'{i % 10}' / f'{i}.png')
    return folder


@pytest.fixture(scope='module', autouse=True)
def _files_at_hand(exported: Callable[..., Path]) -> Iterator[None]:
    """Let the float32 files, which int8 ones are made of, be those that other tests have exported."""
    files = {subnet: exported('onnx', subnet) for subnet in (None, FIXED)}

    def write(module: Any, images: Any, path: Path, *_: Any) -> None:
        shutil.copy(files[getattr(module, 'subnet', None)], path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, 'write_program', write)
        yield


def export(source: str, output: Path, *arguments: Any) -> Result:
    return supervit(
        'export', source, '--format', 'onnx', '--output', output, '--quantize', 'int8', '--workers', 0, *arguments)


@pytest.fixture(scope='module', params=['elastic', 'fixed'])
def quantized(request: pytest.FixtureRequest, source: str, data: Path, tmp_path_factory: Any) -> Path:
    """An elastic file with ranges found at each call, or a fixed one with ranges found in advance."""
    output = tmp_path_factory.mktemp('int8')
    fixed = ['--subnet', FIXED, '--calibration-data', data] if request.param == 'fixed' else []
    result = export(source, output, *fixed)
    assert result.exit_code == 0, result.output
    path, = output.glob('*.onnx')
    assert f'{path.name}: 0.' in result.stdout and 'of float32' in result.stdout
    return path


def test_the_manifest_says_that_a_file_is_int8_and_how_it_compares(
        quantized: Path, exported: Callable[..., Path]) -> None:
    program, manifest = load_program(quantized), json.loads(Path(f'{quantized}.json').read_text())
    assert sorted(path.name for path in quantized.parent.iterdir()) == [quantized.name, f'{quantized.name}.json']
    assert quantized.name == f'supervit_digits{"" if program.is_elastic else "-24-0.5"}-int8.onnx'
    assert program.fixed_setting == {'precision': 'int8', 'runtime': 'onnx'}
    assert manifest['precision'] == 'int8'
    assert manifest['calibrated'] is not program.is_elastic
    assert manifest['float32_bytes'] == exported('onnx', None if program.is_elastic else FIXED).stat().st_size
    assert manifest['bytes'] == quantized.stat().st_size < 0.8 * manifest['float32_bytes']
    assert all(difference > 1e-4 for difference in manifest['max_difference'].values())


def test_it_computes_nearly_the_same(quantized: Path, model: Any, data: Path) -> None:
    program = load_program(quantized)
    (images, _), = create_evaluation_loader(open_dataset(str(data)).dataset, model, num_workers=0)
    for subnet in program.subnets:
        # An image of which another patch is kept differs by more; where all are kept, none does.
        with torch.no_grad():
            expected = model(images, img_size=subnet.img_size, keep_rate=1. if program.is_elastic else FIXED.keep_rate)
        actual = program(images, subnet.img_size, 1.) if program.is_elastic else program(images)
        error = (actual - expected).norm() / expected.norm()
        assert 0 < error < 0.1, f'{subnet}: {error}'


def test_only_products_with_weights_are_quantized(quantized: Path, model: Any) -> None:
    import onnx

    graph = onnx.load(quantized).graph
    kept = {node.op_type for node in graph.node}
    assert {'Conv', 'MatMul', 'LayerNormalization', 'Softmax'} <= kept  # the patch embedding, and attention
    weights = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and tensor.dims]
    assert sum(len(tensor.dims) == 2 for tensor in weights) == 4 * len(model.blocks) + 1


def test_a_changed_file_is_refused(quantized: Path, tmp_path: Path) -> None:
    content = bytearray(quantized.read_bytes())
    content[-100] ^= 1
    (tmp_path / quantized.name).write_bytes(content)
    shutil.copy(f'{quantized}.json', tmp_path)
    with pytest.raises(ValueError, match='is damaged'):
        load_program(tmp_path / quantized.name)


# What the other commands make of it


def evaluate(path: Path, data: Path, *arguments: Any) -> Any:
    result = supervit('evaluate', path, '--data-dir', data, '-j', 0, *arguments, '--json')
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_accuracy_is_of_the_batches_that_the_ranges_were_found_in(quantized: Path, model: Any, data: Path) -> None:
    program = load_program(quantized)
    loader = list(create_evaluation_loader(open_dataset(str(data)).dataset, model, batch_size=8, num_workers=0))
    results = evaluate(quantized, data, '-b', 8)
    assert results['info']['precision'] == 'int8'
    for row in results['rows']:
        assert (row['precision'], row.get('batch_size')) == ('int8', 8 if program.is_elastic else None)
        correct = [program(images, *subnet_of(row)).argmax(1) == target for images, target in loader]
        assert (row['correct1'], row['count']) == (int(torch.cat(correct).sum()), IMAGES)


def test_it_is_profiled_in_its_own_precision_and_runtime(quantized: Path, tmp_path: Path) -> None:
    program = load_program(quantized)
    result = supervit('profile', quantized, '-b', 1, '-b', 3, '--rounds', 2, '--output', tmp_path)
    assert result.exit_code == 0, result.output
    rows = load_results(tmp_path / 'profile.json').rows
    assert [(subnet_of(row), row['batch_size']) for row in rows] == [
        (subnet, size) for subnet in program.subnets for size in (1, 3)]
    for row in rows:
        assert (row['precision'], row['runtime']) == ('int8', 'onnx')
        assert 0 < row['latency_ms'] <= row['latency_p90_ms']
        assert (row['macs'], row['memory_mib']) == (program.macs(subnet_of(row)), None)
    for option in (['--runtime', 'compile'], ['--precision', 'float16']):
        result = supervit('profile', quantized, *option, '--rounds', 2)
        assert result.exit_code == 1 and 'leave --precision and --runtime out' in result.stderr


def test_choose_has_it_as_a_point_beside_its_float32(
        quantized: Path, exported: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    program = load_program(quantized)
    for path, name in ((quantized, 'int8'), (exported('onnx', None if program.is_elastic else FIXED), 'float32')):
        for command in (['evaluate', path, '--data-dir', data, '-j', 0, '-b', 1], ['profile', path, '--rounds', 2]):
            result = supervit(*command, '--output', tmp_path / name)
            assert result.exit_code == 0, result.output
    files = [tmp_path / name / f'{command}.json' for name in ('int8', 'float32') for command in ('evaluate', 'profile')]
    assert {name_of(row) for row in choose(files).merged[0].rows} == {
        f'{subnet}{mark}' for subnet in program.subnets for mark in ('', ' int8')}
    result = supervit('choose', *files, '--latency-ms', 1e6, '--json')
    assert result.exit_code == 0, result.output
    # The most accurate of all that were measured, in either precision; of equals the faster.
    measured = []
    for one, other in zip(files[::2], files[1::2], strict=True):
        for accuracy, cost in zip(load_results(one).rows, load_results(other).rows, strict=True):
            measured.append((-accuracy['top1'], cost['latency_ms'], cost['precision'], subnet_of(cost)))
    assert len(measured) == 2 * len(program.subnets)
    best = json.loads(result.stdout)['info']['best']
    assert (-best['top1'], best['latency_ms'], best['precision'], subnet_of(best)) == min(measured)
    if program.is_elastic:  # its accuracy in other batches is none of this latency
        evaluate(quantized, data, '-b', 8, '--output', tmp_path / 'int8')
        result = supervit('choose', *files, '--latency-ms', 1e6)
        assert result.exit_code == 1 and 'batch_size=8 or 1' in result.stderr


# What is refused


@pytest.mark.parametrize(('number', 'message'), [(0, 'Found 0 images'), (1, 'holds 1 image, .* give 16 or more')])
def test_a_folder_of_too_few_images_is_refused_before_anything_is_done(
        source: str, tmp_path: Path, number: int, message: str) -> None:
    (tmp_path / 'few' / '0').mkdir(parents=True)
    for i in range(number):
        Image.new('RGB', (8, 8)).save(tmp_path / 'few' / '0' / f'{i}.png')
    result = export(source, tmp_path / 'out', '--calibration-data', tmp_path / 'few')
    assert result.exit_code == 1 and re.search(message, ' '.join(result.stderr.split()))
    assert not list((tmp_path / 'out').iterdir())


def test_a_file_that_the_quantizer_wrote_in_part_is_an_error(
        source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its writer does not notice a full disk.
    monkeypatch.setattr(
        'onnxruntime.quantization.quantize_dynamic', lambda source, target, **_: target.write_bytes(b'\x08\x07\xff'))
    result = export(source, tmp_path, '--subnet', FIXED)
    assert result.exit_code == 1 and 'needs room for four copies' in result.stderr
    assert not any(tmp_path.iterdir())


def test_images_that_cannot_be_read_do_not_calibrate(source: str, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / 'data')
    broken = tmp_path / 'data' / '9' / '19.png'
    broken.write_text('no image')
    result = export(source, tmp_path / 'out', '--subnet', FIXED, '--calibration-data', tmp_path / 'data')
    message = result.stderr.splitlines()[-1]
    assert result.exit_code == 1 and f'image {broken} cannot be read' in message
    assert 'skip-bad' not in message and 'Errno' not in message
    assert not any((tmp_path / 'out').iterdir())


# Ranges that are found in advance


def test_the_images_for_it_are_chosen_as_for_other_commands(source: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / 'splits').mkdir()
    (tmp_path / 'splits' / 'train').symlink_to(data)
    (tmp_path / 'splits' / 'validation' / '0').mkdir(parents=True)  # without images
    fixed = ['--subnet', FIXED, '--calibration-data', tmp_path / 'splits']
    result = export(source, tmp_path / 'out', *fixed, '--split', 'train')
    assert result.exit_code == 0, result.output
    direct = export(source, tmp_path / 'direct', '--subnet', FIXED, '--calibration-data', data)
    assert direct.exit_code == 0
    name = 'supervit_digits-24-0.5-int8.onnx'
    assert (tmp_path / 'out' / name).read_bytes() == (tmp_path / 'direct' / name).read_bytes()
    assert export(source, tmp_path / 'other', *fixed).exit_code == 1
    assert 'no split' in export(source, tmp_path / 'other', *fixed, '--split', 'test').stderr
    lone = export(source, tmp_path / 'other', '--split', 'train')
    assert (lone.exit_code, '--split is for --calibration-data' in lone.stderr) == (2, True)


def test_a_stream_for_it_is_refused(model: Any) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(ValueError, match=r'a stream .*--calibration-data'):
        create_calibration_loader(Stream(), model, 0)


def test_it_is_said_what_is_being_done(source: str, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    def follow(steps: Any, label: str) -> Any:
        seen.append((label, len(list(steps))))
        return steps

    tool.export(load_supervit(source), tmp_path, 'onnx', [FIXED], quantize='int8', progress=follow)
    assert [label.split()[0] for label, _ in seen] == ['Tracing', *['Comparing'] * 2, 'Quantizing', *['Comparing'] * 2]
    assert {count for _, count in seen} == {1}
    lines = export(source, tmp_path, '--subnet', FIXED).stderr.splitlines()
    assert [line.split()[0] for line in lines] == ['Tracing', 'Quantizing']  # what may take minutes
