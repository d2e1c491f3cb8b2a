"""Elastic files: one program that runs every subnet, its size and rate chosen by inputs."""
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from reference import ReferenceSuperViT

from timm_supervit import Subnet
from timm_supervit.programs.program import Program, load_program

RATES = (0.05, 0.3, 0.6, 0.77, 1.0)  # 0.6 of 5 tokens are 3, and 4 in float32
RECTANGLES: dict[str, Any] = dict(
    name='supervit_lvvit_tiny', img_sizes=((16, 8), (16, 24)), patch_size=8, embed_dim=32, num_heads=2, depth=1,
    drop_layers=(0,), num_classes=7)


class Exported(NamedTuple):
    model: Any
    path: Path
    program: Any


@pytest.fixture(scope='module')
def squares(exported: Callable[..., Path], model_to_export: Callable[..., Any]) -> Exported:
    """An ONNX file."""
    path = exported('onnx')
    return Exported(model_to_export(), path, load_program(path))


@pytest.fixture(scope='module')
def rectangles(exported: Callable[..., Path], model_to_export: Callable[..., Any]) -> Exported:
    """A pt2 file of the other backbone, with rectangles in its grid."""
    path = exported('pt2', **RECTANGLES)
    return Exported(model_to_export(**RECTANGLES), path, load_program(path))


@pytest.fixture(params=['squares', 'rectangles'])
def either(request: pytest.FixtureRequest) -> Exported:
    return request.getfixturevalue(request.param)


def run_unchecked(program: Any, size: Any, rate: float) -> Any:
    """Run a file as others do, past what the package checks."""
    inputs = [torch.zeros(1, 3, 16, 24), torch.tensor(size), torch.tensor(rate, dtype=torch.float64)]
    if program.runtime == 'pt2':
        return program.module(*inputs)
    names = ('image', 'img_size', 'keep_rate')
    return program.session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})


@torch.no_grad()
def assert_every_subnet_agrees(model: Any, program: Any) -> None:
    for batch_size in (1, 3, 8):
        images = torch.randn(batch_size, 3, 16, 24)
        for size in model.img_sizes:
            for rate in RATES:
                expected = model(images, img_size=size, keep_rate=rate)
                torch.testing.assert_close(program(images, size, rate), expected, atol=1e-5, rtol=0)


def test_one_file_gives_the_logits_of_every_size_at_any_rate_and_batch_size(either: Exported) -> None:
    assert_every_subnet_agrees(either.model, either.program)


@pytest.mark.parametrize(('format', 'settings'), [
    ('onnx', dict(name='supervit', backbone='vit_tiny_r_s16_p8_224', patch_size=1, img_sizes=(16, (16, 24)))),
    ('onnx', dict(global_pool='')), ('pt2', dict(global_pool='')),
])
def test_stems_that_pad_by_the_size_and_outputs_of_all_tokens_are_exported_too(
        exported: Callable[..., Path], model_to_export: Callable[..., Any], format: str, settings: dict[str, Any],
) -> None:
    import onnx

    path, model = exported(format, **settings), model_to_export(**settings)
    assert_every_subnet_agrees(model, load_program(path))
    assert load_program(path).num_classes == 10
    if format == 'onnx':
        assert b'.py' not in path.read_bytes()  # no paths of the machine, in branches neither
        held = sum(math.prod(tensor.dims) for tensor in onnx.load(path).graph.initializer)
        assert held <= 1000 + sum(tensor.numel() for tensor in [*model.state_dict().values(), *model.pos_embed_list])


def test_it_agrees_with_an_independent_implementation(squares: Exported) -> None:
    reference = ReferenceSuperViT(
        (8, 16, 24), (0, 1), patch_size=4, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2., num_classes=10)
    reference.load_state_dict(squares.model.state_dict())
    images = torch.randn(2, 3, 24, 24)
    for size, rate in [(8, 0.6), (16, 0.3), (24, 0.9)]:
        with torch.no_grad():
            expected = reference(images, size, rate)
        torch.testing.assert_close(squares.program(images, size, rate), expected, atol=1e-5, rtol=0)


def test_the_file_holds_the_weights_once(either: Exported) -> None:
    import onnx

    model, path, _ = either
    if path.suffix == '.onnx':
        held = sum(math.prod(tensor.dims) for tensor in onnx.load(path).graph.initializer)
    else:
        held = sum(tensor.numel() for tensor in torch.export.load(path).state_dict.values())
    weights = sum(tensor.numel() for tensor in model.state_dict().values())
    assert weights <= held <= weights + sum(pos_embed.numel() for pos_embed in model.pos_embed_list) + 1000


@pytest.mark.parametrize('rate', [0., -0.5, 1.01, math.nan])
def test_a_rate_that_is_none_is_an_error_of_the_runtime_that_says_so(either: Exported, rate: float) -> None:
    with pytest.raises(Exception, match=r'keep[_ ]rate[_ ]must[_ ]be[_ ]above[_ ]0[_ ]and[_ ]at[_ ]most[_ ]1'):
        run_unchecked(either.program, either.model.img_sizes[0], rate)


