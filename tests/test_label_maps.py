"""Labels from label maps see the crop, the flip and the geometry that their image sees."""
import pickle
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import AugMixDataset, FastCollateMixup, ImageDataset, Mixup, create_dataset, create_loader
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from timm.data.transforms_factory import create_transform
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask
from torchvision.transforms import Compose

from timm_supervit import LabelMapDataset

PHOTOS = Path(__file__).parents[2] / 'shared' / 'data' / 'cifar10-subset.tar.gz'
COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))  # of the classes 0 to 3


def write_map(path: Path, scores: torch.Tensor, classes: torch.Tensor) -> None:
    """Write a label map as the published ones are: half precision, [2, 5, 18, 18]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.stack([scores.half(), classes.half()]), path)


@pytest.fixture
def quarters(tmp_path: Path) -> LabelMapDataset:
    """Eight images of another shape each, of four colored quarters that their label maps name."""
    for i in range(8):
        width, height = 40 + 4 * i, 60 - 2 * i
        pixels = np.zeros((height, width, 3), np.uint8)
        classes = torch.arange(5, 10).view(5, 1, 1).repeat(1, 18, 18)
        for color in range(4):
            rows, cols = divmod(color, 2)
            pixels[height // 2 * rows:, width // 2 * cols:] = COLORS[color]
            classes[0, 9 * rows:, 9 * cols:] = color
        path = tmp_path / 'images' / f'class{i % 2}' / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        scores = torch.tensor([20., 1., 1., 1., 1.]).view(5, 1, 1).expand(5, 18, 18)
        write_map(tmp_path / 'maps' / f'class{i % 2}' / f'{i}.pt', scores, classes)
    return LabelMapDataset(ImageDataset(tmp_path / 'images'), tmp_path / 'maps', num_classes=10, grid_size=6)


def load_batch(dataset: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    loader = create_loader(dataset, (3, 48, 48), 8, is_training=True, num_workers=0, device=torch.device('cpu'),
                           mean=(0., 0., 0.), std=(1., 1., 1.), color_jitter=None, **kwargs)
    images, target = next(iter(loader))
    return images, target


@pytest.mark.parametrize('use_prefetcher', [True, False])
@pytest.mark.parametrize('flips', [dict(hflip=0.), dict(hflip=1.), dict(hflip=0.5, vflip=0.5)])
def test_each_patch_has_the_label_of_what_it_shows(
        quarters: LabelMapDataset,
        flips: dict[str, float],
        use_prefetcher: bool,
) -> None:
    random.seed(0)
    compared = 0
    for _ in range(8):
        images, target = load_batch(quarters, scale=(0.1, 1.), use_prefetcher=use_prefetcher, **flips)
        assert target.shape == (8, 10, 2 + 36)
        compared += check_labels(images, target)
    assert compared > 1000  # of 2,304


def check_labels(images: torch.Tensor, target: torch.Tensor) -> int:
    """Compare the labels of all patches of one color with that color; return how many there are."""
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).flatten(4).movedim(1, -1)  # [B, 6, 6, 64, 3]
    distance = (patches.unsqueeze(-2) - torch.tensor(COLORS) / 255).abs().sum(dim=-1)
    shown = distance.argmin(dim=-1)
    plain = (distance.amin(dim=-1) < 0.01).all(dim=-1) & (shown == shown[..., :1]).all(dim=-1)  # of one color
    labels = target[:, :, 2:].argmax(dim=1).unflatten(1, (6, 6))
    assert labels[plain].equal(shown[..., 0][plain])
    return int(plain.sum())


GEOMETRY = ('Rotate', 'ShearX', 'ShearY', 'TranslateXRel', 'TranslateYRel')


def always(*names: str) -> list[AugmentOp]:
    """Return operations that leave black what they uncover."""
    return [AugmentOp(name, prob=1, magnitude=8, hparams=dict(img_mean=(0, 0, 0))) for name in names]


@pytest.mark.parametrize('augment', [
    *(pytest.param(RandAugment(always(name), num_layers=1), id=name) for name in GEOMETRY),
    pytest.param(RandAugment(always(*GEOMETRY), num_layers=2), id='two of them'),
    pytest.param(AutoAugment([always('Rotate', 'TranslateXRel')]), id='AutoAugment'),
])
def test_labels_follow_what_turns_shears_and_shifts_an_image(quarters: LabelMapDataset, augment: Any) -> None:
    random.seed(0)
    np.random.seed(0)
    crop, flip, to_tensor, *_ = create_transform((3, 48, 48), is_training=True, color_jitter=None,
                                                 mean=(0., 0., 0.), std=(1., 1., 1.)).transforms
    quarters.transform = Compose([crop, flip, augment, to_tensor])
    compared = uncovered = alike = 0
    for i in range(96):
        image, target = quarters[i % 8]
        compared += check_labels(image[None], target[None])
        black = image.unfold(1, 8, 8).unfold(2, 8, 8).abs().amax(dim=(0, 3, 4)).flatten() == 0
        uncovered += int(black.sum())
        alike += int((target[:, 2:][:, black].amax(dim=0) < 0.15).sum())  # of ten classes
    assert compared > 1000  # of 3,456
    assert alike >= 0.9 * uncovered > 10  # the rest is half a place beside what the image shows


def test_the_images_are_those_of_the_transform_with_its_crop_last(quarters: LabelMapDataset) -> None:
    transform = create_transform((3, 48, 48), is_training=True, auto_augment='rand-m9-mstd0.5-inc1',
                                 interpolation='random', vflip=0.5, re_prob=0.5)
    crop, hflip, vflip, augment, *to_tensor = transform.transforms
    plain = ImageDataset(quarters.dataset.reader.root, transform=Compose([hflip, vflip, augment, crop, *to_tensor]))
    quarters.transform = transform
    assert quarters.transform is transform
    received = pickle.loads(pickle.dumps(quarters))  # as by a worker that is spawned
    for i in range(8):
        images = []
        for dataset in (quarters, plain, received):
            random.seed(i)
            np.random.seed(i)
            torch.manual_seed(i)
            images.append(dataset[i][0])
        assert images[0].equal(images[1])
        assert images[0].equal(images[2])


@pytest.mark.parametrize('name', ['label_maps/', 'Label_Maps/'])
def test_create_dataset_adds_label_maps_to_the_training_split_alone(
        quarters: LabelMapDataset, name: str, tmp_path: Path) -> None:
    options = dict(root=str(tmp_path), split='images', class_map='', download=False, batch_size=4)
    training = create_dataset(f'{name}{quarters.label_root}', is_training=True, **options)
    assert isinstance(training, LabelMapDataset)
    assert training.num_classes == 2
    assert [training.dataset.filename(i) for i in range(8)] == [quarters.dataset.filename(i) for i in range(8)]
    for other in (
            create_dataset(f'{name}{quarters.label_root}', is_training=False, **options),
            create_dataset('', is_training=True, **options),
    ):
        assert type(other) is ImageDataset
    with pytest.raises(FileNotFoundError, match='no folder of label maps elsewhere'):
        create_dataset(f'{name}elsewhere', is_training=True, **options)


def test_there_is_a_label_for_every_16_pixels_unless_said_otherwise(quarters: LabelMapDataset) -> None:
    quarters.grid_size = None
    images, target = load_batch(quarters)
    assert target.shape == (len(images), 10, 2 + 3 * 3)


def test_ground_truth_and_image_label_come_before_the_patches(quarters: LabelMapDataset) -> None:
    _, target = quarters[5]
    assert target[:, 0].equal(torch.eye(10)[quarters.dataset[5][1]])
    assert target[:, 1].topk(4).indices.sort().values.equal(torch.arange(4))  # the whole image shows four classes
    torch.testing.assert_close(target.sum(dim=0), torch.ones(38))


@pytest.mark.skipif(not PHOTOS.exists(), reason=f'the photographs are not at {PHOTOS}')
def test_labels_follow_the_brightness_of_photographs(tmp_path: Path) -> None:
    with tarfile.open(PHOTOS) as archive:
        members = [member for member in archive if 'train/' in member.name and member.isfile()][:16]
        archive.extractall(tmp_path, members, filter='data')
    dataset = ImageDataset(tmp_path / 'cifar10-subset' / 'train')
    for i in range(len(dataset)):
        gray = dataset[i][0].convert('L').resize((18, 18), Image.Resampling.BOX)
        scores = torch.zeros(5, 18, 18)
        scores[0] = torch.from_numpy(np.array(gray)).float() / 25
        write_map(tmp_path / 'maps' / Path(dataset.filename(i)).with_suffix('.pt'), scores,
                  torch.arange(5).view(5, 1, 1).expand(5, 18, 18))
    labels = LabelMapDataset(dataset, tmp_path / 'maps', num_classes=10)
    loader = create_loader(labels, (3, 224, 224), 16, is_training=True, scale=(0.3, 1.), num_workers=0,
                           mean=(0., 0., 0.), std=(1., 1., 1.), color_jitter=None, device=torch.device('cpu'))
    images, target = next(iter(loader))
    brightness = (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)
    brightness = torch.nn.functional.avg_pool2d(brightness, 16).flatten(1)  # [B, 196]
    scores = target[:, 0, 2:].log() - target[:, 1, 2:].log()
    for one, other in zip(scores, brightness, strict=True):
        assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.95


@pytest.mark.parametrize('settings', [
    dict(is_training=False), dict(is_training=True, no_aug=True), dict(is_training=True, train_crop_mode='rkrc')])
def test_a_transform_that_labels_cannot_follow_is_refused(quarters: LabelMapDataset, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match='random resized crop'):
        create_loader(quarters, (3, 48, 48), 8, num_workers=0, **settings)


def test_augmix_is_refused_since_it_blends_several_moves_of_an_image(quarters: LabelMapDataset) -> None:
    with pytest.raises(ValueError, match='AugMix'):
        create_loader(quarters, (3, 48, 48), 8, num_workers=0, is_training=True, auto_augment='augmix-m5')


@pytest.mark.parametrize('content, message', [
    (torch.zeros(2, 5, 18), r'\(2, 5, 18\)'),
    (torch.zeros(2, 0, 18, 18), r'\(2, 0, 18, 18\)'),
    ([1, 2], 'holds list'),
    (torch.full((2, 5, 18, 18), 10.), 'class 10, beyond num_classes=10'),
    (torch.full((2, 5, 18, 18), -1.), 'class -1, beyond num_classes=10'),
])
def test_a_file_that_holds_no_label_map_is_refused(quarters: LabelMapDataset, content: Any, message: str) -> None:
    torch.save(content, quarters.label_root / 'class0' / '0.pt')
    with pytest.raises(ValueError, match=message):
        quarters[0]


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.path,)


def test_a_label_map_is_never_run_as_code(quarters: LabelMapDataset, tmp_path: Path) -> None:
    torch.save(RunsCode(tmp_path / 'ran'), quarters.label_root / 'class0' / '0.pt')
    with pytest.raises(ValueError, match=r'0\.pt .*weights_only'):
        quarters[0]
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('size', [0, 20, 600, -1])
def test_a_label_map_that_was_cut_short_is_named(quarters: LabelMapDataset, size: int) -> None:
    path = quarters.label_root / 'class0' / '0.pt'
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r'class0/0\.pt cannot be read'):
        quarters[0]


@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
@pytest.mark.parametrize('part', [0, 1])
def test_a_label_map_that_is_not_finite_is_named(quarters: LabelMapDataset, value: float, part: int) -> None:
    path = quarters.label_root / 'class0' / '0.pt'
    label_map = torch.load(path)
    label_map[part, 2, 5, 7] = value
    torch.save(label_map, path)
    with pytest.raises(ValueError, match=r'class0/0\.pt .*not finite'):
        quarters[0]


@pytest.mark.parametrize('how', [dict(mixup_alpha=0.8), dict(mixup_alpha=0., cutmix_alpha=1.), dict(mode='elem')])
def test_mixing_them_is_refused(quarters: LabelMapDataset, how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match='--mixup, --cutmix'):
        load_batch(quarters, collate_fn=FastCollateMixup(num_classes=10, **how))
    images, target = load_batch(quarters, use_prefetcher=False)
    with pytest.raises(ValueError, match='--mixup, --cutmix'):
        Mixup(num_classes=10, **how)(images, target)
    mixed = Mixup(num_classes=10, prob=1., **how)(images, torch.arange(8))[1]  # labels of images are mixed as before
    assert mixed.shape == (8, 10) and mixed.sum(dim=1).allclose(torch.ones(8))


def test_splits_of_a_batch_are_refused(quarters: LabelMapDataset) -> None:
    with pytest.raises(ValueError, match='--aug-splits'):
        load_batch(AugMixDataset(quarters, num_splits=3), num_aug_splits=3, auto_augment='rand-m9')


@pytest.mark.parametrize('name', ['supervit_tiny', 'vit_tiny_patch16_224'])
def test_another_network_than_lvvit_says_that_it_does_not_learn_them(quarters: LabelMapDataset, name: str) -> None:
    settings: dict[str, Any] = dict(img_sizes=(48,), drop_layers=(1,)) if name == 'supervit_tiny' else dict(img_size=48)
    model = timm.create_model(name, num_classes=10, embed_dim=24, depth=2, num_heads=2, **settings)
    for criterion in (torch.nn.CrossEntropyLoss(), LabelSmoothingCrossEntropy(), SoftTargetCrossEntropy()):
        task = ClassificationTask(model, criterion, verbose=False)
        with pytest.raises(ValueError, match=r'supervit_lvvit_.* leave out --dataset label_maps'):
            task(*load_batch(quarters))
