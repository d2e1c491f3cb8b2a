"""Writing files so that a reader sees the old ones or the new ones, never half of one, and nothing else stays.

What is written goes to a hidden folder beside its place first. Its process keeps that folder locked, by which the next
one there can tell the folders of killed processes and clear them up. While files are put in their places, the folder
around is locked as well. Where the file system has no locks, all is done without them, and what was killed stays.

Neither here nor where files are read is anything opened that is no file.
"""
import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

TEMPORARY = '.timm-supervit-'  # how the names of the hidden folders begin, and of the files that lock folders


@contextlib.contextmanager
def fill_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary folder to write to, and move its files to ``folder`` at the end; other files there stay.

    If the block raises, nothing is moved, and if not all files can be moved, none is. Of two processes that fill one
    folder at once, the files of the later one are there in the end. Files have the permissions of any new file, and
    may be in sub-folders.

    Args:
        folder: The folder to fill; it is made if missing, and may be a mount point or a symbolic link to a folder.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    check_output_folder(folder)
    try:
        with contextlib.ExitStack() as stack:
            with _alone(folder):
                temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
                stack.callback(_clear_up, temporary, folder)
                stack.callback(_lock(temporary).release)
            (temporary / 'new').mkdir()
            yield temporary / 'new'
            _put_in_place(temporary, folder)
    except OSError as error:
        path = Path(os.path.abspath(str(error.filename or folder)))
        if error.errno is None or not path.is_relative_to(os.path.abspath(folder)):
            raise  # of something that was read
        name = f' ({error.filename})' if error.filename else ''
        raise OSError(error.errno, f'{error.strerror}{name}: {folder} was not written to and is as it was') from error
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # unless it was filled
                folder.rmdir()


def check_regular(path: str | os.PathLike) -> None:
    """Refuse to read or replace a FIFO or a socket, which would be waited for, or a device, which may have no end.

    Raises:
        FileNotFoundError: If there is nothing.
        OSError: If it is neither a file nor a folder.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = 'a FIFO' if stat.S_ISFIFO(mode) else 'a socket' if stat.S_ISSOCK(mode) else 'a device'
        raise OSError(f'{os.fspath(path)} is {kind} and no file; give or put a file there')


def lock_file(path: Path) -> FileLock:
    """Lock a file that is written to for long, until ``unlock_file``, where the file system can.

    Raises:
        OSError: If another process has locked it, or another thread.
    """
    lock = _file_lock(path.parent, path.name)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise OSError(f'{path} is being written to by another process; wait for its end or give another') from error
    except OSError:
        pass  # no locks here
    return lock


def unlock_file(lock: FileLock) -> None:
    """Unlock a file of ``lock_file``; in a forked process, which has no part in the lock, nothing is done."""
    if lock.is_locked:
        _remove_lock(lock)


def check_output_folder(folder: str | os.PathLike) -> None:
    """Make a folder if missing and see whether files can be written to it, before any work is done for it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=Path(folder)).close()
    except OSError as error:
        raise OSError(
            error.errno, f'cannot write to the folder {str(folder)!r} ({error.strerror}); choose another') from error


def _put_in_place(temporary: Path, folder: Path) -> None:
    new, backup = temporary / 'new', temporary / 'backup'
    mode = new.stat().st_mode & 0o666  # what the umask leaves; to ask for the umask is to change it for all threads
    names = _list_files(new)
    for name in names:
        with contextlib.suppress(OSError):  # some file systems have no permissions
            (new / name).chmod(mode)  # some libraries make files that nobody else may read
        with (new / name).open('rb+') as content:
            os.fsync(content.fileno())  # some file systems report a full disk only here
    with _alone(folder):
        for name in names:
            is_there = os.path.lexists(folder / name)
            copy = backup / ('replaced' if is_there else 'added') / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if is_there:
                if not (folder / name).is_symlink():
                    check_regular(folder / name)
                shutil.copy2(folder / name, copy, follow_symlinks=False)
            else:
                copy.touch()
        try:
            backup.rename(temporary / 'old')  # all of them are put back if it ends before this name is gone
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(new / name, folder / name)
            (temporary / 'old').rename(backup)
        except BaseException:
            _clear_up(temporary, folder)
            raise


def _list_files(folder: Path) -> list[Path]:
    """Return the files in a folder and in those in it, relative to it."""
    return sorted(path.relative_to(folder) for path in folder.rglob('*') if path.is_symlink() or not path.is_dir())


def _clear_up(temporary: Path, folder: Path) -> None:
    """Put back what was to be replaced, and remove a temporary folder; where that fails, the next run tries again."""
    old = temporary / 'old'
    with contextlib.suppress(OSError):
        for name in _list_files(old / 'added'):
            (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                for parent in list(name.parents)[:-1]:
                    (folder / parent).rmdir()  # where this made it
        for name in _list_files(old / 'replaced'):
            os.replace(old / 'replaced' / name, folder / name)
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let no other process put files in a folder while the context lasts, and clear up after killed ones first."""
    lock = _lock(folder)
    try:
        for temporary in folder.glob(f'{TEMPORARY}*') if lock.is_locked else []:
            with contextlib.suppress(OSError):
                is_own = temporary.lstat().st_uid == getattr(os, 'geteuid', int)()  # on Windows, all are of user 0
                if is_own and temporary.is_dir() and (left := _lock(temporary, wait=False)).is_locked:
                    left.release()  # Windows removes no open files
                    _clear_up(temporary, folder)
        yield
    finally:
        _remove_lock(lock)


def _lock(folder: Path, wait: bool = True) -> FileLock:
    """Lock a folder, if the file system can and, without waiting, if nobody else does."""
    lock = _file_lock(folder)
    with contextlib.suppress(OSError):
        lock.acquire(blocking=wait)
    return lock


def _file_lock(folder: Path, name: str = '') -> FileLock:
    # Other users may have to lock the file too; and a soft lock would stay for ever if its process is killed.
    return FileLock(folder / f'{TEMPORARY}{name}lock', mode=0o666, fallback_to_soft=False)


def _remove_lock(lock: FileLock) -> None:
    with contextlib.suppress(OSError):
        os.unlink(lock.lock_file)  # while it is locked, or two could hold it; on Windows, the release does it
    lock.release()
