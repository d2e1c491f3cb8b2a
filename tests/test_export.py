"""Fixed files of single subnets, and what all exported files have in common."""
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from reference import ReferenceSuperViT
from timm.data import create_transform, resolve_data_config

from timm_supervit import Subnet
from timm_supervit.cli import main
from timm_supervit.programs.program import load_program
from timm_supervit.results.fingerprint import fingerprint
from timm_supervit.results.rows import load_results, subnet_of
from timm_supervit.tools import export

SUBNET = Subnet(24, 0.5)
TINY = dict(img_sizes=(8, 16), depth=1, drop_layers=(0,), embed_dim=8, num_heads=1)


def supervit(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope='module')
def model(model_to_export: Callable[..., Any]) -> Any:
    return model_to_export()


@pytest.fixture(scope='module', params=['onnx', 'pt2'])
def path(request: pytest.FixtureRequest, exported: Callable[..., Path]) -> Path:
    return exported(request.param, SUBNET)


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of ten classes."""
    folder = tmp_path_factory.mktemp('images')
    pixels = np.random.default_rng(0)
    for i in range(30):
        path = folder / f'name {i % 10}' / f'{i}.png'  # as the classes of ``model_to_export`` are called
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (30, 26, 3), np.uint8)).save(path)
    return folder


def test_a_file_computes_what_an_independent_implementation_computes_at_any_batch_size(path: Path, model: Any) -> None:
    reference = ReferenceSuperViT(
        (8, 16, 24), (0, 1), patch_size=4, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2., num_classes=10)
    reference.load_state_dict(model.state_dict())
    program = load_program(path)
    for batch_size in (1, 2, 7):
        images = torch.randn(batch_size, 3, 24, 24)
        with torch.no_grad():
            expected = reference(images, *SUBNET)
        # The promise that the command makes; rounding explains about a hundredth of it here.
        torch.testing.assert_close(program(images), expected, atol=1e-4, rtol=0)


def test_the_manifest_beside_a_file_describes_it(path: Path, model: Any) -> None:
    assert {other.name for other in path.parent.iterdir()} == {path.name, f'{path.name}.json'}
    assert path.stem == 'supervit_digits-24-0.5'
    manifest, content = json.loads(Path(f'{path}.json').read_text()), path.read_bytes()
    assert (manifest['file'], manifest['bytes']) == (path.name, len(content))
    assert manifest['sha256'] == hashlib.sha256(content).hexdigest()
    assert manifest['subnets'] == [{**SUBNET._asdict(), 'macs': model.macs(SUBNET)}]
    assert set(manifest['max_difference']) == {'1', '5'}
    assert manifest['inputs']['image']['shape'] == ['batch', 3, 24, 24]
    assert tuple(manifest['preprocessing']['mean']) == model.pretrained_cfg['mean']


def test_a_file_alone_says_what_it_runs_and_how_to_prepare_images(path: Path, model: Any, tmp_path: Path) -> None:
    shutil.copy(path, tmp_path)
    program = load_program(tmp_path / path.name)
    assert program.subnets == [program.subnet] == [SUBNET]
    assert not program.is_elastic
    assert program.subnet_macs() == {SUBNET: model.macs(SUBNET)}
    assert resolve_data_config({}, model=program) == resolve_data_config({}, model=model)
    assert (program.source.name, program.num_classes, program.in_chans) == ('supervit_digits', 10, 3)
    assert program.network == fingerprint(model)
    with pytest.raises(ValueError, match=r'no subnet 24:1; it runs 24:0.5'):
        program(torch.zeros(1, 3, 24, 24), keep_rate=1.)


def test_a_file_that_changed_since_its_checksum_is_refused(path: Path, tmp_path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / path.name).write_bytes(content)
    shutil.copy(f'{path}.json', tmp_path)
    with pytest.raises(ValueError, match=rf'{path.name} is damaged: .*export it again'):
        load_program(tmp_path / path.name)
    (tmp_path / f'{path.name}.json').write_text('{}')
    with pytest.raises(ValueError, match='json is damaged'):
        load_program(tmp_path / path.name)


@pytest.mark.parametrize('ending', ['onnx', 'pt2'])
def test_a_file_that_is_no_program_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f'network.{ending}'
    with pytest.raises(FileNotFoundError, match='is no file'):
        load_program(path)
    path.write_bytes(b'nothing of the kind')
    with pytest.raises(RuntimeError, match=rf'network.{ending} cannot be run by \w+ \d.*update this one'):
        load_program(path)


def test_an_onnx_file_of_others_is_refused(tmp_path: Path) -> None:
    import onnx

    value = onnx.helper.make_tensor_value_info('x', onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node('Identity', ['x'], ['y'])], 'g', [value], [
        onnx.helper.make_tensor_value_info('y', onnx.TensorProto.FLOAT, [1])])
    opset = onnx.helper.make_opsetid('', 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path / 'other.onnx')
    with pytest.raises(ValueError, match=r'other.onnx does not say what network it holds'):
        load_program(tmp_path / 'other.onnx')


def test_an_onnx_file_of_a_newer_opset_than_the_runtime_names_the_remedy(
        exported: Callable[..., Path], tmp_path: Path) -> None:
    import onnx

    proto = onnx.load(exported('onnx', SUBNET))
    proto.opset_import[0].version = 99
    (tmp_path / 'new.onnx').write_bytes(proto.SerializeToString())
    with pytest.raises(RuntimeError, match=r'new.onnx cannot be run by onnxruntime .*opset.*update this one'):
        load_program(tmp_path / 'new.onnx')


def test_an_onnx_file_names_its_input_output_and_batch_dimension(exported: Callable[..., Path]) -> None:
    import onnx

    graph = onnx.load(exported('onnx', SUBNET)).graph
    dims = {value.name: value.type.tensor_type.shape.dim[0].dim_param for value in [*graph.input, *graph.output]}
    assert dims == {'image': 'batch', 'logits': 'batch'}


@pytest.mark.parametrize('quantize', [None, 'int8'])
def test_a_file_for_an_older_runtime_has_no_operator_that_it_does_not_know(
        tmp_path: Path, model_to_export: Callable[..., Any], quantize: str | None) -> None:
    import onnx

    manifest, = export.export(model_to_export(**TINY, num_classes=10), tmp_path, 'onnx', quantize=quantize, opset=18)
    proto = onnx.load(tmp_path / manifest['file'])
    assert manifest['opset'] == load_program(tmp_path / manifest['file']).facts['opset'] == 18
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [('', 18)]
    assert proto.ir_version == 8  # of the first onnxruntime that has opset 18
    assert {onnx.defs.get_schema(node.op_type, 18).since_version <= 18 for node in proto.graph.node} == {True}
    with pytest.raises(onnx.defs.SchemaError):
        onnx.defs.get_schema('Gelu', 18)  # or this would show nothing


def test_the_manifest_says_the_opset_where_none_was_asked_for(exported: Callable[..., Path]) -> None:
    import onnx

    path = exported('onnx', SUBNET)
    assert json.loads(Path(f'{path}.json').read_text())['opset'] == onnx.load(path).opset_import[0].version


@pytest.fixture
def written(exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let every export write the same pt2 file, whatever its model."""
    path = exported('pt2', SUBNET)

    def write(module: Any, images: Any, target: Path, format: str, facts: dict[str, Any]) -> None:
        shutil.copy(path, target)

    monkeypatch.setattr(export, 'write_program', write)
    return path


