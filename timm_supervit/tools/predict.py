"""Predictions for any number of images: what they show, how sure that is, and which subnet says so.

Images are numbered in the order of the collection. Of several processes each takes its turn. Predictions are written
in that order as JSON lines, one for each image, so that the complete lines of a killed run say where to go on. A line
names its image and the run that it is of, so that a file of other images, networks or settings is not gone on with.
"""
import contextlib
import functools
import hashlib
import itertools
import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from numbers import Integral
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch.distributed as dist
from filelock import FileLock
from timm.data.dataset import ImageDataset
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset, IterableDataset

from ..cascade import Cascade, probabilities
from ..images.datasets import Images, ReadableImages, create_evaluation_loader, img_mode, preprocessing
from ..images.folders import ending_of, files_in, image_endings, is_special
from ..images.passes import check_finite, count_missing, evaluation_mode, inference
from ..loading.class_names import shown_class_names
from ..programs.program import Program, checksum
from ..results.files import check_output_folder, check_regular, fill_folder, lock_file, unlock_file
from ..results.fingerprint import fingerprint
from ..runner import SubnetRunner, check_predicts
from ..subnets import Size
from . import Progress, silent


class _Share(NamedTuple):
    rank: int
    size: int


class Share(_Share):
    """The part of a collection that one of several processes predicts; valid by being one.

    Attributes:
        rank: Number of the process, from 0.
        size: How many processes there are.

    Raises:
        ValueError: If there is no such process.
    """

    __slots__ = ()

    def __new__(cls, rank: int = 0, size: int = 1) -> 'Share':
        """Check both numbers."""
        if any(isinstance(number, bool) or not isinstance(number, Integral) for number in (rank, size)) \
                or not 0 <= rank < size:
            raise ValueError(
                f'rank {rank!r} of {size!r} processes is none; give whole numbers, the rank from 0 and below the size')
        return super().__new__(cls, int(rank), int(size))


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
        output: File of JSON lines to write to; one of a run that was stopped is continued, and its images that could
            not be read are tried again. Of several processes each has its own, see ``share_path``.
        share: Which of several processes this is.
        batch_size: Images of a batch.
        workers: Processes that read images.
        precision: ``float32``, or ``bfloat16`` or ``float16`` by autocast.
        progress: Follows the batches, such as ``tqdm.tqdm``.

    Raises:
        OSError: If there are no images, the file cannot be written, or another process writes to it.
        RuntimeError: If logits are not finite.
        ValueError: If there is no such subnet, the model has no two classes, or the file holds other predictions.
    """
    check_predicts(model)
    if not isinstance(images, Images):
        images = find_images([images] if isinstance(images, str | os.PathLike) else images)
    network: Any = model.model if isinstance(model, Cascade) else model
    names = shown_class_names(network)
    how: Any = (model.stages, model.thresholds) if isinstance(model, Cascade) else model.subnet
    if subnet is not None:
        how, = model.subnet_macs([subnet])
    log = None
    if output is not None:
        # An int8 file without ranges finds them in each batch, so that an image depends on the others there.
        unit = batch_size if isinstance(network, Program) and network.facts.get('calibrated') is False else 1
        run = digest_run(model, images, how, names, top, precision, share.size, unit)
        log = open_log(share_path(output, share), run, images.dataset, share, unit)
    run_parts = functools.partial(
        _predict_batches, model=model, how=how, images=images, names=names, top=top, batch_size=batch_size,
        workers=workers, precision=precision, progress=progress)
    return Predictions(model, run_parts, images, share, batch_size, log)


class Predictions:
    """Predictions as they come, a row for each image of this process's share, in order.

    A row has the number ``index`` of the image in the collection and its name ``image``, the ``subnet`` that answered,
    and under ``predictions`` the most probable classes, each with ``class``, ``index`` and ``probability``; or under
    ``error`` why it cannot be read. Rows are in the file before they are seen here. They come once.

    Attributes:
        path: The file that they are written to, if any.
        num_resumed: How many images were in it already and are not tried again.
        failed: The names of the images that could not be read, those in the file included.
        num_missing: How many images of a stream were not delivered; known at the end.
    """

    def __init__(
            self,
            model: SubnetRunner,
            run: Callable[[Iterable[Any]], Iterator[list[dict[str, Any]]]],
            images: Images,
            share: Share,
            batch_size: int,
            log: 'Log | None',
    ) -> None:
        self._model, self._run, self._dataset, self._share, self._log = model, run, images.dataset, share, log
        self._batch_size, self._mode = batch_size, img_mode(model, images.img_mode)
        self.path = log.path if log else None
        self.num_resumed = log.done - len(log.again) if log else 0
        self.failed = list(log.failed) if log else []
        self.num_missing = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Predict; where torchrun has started several processes, the end comes when all of them are done."""
        log, share = self._log, self._share
        if log and log.file.closed:
            return
        done = log.done if log else 0
        with evaluation_mode(self._model), contextlib.closing(log) if log else contextlib.nullcontext():
            if log and log.again:
                numbers = [share.rank + place * share.size for place in log.again]
                again = [row for rows in self._run([_part(self._dataset, self._mode, numbers)]) for row in rows]
                log.replace(again)
                self.failed = [row['image'] for row in again if 'error' in row]
                yield from again
            for rows in self._run(_parts(self._dataset, self._mode, share, done, self._batch_size)):
                done += len(rows)
                if log:
                    log.write(rows)
                self.failed += [row['image'] for row in rows if 'error' in row]
                yield from rows
        self.num_missing = count_missing(self._dataset, done, *share)
        _wait_for_others(share.size)


