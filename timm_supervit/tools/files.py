"""Writing files so that a reader sees the old file or the new one, never half of one."""
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ['check_output_folder', 'fill_folder', 'replace_file', 'write_text']


@contextlib.contextmanager
def replace_file(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path in the folder of ``path`` to write to, and put that file in its place at the end.

    If the block raises (a full disk, an interrupt), the temporary file is removed and ``path`` stays as it was.

    Args:
        path: The file to write; its folder is made if missing. Its suffix is that of the temporary file too.

    Raises:
        OSError: If the folder cannot be written to; the message names it.
    """
    path = Path(path)
    check_output_folder(path.parent)
    handle, name = tempfile.mkstemp(prefix=f'.{path.stem}-', suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open('rb') as file:
            os.fsync(file.fileno())  # some file systems report a full disk only here
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that nobody else may read
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f'{error.strerror or error}: {path} was not written and is as it was') from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def fill_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary folder to write to, and move its files to ``folder`` at the end; other files there stay.

    If the block raises, nothing is moved.

    Raises:
        OSError: If the folder cannot be written to; the message names it.
    """
    folder = Path(folder)
    check_output_folder(folder)
    with tempfile.TemporaryDirectory(prefix='.', dir=folder) as temporary:
        yield Path(temporary)
        for path in sorted(Path(temporary).iterdir()):
            os.replace(path, folder / path.name)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8, see ``replace_file``."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding='utf-8')


def check_output_folder(folder: str | os.PathLike) -> None:
    """Make a folder if missing and see whether files can be written to it, before any work is done for it.

    Raises:
        OSError: If it is no folder or cannot be written to; the message names it.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=Path(folder)):
            pass
    except OSError as error:
        raise OSError(
            error.errno, f'cannot write to the folder {str(folder)!r} ({error.strerror}); choose another') from error


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
