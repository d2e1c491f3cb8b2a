"""Elastic files: one program that runs every subnet, its size and rate chosen by inputs."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from click.testing import CliRunner
from reference import ReferenceSuperViT

from timm_supervit import Subnet
from timm_supervit.cli import main
from timm_supervit.tools.export import export_model
from timm_supervit.tools.program import Program, load_program

RATES = (0.05, 0.3, 0.6, 0.77, 1.0)  # 0.6 of 5 tokens are 3, and 4 in float32
SETTINGS = dict(img_sizes=(8, 16, 24), embed_dim=48, num_heads=3, depth=2, drop_layers=(0, 1))


class Exported(NamedTuple):
    model: Any
    path: Path
    program: Any


@pytest.fixture(scope='module')
def squares(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """An ONNX file, written by the command."""
    folder = tmp_path_factory.mktemp('squares')
    model = create('supervit_digits', **SETTINGS)
    torch.save(model.state_dict(), folder / 'model.pth')
    (folder / 'names.txt').write_text('\n'.join('abcdefghij'))
    result = CliRunner().invoke(main, [
        'export', 'supervit_digits', '--checkpoint', str(folder / 'model.pth'), '--format', 'onnx', '--device', 'cpu',
        '--model-kwargs', *(f'{key}={value}' for key, value in SETTINGS.items()),
        '--class-names', str(folder / 'names.txt'), '--output', str(folder / 'out')])
    assert result.exit_code == 0, result.output
    assert 'supervit_digits.onnx: 0.' in result.stdout
    path = folder / 'out' / 'supervit_digits.onnx'
    return Exported(model, path, load_program(path))


@pytest.fixture(scope='module')
def rectangles(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A pt2 file of the other backbone, with rectangles in its grid."""
    folder = tmp_path_factory.mktemp('rectangles')
    model = create(
        'supervit_lvvit_tiny', img_sizes=((16, 8), (16, 24)), patch_size=8, embed_dim=32, num_heads=2, depth=1,
        drop_layers=(0,), num_classes=7)
    export_model(model, folder, 'pt2')
    path = folder / 'supervit_lvvit_tiny.pt2'
    return Exported(model, path, load_program(path))


@pytest.fixture(params=['squares', 'rectangles'])
def exported(request: pytest.FixtureRequest) -> Exported:
    return request.getfixturevalue(request.param)


