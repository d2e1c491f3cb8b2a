"""Tries random settings and damaged files, beyond what the tests name: ``python tests/fuzz.py --help``.

Each setting is a small network of either backbone that has to keep what any of them keeps:

- a call, the same subnet among others by ``forward_subnets``, and the features behind the last block agree;
- a higher rate and a larger size cost more multiply-accumulates;
- an image gets the same logits alone and in a batch;
- a copy with the same settings takes the weights over and answers the same;
- with all tokens it is the ViT of timm with the same settings (DeiT's backbone).

Each damaged file is refused on every route by one message that names it, and changes nothing. Results, cascades,
manifests, files of predictions and pt2 archives, in which something else stands, are read or refused by one message:
none acts, none takes long and none is a traceback. Exit status 1 if any of it fails; the seed of a line repeats it.
"""
import argparse
import contextlib
import io
import itertools
import json
import logging
import os
import pickle
import random
import re
import signal
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from click.testing import CliRunner
from timm.models import load_checkpoint
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from timm_supervit.cascade import Cascade
from timm_supervit.cli import main as supervit
from timm_supervit.loading.checkpoints import read_checkpoint
from timm_supervit.programs.program import load_program
from timm_supervit.results.fingerprint import fingerprint
from timm_supervit.results.rows import results_of, save_results
from timm_supervit.tools.export import export

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


# --- files with something else in them ---

HOSTILE: list[Any] = [
    10 ** 400, -10 ** 400, 1e308, float('nan'), float('inf'), -1, 0, 10 ** 9, 100_000, None, True, '', 'text',
    'two\nlines', '\x1b[31m', [], {}, [[]], [1, 'a'], {'a': {}}, '__import__("os").mkdir("{mark}")',
    'x = __import__("os").mkdir("{mark}")', 'torch.os.mkdir', 'torch.ops.aten.from_file.default', '../../{mark}',
    'hf-hub:user/name']


def spoil(content: Any, draws: random.Random, mark: Path) -> Any:
    """Return what JSON holds with one to three values in it replaced, removed or under another key."""
    content = {'': content}
    for _ in range(draws.randint(1, 3)):
        place = content
        while True:
            key = draws.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or not place[key]:
                break
            if place is not content and draws.random() < .2:
                break
            place = place[key]
        value = draws.choice(HOSTILE)
        value = value.replace('{mark}', str(mark)) if isinstance(value, str) else value
        if place is not content and isinstance(place, dict) and draws.random() < .2:
            place[str(value)] = place.pop(key)
        elif place is not content and draws.random() < .1:
            del place[key]
        else:
            place[key] = value
        if not isinstance(content[''], dict | list) or not content['']:
            break
    return content['']


def spoil_text(text: bytes, draws: random.Random, mark: Path) -> bytes:
    """Return JSON, or lines of it, with something else in it, or damaged as a file."""
    if draws.random() < .2:
        return draws.choice([lambda: damage(text, draws), lambda: b'[' * 100_000, lambda: b'\xff\xfe' + text])()
    lines = text.splitlines() if text.count(b'}\n{') else [text]
    i = draws.randrange(len(lines))
    lines[i] = json.dumps(spoil(json.loads(lines[i]), draws, mark)).encode()
    return b'\n'.join(lines) + b'\n'


class Acting:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def spoil_archive(content: bytes, draws: random.Random, mark: Path) -> bytes:
    """Return an archive in which an entry is another one, unpickled or of code, or which is damaged as a file."""
    if draws.random() < .2:
        return damage(content, draws)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = draws.choice([*entries, *(name for name in entries if name.endswith('.json'))])
    pickled = io.BytesIO()
    torch.save(((Acting(mark),), {}), pickled)
    if name.endswith('.json') and draws.random() < .9:
        entries[name] = json.dumps(spoil(json.loads(entries[name]), draws, mark)).encode()
    else:
        others = ['data/sample_inputs/model.pt', 'data/constants/opaque_obj_0', 'data/weights/model.pt', 'version',
                  'data/aotinductor/model/model.so', 'data/constants/custom_obj_0']
        name = draws.choice([name, *(f'archive/{other}' for other in others)])
        entries[name] = draws.choice([pickled.getvalue(), pickle.dumps(Acting(mark)), draws.randbytes(50), b''])
    if draws.random() < .1:
        del entries[draws.choice(list(entries))]
    spoiled = io.BytesIO()
    with zipfile.ZipFile(spoiled, 'w', draws.choice([zipfile.ZIP_STORED] * 5 + [zipfile.ZIP_DEFLATED])) as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry)
    return spoiled.getvalue()


