"""Compilers and exporters take the model as they take a ViT of timm: by any of their routes, at every keep rate."""
import copy
import io
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from comparing import ROUNDING, run_subnet
from timm.layers import DropPath
from torch import Tensor, nn

TIMM_SCRIPTS = os.environ.get('TIMM_SCRIPTS')
BACKBONES = ['supervit_tiny', 'supervit_lvvit_small']


def run_onnx(content: Any, images: Tensor) -> Tensor:
    onnxruntime = pytest.importorskip('onnxruntime')
    session = onnxruntime.InferenceSession(content)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


# --- exporters that call positionally ---


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('keep_rate', [0.3, 0.6, 1.0])
@pytest.mark.parametrize('name', BACKBONES)
def test_the_older_onnx_export_runs_at_other_batch_sizes(small_model: Any, name: str, keep_rate: float) -> None:
    model = small_model(name, keep_rate=keep_rate)
    file = io.BytesIO()
    torch.onnx.export(
        model, torch.randn(2, 3, 64, 64), file, dynamo=False, input_names=['x'], dynamic_axes={'x': {0: 'batch'}})
    for batch_size in (1, 2, 5):
        images = torch.randn(batch_size, 3, 64, 64)
        torch.testing.assert_close(run_onnx(file.getvalue(), images), model(images).detach(), **ROUNDING)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('keep_rate', [0.3, 1.0])
@pytest.mark.parametrize('name', BACKBONES)
def test_a_trace_runs_at_other_batch_sizes(small_model: Any, name: str, keep_rate: float) -> None:
    model = small_model(name, keep_rate=keep_rate)
    traced = torch.jit.trace(model, torch.randn(2, 3, 64, 64))
    for batch_size in (1, 2, 5):
        images = torch.randn(batch_size, 3, 64, 64)
        torch.testing.assert_close(traced(images), model(images), **ROUNDING)


@pytest.mark.filterwarnings('ignore')
def test_equal_scores_are_ranked_alike_in_onnx(small_model: Any, images: Tensor) -> None:
    model = small_model(keep_rate=0.6, depth=2, drop_layers=(0,))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:48] = 0.
            block.attn.qkv.bias[:48] = 0.
    for dynamo in (False, True):
        file = io.BytesIO()
        torch.onnx.export(model, (images,), file, dynamo=dynamo, **(dict(verbose=False) if dynamo else {}))
        torch.testing.assert_close(run_onnx(file.getvalue(), images), model(images).detach(), **ROUNDING)


@pytest.mark.skipif(not TIMM_SCRIPTS, reason='TIMM_SCRIPTS names no folder with timm\'s onnx_export.py')
@pytest.mark.parametrize('keep_rate', [0.5, 1.0])
def test_timm_s_onnx_export_script_writes_a_file_that_runs(tmp_path: Path, keep_rate: float) -> None:
    weights = tmp_path / 'weights.pth'
    model = timm.create_model('supervit_digits', keep_rate=keep_rate).eval()
    torch.save(model.state_dict(), weights)
    # The script takes no settings of the model; its own are those of the file that the model is saved in.
    timm.models.save_for_hf(model, tmp_path / 'model', safe_serialization=True)
    path = tmp_path / 'model.onnx'
    run = subprocess.run(
        [sys.executable, '-P', f'{TIMM_SCRIPTS}/onnx_export.py', str(path), '--model', f'local-dir:{tmp_path}/model',
         '--img-size', '24', '--batch-size', '2'],
        capture_output=True, text=True, check=False, env={**os.environ, 'PYTHONSAFEPATH': '1'})
    assert run.returncode == 0, run.stderr
    images = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(run_onnx(str(path), images), model(images).detach(), **ROUNDING)


# --- what is no goal ---


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', BACKBONES)
def test_torchscript_is_refused_by_one_sentence(small_model: Any, name: str) -> None:
    for model in (small_model(name), nn.Sequential(small_model(name)), small_model(name, scriptable=True)):
        with pytest.raises(NotImplementedError, match=r'no TorchScript; use torch\.jit\.trace, torch\.export'):
            torch.jit.script(model)


def test_the_call_of_the_official_code_is_told_what_to_write(small_model: Any, images: Tensor) -> None:
    model = small_model()
    for call in (model, model.forward_features):
        with pytest.raises(TypeError, match=re.escape('model(x, img_size=160, keep_rate=0.7)')):
            call(images, 48, 0.6)


# --- compiling ---