def create(*args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    model: Any = timm.create_model(*args, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def scalars(size: Any, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(size), torch.tensor(rate, dtype=torch.float64)


@torch.no_grad()
def assert_every_subnet_agrees(model: Any, program: Any) -> None:
    for batch_size in (1, 3, 8):
        images = torch.randn(batch_size, 3, 16, 24)
        for size in model.img_sizes:
            for rate in RATES:
                expected = model(images, img_size=size, keep_rate=rate)
                torch.testing.assert_close(program(images, size, rate), expected, atol=1e-5, rtol=0)


def test_one_file_gives_the_logits_of_every_size_at_any_rate_and_batch_size(exported: Exported) -> None:
    assert_every_subnet_agrees(exported.model, exported.program)


def test_it_agrees_with_an_independent_implementation(squares: Exported) -> None:
    reference = ReferenceSuperViT(**SETTINGS, patch_size=4, mlp_ratio=2., num_classes=10)
    reference.load_state_dict(squares.model.state_dict())
    images = torch.randn(2, 3, 24, 24)
    for size, rate in [(8, 0.6), (16, 0.3), (24, 0.9)]:
        with torch.no_grad():
            expected = reference(images, size, rate)
        torch.testing.assert_close(squares.program(images, size, rate), expected, atol=1e-5, rtol=0)


def test_the_file_holds_the_weights_once(exported: Exported) -> None:
    import onnx

    model, path, _ = exported
    if path.suffix == '.onnx':
        held = sum(math.prod(tensor.dims) for tensor in onnx.load(path).graph.initializer)
    else:
        held = sum(tensor.numel() for tensor in torch.export.load(path).state_dict.values())
    weights = sum(tensor.numel() for tensor in model.state_dict().values())
    assert weights <= held <= weights + sum(pos_embed.numel() for pos_embed in model.pos_embed_list) + 1000


@pytest.mark.parametrize('rate', [0., -0.5, 1.01, math.nan])
def test_a_rate_that_is_none_is_an_error_that_says_so(exported: Exported, rate: float) -> None:
    # Of the runtime: this goes past what the package checks.
    inputs = exported.program._inputs(torch.zeros(1, 3, 16, 24), Subnet(exported.model.img_sizes[0], rate))
    with pytest.raises(Exception, match=r'keep[_ ]rate[_ ]must[_ ]be[_ ]above[_ ]0[_ ]and[_ ]at[_ ]most[_ ]1'):
        exported.program._run(*inputs)


@pytest.mark.parametrize('size', [12, 0, -8])
def test_a_size_that_is_none_of_the_grid_is_an_error_that_says_so(squares: Exported, size: int) -> None:
    with pytest.raises(Exception, match='img_size_must_be_one_of_8_16_24'):
        squares.program._run(torch.zeros(1, 3, 24, 24), *scalars(size, 0.5))


@pytest.mark.parametrize('size', [(8, 16), (16, 16)])
def test_rectangles_are_asked_for_by_height_and_width(rectangles: Exported, size: tuple[int, int]) -> None:
    assert rectangles.program.facts['inputs']['img_size'] == {'dtype': 'int64', 'shape': [2]}
    with pytest.raises(RuntimeError, match='img size must be one of 16x8 16x24'):
        rectangles.program._run(torch.zeros(1, 3, 16, 24), *scalars(size, 0.5))


def test_the_loader_names_what_the_file_has(squares: Exported) -> None:
    program, images = squares.program, torch.zeros(1, 3, 24, 24)
    with pytest.raises(ValueError, match=r'has no subnet 12:0.5; it runs the image sizes 8, 16, 24 at any keep rate'):
        program(images, 12, 0.5)
    with pytest.raises(ValueError, match=r'keep_rate 2 is not in \(0, 1\]'):
        program(images, 16, 2)
    with pytest.raises(ValueError, match=r'does not say what 8:0.6 costs, but what 8:0.5, 8:0.7,'):
        program.macs(Subnet(8, 0.6))


def test_the_file_alone_stands_for_the_model(exported: Exported, tmp_path: Path) -> None:
    model, path, _ = exported
    (tmp_path / path.name).write_bytes(path.read_bytes())
    program = load_program(tmp_path / path.name)
    assert isinstance(program, Program)
    assert program.is_elastic
    assert (program.img_sizes, program.subnets, program.subnet) == (model.img_sizes, model.subnets, model.subnet)
    assert [program.macs(subnet) for subnet in program.subnets] == [model.macs(subnet) for subnet in model.subnets]
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(program(images), model(images, img_size=model.img_sizes[-1]), atol=1e-5, rtol=0)
        for logits, expected in zip(
                program.forward_subnets(images, model.subnets), model.forward_subnets(images, model.subnets),
                strict=True):
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_the_manifest_says_what_the_file_does(squares: Exported) -> None:
    manifest = json.loads((squares.path.parent / 'supervit_digits.onnx.json').read_text())
    assert sorted(path.name for path in squares.path.parent.iterdir()) == [
        'supervit_digits.onnx', 'supervit_digits.onnx.json']
    assert manifest['class_names'] == squares.program.class_names == list('abcdefghij')
    assert len(manifest['subnets']) == 9
    assert manifest['inputs'] == {
        'image': {'dtype': 'float32', 'shape': ['batch', 3, 'height', 'width']},
        'img_size': {'dtype': 'int64', 'shape': []}, 'keep_rate': {'dtype': 'float64', 'shape': []}}


def test_an_onnx_file_says_nothing_of_the_machine_that_wrote_it(squares: Exported) -> None:
    content = squares.path.read_bytes()
    assert str(Path(timm.__file__).parent).encode() not in content
    assert b'.py' not in content


@pytest.mark.timeout(1200)  # it runs a C++ compiler
def test_aotinductor_compiles_it_once_for_all_subnets(rectangles: Exported, tmp_path: Path) -> None:
    compiled: Any = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(
        torch.export.load(rectangles.path), package_path=str(tmp_path / 'compiled.pt2'),
        inductor_configs={'aot_inductor.compile_wrapper_opt_level': 'O0'}))
    assert_every_subnet_agrees(
        rectangles.model, lambda images, *subnet: compiled(*rectangles.program._inputs(images, Subnet(*subnet))))
    with pytest.raises(RuntimeError, match='img size must be one of'):
        compiled(torch.zeros(1, 3, 16, 24), *scalars((8, 16), 0.5))


def test_a_pt2_file_runs_without_this_package_and_timm(rectangles: Exported) -> None:
    code = (
        'import sys, torch; program = torch.export.load(sys.argv[1]).module(); '
        'rate = torch.tensor(0.6, dtype=torch.float64); '
        'print(*program(torch.zeros(3, 3, 30, 20), torch.tensor([16, 8]), rate).shape, '
        '"timm" in sys.modules, "timm_supervit" in sys.modules)')
    result = subprocess.run(
        [sys.executable, '-c', code, rectangles.path], env={**os.environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'},
        capture_output=True, text=True, check=True)
    assert result.stdout.split() == ['3', '7', 'False', 'False']
