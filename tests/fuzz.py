"""Tries random settings and damaged files, beyond what the tests name: ``python tests/fuzz.py --help``.

Each setting is a small network of either backbone that has to keep what any of them keeps:

- a call, the same subnet among others by ``forward_subnets``, and the features behind the last block agree;
- a higher rate and a larger size cost more multiply-accumulates;
- an image gets the same logits alone and in a batch;
- a copy with the same settings takes the weights over and answers the same;
- with all tokens it is the ViT of timm with the same settings (DeiT's backbone).

Each damaged file is refused on every route by one message that names it, and changes nothing. Exit status 1 if any
of it fails; the seed of a line repeats it.
"""
import argparse
import itertools
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from click.testing import CliRunner
from timm.models import load_checkpoint
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from timm_supervit.cli import main as supervit
from timm_supervit.loading.checkpoints import read_checkpoint

ROUNDING = dict(atol=1e-9, rtol=1e-7)  # float64


# --- settings ---


def draw_settings(draws: random.Random) -> tuple[str, dict[str, Any]]:
    name = draws.choice(['supervit_tiny', 'supervit_lvvit_small'])
    patch_size = draws.choice([4, 8])
    depth, heads = draws.randint(1, 5), draws.randint(1, 3)
    sides = sorted(draws.sample(range(1, 7), draws.randint(1, 4)))
    settings: dict[str, Any] = dict(
        patch_size=patch_size, img_sizes=[side * patch_size for side in sides], depth=depth, num_heads=heads,
        embed_dim=8 * heads, num_classes=draws.choice([1, 2, 5]),
        keep_rates=sorted({round(draws.uniform(0.01, 1), 3) for _ in range(draws.randint(1, 3))} | {1.0}),
        drop_layers=sorted(draws.sample(range(depth), draws.randint(0, depth))),
        share_prefix=draws.random() < 0.8, reg_tokens=draws.choice([0, 0, 1, 3]), qk_norm=draws.random() < 0.2,
        no_embed_class=draws.random() < 0.2, mlp_ratio=draws.choice([1., 2.5, 4.]))
    if name == 'supervit_tiny':
        settings |= dict(global_pool=draws.choice(['token', 'token', 'avg', 'max', 'avgmax']),
                         init_values=draws.choice([None, 0.1]), pre_norm=draws.random() < 0.2)
    else:
        settings['skip_lam'] = draws.choice([1., 2.])
    return name, settings


def create(name: str, settings: dict[str, Any], seed: int) -> Any:
    torch.manual_seed(seed)
    model = timm.create_model(name, **settings).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # large enough for subnets to differ
    return model


def check_settings(seed: int) -> None:
    draws = random.Random(seed)
    name, settings = draw_settings(draws)
    model = create(name, settings, seed)
    images = torch.randn(3, 3, settings['img_sizes'][-1], settings['img_sizes'][-1], dtype=torch.float64)
    subnets = model.subnets
    order = draws.sample(subnets, len(subnets))
    together = dict(zip(order, model.forward_subnets(images, order), strict=True))
    for subnet in subnets:
        alone = model(images, **subnet._asdict())
        assert alone.isfinite().all()
        torch.testing.assert_close(together[subnet], alone, **ROUNDING)
        final, _ = model.forward_intermediates(images, **subnet._asdict())
        torch.testing.assert_close(model.forward_head(final), alone, **ROUNDING)
        torch.testing.assert_close(model(images[1:2], **subnet._asdict()), alone[1:2], **ROUNDING)
    costs = {subnet: model.macs(subnet) for subnet in subnets}
    for a, b in itertools.combinations(subnets, 2):
        if a.img_size <= b.img_size and a.keep_rate <= b.keep_rate:
            assert costs[a] <= costs[b], (a, b)
    copy = create(name, settings, seed + 1)
    copy.load_state_dict(model.state_dict())
    torch.testing.assert_close(copy(images), model(images), **ROUNDING)
    if name == 'supervit_tiny':
        check_plain(model, images, settings)


def check_plain(model: Any, images: Tensor, settings: dict[str, Any]) -> None:
    """Compare each size with all tokens with timm's ViT."""
    ours = ('img_sizes', 'keep_rates', 'drop_layers', 'share_prefix')
    weights = {name: value for name, value in model.state_dict().items() if 'pos_embed' not in name}
    for i, img_size in enumerate(model.img_sizes):
        plain = VisionTransformer(img_size=img_size, **{k: v for k, v in settings.items() if k not in ours})
        plain.double().eval().load_state_dict(weights | {'pos_embed': model.pos_embed_list[i]})
        resized = nn.functional.interpolate(images, (img_size, img_size), mode='bilinear', align_corners=True)
        torch.testing.assert_close(model(images, img_size=img_size, keep_rate=1.), plain(resized), **ROUNDING)


