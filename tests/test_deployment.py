"""The code in docs/deployment.md, run as it stands there."""
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from timm_supervit import Cascade

DOCUMENT = Path(__file__).parents[1] / 'docs' / 'deployment.md'


@pytest.fixture(scope='module')
def documented(
        exported: Callable[..., Path],
        model_to_export: Callable[..., Any],
        tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Any, dict[str, Any]]:
    """Run the blocks of Python in a folder of the files that they name; return the model and what they define."""
    folder = tmp_path_factory.mktemp('documented')
    shutil.copytree(exported('onnx').parent, folder / 'exported')
    model = model_to_export()
    images = torch.randn(32, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    stages = [(8, 0.5), (16, 0.7), (24, 1.0)]
    with torch.no_grad():  # thresholds that part the images, midway between two of them
        thresholds = [
            logits.softmax(dim=1).amax(dim=1).quantile(0.5).item()
            for logits in model.forward_subnets(images, stages[:2])]
    (folder / 'results').mkdir()
    (folder / 'results' / 'cascade.json').write_text(json.dumps({'stages': stages, 'thresholds': thresholds}))
    blocks = re.findall(r'```python\n(.*?)```', DOCUMENT.read_text(encoding='utf-8'), re.DOTALL)
    defined: dict[str, Any] = {}
    before = os.getcwd()
    os.chdir(folder)
    try:
        for block in blocks:
            defined['images'] = images if 'load_model' in block else images.numpy()
            exec(block, defined)
            defined.setdefault('of_program', defined.get('logits'))
    finally:
        os.chdir(before)
    return model, defined


def test_the_calls_compute_what_the_model_does(documented: tuple[Any, dict[str, Any]]) -> None:
    model, defined = documented
    images = torch.from_numpy(defined['images'])
    with torch.no_grad():
        expected = model(images, img_size=16, keep_rate=0.7)
    np.testing.assert_allclose(defined['run'](defined['images'], 16, 0.7), expected, atol=1e-4)
    np.testing.assert_allclose(defined['of_program'], expected, atol=1e-4)


@pytest.mark.parametrize('size', [(24, 24), (40, 31), (97, 200), (10, 9)])
def test_images_are_prepared_as_timm_prepares_them(
        documented: tuple[Any, dict[str, Any]], tmp_path: Path, size: tuple[int, int]) -> None:
    model, defined = documented
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'image.png')
    transform: Any = create_transform(**resolve_model_data_config(model), is_training=False)
    expected = transform(Image.open(tmp_path / 'image.png'))
    np.testing.assert_allclose(defined['prepare'](tmp_path / 'image.png'), expected, atol=1e-5)


def test_the_cascade_is_the_one_of_the_package(documented: tuple[Any, dict[str, Any]]) -> None:
    model, defined = documented
    content = defined['content']
    cascade = Cascade(model, [tuple(stage) for stage in content['stages']], content['thresholds'])
    with torch.no_grad():
        expected, exits = cascade(torch.from_numpy(defined['images']), return_exits=True)
    assert set(exits.tolist()) == {0, 1, 2}  # or the test would show little
    np.testing.assert_allclose(defined['logits'], expected, atol=1e-4)