def _predict_batches(
        parts: Iterable[tuple[Any, Sequence[int]]],
        *,
        model: Any,
        how: Any,
        images: Images,
        names: Sequence[str],
        top: int,
        batch_size: int,
        workers: int,
        precision: str,
        progress: Progress,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each batch, see ``Predictions``; ``how`` is the subnet or what a cascade is made of."""
    dataset = images.dataset
    is_stream = isinstance(dataset, IterableDataset)
    for part, numbers in parts:
        # Marks images that it cannot read.
        loader = create_evaluation_loader(
            images._replace(dataset=part), model, batch_size, workers, labeled=False)
        for batch, marks in loader if is_stream else progress(loader, 'Predicting'):
            with inference(model, precision):
                if isinstance(model, Cascade):
                    logits, exits = model(batch, return_exits=True)
                    subnets = [model.stages[stage] for stage in exits.tolist()]
                else:
                    logits, subnets = model(batch, **how._asdict()), [how] * len(batch)
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


class _Files(ReaderImageFolder):
    """Reads image files for timm's data set, without classes."""

    def __init__(self, paths: Sequence[str]) -> None:
        Reader.__init__(self)
        self.samples, self.class_to_idx = [(path, 0) for path in paths], {}

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return os.path.basename(path) if basename else path


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

    What is passed over in folders is no image by its ending; a FIFO, socket or device; or one of the files, ``._NAME``,
    in which macOS keeps what other disks have no place for.

    Args:
        paths: Files and folders. Files may have any name.
    """
    found: dict[str, str] = {}  # by the real folder of a file, and its name there
    endings = image_endings()
    special: list[str] = []
    others: list[str] = []
    for path in (os.fspath(path) for path in paths):
        if not os.path.isdir(path):
            if not os.path.exists(path):
                raise FileNotFoundError(f'{path} does not exist; give image files or folders of them')
            check_regular(path)
            found.setdefault(_real_path(path), path)
            continue
        inside: list[str] = []
        for name in sorted(files_in(path)):
            is_image = ending_of(name) in endings and not os.path.basename(name).startswith('._')
            (special if is_special(name) else inside if is_image else others).append(name)
        if not inside:
            raise FileNotFoundError(
                f'the folder {path} holds no image, by the endings that Pillow reads; give another folder, or files')
        for name in inside:
            found.setdefault(_real_path(name), name)
    # Relative names are of other images in another folder.
    base = None if all(map(os.path.isabs, found.values())) else os.getcwd()
    return Images(ImageDataset('', reader=_Files(list(found.values()))), base, passed_over=special + others)


def _real_path(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def _parts(dataset: Any, mode: str, share: Share, start: int, batch_size: int) -> Iterator[tuple[Any, Sequence[int]]]:
    """Yield data sets whose targets are indices, and the number in the collection that each index has."""
    if not isinstance(dataset, IterableDataset):
        numbers = range(len(dataset))[share.rank::share.size][start:]
        if numbers:
            yield _part(dataset, mode, numbers)
        return
    # A stream can only be read from its start on, by one process; each takes its images and passes over the others.
    stream = itertools.islice(enumerate(dataset), share.rank + start * share.size, None, share.size)
    while batch := list(itertools.islice(stream, batch_size)):
        yield [(image, index) for index, (_, (image, _)) in enumerate(batch)], [number for number, _ in batch]


def _part(dataset: Any, mode: str, numbers: Sequence[int]) -> tuple[_Part, Sequence[int]]:
    return _Part(ReadableImages(dataset, mode), numbers), numbers


def _name(dataset: Any, number: int) -> str:
    return f'image {number}' if isinstance(dataset, IterableDataset) else ReadableImages(dataset).name(number)


def _reason(part: Any, index: int) -> str:
    try:
        part[index]
    except Exception as error:
        return ' '.join(f'{type(error).__name__}: {error}'.split())
    return 'it could not be read at first'


def digest_run(model: Any, images: Images, *settings: Any) -> str:
    """Return a few letters that tell a run from those of other networks, images and settings.

    Where images have no files, by whose names lines tell them apart, it depends on how many there are, and on the first
    and the last.

    Args:
        model: A SuperViT, an exported file, or a cascade of either.
        images: The images.
        settings: What else its lines depend on.
    """
    network = model.model if isinstance(model, Cascade) else model
    what = checksum(network.path) if isinstance(network, Program) else fingerprint(network)
    source = images._replace(
        dataset=None, passed_over=(), data_dir=images.data_dir and os.path.realpath(images.data_dir))
    ends = []
    if not isinstance(images.dataset, IterableDataset) and len(images.dataset):
        readable = ReadableImages(images.dataset)
        if readable.path(0) is None:
            ends = [len(readable), _digest_image(readable, 0), _digest_image(readable, len(readable) - 1)]
    everything = [what, preprocessing(model), img_mode(model, images.img_mode), source, ends, *settings]
    return hashlib.sha256(json.dumps(everything, default=str).encode()).hexdigest()[:12]


def _digest_image(images: ReadableImages, index: int) -> str:
    try:
        return hashlib.sha256(images.read(index)[0].tobytes()).hexdigest()
    except Exception:  # as for an image that cannot be read
        return ''


def share_path(path: str | os.PathLike, share: Share) -> Path:
    """Return the file of one of several processes: PATH, or with its number, as in predictions-0-of-4.jsonl."""
    path = Path(path)
    return path if share.size == 1 else path.with_name(f'{path.stem}-{share.rank}-of-{share.size}{path.suffix}')


class Log:
    """A file of JSON lines that is written to as predictions come.

    Attributes:
        path: Its path.
        file: It, open.
        run: The run that its lines are of.
        done: How many lines were in it when it was opened.
        failed: The names of those of their images that could not be read.
        again: Which of these lines to predict again, counted from 0: those of such images, where they can be read anew.
    """

    def __init__(
            self,
            path: Path,
            file: BinaryIO,
            run: str,
            done: int,
            failed: Sequence[str],
            again: Sequence[int] = (),
            lock: FileLock | None = None,
    ) -> None:
        self.path, self.file, self.run, self.done, self.failed, self.again = path, file, run, done, failed, again
        # Where it is never closed, too, since nothing was iterated over.
        self._unlock = weakref.finalize(self, unlock_file, lock) if lock else lambda: None

    def close(self) -> None:
        """Close the file, and let other processes write to it."""
        self.file.close()
        self._unlock()

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows, all at once."""
        try:
            text = memoryview(b''.join(map(self._line, rows)))
            while text:  # a file without a buffer may take a part
                text = text[self.file.write(text):]
        except OSError as error:
            raise OSError(
                error.errno, f'{error.strerror or error}: {self.path} keeps what was predicted so far; make room and '
                f'call again to go on') from error

    def replace(self, rows: Iterable[dict[str, Any]]) -> None:
        """Put rows in the place of those of the same images, all or none, unless all images still cannot be read."""
        lines = {row['index']: self._line(row) for row in rows if row['image'] not in self.failed or 'error' not in row}
        if not lines:
            return
        path = Path(os.path.realpath(self.path))
        self.file.close()
        with fill_folder(path.parent) as folder, \
                open(path, 'rb') as before, open(folder / path.name, 'wb') as after:
            after.writelines(lines.get(json.loads(line)['index'], line) for line in before)
        self.file = _open_end(path)

    def _line(self, row: dict[str, Any]) -> bytes:
        return json.dumps({**row, 'run': self.run}).encode() + b'\n'


def open_log(path: Path, run: str, dataset: Any, share: Share, unit: int = 1) -> Log:
    """Open a file of JSON lines to go on with, alone; what a kill left of a line is removed.

    Of images that could not be read, those at the end are removed too, and the others are to be predicted again.

    Args:
        path: The file; it and its folder are made if missing.
        run: The run that its lines must be of, from ``digest_run``.
        dataset: The images that they must be of.
        share: Which of several processes writes it.
        unit: How many lines depend on each other, and are predicted again together.
    """
    check_output_folder(path.parent)
    if path.exists() and not path.is_file():
        raise ValueError(f'{path} is no file that can be read again to go on with; give another, or use --json')
    lock = lock_file(Path(os.path.realpath(path)))
    try:
        path.touch()
        ends, failed = _read_log(path, run, dataset, share)
        done, again = len(ends) - 1, set()
        if not isinstance(dataset, IterableDataset):  # of which a part cannot be read again
            total = len(range(len(dataset))[share.rank::share.size])
            while failed.pop(done - 1, None):
                done -= 1
            done = done if done == total else done - done % unit
            again = {line for place in failed for line in range(place - place % unit, place - place % unit + unit)}
            again = {place for place in again if place < done}
        return Log(
            path, _open_end(path, ends[done]), run, done, [failed[place] for place in failed if place < done],
            sorted(again), lock)
    except BaseException:
        unlock_file(lock)
        raise


def _read_log(path: Path, run: str, dataset: Any, share: Share) -> tuple[list[int], dict[int, str]]:
    """Return where in a file of JSON lines each ends, from 0 on, and by their places the images that failed."""
    is_stream = isinstance(dataset, IterableDataset)
    ends, failed = [0], {}
    with open(path, 'rb') as lines:
        for place, line in enumerate(lines):
            number = share.rank + place * share.size
            name = _name(dataset, number) if is_stream or number < len(dataset) else ''
            row, start = _parse(line), json.dumps({'index': number, 'image': name}).encode()[:-1]
            is_torn = not line.endswith(b'\n') and (line.startswith(start) or start.startswith(line))
            if not is_torn and (row.get('run'), row.get('index'), row.get('image')) != (run, number, name):
                raise ValueError(
                    f'{path} holds other predictions from line {place + 1} on: of another network, subnet, --top, '
                    f'preparation of images, number of processes or collection of images; give another --output, or '
                    f'remove the file')
            if is_torn:
                break
            if 'error' in row:
                failed[place] = name
            ends.append(ends[-1] + len(line))
    return ends, failed


def _open_end(path: Path, size: int | None = None) -> BinaryIO:
    """Open a file to write on at its end, or at a size that it is cut to."""
    # Unbuffered, so that nothing is left to be written when a full disk ends the run.
    file = open(path, 'r+b', buffering=0)  # noqa: SIM115, it stays open
    if size is not None:
        file.truncate(size)
    file.seek(0, os.SEEK_END)
    return file


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}
