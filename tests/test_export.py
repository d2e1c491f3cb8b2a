"""Fixed files of single subnets, and what all exported files have in common."""
import hashlib
import json
import subprocess
import sys

import pytest
import timm
import torch
from click.testing import CliRunner
from reference import ReferenceSuperViT
from timm.data import resolve_data_config

from timm_supervit import Subnet
from timm_supervit.cli import main
from timm_supervit.fingerprint import fingerprint
from timm_supervit.tools import export
from timm_supervit.tools.export import ExportError, export_model
from timm_supervit.tools.program import load_program

SUBNETS = [Subnet(12, 0.5), Subnet(24, 0.7)]


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return timm.create_model('supervit_digits', embed_dim=48, depth=3, drop_layers=(1,)).eval()


@pytest.fixture(scope='module', params=['onnx', 'pt2'])
def exported(request, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp('exported')
    return folder, export_model(model, folder, request.param, SUBNETS)


def test_the_files_compute_what_an_independent_implementation_computes_at_any_batch_size(exported, model):
    folder, manifests = exported
    reference = ReferenceSuperViT(
        (12, 16, 20, 24), (1,), patch_size=4, embed_dim=48, depth=3, num_heads=2, mlp_ratio=2., num_classes=10)
    reference.load_state_dict(model.state_dict())
    for manifest in manifests:
        program = load_program(folder / manifest['file'])
        for batch_size in (1, 2, 7):
            images = torch.randn(batch_size, 3, 24, 24)
            with torch.no_grad():
                expected = reference(images, *program.subnet)
            # The promise that the command makes; rounding explains about a hundredth of it here.
            torch.testing.assert_close(program(images), expected, atol=1e-4, rtol=0)


def test_each_file_has_a_manifest_that_describes_it(exported, model):
    folder, manifests = exported
    names = [manifest['file'] for manifest in manifests]
    assert {path.name for path in folder.iterdir()} == {*names, *(f'{name}.json' for name in names)}
    for manifest, subnet in zip(manifests, SUBNETS, strict=True):
        assert json.loads((folder / f'{manifest["file"]}.json').read_text()) == json.loads(json.dumps(manifest))
        content = (folder / manifest['file']).read_bytes()
        assert manifest['sha256'] == hashlib.sha256(content).hexdigest()
        assert manifest['bytes'] == len(content)
        assert manifest['subnets'] == [{**subnet._asdict(), 'macs': model.macs(subnet)}]
        assert set(manifest['max_difference']) == {'1', '5'}
        assert manifest['inputs']['image']['shape'] == ['batch', 3, 24, 24]
        assert manifest['preprocessing']['mean'] == model.pretrained_cfg['mean']


def test_a_file_alone_says_what_it_runs_and_how_to_prepare_images(exported, model, tmp_path):
    folder, manifests = exported
    path = tmp_path / manifests[1]['file']
    path.write_bytes((folder / path.name).read_bytes())
    program = load_program(path)
    assert program.subnets == [program.subnet] == [SUBNETS[1]]
    assert not program.is_elastic
    assert program.macs(SUBNETS[1]) == model.macs(SUBNETS[1])
    assert resolve_data_config({}, model=program) == resolve_data_config({}, model=model)
    assert (program.name, program.num_classes, program.in_chans) == ('supervit_digits', 10, 3)
    assert program.network == fingerprint(model)
    with pytest.raises(ValueError, match=r'has no subnet 24:0.5; it runs 24:0.7'):
        program(torch.zeros(1, 3, 24, 24), keep_rate=0.5)


def test_a_file_that_changed_since_its_checksum_is_refused(exported, tmp_path):
    folder, manifests = exported
    path = tmp_path / manifests[0]['file']
    content = bytearray((folder / path.name).read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (tmp_path / f'{path.name}.json').write_bytes((folder / f'{path.name}.json').read_bytes())
    with pytest.raises(ValueError, match=rf'{path.name} is damaged: its SHA-256 is .*fetch or export it again'):
        load_program(path)
    (tmp_path / f'{path.name}.json').write_text('{}')
    with pytest.raises(ValueError, match='json is damaged'):
        load_program(path)


@pytest.mark.parametrize('ending', ['onnx', 'pt2'])
def test_a_file_that_is_no_program_is_refused(tmp_path, ending):
    path = tmp_path / f'network.{ending}'
    with pytest.raises(FileNotFoundError, match='is no file'):
        load_program(path)
    path.write_bytes(b'nothing of the kind')
    with pytest.raises(RuntimeError, match=rf'network.{ending} cannot be run by \w+ \d.*update this one'):
        load_program(path)


def test_an_onnx_file_of_others_is_refused(tmp_path):
    import onnx

    value = onnx.helper.make_tensor_value_info('x', onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node('Identity', ['x'], ['y'])], 'g', [value], [
        onnx.helper.make_tensor_value_info('y', onnx.TensorProto.FLOAT, [1])])
    opset = onnx.helper.make_opsetid('', 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path / 'other.onnx')
    with pytest.raises(ValueError, match=r'other.onnx does not say what network it holds'):
        load_program(tmp_path / 'other.onnx')


def test_an_onnx_file_of_a_newer_opset_than_the_runtime_names_the_remedy(exported, tmp_path):
    import onnx

    folder, manifests = exported
    if manifests[0]['format'] == 'pt2':
        pytest.skip('has no opset')
    proto = onnx.load(folder / manifests[0]['file'])
    proto.opset_import[0].version = 99
    (tmp_path / 'new.onnx').write_bytes(proto.SerializeToString())
    with pytest.raises(RuntimeError, match=r'new.onnx cannot be run by onnxruntime .*opset.*update this one'):
        load_program(tmp_path / 'new.onnx')


def test_an_onnx_file_names_its_input_output_and_batch_dimension(model, tmp_path):
    import onnx

    export_model(model, tmp_path, 'onnx', SUBNETS[:1])
    graph = onnx.load(tmp_path / 'supervit_digits-12-0.5.onnx').graph
    dims = {value.name: value.type.tensor_type.shape.dim[0].dim_param for value in [*graph.input, *graph.output]}
    assert dims == {'image': 'batch', 'logits': 'batch'}


def test_a_pt2_program_runs_without_this_package_and_timm(model, tmp_path):
    export_model(model, tmp_path, 'pt2', SUBNETS[:1])
    code = (
        'import sys, torch; program = torch.export.load(sys.argv[1]).module(); '
        'print(*program(torch.zeros(3, 3, 24, 24)).shape, "timm" in sys.modules, "timm_supervit" in sys.modules)')
    result = subprocess.run(
        [sys.executable, '-c', code, tmp_path / 'supervit_digits-12-0.5.pt2'],
        env={'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'}, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ['3', '10', 'False', 'False']


def test_a_file_that_differs_from_the_model_fails_the_export_and_leaves_the_folder_alone(model, tmp_path, monkeypatch):
    (tmp_path / 'supervit_digits-24-0.7.pt2').write_text('an earlier export')
    torch.manual_seed(1)  # not the model's
    wrong = timm.create_model('supervit_digits', embed_dim=48, depth=3, drop_layers=(1,)).eval()
    write = export.write_program
    monkeypatch.setattr(
        export, 'write_program',
        lambda network, *args: write(export.FixedSubnet(wrong, network.subnet), *args))
    with pytest.raises(ExportError, match=r'supervit_digits-24-0.7.pt2 differs from .* 24:0.7 and batch size 1,'):
        export_model(model, tmp_path, 'pt2', SUBNETS[1:])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        'supervit_digits-24-0.7.pt2': 'an earlier export'}


def test_one_image_whose_patches_score_alike_does_not_fail_the_export(model, tmp_path, monkeypatch):
    calls = []

    def load(path):
        program = load_program(path)

        def run(images, *subnet):
            calls.append(images)
            return program(images, *subnet) + (len(calls) == 1)  # another patch is kept, of the first image alone

        return run

    monkeypatch.setattr(export, 'load_program', load)
    manifest, = export_model(model, tmp_path, 'pt2', SUBNETS[1:])
    assert max(manifest['max_difference'].values()) < 1e-5
    assert not torch.equal(calls[0], calls[1])


@pytest.fixture
def checkpoint(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    return [
        'export', 'supervit_digits', '--checkpoint', str(tmp_path / 'model.pth'),
        '--model-kwargs', 'embed_dim=48', 'depth=3', 'drop_layers=(1,)']


def test_the_command_exports_the_subnets_that_it_is_given(checkpoint, tmp_path):
    arguments = ['--format', 'pt2', '--subnet', '16:0.5', '--subnet', '24:1.0', '--output', str(tmp_path / 'out')]
    result = CliRunner().invoke(main, [*checkpoint, *arguments, '--device', 'cpu'])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [
        'supervit_digits-16-0.5.pt2', 'supervit_digits-16-0.5.pt2.json',
        'supervit_digits-24-1.0.pt2', 'supervit_digits-24-1.0.pt2.json']
    assert 'supervit_digits-24-1.0.pt2' in result.stdout


@pytest.mark.parametrize(('arguments', 'exit_code', 'message'), [
    (['--format', 'onnx', '--subnet', '17:0.5'], 1, 'img_size 17 is none of img_sizes (12, 16, 20, 24)'),
    (['--format', 'onnx', '--subnet', '16'], 2, 'is no subnet SIZE:RATE'),
    (['--format', 'tflite'], 2, 'onnx'),
    (['--format', 'pt2', '--quantize', 'int8'], 1, 'int8 is for format onnx'),
    (['--format', 'onnx', '--data-dir', 'digits'], 2, 'are for --quantize int8'),
])
def test_the_command_explains_what_it_cannot_export(checkpoint, tmp_path, arguments, exit_code, message):
    result = CliRunner().invoke(main, [*checkpoint, *arguments, '--output', str(tmp_path / 'out'), '--device', 'cpu'])
    assert result.exit_code == exit_code
    assert message in result.stderr
