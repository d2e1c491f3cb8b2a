"""What this package changes in timm, beside what the tests of tasks, training and label maps show."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from timm.data.auto_augment import AugmentOp, auto_augment_transform, rand_augment_transform


def noise(mode: str) -> Image.Image:
    shape = (5, 7) if mode == 'L' else (5, 7, 3)
    return Image.fromarray(np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize('mode', ['L', 'RGB'])
@pytest.mark.parametrize('name, magnitude, bits', [
    *(('Posterize', magnitude, bits) for bits, magnitude in enumerate((0, 2.5, 5, 7.5, 10))),
    *(('PosterizeIncreasing', magnitude, bits) for bits, magnitude in enumerate((10, 7.5, 5, 2.5, 0))),
    *(('PosterizeOriginal', magnitude, bits) for bits, magnitude in enumerate((0, 2.5, 5, 7.5, 10), start=4)),
])
def test_no_bits_are_black_and_more_bits_are_what_pillow_makes_of_them(
        name: str, magnitude: float, bits: int, mode: str) -> None:
    image = noise(mode)
    made = AugmentOp(name, prob=1, magnitude=magnitude)(image)
    expected = Image.new(mode, image.size, 'black') if bits == 0 else ImageOps.posterize(image, bits)
    assert (made.mode, made.size) == (mode, image.size)
    assert made.tobytes() == expected.tobytes()


def test_policies_that_posterize_to_black_run_to_their_end() -> None:
    rand = rand_augment_transform('rand-m10-n15-p1-inc1', dict(img_mean=(0, 0, 0)))
    auto = auto_augment_transform('v0', dict(img_mean=(0, 0, 0)))
    for _ in range(100):
        assert rand(noise('RGB')).size == auto(noise('RGB')).size == (7, 5)


# Knows timm and torch alone, as train.py does.
LOADERS = '''
import json, sys
import torch, numpy as np
{first}
from PIL import Image
from timm.data.auto_augment import AugmentOp, RandAugment


class Data(torch.utils.data.Dataset):

    def __init__(self):
        self.transform = RandAugment([AugmentOp('PosterizeIncreasing', prob=1, magnitude=10)], num_layers=1)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return np.array(self.transform(Image.new('RGB', (2, 3), 'white')))


if __name__ == '__main__':
    print(json.dumps([
        [batch.tolist() for batch in torch.utils.data.DataLoader(
            Data(), batch_size=2, num_workers=1, multiprocessing_context=context)]
        for context in ('fork', 'spawn')]))
'''


@pytest.mark.parametrize('autoload', ['1', pytest.param('0', marks=pytest.mark.slow)])
def test_workers_of_data_loaders_posterize_to_no_bits_too(tmp_path: Path, autoload: str) -> None:
    script = tmp_path / 'script.py'
    script.write_text(LOADERS.format(first='' if autoload == '1' else 'import timm_supervit'))
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': autoload})
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [[np.zeros((2, 3, 2, 3)).tolist()]] * 2
