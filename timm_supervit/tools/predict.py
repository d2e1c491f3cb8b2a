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
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch.distributed as dist
from timm.data.dataset import ImageDataset
from timm.data.readers import get_img_extensions
from timm.data.readers.reader import Reader
from torch.utils.data import Dataset, IterableDataset

from ..cascade import Cascade, probabilities
from ..images.datasets import Images, ReadableImages, create_evaluation_loader
from ..images.passes import check_finite, count_missing, inference
from ..loading.class_names import shown_class_names
from ..programs.program import Program
from ..results.files import check_output_folder
from ..results.fingerprint import fingerprint
from ..runner import SubnetRunner
from ..subnets import Size
from . import Progress, silent


class Share(NamedTuple):
    """The part of a collection that one of several processes predicts.

    Attributes:
        rank: Number of the process, from 0.
        size: How many processes there are.
    """

    rank: int = 0
    size: int = 1


def predict(
        model: SubnetRunner,
        images: Any,
        subnet: tuple[Size, float] | None = None,
        *,
        top: int = 5,
        output: str | os.PathLike | None = None,
        share: Share = Share(),  # noqa: B008, it is a tuple
        batch_size: int = 64,
        workers: int = 0,
        precision: str = 'float32',
        progress: Progress = silent,
) -> 'Predictions':
    """Predict what images show, batch by batch, as the result is iterated over.

    Args:
        model: A SuperViT, an exported file, or a cascade of either.
        images: Files and folders, of which all images count; or the images of ``open_dataset``, whose classes do not
            matter.
        subnet: Pair (img_size, keep_rate) of the subnet to run (default: the active one); none for a cascade.
        top: How many classes to name of each image.
        output: File of JSON lines to write to; one of a run that was stopped is continued. Of several processes each
            has its own, see ``share_path``.
        share: Which of several processes this is.
        batch_size: Images of a batch.
        workers: Processes that read images.
        precision: ``float32``, or ``bfloat16`` or ``float16`` by autocast.
        progress: Follows the batches, such as ``tqdm.tqdm``.

    Raises:
        OSError: If there are no images, or the file cannot be written.
        RuntimeError: If logits are not finite.
        ValueError: If there is no such subnet, or the file holds other predictions.
    """
    if not isinstance(images, Images):
        images = find_images([images] if isinstance(images, str | os.PathLike) else images)
    network: Any = model.model if isinstance(model, Cascade) else model
    names = shown_class_names(network)
    how: Any = (model.stages, model.thresholds) if isinstance(model, Cascade) else model.subnet
    if subnet is not None:
        how, = model.subnet_macs([subnet])
    log = None
    if output is not None:
        run = digest_run(network, how, names, top, precision, share.size)
        log = open_log(share_path(output, share), run, images.dataset, share)
    batches = _predict_batches(
        model, how, images.dataset, names, top, share, log.done if log else 0, batch_size, workers, precision, progress)
    return Predictions(batches, images.dataset, share, log)


class Predictions:
    """Predictions as they come, a row for each image of this process's share, in order.

    A row has the number ``index`` of the image in the collection and its name ``image``, the ``subnet`` that answered,
    and under ``predictions`` the most probable classes, each with ``class``, ``index`` and ``probability``; or under
    ``error`` why it cannot be read. Rows are in the file before they are seen here. They come once.

    Attributes:
        path: The file that they are written to, if any.
        num_resumed: How many images were in it already.
        failed: The names of the images that could not be read, those in the file included.
        num_missing: How many images of a stream were not delivered; known at the end.
    """

    def __init__(self, batches: Iterable[list[dict[str, Any]]], dataset: Any, share: Share, log: 'Log | None') -> None:
        self._batches, self._dataset, self._share, self._log = batches, dataset, share, log
        self.path = log.path if log else None
        self.num_resumed = log.done if log else 0
        self.failed = list(log.failed) if log else []
        self.num_missing = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Predict; where torchrun has started several processes, the end comes when all of them are done."""
        done = self.num_resumed
        with contextlib.closing(self._log.file) if self._log else contextlib.nullcontext():
            for rows in self._batches:
                done += len(rows)
                if self._log:
                    self._log.write(rows)
                self.failed += [row['image'] for row in rows if 'error' in row]
                yield from rows
        self.num_missing = count_missing(self._dataset, done, *self._share)
        _wait_for_others(self._share.size)


def _predict_batches(
        model: Any,
        how: Any,
        dataset: Any,
        names: Sequence[str],
        top: int,
        share: Share,
        start: int,
        batch_size: int,
        workers: int,
        precision: str,
        progress: Progress,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each batch, see ``Predictions``; ``how`` is the subnet or what a cascade is made of."""
    is_stream = isinstance(dataset, IterableDataset)
    for part, numbers in _parts(dataset, share, start, batch_size):
        # Marks images that it cannot read.
        loader = create_evaluation_loader(part, model, batch_size, workers)
        for images, marks in loader if is_stream else progress(loader, 'Predicting'):
            with inference(model, precision):
                if isinstance(model, Cascade):
                    logits, exits = model(images, return_exits=True)
                    subnets = [model.stages[stage] for stage in exits.tolist()]
                else:
                    logits, subnets = model(images, **how._asdict()), [how] * len(images)
            check_finite([logits], subnets[:1])
            best, classes = probabilities(logits).topk(min(top, logits.shape[1]), dim=1)
            rows = []
            for mark, subnet, shares, indices in zip(
                    marks.tolist(), subnets, best.tolist(), classes.tolist(), strict=True):
                index = mark if mark >= 0 else -1 - mark
                row: dict[str, Any] = {'index': numbers[index], 'image': _name(dataset, numbers[index])}
                if mark < 0:
                    row['error'] = _reason(part, index)
                else:
                    row |= {'subnet': str(subnet), 'predictions': [
                        {'class': names[i], 'index': i, 'probability': round(probability, 6)}
                        for probability, i in zip(shares, indices, strict=True)]}
                rows.append(row)
            yield rows


