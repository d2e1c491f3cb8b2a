"""Files in folders: which of them are images by their endings, and which are passed over."""
import os
from collections.abc import Callable, Iterator, Sequence

from PIL import Image
from timm.data.readers import get_img_extensions

# What Pillow opens but does not decode alone: stubs for other programs, films, and what Ghostscript would run.
_NOT_DECODED = {'BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF'}


def image_endings() -> set[str]:
    """Return the endings, in lower case, of the image files that Pillow reads, and of those that timm reads."""
    formats = Image.registered_extensions()
    read = (Image.OPEN.keys() | {'MPO'}) - _NOT_DECODED  # MPO is read as the JPEG that it is
    return {ending.lower() for ending, format in formats.items() if format in read} | get_img_extensions(as_set=True)


def ending_of(path: str) -> str:
    """Return the ending of a file's name in lower case, with its dot; empty where it has none."""
    return os.path.splitext(path)[1].lower()


def is_special(path: str) -> bool:
    """Return whether there is something that is neither a file nor a folder, but a FIFO, a socket or a device."""
    return not os.path.isfile(path) and os.path.exists(path) and not os.path.isdir(path)


def files_in(folder: str, onerror: Callable[[OSError], object] | None = None) -> Iterator[str]:
    """Yield all but the folders in a folder and in those in it, links followed, each folder once.

    Args:
        folder: The folder.
        onerror: What to do about a folder that cannot be read (default: raise).
    """
    def fail(error: OSError) -> None:
        raise error

    seen = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=onerror or fail, followlinks=True):
        for name in folders.copy():
            real = os.path.realpath(os.path.join(parent, name))
            if real in seen:
                folders.remove(name)
            seen.add(real)
        yield from (os.path.join(parent, name) for name in names)


def find_unlisted(folder: str, listed: Sequence[tuple[str, int]]) -> list[str]:
    """Return the images in a folder that timm's reader passes over for their endings, and folders it could not read.

    Args:
        folder: The folder.
        listed: What the reader found: files, with their classes.
    """
    passed_over: list[str] = []
    others = image_endings() - {ending_of(path) for path, _ in listed}
    images = files_in(folder, lambda error: passed_over.append(os.fsdecode(error.filename or folder)))
    passed_over += [path for path in images if ending_of(path) in others]
    return passed_over
