"""Images to evaluate on: timm's data sets and loader, with unreadable images marked instead of replaced."""
import contextlib
import copy
import importlib
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageMode
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.data.dataset import ImageDataset
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.datasets import DatasetFolder

from ..results.files import check_regular
from ..results.fingerprint import source_of
from ..runner import SubnetRunner
from .folders import find_unlisted
from .labels import follow_names

DEFAULT_WORKERS = min(4, os.cpu_count() or 1)

IMG_MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}  # of Pillow, by the number of channels

IMG_MODE_NOTE = 'input_img_mode='  # in ``notes`` of pretrained_cfg, where timm keeps text with a model, and the Hub too

_FETCHED = ('hfds', 'hfids', 'tfds')  # kinds whose data sets come from the net unless their name is a path
_PACKAGES = {'hfds': 'datasets', 'hfids': 'datasets', 'tfds': 'tensorflow', 'wds': 'webdataset'}  # that timm reads with
_SPLITS = {'train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test'}


class ReadableImages(Dataset):
    """A data set in which an unreadable image is a black one with the target ``-1 - index``.

    timm's own puts the next image in place of an unreadable one, which would be counted twice and named nowhere.

    Attributes:
        transform: What is done to an image; timm's loader sets it.
    """

    def __init__(self, dataset: Any, mode: str = 'RGB', renumber: Callable[[int], int] | None = None) -> None:
        """Wrap a data set.

        Args:
            dataset: Pairs (image of Pillow's, class) by index, from timm's ``create_dataset`` or one's own.
            mode: Pillow's mode to convert the images to.
            renumber: Returns the class to deliver for one of the data set (default: the same).
        """
        self.dataset = dataset
        self.mode = mode
        self.renumber = renumber
        self.transform: Any = None

    def __len__(self) -> int:
        """Return the number of images, unreadable ones included."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return the transformed image and its class, or the mark of an unreadable one."""
        try:
            image, target = self.read(index)
        except Exception:  # Pillow raises more than OSError: SyntaxError, struct.error, DecompressionBombError, ...
            return self.transform(Image.new(self.mode, (1, 1))), -1 - index
        return self.transform(image), target if self.renumber is None else self.renumber(target)

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
        class_map: The number of each class by its name, where that is given.
        img_mode: Pillow's mode of the images, where that is given.
    """

    dataset: Any
    data_dir: str | None = None
    name: str = ''
    split: str = ''
    passed_over: Sequence[str] = ()
    class_map: Mapping[Any, int] | None = None
    img_mode: str | None = None

    @property
    def info(self) -> dict[str, Any]:
        """Which images they are, for results."""
        return {'data_dir': self.data_dir, 'dataset': self.name, 'split': self.split,
                'passed_over': len(self.passed_over)}


def open_images(images: Any, model: SubnetRunner) -> Images:
    """Return images for a model: those of ``open_dataset``, a folder of them (its split ``validation``), or a data set.

    A function, such as a partial of ``open_dataset``, is called with the model.
    """
    if isinstance(images, Images):
        return images
    if isinstance(images, str | os.PathLike):
        return open_dataset(os.fspath(images), model=model)
    return images(model=model) if callable(images) else Images(images)


def check_data(data_dir: str | None, dataset: str | None) -> None:
    """Check what images are asked for, before anything is loaded; the arguments are as for ``open_dataset``.

    Raises:
        FileNotFoundError: If there is no such folder.
        ModuleNotFoundError: If the package is missing that timm reads data sets of this kind with.
        ValueError: If none are asked for.
    """
    kind, slash, _ = (dataset or '').partition('/')
    if slash and kind.lower() in _PACKAGES:
        importlib.import_module(_PACKAGES[kind.lower()])
    if not dataset and not data_dir:
        raise ValueError('no images: give a folder of them with --data-dir, or a data set with --dataset')
    if dataset == '' and not os.path.exists(str(data_dir)):
        raise FileNotFoundError(f'the folder of images {data_dir!r} does not exist; give another')


def open_dataset(
        data_dir: str | None,
        dataset: str | None = None,
        split: str = 'validation',
        *,
        model: SubnetRunner | None = None,
        class_map: str | None = None,
        input_key: str | None = None,
        target_key: str | None = None,
        input_img_mode: str | None = None,
) -> Images:
    """Return a data set as timm's scripts open it, but with the split that is asked for.

    What is None is as the model's checkpoint says, if it is of ``train.py``, for a data set of the same kind.

    Args:
        data_dir: Folder with a folder of images for each class, or with such folders for each split.
        dataset: Kind and name, as in timm's scripts: ``torch/cifar10``, ``hfds/...``; empty for image folders.
        split: Name of the split.
        model: The model that the images are for.
        class_map: File of the names of the classes, see ``--class-map`` of timm's scripts.
        input_key: Name of the column of the images, or the endings of image files.
        target_key: Name of the column of the classes.
        input_img_mode: Pillow's mode that images are converted to.

    Raises:
        OSError: If there is no such folder or class map.
        ValueError: If the data set cannot be opened.
    """
    trained = (source_of(model).data if model is not None else None) or {}
    given = dataset is not None
    if dataset is None:
        dataset = trained.get('dataset', '')
    kind, _, name = dataset.partition('/')
    if not given and kind.lower() in _FETCHED and not os.path.exists(name):
        raise ValueError(
            f'the model was trained on --dataset {dataset}, which is not fetched unasked; give that, or '
            f'--dataset "" for folders of images')
    check_data(data_dir, dataset)
    if kind.lower() != trained.get('dataset', '').partition('/')[0].lower():
        trained = {}
    is_own_map = class_map is None
    class_map, input_key, target_key = (
        (trained.get(key) if value is None else value) or None
        for key, value in (('class_map', class_map), ('input_key', input_key), ('target_key', target_key)))
    if class_map and os.path.exists(class_map):
        check_regular(class_map)
    if model is not None:
        input_img_mode = img_mode(model, input_img_mode)
    options: dict[str, Any] = dict(input_key=input_key, target_key=target_key)
    options |= dict(input_img_mode=input_img_mode) if input_img_mode else {}
    if class_map and (kind or not is_own_map):  # with it timm passes over folders that the map does not name
        options['class_map'] = class_map
    try:
        opened = create_dataset(dataset, root=data_dir, split=split, **options)
        root = getattr(getattr(opened, 'reader', None), 'root', None) or ''  # where timm looks for a map, too
        classes = load_class_map(class_map, root) if class_map else None
    except (AssertionError, KeyError, RuntimeError, TypeError) as error:  # of timm's, torchvision's or datasets'
        if isinstance(error, RuntimeError) and not (dataset or class_map):  # it says what the folder lacks
            raise
        folders = '' if given or not dataset else '; --dataset "" reads folders of images'
        raise ValueError(
            f'data set {dataset!r} cannot be opened from {data_dir!r} ({type(error).__name__}: {error}); '
            f'check --dataset, --data-dir, --split, --class-map, --input-key and --target-key{folders}') from error
    if not dataset and data_dir and os.path.isdir(data_dir) and opened.reader.root == data_dir:
        # Where there is no such split, timm takes the whole folder, which may be all splits together.
        inside = {entry.name for entry in os.scandir(data_dir) if entry.is_dir()}
        if inside and inside <= _SPLITS:
            raise ValueError(
                f'{data_dir!r} has no split {split!r}, but {", ".join(sorted(inside))}; choose one with --split')
    reader = getattr(opened, 'reader', None)
    passed_over = find_unlisted(reader.root, reader.samples) if isinstance(reader, ReaderImageFolder) else ()
    return Images(opened, data_dir, dataset, split, passed_over, classes, input_img_mode)


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
    config = resolve_data_config({}, pretrained_cfg=model.pretrained_cfg, use_test_size=True)
    config['input_size'] = (model.in_chans, *config['input_size'][1:])
    for key in ('mean', 'std'):
        if len(config[key]) != model.in_chans:
            config[key] = (statistics.fmean(config[key]),) * model.in_chans
    return config


def img_mode(model: SubnetRunner, mode: str | None = None) -> str:
    """Return Pillow's mode that images are converted to for a model.

    Args:
        model: The model, whose ``pretrained_cfg`` may say it in a note, as ``input_img_mode=CMYK``.
        mode: The mode, if it is to be another one.

    Raises:
        ValueError: If the mode has another number of channels than the model, or there is none with so many.
    """
    notes = [note for note in model.pretrained_cfg.get('notes') or () if str(note).startswith(IMG_MODE_NOTE)]
    mode = mode or (notes[-1].removeprefix(IMG_MODE_NOTE) if notes else IMG_MODES.get(model.in_chans))
    if mode is None:
        raise ValueError(
            f'a model of {model.in_chans} channels takes no image files, which have 1 to 4; call it with tensors')
    try:
        channels = len(ImageMode.getmode(mode).bands)
    except KeyError:
        channels = 0
    if channels != model.in_chans:
        raise ValueError(
            f'--input-img-mode {mode} has {channels or "no"} channels, and the model {model.in_chans}; '
            f'give a mode of as many, such as {IMG_MODES.get(model.in_chans, "RGB")}')
    return mode


def create_evaluation_loader(
        images: Any,
        model: SubnetRunner,
        batch_size: int = 256,
        num_workers: int = DEFAULT_WORKERS,
        distributed: bool = False,
        labeled: bool = True,
) -> Any:
    """Return a loader that delivers what timm's ``validate.py`` evaluates a model on.

    Args:
        images: Images of ``open_dataset``, or a data set, of timm's or one's own pairs (image of Pillow's, class).
        model: The model, which says how images are prepared, what its classes are and where the batches go.
        batch_size: Images of a batch.
        num_workers: Processes that read images.
        distributed: Deliver this rank's share only.
        labeled: Deliver the model's classes, see ``follow_names``; else the data set's own, whatever they are.
    """
    images = images if isinstance(images, Images) else Images(images)
    dataset: Any = images.dataset
    renumber = follow_names(dataset, model, images.class_map) if labeled else None
    config = preprocessing(model)
    if not isinstance(dataset, IterableDataset):
        dataset = ReadableImages(dataset, img_mode(model, images.img_mode), renumber)
    elif distributed:
        raise ValueError(
            'a stream of images cannot be shared out exactly between processes; run one process, or use a data set '
            'with random access')
    elif renumber:
        dataset = copy.copy(dataset)
        dataset.target_transform = renumber  # as all of timm's streams have it
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