def _wait_for_others(size: int) -> None:
    """Wait for all processes that torchrun has started, since it ends them all when one fails, as this one may do."""
    if size > 1 and 'MASTER_ADDR' in os.environ:
        dist.init_process_group('gloo', timeout=timedelta(days=7))
        dist.barrier()
        dist.destroy_process_group()


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
    """Some images of a collection, each with its index among them for its class."""

    def __init__(self, images: ReadableImages, numbers: Sequence[int]) -> None:
        self.images = images
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images.read(self.numbers[index])[0], index


def find_images(paths: Iterable[str | os.PathLike[str]]) -> Images:
    """Return image files, and all images in folders and in the folders in those, each image once.

    Args:
        paths: Files and folders. Files may have any name.
    """
    found: dict[str, str] = {}  # by the real folder of a file, and its name there
    extensions = get_img_extensions(as_set=True)
    for path in (os.fspath(path) for path in paths):
        if not os.path.isdir(path):
            if not os.path.exists(path):
                raise FileNotFoundError(f'{path} does not exist; give image files or folders of them')
            found.setdefault(_real_path(path), path)
            continue
        inside = sorted(name for name in _files_in(path) if os.path.splitext(name)[1].lower() in extensions)
        if not inside:
            raise FileNotFoundError(
                f'the folder {path} holds no image ({", ".join(sorted(extensions))}); give another folder, or files')
        for name in inside:
            found.setdefault(_real_path(name), name)
    return Images(ImageDataset('', reader=_Files(list(found.values()))))


def _real_path(path: str) -> str:
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


def _parts(dataset: Any, share: Share, start: int, batch_size: int) -> Iterator[tuple[Any, Sequence[int]]]:
    """Yield data sets whose targets are indices, and the number in the collection that each index has."""
    if not isinstance(dataset, IterableDataset):
        numbers = range(len(dataset))[share.rank::share.size][start:]
        if numbers:
            yield _Part(ReadableImages(dataset), numbers), numbers
        return
    # A stream can only be read from its start on, by one process; each takes its images and passes over the others.
    stream = itertools.islice(enumerate(dataset), share.rank + start * share.size, None, share.size)
    while batch := list(itertools.islice(stream, batch_size)):
        yield [(image, index) for index, (_, (image, _)) in enumerate(batch)], [number for number, _ in batch]


def _name(dataset: Any, number: int) -> str:
    return f'image {number}' if isinstance(dataset, IterableDataset) else ReadableImages(dataset).name(number)


def _reason(part: Any, index: int) -> str:
    try:
        part[index]
    except Exception as error:
        return ' '.join(f'{type(error).__name__}: {error}'.split())
    return 'it could not be read at first'


def digest_run(model: Any, *settings: Any) -> str:
    """Return a few letters that tell a run from those of other networks and settings.

    Args:
        model: A SuperViT or an exported file.
        settings: What else its lines depend on.
    """
    what = model.facts if isinstance(model, Program) else fingerprint(model)
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
        """Add rows, all at once."""
        try:
            text = memoryview(b''.join(json.dumps({**row, 'run': self.run}).encode() + b'\n' for row in rows))
            while text:  # a file without a buffer may take a part
                text = text[self.file.write(text):]
        except OSError as error:
            raise OSError(
                error.errno, f'{error.strerror or error}: {self.path} keeps what was predicted so far; make room and '
                f'call again to go on') from error


def open_log(path: Path, run: str, dataset: Any, share: Share) -> Log:
    """Open a file of JSON lines to go on with; what a kill left of a line is removed.

    Args:
        path: The file; it and its folder are made if missing.
        run: The run that its lines must be of, from ``digest_run``.
        dataset: The images that they must be of.
        share: Which of several processes writes it.
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
            failed += [name] if 'error' in row else []
            done, size = done + 1, size + len(line)
    # Unbuffered, so that nothing is left to be written when a full disk ends the run.
    file = open(path, 'r+b', buffering=0)  # noqa: SIM115, it stays open
    file.truncate(size)
    file.seek(size)
    return Log(path, file, run, done, failed)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
