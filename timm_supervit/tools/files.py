"""Writing files so that a reader sees the old ones or the new ones, never half of one, and nothing else stays.

What is written goes to a hidden folder beside its place first, ``.timm-supervit-*``. The process that writes keeps that
folder locked, so that the next one there can tell those of killed processes and clear them up, where the file system
can lock folders. It holds

- ``new``: the files to come;
- ``old``: what they replace, until all of them are in their places, to be put back if that fails.
"""
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ['TEMPORARY', 'check_output_folder', 'fill_folder', 'replace_file']

TEMPORARY = '.timm-supervit-'  # how the names of the hidden folders begin


@contextlib.contextmanager
def replace_file(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path of the same name to write to, and put that file in its place at the end.

    If the block raises (a full disk, an interrupt), ``path`` stays as it was.

    Args:
        path: The file to write; its folder is made if missing.

    Raises:
        OSError: If the folder cannot be written to; the message names it.
    """
    path = Path(path)
    with fill_folder(path.parent) as folder:
        try:
            yield folder / path.name
        except OSError as error:
            raise OSError(error.errno, f'{error.strerror or error}: {path} was not written and is as it was') from error


@contextlib.contextmanager
def fill_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary folder to write to, and move its files to ``folder`` at the end; other files there stay.

    If the block raises, nothing is moved, and if not all files can be moved, none is. Of two processes that fill one
    folder at once, the files of the later one are there in the end. Files have the permissions of any new file.

    Args:
        folder: The folder to fill; it is made if missing, and may be a mount point or a symbolic link to a folder.

    Raises:
        OSError: If the folder cannot be written to; the message names it.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    check_output_folder(folder)
    try:
        with _temporary_folder(folder) as temporary:
            yield temporary / 'new'
            try:
                _put_in_place(temporary, folder)
            except OSError as error:
                cause = f'{error.strerror or error}{f" ({error.filename})" if error.filename else ""}'
                raise OSError(error.errno, f'{cause}: {folder} was not written to and is as it was') from error
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


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


@contextlib.contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        with _locked(folder) as is_locked:
            if is_locked:
                _clear_up_after_others(folder)
            temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
            stack.enter_context(_locked(temporary))
            stack.callback(_clear_up, temporary, folder)
        (temporary / 'new').mkdir()
        yield temporary


@contextlib.contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Lock a folder as long as the context lasts; yield whether it is, since not every file system can (NFS)."""
    with contextlib.ExitStack() as stack:
        is_locked = False
        if fcntl:
            with contextlib.suppress(OSError):
                handle = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_locked = True
        yield is_locked


def _put_in_place(temporary: Path, folder: Path) -> None:
    new, old = temporary / 'new', temporary / 'old'
    mode = new.stat().st_mode & 0o666  # what the umask leaves; to ask for the umask is to change it for all threads
    names = sorted(path.name for path in new.iterdir())
    for name in names:
        if (new / name).stat().st_mode & 0o777 != mode:
            (new / name).chmod(mode)  # some libraries make files that nobody else may read
        with (new / name).open('rb') as file:
            os.fsync(file.fileno())  # some file systems report a full disk only here
    with _locked(folder) as is_locked:
        if is_locked:
            _clear_up_after_others(folder)
        try:
            old.mkdir()
            for name in names:
                _keep(folder / name, old / name)
                os.replace(new / name, folder / name)
            old.rename(temporary / 'replaced')
        except BaseException:
            _clear_up(temporary, folder)
            raise


def _keep(path: Path, backup: Path) -> None:
    """Keep a file under another name; where there is none, keep a folder in its place, to tell."""
    if not os.path.lexists(path):
        backup.mkdir()
        return
    try:
        os.link(path, backup)
    except OSError:  # no hard links on this file system
        os.replace(shutil.copy2(path, backup.parent.with_name('copy')), backup)


def _clear_up(temporary: Path, folder: Path) -> None:
    """Put back what was to be replaced, and remove a temporary folder; where that fails, the next run tries again."""
    old = temporary / 'old'
    with contextlib.suppress(OSError):
        for backup in list(old.iterdir()) if old.exists() else []:
            if backup.is_dir():
                (folder / backup.name).unlink(missing_ok=True)
            else:
                os.replace(backup, folder / backup.name)
        shutil.rmtree(temporary)


def _clear_up_after_others(folder: Path) -> None:
    """Remove what killed processes of this user left in a folder, which must be locked."""
    for temporary in folder.glob(f'{TEMPORARY}*'):
        with _locked(temporary, wait=False) as is_left, contextlib.suppress(FileNotFoundError):
            if is_left and temporary.lstat().st_uid == os.geteuid():
                _clear_up(temporary, folder)
