import hashlib
import json
import subprocess
import sys

import pytest
import timm
import torch
from click.testing import CliRunner
from reference import ReferenceSuperViT

from timm_supervit import Subnet
from timm_supervit.cli import main
from timm_supervit.tools import export
from timm_supervit.tools.export import ExportError, export_subnets, load_program

SUBNETS = [Subnet(12, 0.5), Subnet(24, 0.7)]


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return timm.create_model('supervit_digits', embed_dim=48, depth=3, drop_layers=(1,)).eval()


@pytest.fixture(scope='module', params=['onnx', 'pt2'])
def exported(request, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp('exported')
    return folder, export_subnets(model, SUBNETS, folder, request.param)


def test_the_files_compute_what_an_independent_implementation_computes_at_any_batch_size(exported, model):
    folder, manifest = exported
    reference = ReferenceSuperViT(
        (12, 16, 20, 24), (1,), patch_size=4, embed_dim=48, depth=3, num_heads=2, mlp_ratio=2., num_classes=10)
    reference.load_state_dict(model.state_dict())
    for entry in manifest['files']:
        program = load_program(folder / entry['file'])
        for batch_size in (1, 2, 7):
            images = torch.randn(batch_size, 3, 24, 24)
            with torch.no_grad():
                expected = reference(images, entry['img_size'], entry['keep_rate'])
            # The promise that the command makes; rounding explains about a hundredth of it here.
            torch.testing.assert_close(program(images), expected, atol=1e-4, rtol=0)


def test_the_manifest_describes_the_files(exported, model):
    folder, manifest = exported
    name = f'supervit_digits-{manifest["format"]}.json'
    assert json.loads((folder / name).read_text()) == json.loads(json.dumps(manifest))
    assert {path.name for path in folder.iterdir()} == {name, *(entry['file'] for entry in manifest['files'])}
    assert [(entry['img_size'], entry['keep_rate']) for entry in manifest['files']] == SUBNETS
    for entry in manifest['files']:
        content = (folder / entry['file']).read_bytes()
        assert entry['sha256'] == hashlib.sha256(content).hexdigest()
        assert entry['bytes'] == len(content)
        assert entry['macs'] == model.macs(Subnet(entry['img_size'], entry['keep_rate']))
        assert set(entry['max_difference']) == {'1', '5'}
    assert manifest['input']['shape'] == ['batch', 3, 24, 24]
    assert manifest['preprocessing']['mean'] == model.pretrained_cfg['mean']


def test_an_onnx_file_names_its_input_output_and_batch_dimension(model, tmp_path):
    import onnx

    export_subnets(model, SUBNETS[:1], tmp_path, 'onnx')
    graph = onnx.load(tmp_path / 'supervit_digits-12-0.5.onnx').graph
    dims = {value.name: value.type.tensor_type.shape.dim[0].dim_param for value in [*graph.input, *graph.output]}
    assert dims == {'image': 'batch', 'logits': 'batch'}


def test_a_pt2_program_runs_without_this_package_and_timm(model, tmp_path):
    export_subnets(model, SUBNETS[:1], tmp_path, 'pt2')
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
    with pytest.raises(ExportError, match=r'supervit_digits-24-0.7.pt2 differs from the model by .* at batch size 1'):
        export_subnets(model, SUBNETS[1:], tmp_path, 'pt2')
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        'supervit_digits-24-0.7.pt2': 'an earlier export'}


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
        'supervit_digits-16-0.5.pt2', 'supervit_digits-24-1.0.pt2', 'supervit_digits-pt2.json']
    assert 'supervit_digits-24-1.0.pt2' in result.stdout


@pytest.mark.parametrize(('arguments', 'exit_code', 'message'), [
    (['--format', 'onnx', '--subnet', '17:0.5'], 1, 'img_size 17 is none of img_sizes (12, 16, 20, 24)'),
    (['--format', 'onnx', '--subnet', '16'], 2, 'is no subnet SIZE:RATE'),
    (['--format', 'onnx', '--subnet', '16:0.5', '--all'], 2, 'exclude each other'),
    (['--format', 'tflite', '--all'], 2, 'onnx'),
])
def test_the_command_explains_what_it_cannot_export(checkpoint, tmp_path, arguments, exit_code, message):
    result = CliRunner().invoke(main, [*checkpoint, *arguments, '--output', str(tmp_path / 'out'), '--device', 'cpu'])
    assert result.exit_code == exit_code
    assert message in result.stderr
