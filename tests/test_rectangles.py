"""Image sizes that are not square: the same network as timm's on such images, and every tool on such a grid."""
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from comparing import EXACT
from PIL import Image
from timm.models import save_for_hf

from timm_supervit import SuperViTTask
from timm_supervit.cli import main
from timm_supervit.subnets import Subnet

SIZES = ((32, 16), 32, (64, 32), (48, 64))  # of 2, 4, 8 and 12 patches


@pytest.fixture
def model(small_model: Any) -> Any:
    return small_model(img_sizes=SIZES)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of three images, upright and lying."""
    for i in range(6):
        folder = tmp_path / 'photos' / 'val' / f'class{i % 2}'
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64 + 8 * i, 96 - 8 * i), 60).convert('RGB').save(folder / f'{i}.png')
    return tmp_path / 'photos'


@pytest.fixture
def folder(small_model: Any, tmp_path: Path) -> str:
    """A Hub folder of a network with two classes."""
    save_for_hf(small_model(img_sizes=SIZES, num_classes=2), str(tmp_path / 'network'), safe_serialization=True)
    return f'local-dir:{tmp_path / "network"}'


def run(*args: Any) -> str:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result.stdout


# --- the network ---


@pytest.mark.parametrize('size', [(32, 16), (64, 32), (48, 64)])
def test_full_sizes_are_timms_vit_of_that_size(model: Any, size: tuple[int, int]) -> None:
    plain = timm.create_model(
        'vit_tiny_patch16_224', img_size=size, embed_dim=48, depth=4, num_heads=3, num_classes=10).eval()
    weights = {name: value for name, value in model.state_dict().items() if 'pos_embed' not in name}
    plain.load_state_dict(weights | {'pos_embed': model.pos_embed_list[SIZES.index(size)]})
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(images, img_size=size), plain(images), **EXACT)
        final, maps = model.forward_intermediates(images, img_size=size)
        plain_final, plain_maps = plain.forward_intermediates(images)
    torch.testing.assert_close([final, *maps], [plain_final, *plain_maps], **EXACT)


def test_plain_weights_spread_over_rectangles_as_timm_resizes_them(small_model: Any, tmp_path: Path) -> None:
    settings = dict(embed_dim=48, depth=4, num_heads=3, num_classes=10)
    square = timm.create_model('vit_tiny_patch16_224', img_size=64, **settings)
    torch.nn.init.normal_(square.pos_embed)
    torch.save(square.state_dict(), tmp_path / 'square.pth')
    ours = timm.create_model(
        'supervit_tiny', pretrained=True, img_sizes=SIZES, drop_layers=(1, 2),
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'square.pth'), num_classes=10), **settings).eval()
    images = torch.randn(2, 3, 64, 64)
    for size in SIZES:
        plain = timm.create_model(
            'vit_tiny_patch16_224', pretrained=True, img_size=size,
            pretrained_cfg_overlay=dict(file=str(tmp_path / 'square.pth'), num_classes=10), **settings).eval()
        with torch.no_grad():
            x = torch.nn.functional.interpolate(
                images, plain.patch_embed.img_size, mode='bilinear', align_corners=True)
            torch.testing.assert_close(ours(images, img_size=size), plain(x))


def test_subnets_and_kept_patches_of_every_size(model: Any) -> None:
    images = torch.randn(2, 3, 64, 48)
    subnets = model.subnets
    assert [str(subnet) for subnet in subnets][-1] == '48x64:1'
    with torch.no_grad():
        together = model.forward_subnets(images, subnets)
        for subnet, logits in zip(subnets, together, strict=True):
            torch.testing.assert_close(logits, model(images, **subnet._asdict()), atol=1e-5, rtol=1e-5)
            _, maps = model.forward_intermediates(images, **subnet._asdict())
            rows, cols = model.grid_size(subnet.img_size)
            assert all(dense.shape == (2, 48, rows, cols) for dense in maps)
            for patches in model.kept_patches(images, **subnet._asdict()).values():
                assert patches.max() < rows * cols


def test_a_step_trains_every_size(model: Any) -> None:
    model.train_subnets = 'all'
    task = SuperViTTask(model.train(), torch.nn.CrossEntropyLoss(), verbose=True)
    result = task(torch.randn(2, 3, 48, 64), torch.tensor([1, 2]))
    result['loss'].backward()
    assert {loss.subnet.img_size for loss in result['subnet_losses']} == {*SIZES}
    assert all(parameter.grad is not None for parameter in model.parameters())
    task.log_losses()


def test_set_input_size_takes_a_rectangle(model: Any) -> None:
    images = torch.randn(1, 3, 64, 16)
    before = model(images, img_size=32, keep_rate=1.0)
    model.set_input_size((64, 16))
    assert model.img_sizes == ((32, 16), 32, (64, 16), (64, 32), (48, 64))
    assert model.subnet == Subnet((64, 16), 1.0)
    assert model(images).shape == (1, 10)
    torch.testing.assert_close(model(images, img_size=32, keep_rate=1.0), before, **EXACT)


def test_equal_pairs_and_lists_are_sizes_too(small_model: Any) -> None:
    model = small_model(img_sizes=[[32, 16], (32, 32), [64, 32]], img_size=[64, 32])
    assert model.img_sizes == ((32, 16), 32, (64, 32))
    assert model.subnet.img_size == (64, 32)


@pytest.mark.parametrize('sizes, message', {
    'out of order': (((64, 32), (32, 16)), r'not ascending by area.*use \(\(32, 16\), \(64, 32\)\)'),
    'the height does not fit': (((40, 32), 64), r'40 .* 16; use 32 or 48'),
    'the width does not fit': (((32, 40), 64), r'40 .* 16; use 32 or 48'),
    'three sides': (((32, 32, 3), 64), r'\(32, 32, 3\) is neither'),
    'no side': (((), 64), r'\(\) is neither'),
    'not whole': (((32, 16.5), 64), r'\(32, 16\.5\) is neither'),
    'twice': (((32, 32), 32), r'not ascending by area without repeats; use \(32,\)'),
    'text': (('32x16', 64), "'32x16' is neither"),
}.values())
def test_sizes_that_make_no_grid_are_refused(small_model: Any, sizes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(img_sizes=sizes)


def test_a_hub_folder_gives_the_sizes_back(folder: str, tmp_path: Path) -> None:
    config = json.loads((tmp_path / 'network' / 'config.json').read_text())
    assert config['model_args']['img_sizes'] == [[32, 16], 32, [64, 32], [48, 64]]
    assert config['pretrained_cfg']['input_size'] == [3, 48, 64]
    assert timm.create_model(folder, pretrained=True).img_sizes == SIZES


# --- the tools ---


def test_the_chain_of_commands(folder: str, photos: Path, tmp_path: Path) -> None:
    results = tmp_path / 'results'
    printed = run('evaluate', folder, '--data-dir', photos, '--output', results, '--workers', 0)
    assert printed.count('48x64') == printed.count('32x16') > 0
    written = json.loads((results / 'evaluate.json').read_text())
    assert written['rows'][0]['img_size'] == [32, 16]
    assert '32x16' in (results / 'evaluate.csv').read_text()
    run('profile', folder, '--subnet', '32x16:0.6', '--subnet', '48x64:1', '--rounds', 2, '--output', results)
    chosen = run('choose', results / 'evaluate.json', results / 'profile.json', '--macs', '1e9')
    assert chosen.splitlines()[-1].partition(':')[0] in ('32x16', '32', '64x32', '48x64')
    image = next(photos.rglob('*.png'))
    run('visualize', folder, image, '--subnet', '64x32:0.6', '--output', tmp_path / 'pictures')
    assert (tmp_path / 'pictures' / 'visualize.png').stat().st_size > 0
    assert (results / 'evaluate.png').stat().st_size > 0


@pytest.mark.parametrize('subnet', ['256x128x3:0.5', '256x:0.5', 'x128:0.5', '0x128:0.5'])
def test_a_subnet_that_cannot_be_read_is_a_usage_error(folder: str, subnet: str) -> None:
    result = CliRunner().invoke(main, ['profile', folder, '--subnet', subnet])
    assert result.exit_code == 2
    assert '256x128:0.7' in result.stderr
