"""Images to evaluate on: timm's data sets and loader, with unreadable images marked instead of replaced."""
import contextlib
import os
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.data.dataset import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.datasets import DatasetFolder

from ..results.files import check_regular
from ..runner import SubnetRunner
from .folders import find_unlisted

DEFAULT_WORKERS = min(4, os.cpu_count() or 1)

_SPLITS = {'train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test'}


class ReadableImages(Dataset):
    """A data set in which an unreadable image is a black one with the target ``-1 - index``.

    timm's own puts the next image in place of an unreadable one, which would be counted twice and named nowhere.

    Attributes:
        transform: What is done to an image; timm's loader sets it.
    """

    def __init__(self, dataset: Any, mode: str = 'RGB') -> None:
        """Wrap a data set.

        Args:
            dataset: Pairs (image of Pillow's, class) by index, from timm's ``create_dataset`` or one's own.
            mode: Pillow's mode to convert the images to.
        """
        self.dataset = dataset
        self.mode = mode
        self.transform: Any = None

    def __len__(self) -> int:
        """Return the number of images, unreadable ones included."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return the transformed image and its class, or the mark of an unreadable one."""
        try:
            image, target = self.read(index)
        except Exception:  # Pillow raises more than OSError: SyntaxError, struct.error, DecompressionBombError, ...
            image, target = Image.new(self.mode, (1, 1)), -1 - index
        return self.transform(image), target

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return an image and its class, or raise what keeps it from being read."""
        if path := self.path(index):
            check_regular(path)
        dataset, index = self._locate(index)
        if not isinstance(dataset, ImageDataset):
            image, target = dataset[index]
            return image.convert(self.mode), target
        content, target, *_ = dataset.reader[index]
        with contextlib.closing(content):
            return Image.open(content).convert(self.mode), target

    def name(self, index: int) -> str:
        """Return the name of an image: its file where it has one."""
        dataset, own_index = self._locate(index)
        name = dataset.filename(own_index, absolute=True) if isinstance(dataset, ImageDataset) else self.path(index)
        return name or f'image {index}'

    def path(self, index: int) -> str | None:
        """Return the file that an image is, or None for one that is in an archive, in memory or elsewhere."""
        dataset, index = self._locate(index)
        source = dataset.reader if isinstance(dataset, ImageDataset) else dataset
        return source.samples[index][0] if isinstance(source, ReaderImageFolder | DatasetFolder) else None

    def _locate(self, index: int) -> tuple[Any, int]:
        """Return the data set that reads an image itself, and its index there."""
        dataset: Any = self.dataset
        while isinstance(dataset, Subset):
            dataset, index = dataset.dataset, dataset.indices[index]
        return dataset, index


class Images(NamedTuple):
    """A data set, and what it was asked for by.

    Attributes:
        dataset: The data set, of timm's ``create_dataset`` or one's own pairs (image of Pillow's, class).
        data_dir: Its folder.
        name: Its kind and name, as in timm's scripts.
        split: Its split.
        passed_over: Files and folders in the folder that are not read.
    """

    dataset: Any
    data_dir: str | None = None
    name: str = ''
    split: str = ''
    passed_over: Sequence[str] = ()

    @property
    def info(self) -> dict[str, Any]:
        """Which images they are, for results."""
        return {'data_dir': self.data_dir, 'dataset': self.name, 'split': self.split,
                'passed_over': len(self.passed_over)}


def open_images(images: Any) -> Images:
    """Return images: those of ``open_dataset``, a folder of them (its split ``validation``), or a data set."""
    if isinstance(images, Images):
        return images
    return open_dataset(os.fspath(images)) if isinstance(images, str | os.PathLike) else Images(images)


def open_dataset(data_dir: str | None, dataset: str = '', split: str = 'validation') -> Images:
    """Return a data set as timm's scripts open it, but with the split that is asked for.

    Args:
        data_dir: Folder with a folder of images for each class, or with such folders for each split.
        dataset: Kind and name, as in timm's scripts: ``torch/cifar10``, ``hfds/...``; empty for image folders.
        split: Name of the split.
    """
    if not dataset and not data_dir:
        raise ValueError('no images: give a folder of them with --data-dir, or a data set with --dataset')
    if not dataset and not os.path.exists(str(data_dir)):
        raise FileNotFoundError(f'the folder of images {data_dir!r} does not exist; give another')
    try:
        opened = create_dataset(dataset, root=data_dir, split=split)
    except (AssertionError, KeyError, TypeError) as error:  # of timm's or torchvision's, for a name, folder or split
        raise ValueError(
            f'data set {dataset!r} cannot be opened from {data_dir!r} ({type(error).__name__}: {error}); '
            f'check --dataset, --data-dir and --split') from error
    if not dataset and data_dir and os.path.isdir(data_dir) and opened.reader.root == data_dir:
        # Where there is no such split, timm takes the whole folder, which may be all splits together.
        inside = {entry.name for entry in os.scandir(data_dir) if entry.is_dir()}
        if inside and inside <= _SPLITS:
            raise ValueError(
                f'{data_dir!r} has no split {split!r}, but {", ".join(sorted(inside))}; choose one with --split')
    reader = getattr(opened, 'reader', None)
    passed_over = find_unlisted(reader.root, reader.samples) if isinstance(reader, ReaderImageFolder) else ()
    return Images(opened, data_dir, dataset, split, passed_over=passed_over)


def count_common(one: Any, other: Any) -> int:
    """Return how many image files are in both of two data sets."""

    def files(dataset: Any) -> set[str]:
        names = dataset.filenames(absolute=True) if isinstance(dataset, ImageDataset) else []
        return {os.path.realpath(name) for name in names if os.path.exists(name)}

    return len(files(one) & files(other))


def preprocessing(model: Any) -> dict[str, Any]:
    """Return how timm's ``validate.py`` prepares images for a model, in as many channels as the model has.

    A model of one channel has ``pretrained_cfg`` of three where it was created with ``in_chans=1``.
    """
    config = resolve_data_config({}, model=model, use_test_size=True)
    config['input_size'] = (model.in_chans, *config['input_size'][1:])
    for key in ('mean', 'std'):
        if len(config[key]) != model.in_chans:
            config[key] = (statistics.fmean(config[key]),) * model.in_chans
    return config


def create_evaluation_loader(
        dataset: Any,
        model: SubnetRunner,
        batch_size: int = 256,
        num_workers: int = DEFAULT_WORKERS,
        distributed: bool = False,
) -> Any:
    """Return a loader that delivers what timm's ``validate.py`` evaluates a model on.

    Args:
        dataset: A data set, of timm's ``create_dataset`` or one's own pairs (image of Pillow's, class).
        model: The model, which says how images are prepared and where the batches go.
        batch_size: Images of a batch.
        num_workers: Processes that read images.
        distributed: Deliver this rank's share only.
    """
    _check_classes(dataset, model)
    config = preprocessing(model)
    if not isinstance(dataset, IterableDataset):
        dataset = ReadableImages(dataset, mode='RGB' if config['input_size'][0] == 3 else 'L')
    elif distributed:
        raise ValueError(
            'a stream of images cannot be shared out exactly between processes; run one process, or use a data set '
            'with random access')
    return create_loader(
        dataset,
        input_size=config['input_size'],
        batch_size=batch_size,
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        crop_pct=config['crop_pct'],
        crop_mode=config['crop_mode'],
        num_workers=num_workers,
        distributed=distributed,
        device=model.device,
        persistent_workers=False,
    )


def _check_classes(dataset: Any, model: Any) -> None:
    classes = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
    classes = getattr(dataset, 'classes', None) if classes is None else classes
    if classes and len(classes) != model.num_classes:  # a stream may not know them
        raise ValueError(
            f'the data set has {len(classes)} classes and the model {model.num_classes}; check the folder, '
            f'or give a checkpoint of {len(classes)} classes, with --num-classes {len(classes)} if it is no one of '
            f'train.py')
