"""Predictions for any number of images: what they show, how sure that is, and which subnet says so.

Images are numbered in the order of the collection. Of several processes each takes its turn. Predictions are written
in that order as JSON lines, one for each image, so that the complete lines of a killed run say where to go on. A line
names its image and the run that it is of, so that a file of other images or networks is not gone on with.
"""
import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from timm.data.dataset import ImageDataset
from timm.data.readers import get_img_extensions
from timm.data.readers.reader import Reader
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ..cascade import Cascade, check_stages, check_thresholds, probabilities, read_cascade, run_stages
from ..fingerprint import fingerprint
from ..models.supervit import SuperVisionTransformer
from ..subnets import Subnet
from .data import ReadableImages, create_evaluation_loader
from .evaluate import check_finite
from .files import check_output_folder
from .program import Program
from .progress import Progress, silent

__all__ = [
    'Classifier',
    'Log',
    'Share',
    'digest_run',
    'open_images',
    'open_log',
    'predict',
    'read_program_cascade',
    'run_cascade',
    'run_program_cascade',
    'run_subnet',
    'share_path',
]

# Takes images [B, C, H, W] and returns their logits [B, classes] and the subnet that each is from.
Classifier = Callable[[Tensor], tuple[Tensor, Sequence[Subnet]]]


class Share(NamedTuple):
    """The part of a collection that one of several processes predicts.

    Attributes:
        rank: Number of the process, from 0.
        size: How many processes there are.
    """

    rank: int = 0
    size: int = 1


class _Files(Reader):
    """Reads image files for timm's data set, without classes."""

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__()
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return open(self.paths[index], 'rb'), 0

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return os.path.basename(self.paths[index]) if basename else self.paths[index]


class _Part(Dataset):
    """Some images of a collection, each with its place among them for its class."""

    def __init__(self, images: ReadableImages, places: Sequence[int]) -> None:
        self.images = images
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images.read(self.places[index])[0], index


def open_images(paths: Iterable[str | os.PathLike[str]]) -> ImageDataset:
    """Return a data set of files and of all images in folders and the folders in them, each image once.

    Args:
        paths: Files and folders. Files may have any name.

    Raises:
        FileNotFoundError: If a folder holds no image, or there is no such path.
        PermissionError: If a folder may not be read.
    """
    found: dict[str, str] = {}  # by the real folder of a file, and its name there
    extensions = get_img_extensions(as_set=True)
    for path in (os.fspath(path) for path in paths):
        if not os.path.isdir(path):
            if not os.path.exists(path):
                raise FileNotFoundError(f'{path} does not exist; give image files or folders of them')
            found.setdefault(_place(path), path)
            continue
        inside = sorted(name for name in _files_in(path) if os.path.splitext(name)[1].lower() in extensions)
        if not inside:
            raise FileNotFoundError(
                f'the folder {path} holds no image ({", ".join(sorted(extensions))}); give another folder, or files')
        for name in inside:
            found.setdefault(_place(name), name)
    return ImageDataset('', reader=_Files(list(found.values())))


