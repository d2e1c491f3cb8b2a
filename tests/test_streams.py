"""Images in WebDataset shards, which can only be read from their start on: each once, and those that are lost told."""
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from timm_supervit.cli import main

pytest.importorskip('webdataset')

NUM_IMAGES = 20


def supervit(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope='module')
def source(tmp_path_factory: Any) -> str:
    torch.manual_seed(0)
    model = timm.create_model('supervit_digits', num_classes=2)
    folder = tmp_path_factory.mktemp('model')
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return f'local-dir:{folder}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of images by class."""
    generator = torch.Generator().manual_seed(1)
    for i in range(NUM_IMAGES):
        path = tmp_path / 'folder' / str(i * 2 // NUM_IMAGES) / f'{i:02d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (24, 24, 3), generator=generator, dtype=torch.uint8).numpy()).save(path)
    return tmp_path / 'folder'


def make_shards(folder: Path, broken: tuple[int, ...] = ()) -> list[Any]:
    """Write the images of a folder to two shards beside it; return the options that open them."""
    shards = folder.with_name('shards')
    shards.mkdir()
    for shard in range(2):
        with tarfile.open(shards / f'images-{shard}.tar', 'w') as tar:
            for i, path in list(enumerate(sorted(folder.rglob('*.png'))))[shard * 10:][:10]:
                content = b'no image' if i in broken else path.read_bytes()
                for ending, data in (('png', content), ('cls', path.parent.name.encode())):
                    info = tarfile.TarInfo(f'{i:02d}.{ending}')
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return ['--dataset', 'wds/images', '--data-dir', shards, '--split', f'images-{{0..1}}.tar|{NUM_IMAGES}']


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shards_give_what_their_images_give_in_a_folder(source: str, folder: Path, tmp_path: Path) -> None:
    shards = make_shards(folder)
    results = []
    for options in (['--data-dir', folder], shards):
        result = supervit('evaluate', source, *options, '--json', '-j', 0, '-b', 8)
        assert result.exit_code == 0, result.output
        results.append(json.loads(result.stdout)['rows'])
    assert results[0] == results[1] and results[0][0]['count'] == NUM_IMAGES

    assert supervit('predict', source, folder, '--output', tmp_path / 'folder.jsonl').exit_code == 0
    assert supervit('predict', source, *shards, '--output', tmp_path / 'shards.jsonl').exit_code == 0
    expected, found = (lines(tmp_path / f'{name}.jsonl') for name in ('folder', 'shards'))
    assert [row['predictions'] for row in found] == [row['predictions'] for row in expected]
    assert [row['image'] for row in found] == [f'image {i}' for i in range(NUM_IMAGES)]

    whole = (tmp_path / 'shards.jsonl').read_bytes()  # what a killed run leaves is gone on with
    (tmp_path / 'shards.jsonl').write_bytes(whole[:len(whole) // 2])
    assert supervit('predict', source, *shards, '--output', tmp_path / 'shards.jsonl').exit_code == 0
    assert (tmp_path / 'shards.jsonl').read_bytes() == whole


def test_images_that_a_stream_passes_over_are_missed(source: str, folder: Path, tmp_path: Path) -> None:
    shards = make_shards(folder, broken=(3, 14))
    output = tmp_path / 'predictions.jsonl'
    for _ in range(2):  # gone on with, too
        result = supervit('predict', source, *shards, '--output', output)
        assert result.exit_code == 1 and '2 images were not delivered' in result.stderr
        assert len(lines(output)) == NUM_IMAGES - 2
    for command in (['evaluate', source], ['cascade', source, '--macs', '3e6']):
        result = supervit(*command, *shards, '-j', 0)
        assert result.exit_code == 1 and '2 of 20 images were not delivered' in result.stderr, result.output
    result = supervit('evaluate', source, *shards, '-j', 0, '--skip-bad-images', '--json')
    assert result.exit_code == 0 and json.loads(result.stdout)['rows'][0]['count'] == NUM_IMAGES - 2