@pytest.mark.parametrize('size', [12, 0, -8])
def test_a_size_that_is_none_of_the_grid_is_an_error_of_the_runtime_that_says_so(squares: Exported, size: int) -> None:
    with pytest.raises(Exception, match='img_size_must_be_one_of_8_16_24'):
        run_unchecked(squares.program, size, 0.5)


@pytest.mark.parametrize('size', [(8, 16), (16, 16)])
def test_rectangles_are_asked_for_by_height_and_width(rectangles: Exported, size: tuple[int, int]) -> None:
    assert rectangles.program.facts['inputs']['img_size'] == {'dtype': 'int64', 'shape': [2]}
    with pytest.raises(RuntimeError, match='img size must be one of 16x8 16x24'):
        run_unchecked(rectangles.program, size, 0.5)


def test_the_loader_names_what_the_file_has(squares: Exported) -> None:
    program, images = squares.program, torch.zeros(1, 3, 24, 24)
    with pytest.raises(ValueError, match=r'no subnet 12:0.5; it runs the image sizes 8, 16, 24 at any keep rate'):
        program(images, 12, 0.5)
    with pytest.raises(ValueError, match=r'keep_rate 2 is not in \(0, 1\]'):
        program(images, 16, 2)
    with pytest.raises(ValueError, match=r'what 8:0.6 costs, but what 8:0.5, 8:1,'):
        program.macs(Subnet(8, 0.6))


def test_the_file_alone_stands_for_the_model(either: Exported, tmp_path: Path) -> None:
    model, path, _ = either
    shutil.copy(path, tmp_path)
    program = load_program(tmp_path / path.name)
    assert isinstance(program, Program)
    assert program.is_elastic
    assert (program.img_sizes, program.subnets, program.subnet) == (model.img_sizes, model.subnets, model.subnet)
    assert program.subnet_macs() == model.subnet_macs()
    assert [program.macs(subnet) for subnet in program.subnets] == [model.macs(subnet) for subnet in model.subnets]
    assert program.class_names == model.pretrained_cfg['label_names']
    images = torch.randn(2, *program.pretrained_cfg['input_size'])
    with torch.no_grad():
        torch.testing.assert_close(program(images), model(images, img_size=model.img_sizes[-1]), atol=1e-5, rtol=0)
        for logits, expected in zip(
                program.forward_subnets(images, model.subnets), model.forward_subnets(images, model.subnets),
                strict=True):
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_the_manifest_says_what_the_file_does(squares: Exported) -> None:
    manifest = json.loads(Path(f'{squares.path}.json').read_text())
    assert sorted(path.name for path in squares.path.parent.iterdir()) == [
        'supervit_digits.onnx', 'supervit_digits.onnx.json']
    assert manifest['class_names'] == squares.model.pretrained_cfg['label_names']
    assert [(row['img_size'], row['keep_rate']) for row in manifest['subnets']] == squares.model.subnets
    assert manifest['inputs'] == {
        'image': {'dtype': 'float32', 'shape': ['batch', 3, 'height', 'width']},
        'img_size': {'dtype': 'int64', 'shape': []}, 'keep_rate': {'dtype': 'float64', 'shape': []}}


def test_an_onnx_file_says_nothing_of_the_machine_that_wrote_it(squares: Exported) -> None:
    content = squares.path.read_bytes()
    assert str(Path(timm.__file__).parent).encode() not in content
    assert b'.py' not in content


@pytest.mark.slow  # it runs a C++ compiler
@pytest.mark.timeout(1200)
def test_aotinductor_compiles_it_once_for_all_subnets(rectangles: Exported, tmp_path: Path) -> None:
    program = torch.export.load(rectangles.path)
    program.example_inputs = (
        (torch.randn(2, 3, 16, 24), torch.tensor((16, 8)), torch.tensor(0.7, dtype=torch.float64)), {})
    compiled: Any = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / 'compiled.pt2'),
        inductor_configs={'aot_inductor.compile_wrapper_opt_level': 'O0'}))

    def run(images: torch.Tensor, size: tuple[int, int], rate: float) -> Any:
        return compiled(images, torch.tensor(size), torch.tensor(rate, dtype=torch.float64))

    assert_every_subnet_agrees(rectangles.model, run)
    with pytest.raises(RuntimeError, match='img size must be one of'):
        run(torch.zeros(1, 3, 16, 24), (8, 16), 0.5)


def test_pt2_files_run_without_this_package_and_timm(rectangles: Exported, exported: Callable[..., Path]) -> None:
    code = (
        'import sys, torch; elastic, fixed = (torch.export.load(path).module() for path in sys.argv[1:]); '
        'rate = torch.tensor(0.6, dtype=torch.float64); '
        'print(*elastic(torch.zeros(3, 3, 30, 20), torch.tensor([16, 8]), rate).shape, '
        '*fixed(torch.zeros(4, 3, 24, 24)).shape, "timm" in sys.modules, "timm_supervit" in sys.modules)')
    result = subprocess.run(
        [sys.executable, '-c', code, rectangles.path, exported('pt2', Subnet(24, 0.5))],
        env={**os.environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'}, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ['3', '7', '4', '10', 'False', 'False']