def _place(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def _files_in(folder: str) -> Iterator[str]:
    """Yield the files in a folder and in those in it, links followed, each folder once."""

    def fail(error: OSError) -> None:
        raise error

    seen = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        for name in folders.copy():
            real = os.path.realpath(os.path.join(parent, name))
            if real in seen:
                folders.remove(name)
            seen.add(real)
        yield from (os.path.join(parent, name) for name in names)


def run_subnet(network: Any, subnet: Subnet) -> Classifier:
    """Return a classifier that runs one subnet of a network."""
    def classify(images: Tensor) -> tuple[Tensor, Sequence[Subnet]]:
        return network(images, img_size=subnet.img_size, keep_rate=subnet.keep_rate), [subnet] * len(images)

    return classify


def read_program_cascade(program: Program, path: str | os.PathLike) -> tuple[tuple[Subnet, ...], tuple[float, ...]]:
    """Return the stages and thresholds of a file of ``supervit cascade`` for an exported elastic file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no cascade that the exported file can run.
    """
    stages, thresholds = read_cascade(path, program.network)
    costs = {subnet: program.macs(subnet) for subnet in program.subnets}
    try:
        checked = check_stages(stages, program.img_sizes, costs.get)
        return checked, check_thresholds(thresholds, len(checked))
    except ValueError as error:
        raise ValueError(f'{os.fspath(path)}: {error}') from error


def run_program_cascade(program: Program, stages: Sequence[Subnet], thresholds: Sequence[float]) -> Classifier:
    """Return a classifier that runs a cascade of an exported elastic file, in which each stage starts over."""

    def run_stage(stage: int, images: Tensor, _: Any) -> Tensor:
        return program(images, *stages[stage]).to(images.device)

    def classify(images: Tensor) -> tuple[Tensor, Sequence[Subnet]]:
        logits, exits = run_stages(images, thresholds, run_stage)
        return logits, [stages[stage] for stage in exits.tolist()]

    return classify


def run_cascade(cascade: Cascade) -> Classifier:
    """Return a classifier that runs a cascade."""
    def classify(images: Tensor) -> tuple[Tensor, Sequence[Subnet]]:
        logits, exits = cascade(images, return_exits=True)
        return logits, [cascade.stages[stage] for stage in exits.tolist()]

    return classify


def predict(
        classify: Classifier,
        network: Any,
        dataset: Any,
        names: Sequence[str],
        *,
        top: int = 5,
        share: Share = Share(),  # noqa: B008, it is a tuple
        start: int = 0,
        batch_size: int = 64,
        num_workers: int = 0,
        device: Any = 'cpu',
        amp_dtype: torch.dtype | None = None,
        progress: Progress = silent,
) -> Iterator[list[dict[str, Any]]]:
    """Predict what images show, batch by batch.

    Args:
        classify: What classifies a batch.
        network: The network, whose ``pretrained_cfg`` says how images are prepared.
        dataset: A data set, from ``open_images`` or ``open_dataset``; its classes do not matter.
        names: Names of the classes.
        top: How many classes to name of each image.
        share: Which of several processes this is.
        start: How many images of its share are done.
        batch_size: Images of a batch.
        num_workers: Processes that read images.
        device: Where the batches go.
        amp_dtype: Run in mixed precision with this dtype.
        progress: Follows the batches, such as ``tqdm.tqdm``.

    Yields:
        A row for each image of a batch, in order: its number ``index`` in the collection and its name ``image``, the
        ``subnet`` that answered, and under ``predictions`` the most probable classes, each with ``class``, ``index``
        and ``probability``; or under ``error`` why it cannot be read.

    Raises:
        RuntimeError: If logits are not finite.
    """
    device = torch.device(device)
    for part, numbers in _parts(dataset, share, start, batch_size):
        # Marks images that it cannot read.
        loader = create_evaluation_loader(part, network, batch_size, num_workers, device)
        for images, marks in loader if isinstance(dataset, IterableDataset) else progress(loader, 'Predicting'):
            with torch.inference_mode(), torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                logits, subnets = classify(images)
            check_finite([logits], subnets[:1])
            best, classes = probabilities(logits).topk(min(top, logits.shape[1]), dim=1)
            rows = []
            for mark, subnet, shares, indices in zip(
                    marks.tolist(), subnets, best.tolist(), classes.tolist(), strict=True):
                place = mark if mark >= 0 else -1 - mark
                row: dict[str, Any] = {'index': numbers[place], 'image': _name(dataset, numbers[place])}
                if mark < 0:
                    row['error'] = _reason(part, place)
                else:
                    row |= {'subnet': str(subnet), 'predictions': [
                        {'class': names[index], 'index': index, 'probability': round(probability, 6)}
                        for probability, index in zip(shares, indices, strict=True)]}
                rows.append(row)
            yield rows


def _parts(dataset: Any, share: Share, start: int, batch_size: int) -> Iterator[tuple[Any, Sequence[int]]]:
    """Yield data sets whose targets are places, and the number in the collection that each place has."""
    if not isinstance(dataset, IterableDataset):
        numbers = range(len(dataset))[share.rank::share.size][start:]
        if numbers:
            yield _Part(ReadableImages(dataset), numbers), numbers
        return
    # A stream can only be read from its start on, by one process; each takes its images and passes over the others.
    stream = itertools.islice(enumerate(dataset), share.rank + start * share.size, None, share.size)
    while batch := list(itertools.islice(stream, batch_size)):
        yield [(image, place) for place, (_, (image, _)) in enumerate(batch)], [number for number, _ in batch]


def _name(dataset: Any, number: int) -> str:
    return f'image {number}' if isinstance(dataset, IterableDataset) else ReadableImages(dataset).name(number)


def _reason(part: Any, place: int) -> str:
    try:
        part[place]
    except Exception as error:
        return ' '.join(f'{type(error).__name__}: {error}'.split())
    return 'it could not be read at first'


def digest_run(network: SuperVisionTransformer | Program, *settings: Any) -> str:
    """Return a few letters that tell a run from those of other networks and settings.

    Args:
        network: A SuperViT, or an exported one.
        settings: What else its lines depend on.
    """
    what = fingerprint(network) if isinstance(network, SuperVisionTransformer) else network.facts
    return hashlib.sha256(json.dumps([what, *settings], default=str).encode()).hexdigest()[:12]


def share_path(path: str | os.PathLike, share: Share) -> Path:
    """Return the file of one of several processes: PATH, or with its number, as in predictions-0-of-4.jsonl."""
    path = Path(path)
    return path if share.size == 1 else path.with_name(f'{path.stem}-{share.rank}-of-{share.size}{path.suffix}')


class Log(NamedTuple):
    """A file of JSON lines that is written to as predictions come.

    Attributes:
        path: Its path.
        file: It, open.
        run: The run that its lines are of.
        done: How many images were in it when it was opened.
        failed: The names of those of them that could not be read.
    """

    path: Path
    file: BinaryIO
    run: str
    done: int
    failed: list[str]

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows, all at once.

        Raises:
            OSError: If they cannot be written; the message says how to go on.
        """
        try:
            text = memoryview(b''.join(json.dumps({**row, 'run': self.run}).encode() + b'\n' for row in rows))
            while text:  # a file without a buffer may take a part
                text = text[self.file.write(text):]
        except OSError as error:
            raise OSError(
                error.errno, f'{error.strerror or error}: {self.path} keeps what was predicted so far; make room and '
                f'call again to go on') from error


@contextlib.contextmanager
def open_log(path: Path, run: str, dataset: Any, share: Share) -> Iterator[Log]:
    """Open a file of JSON lines to go on with; what a kill left of a line is removed.

    Args:
        path: The file; it and its folder are made if missing.
        run: The run that its lines must be of, from ``digest_run``.
        dataset: The images that they must be of.
        share: Which of several processes writes it.

    Raises:
        OSError: If it cannot be written.
        ValueError: If it holds anything else, which stays as it is, or is no regular file.
    """
    check_output_folder(path.parent)
    is_stream = isinstance(dataset, IterableDataset)
    done, size, failed = 0, 0, []
    path.touch()
    if not path.is_file():
        raise ValueError(f'{path} is no file that can be read again to go on with; give another, or use --json')
    with open(path, 'rb') as lines:
        for line in lines:
            number = share.rank + done * share.size
            name = _name(dataset, number) if is_stream or number < len(dataset) else ''
            row, start = _parse(line), json.dumps({'index': number, 'image': name}).encode()[:-1]
            is_torn = not line.endswith(b'\n') and (line.startswith(start) or start.startswith(line))
            if not is_torn and (row.get('run'), row.get('index'), row.get('image')) != (run, number, name):
                raise ValueError(
                    f'{path} holds other predictions from line {done + 1} on: of another network, subnet, --top, '
                    f'number of processes or collection of images; give another --output, or remove the file')
            if is_torn:
                break
            failed += [name] * ('error' in row)
            done, size = done + 1, size + len(line)
    # Unbuffered, so that nothing is left to be written when a full disk ends the run.
    with open(path, 'r+b', buffering=0) as file:
        file.truncate(size)
        file.seek(size)
        yield Log(path, file, run, done, failed)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