def test_a_file_that_differs_from_the_model_fails_the_export_and_leaves_the_folder_alone(
        written: Path, model_to_export: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / written.name).write_text('an earlier export')
    other = model_to_export()
    other.head.weight.data += 0.01
    with pytest.raises(export.ExportError, match=rf'{written.name} differs from .* 24:0.5 and batch size 1,'):
        export.export(other, tmp_path, 'pt2', [SUBNET])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {written.name: 'an earlier export'}


def test_one_image_whose_patches_score_alike_does_not_fail_the_export(
        written: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(path: Path) -> Any:
        program = load_program(path)

        def run(images: torch.Tensor, *subnet: Any) -> torch.Tensor:
            calls.append(images)
            return program(images, *subnet) + (len(calls) == 1)  # another patch is kept, of the first image alone

        return run

    monkeypatch.setattr(export, 'load_program', load)
    manifest, = export.export(model, tmp_path, 'pt2', [SUBNET])
    assert max(manifest['max_difference'].values()) < 1e-5
    assert not torch.equal(calls[0], calls[1])


# The commands


@pytest.fixture
def checkpoint(tmp_path: Path) -> list[Any]:
    torch.save(timm.create_model('supervit_digits', **TINY).state_dict(), tmp_path / 'model.pth')
    return [
        'export', 'supervit_digits', '--checkpoint', tmp_path / 'model.pth', '--device', 'cpu',
        '--output', tmp_path / 'out', '--model-kwargs', *(f'{key}={value}' for key, value in TINY.items())]


def test_the_command_exports_the_subnets_that_it_is_given(checkpoint: list[Any], tmp_path: Path) -> None:
    (tmp_path / 'names.txt').write_text('\n'.join('abcdefghij'))
    result = supervit(*checkpoint, '--format', 'pt2', '--subnet', '8:0.5', '--subnet', '16:1.0',
                      '--class-names', tmp_path / 'names.txt')
    assert result.exit_code == 0, result.output
    names = ['supervit_digits-16-1.0.pt2', 'supervit_digits-8-0.5.pt2']
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == sorted([
        *names, *(f'{name}.json' for name in names)])
    for name, subnet in zip(names, [(16, 1.0), (8, 0.5)], strict=True):
        assert f'{name}: 0.' in result.stdout
        program = load_program(tmp_path / 'out' / name)
        assert (program.subnet, program.class_names) == (subnet, list('abcdefghij'))


@pytest.mark.parametrize(('arguments', 'exit_code', 'message'), [
    (['--format', 'onnx', '--subnet', '17:0.5'], 1, 'img_size 17 is none of img_sizes (8, 16)'),
    (['--format', 'onnx', '--subnet', '16'], 2, 'is no subnet SIZE:RATE'),
    (['--format', 'tflite'], 2, 'onnx'),
    (['--format', 'pt2', '--quantize', 'int8'], 1, 'int8 is for format onnx'),
    (['--format', 'onnx', '--opset', '17'], 1, '18'),
    (['--format', 'onnx', '--opset', '99'], 1, 'opset 99'),
    (['--format', 'pt2', '--opset', '18'], 1, '--opset is for format onnx'),
    (['--format', 'onnx', '--calibration-data', 'digits'], 2, 'is for --quantize int8'),
])
def test_the_command_explains_what_it_cannot_export(
        checkpoint: list[Any], arguments: list[str], exit_code: int, message: str) -> None:
    result = supervit(*checkpoint, *arguments)
    assert result.exit_code == exit_code
    assert message in result.stderr


@pytest.mark.parametrize('format', ['onnx', 'pt2'])
def test_evaluating_a_file_counts_what_the_model_says_of_each_image(
        exported: Callable[..., Path], model: Any, folder: Path, tmp_path: Path, format: str) -> None:
    path = exported(format)
    result = supervit('evaluate', path, '--data-dir', folder, '-j', 0, '-b', 8, '--output', tmp_path)
    assert result.exit_code == 0, result.output
    results = load_results(tmp_path / 'evaluate.json')
    transform: Any = create_transform(**resolve_data_config({}, model=model), is_training=False)
    counted = {}
    for subnet in model.subnets:
        hits = []
        for file in folder.rglob('*.png'):
            with torch.no_grad():
                logits = model(transform(Image.open(file))[None], **subnet._asdict())[0]
            hits.append(logits.argsort(descending=True).tolist().index(int(file.parent.name[-1])))
        counted[subnet] = sum(place == 0 for place in hits), sum(place < 5 for place in hits), len(hits)
    assert {subnet_of(row): (row['correct1'], row['correct5'], row['count']) for row in results.rows} == counted
    assert len({hits[1] for hits in counted.values()}) > 1  # or another subnet would do as well
    assert {subnet_of(row): row['macs'] for row in results.rows} == model.subnet_macs()
    assert results.info['checkpoint'] == str(path) and results.network['weights'] == fingerprint(model)['weights']


def test_a_file_of_one_subnet_is_evaluated_at_that_alone(path: Path, folder: Path) -> None:
    result = supervit('evaluate', path, '--data-dir', folder, '-j', 0, '--json')
    assert result.exit_code == 0, result.output
    assert [subnet_of(row) for row in json.loads(result.stdout)['rows']] == [SUBNET]
    result = supervit('evaluate', path, '--data-dir', folder, '-j', 0, '--subnet', '8:0.5')
    assert result.exit_code == 1 and 'no subnet 8:0.5' in result.stderr