def prepare_files(folder: Path) -> dict[str, tuple[Path, Callable[[], str]]]:
    """Write one good file of each kind; return it with a command that reads it, as a function that returns stderr."""
    folder.mkdir()
    settings = dict(img_sizes=[8, 16], depth=1, drop_layers=[0], embed_dim=8, num_heads=1, keep_rates=[0.5, 1.0])
    model: Any = timm.create_model('supervit_digits', **settings).eval()
    checkpoint, images = folder / 'model.pth', folder.parent / 'data'
    args = argparse.Namespace(model='supervit_digits', model_kwargs=settings, num_classes=10)
    torch.save({'state_dict': model.state_dict(), 'args': args}, checkpoint)
    exported = {format: folder / export(model, folder, format)[0]['file'] for format in ('onnx', 'pt2')}
    rows = [{**subnet._asdict(), 'macs': cost, 'top1': 50., 'correct1': 5, 'count': 10}
            for subnet, cost in model.subnet_macs().items()]
    save_results(results_of(model, rows, {'data_dir': 'data'}), folder, 'evaluate')
    cascade = folder / 'cascade.json'
    cascade.write_text(Cascade(model, [(8, 0.5), (16, 1.0)], [0.5]).to_json(fingerprint(model), {'top1': 50.}))
    predictions = folder / 'predictions.jsonl'

    def command(*words: Any) -> Callable[[], str]:
        def run() -> str:
            result = CliRunner().invoke(supervit, [str(word) for word in words])
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise AssertionError(f'traceback in {words[0]}: {result.exception!r}') from result.exception
            assert result.exit_code in (0, 1), result.output
            return result.stderr if result.exit_code else ''

        return run

    def run_archive() -> str:
        path = exported['pt2']
        try:
            program = load_program(path)
        except (OSError, RuntimeError, ValueError) as error:
            return f'Error: {error}'
        with contextlib.suppress(RuntimeError, ValueError):  # of torch, of a graph that fits nothing
            program(torch.zeros(1, 3, 16, 16))
        return ''

    predict = ('predict', checkpoint, images, '-q', '--device', 'cpu')
    command(*predict, '--output', predictions)()
    exported['pt2'].with_name(f'{exported["pt2"].name}.json').unlink()
    return {
        'results': (folder / 'evaluate.json', command('choose', folder / 'evaluate.json')),
        'cascades': (cascade, command(*predict, '--cascade', cascade)),
        'manifests': (folder / f'{exported["onnx"].name}.json', command('predict', exported['onnx'], images, '-q')),
        'prediction files': (predictions, command(*predict, '--output', predictions)),
        'pt2 archives': (exported['pt2'], run_archive),
    }


def check_spoiled_file(seed: int, path: Path, run: Callable[[], str]) -> None:
    draws, content, mark = random.Random(seed), path.read_bytes(), path.parent / 'acted'
    change = spoil_archive if path.suffix == '.pt2' else spoil_text
    path.write_bytes(change(content, draws, mark))
    signal.alarm(30)  # whose handler raises
    try:
        lines = [line for line in run().splitlines() if not re.match(r'W\d', line)]  # notes of torch's
    finally:
        signal.alarm(0)
        path.write_bytes(content)
    if mark.exists():
        mark.rmdir()
        raise AssertionError('it acted')
    assert len(lines) < 2, f'{len(lines)} lines: {lines}'
    assert not lines or path.name.removesuffix('.json') in lines[0], f'the file is not named: {lines[0]}'


def stop(*_: Any) -> None:
    """Raise what no file may take the time for."""
    raise AssertionError('it takes long')


def main() -> int:
    """Run what is asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--settings', type=int, default=500, help='random settings (default: %(default)s)')
    parser.add_argument('--files', type=int, default=200, help='damaged files (default: %(default)s)')
    parser.add_argument('--others', type=int, default=200, help='other files of each kind (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='the first seed (default: %(default)s)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    logging.disable()  # torch logs why it refuses an archive
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
        signal.signal(signal.SIGALRM, stop)
        for kind, (path, run) in prepare_files(folder / 'files').items() if args.others else ():
            kinds.append((kind, args.others, partial(check_spoiled_file, path=path, run=run)))
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