@pytest.mark.parametrize('drop_path_rate', [0.0, 0.3])
def test_compiled_blocks_leave_a_model_that_copies_and_pickles(
        small_model: Any,
        images: Tensor,
        drop_path_rate: float,
) -> None:
    torch._dynamo.reset()
    settings = dict(depth=2, drop_layers=(1,), drop_path_rate=drop_path_rate)
    model = small_model(**settings)
    expected = model(images, keep_rate=0.6)
    model.compile(backend='eager')
    model.train()
    model(images, keep_rate=0.6)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.eval()
        torch.testing.assert_close(other(images, keep_rate=0.6), expected, **ROUNDING)
        assert not any('forward' in vars(module) for module in other.modules())
        assert [m.drop_prob for m in other.modules() if isinstance(m, DropPath) and m.drop_prob] == [
            m.drop_prob for m in small_model(**settings).modules() if isinstance(m, DropPath)]


def test_more_subnets_than_torch_compiles_of_others_never_fall_back(images: Tensor) -> None:
    torch._dynamo.reset()
    model = timm.create_model(
        'supervit_digits', img_sizes=(12, 16), drop_layers=(0,), depth=1, embed_dim=8, num_heads=1).eval()
    compiled = torch.compile(model, backend='eager')
    limits = dict(cache_size_limit=2, fail_on_recompile_limit_hit=True)  # it is 8, and then it takes twelve subnets
    with torch._dynamo.config.patch(limits), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for img_size, keep_rate in model.subnets:
            torch.testing.assert_close(
                compiled(images, img_size=img_size, keep_rate=keep_rate),
                model(images, img_size=img_size, keep_rate=keep_rate), **ROUNDING)


# --- tracers and torch.export ---


@pytest.mark.parametrize('training', [False, True])
def test_every_subnet_compiles_to_one_graph(small_model: Any, images: Tensor, training: bool) -> None:
    model = small_model(depth=2, drop_layers=(0,)).train(training)
    subnets = [(64, 0.3), (32, 1.0)]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    for subnet in subnets:
        torch.testing.assert_close(run_subnet(compiled, images, subnet), run_subnet(model, images, subnet), **ROUNDING)
    together = torch.compile(model.forward_subnets, backend='eager', fullgraph=True)
    for output, subnet in zip(together(images, subnets), subnets, strict=True):
        torch.testing.assert_close(output, run_subnet(model, images, subnet), **ROUNDING)


def test_a_compiled_model_follows_the_active_subnet(small_model: Any, images: Tensor) -> None:
    model = small_model(depth=2, drop_layers=(0,))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    compiled(images)
    model.subnet = (32, 0.3)
    torch.testing.assert_close(compiled(images), model(images), **ROUNDING)


@pytest.mark.parametrize('subnet', [(64, 1.0), (48, 0.6)])
def test_a_subnet_exports_with_any_batch_size(small_model: Any, images: Tensor, subnet: tuple[int, float]) -> None:
    model = small_model(img_size=subnet[0], keep_rate=subnet[1])
    batch = torch.export.Dim('batch', min=1, max=1024)  # without a bound torch 2.5 finds fault with the largest integer
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch}, None, None)[:1]).module()
    for size in (1, 2, 5):
        x = torch.randn(size, 3, 64, 64)
        torch.testing.assert_close(program(x), model(x), **ROUNDING)


def test_a_subnet_given_in_the_call_exports(small_model: Any, images: Tensor) -> None:
    model = small_model()
    program = torch.export.export(model, (images,), kwargs=dict(img_size=48, keep_rate=0.3)).module()
    torch.testing.assert_close(
        program(images, img_size=48, keep_rate=0.3), run_subnet(model, images, (48, 0.3)), **ROUNDING)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('subnet', [(64, 1.0), (48, 0.6)])
@pytest.mark.filterwarnings('ignore:The nodes obtained by tracing the model in train mode')
def test_torchvision_extracts_features_of_the_active_subnet(
        small_model: Any,
        images: Tensor,
        subnet: tuple[int, float],
        training: bool,
) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model = small_model(img_size=subnet[0], keep_rate=subnet[1]).train(training)
    options = dict(tracer_kwargs=dict(
        leaf_modules=timm.models.get_notrace_modules(),
        autowrap_functions=timm.models.get_notrace_functions()))
    nodes = get_graph_node_names(model, **options)
    assert 'head' in nodes[0]
    extractor = create_feature_extractor(model, return_nodes=['norm', 'head'], **options)
    features = extractor(images)
    torch.testing.assert_close(features['norm'], model.forward_features(images), **ROUNDING)
    torch.testing.assert_close(features['head'], model(images), **ROUNDING)
    features['head'].sum().backward()
