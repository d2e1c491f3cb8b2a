"""transformers reads what timm and this package save: the same logits, and names of classes."""
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from timm_supervit.tools.convert import convert

transformers = pytest.importorskip('transformers')

SMALL = dict(img_sizes=(16, 32), embed_dim=48, depth=4, num_heads=3, drop_layers=(1, 2))
NETWORKS: dict[str, dict[str, Any]] = {
    'a few classes': dict(model_name='supervit_tiny', num_classes=3),
    'all classes': dict(model_name='supervit_tiny'),
    'one number': dict(model_name='supervit_tiny', num_classes=1),
    'another subnet': dict(model_name='supervit_tiny', num_classes=3, img_size=16, keep_rate=0.5),
    'LV-ViT': dict(model_name='supervit_lvvit_tiny', num_classes=3),
    'a backbone': dict(model_name='supervit', backbone='vit_tiny_patch16_224', num_classes=3),
    'a backbone with registers': dict(model_name='supervit', backbone='vit_small_patch14_reg4_dinov2', num_classes=3,
                                      img_sizes=(28, 56)),
    'grey': dict(model_name='supervit_tiny', num_classes=3, in_chans=1),
}
WRITERS: dict[str, Any] = {
    'save_for_hf': lambda model, folder: save_for_hf(model, str(folder), safe_serialization=True),
    'convert': lambda model, folder: convert(model, folder),
}


def create(name: str) -> Any:
    torch.manual_seed(0)
    return timm.create_model(**{**SMALL, **NETWORKS[name]}).eval()


@pytest.mark.parametrize('writer', WRITERS)
@pytest.mark.parametrize('name', NETWORKS)
def test_a_folder_gives_the_same_logits_in_transformers_and_timm(name: str, writer: str, tmp_path: Path) -> None:
    model = create(name)
    WRITERS[writer](model, tmp_path / 'folder')
    images = torch.randn(2, model.in_chans, *model.pretrained_cfg['input_size'][1:])
    other = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'folder').eval()
    again = timm.create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True).eval()
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(other(images).logits, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(again(images), expected, atol=1e-6, rtol=0)
    assert (again.num_classes, again.subnet, again.subnets) == (model.num_classes, model.subnet, model.subnets)


def test_a_pipeline_names_classes_as_the_converted_model_does(tmp_path: Path) -> None:
    model = create('a few classes')
    model.pretrained_cfg['label_names'] = ['ant', 'bee', 'cat']
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([0., 3., 1.]))
    convert(model, tmp_path / 'folder')
    Image.new('RGB', (40, 40), 'red').save(tmp_path / 'photo.png')
    answers = transformers.pipeline('image-classification', model=str(tmp_path / 'folder'))(str(tmp_path / 'photo.png'))
    assert [answer['label'] for answer in answers] == ['bee', 'cat', 'ant']
    transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        shares = model(transform(Image.open(tmp_path / 'photo.png').convert('RGB'))[None]).softmax(dim=1)[0]
    expected = shares.sort(descending=True).values.tolist()
    assert [answer['score'] for answer in answers] == pytest.approx(expected, abs=1e-4)


def test_features_of_a_network_without_classes_are_read(tmp_path: Path) -> None:
    model = timm.create_model('supervit_tiny', num_classes=0, **SMALL).eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        other = transformers.AutoModel.from_pretrained(tmp_path).eval()(images)
        torch.testing.assert_close(other.pooler_output, model(images), atol=1e-6, rtol=0)


def test_timm_reads_folders_that_say_the_number_twice_as_other_models_do(tmp_path: Path) -> None:
    model = create('a few classes')
    save_for_hf(model, str(tmp_path / 'ours'), safe_serialization=True)
    path = tmp_path / 'ours' / 'config.json'
    content = json.loads(path.read_text())
    assert 'num_classes' not in content['model_args']
    content['model_args']['num_classes'] = 3  # as it was written before
    path.write_text(json.dumps(content))
    assert timm.create_model(f'local-dir:{path.parent}', pretrained=True).num_classes == 3
    save_for_hf(timm.create_model('test_vit', num_classes=4), str(tmp_path / 'timm'))
    assert json.loads((tmp_path / 'timm' / 'config.json').read_text())['model_args']['num_classes'] == 4
