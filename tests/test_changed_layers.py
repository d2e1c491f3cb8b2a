"""Networks whose layers others have replaced or wrapped: what they cost, how they are evaluated and told apart."""
import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import prune

from timm_supervit.results.fingerprint import differing, fingerprint
from timm_supervit.tools.evaluate import evaluate

pytestmark = pytest.mark.filterwarnings('ignore:.*(deprecated|quantization)')


def to_int8(model: Any) -> Any:
    return quantize_dynamic(model, {nn.Linear})


def to_float16(model: Any) -> Any:
    return quantize_dynamic(model, {nn.Linear}, dtype=torch.float16)


def by_quanto(model: Any) -> Any:
    quanto = pytest.importorskip('optimum.quanto')
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def by_torchao(model: Any) -> Any:
    torchao = pytest.importorskip('torchao.quantization')
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def prune_half(model: Any) -> Any:
    prune.l1_unstructured(model.blocks[0].mlp.fc1, 'weight', 0.5)
    return model


def in_place(model: Any) -> Any:
    model.compile(backend='eager')
    return model


CHANGES = {
    'int8': to_int8, 'float16': to_float16, 'quanto': by_quanto, 'torchao': by_torchao, 'pruned': prune_half,
    'compiled': lambda model: torch.compile(model, backend='eager'), 'compiled in place': in_place}


def create(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    settings = dict(img_sizes=(8, 16), patch_size=4, embed_dim=32, depth=3, num_heads=2, drop_layers=(1, 2))
    model: Any = timm.create_model(name, num_classes=2, **settings)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('images')
    generator = torch.Generator().manual_seed(1)
    for i in range(8):
        path = root / f'class{i % 2}' / f'{i}.png'
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy()).save(path)
    return root


@pytest.mark.parametrize('name', ['supervit_digits', 'supervit_lvvit_tiny'])
@pytest.mark.parametrize('change', CHANGES)
def test_it_costs_what_it_did_and_is_evaluated(name: str, change: str, folder: Path) -> None:
    plain = create(name)
    changed = CHANGES[change](create(name))
    assert changed.subnet_macs() == plain.subnet_macs()
    rows = evaluate(changed, folder, batch_size=3, workers=0).rows
    expected = evaluate(plain, folder, workers=0).rows
    assert [row['macs'] for row in rows] == [row['macs'] for row in expected]
    assert all(abs(row['correct1'] - other['correct1']) <= 1 for row, other in zip(rows, expected, strict=True))


@pytest.mark.parametrize('change', CHANGES)
def test_it_is_known_by_its_kind_and_its_weights(change: str) -> None:
    plain, one, same, other = (
        fingerprint(model) for model in (
            create('supervit_digits'), *(CHANGES[change](create('supervit_digits', seed)) for seed in (0, 0, 1))))
    assert differing(one, same) == []
    assert differing(one, other) == ['weights']
    assert differing(one, plain) == ([] if 'compiled' in change else ['modules', 'weights'])


def test_precisions_of_quantized_layers_are_no_one_network() -> None:
    kinds = [fingerprint(change(create('supervit_digits')), weights=False) for change in (to_int8, to_float16)]
    assert differing(*kinds) == ['modules']


def test_the_logits_of_a_quantized_network_are_its_own() -> None:
    model = create('supervit_digits')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quantized = to_int8(copy.deepcopy(model))
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        for subnet, logits in zip(model.subnets, quantized.forward_subnets(images, model.subnets), strict=True):
            alone = model(images, **subnet._asdict())
            assert 0 < (logits - alone).abs().max() < 0.3 * alone.abs().max()