# --- damaged files ---


def damage(content: bytes, draws: random.Random) -> bytes:
    """Cut a file short, overwrite or remove a part of it, or put something else in its place."""
    start = draws.randrange(len(content))
    length = draws.randint(1, 2000)
    return draws.choice([
        lambda: content[:start],
        lambda: content[:start] + content[start + length:],
        lambda: b'',
        lambda: draws.randbytes(length),
        lambda: b'version https://git-lfs.github.com/spec/v1\noid sha256:' + draws.randbytes(8).hex().encode(),
        lambda: content[-length:],
        lambda: bytes(64) + content[64:],
        lambda: '{"weights": "text"}'.encode(draws.choice(['utf-8', 'utf-16'])),
    ])()


def routes(folder: Path) -> Iterator[tuple[str, Callable[[str], Any]]]:
    """Return each way by which a file is read, as a function that raises where it is refused."""
    def command(*words: str) -> Callable[[str], Any]:
        def run(path: str) -> None:
            arguments = [word.format(path=path, output=folder / 'output') for word in words]
            result = CliRunner().invoke(supervit, arguments)
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise AssertionError(f'traceback in {words[0]}: {result.exception!r}') from result.exception
            if result.exit_code:
                raise ValueError(result.output)
        return run

    yield 'read_checkpoint', read_checkpoint
    yield 'convert', command(
        'convert', '{path}', '--model', 'supervit_digits', '--output', '{output}', '--overwrite')
    yield 'visualize', command(
        'visualize', 'supervit_digits', str(folder / 'image.png'), '--checkpoint', '{path}', '--output', '{output}')
    yield 'export', command(
        'export', 'supervit_digits', '--checkpoint', '{path}', '--format', 'pt2', '--output', '{output}')
    yield 'evaluate', command(
        'evaluate', 'supervit_digits', '--checkpoint', '{path}', '--data-dir', str(folder / 'data'))


def check_damaged_file(seed: int, folder: Path) -> None:
    draws = random.Random(seed)
    model = timm.create_model('supervit_digits')
    path = folder / f'{seed}{draws.choice([".pth", ".safetensors"])}'
    if path.suffix == '.pth':
        torch.save({'state_dict': model.state_dict(), 'epoch': 3}, path)
    else:
        from safetensors.torch import save_file

        save_file(dict(model.state_dict()), path)
    content = path.read_bytes()
    damaged = damage(content, draws)
    if damaged == content:
        return
    path.write_bytes(damaged)
    for route, read in routes(folder):
        try:
            read(str(path))
        except AssertionError:
            raise
        except Exception as error:
            assert path.name in str(error), f'{route} does not name the file: {error}'
        else:
            assert route != 'read_checkpoint' or path.suffix == '.safetensors', f'{route} took a damaged file'
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        load_checkpoint(model, str(path))
    except Exception:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    path.unlink()


def main() -> int:
    """Run what is asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--settings', type=int, default=500, help='random settings (default: %(default)s)')
    parser.add_argument('--files', type=int, default=200, help='damaged files (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='the first seed (default: %(default)s)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        from PIL import Image

        image = Image.new('RGB', (24, 24), 'gray')
        image.save(folder / 'image.png')
        (folder / 'data' / 'validation' / '0').mkdir(parents=True)
        image.save(folder / 'data' / 'validation' / '0' / 'image.png')
        kinds: list[tuple[str, int, Callable[[int], None]]] = [
            ('settings', args.settings, check_settings),
            ('damaged files', args.files, lambda seed: check_damaged_file(seed, folder)),
        ]
        for kind, count, check in kinds:
            faults = 0
            for seed in range(args.seed, args.seed + count):
                try:
                    with torch.no_grad():
                        check(seed)
                except Exception as error:
                    faults += 1
                    print(f'{kind}, --seed {seed}: {type(error).__name__}: {" ".join(str(error).split())[:400]}')
            print(f'{kind}: {count} tried, {faults} failed', flush=True)
            failed += faults
    return int(failed > 0)


if __name__ == '__main__':
    sys.exit(main())
