"""Writing files: the old ones or the new ones and nothing else, whatever happens and whoever else writes there."""
import errno
import fcntl
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time

import pytest
from click.testing import CliRunner

from timm_supervit.cli import main
from timm_supervit.results import files
from timm_supervit.results.files import fill_folder

NAMES = ('a.txt', 'b.txt', 'c.txt')


def write_text(path, text):
    with fill_folder(path.parent) as folder:
        (folder / path.name).write_text(text)


def fill(folder, content, names=NAMES):
    with fill_folder(folder) as new:
        for name in names:
            (new / name).write_text(content)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def run(code, *arguments, **kwargs):
    # In a process of its own, with nothing imported but the module.
    lines = [
        'import os, signal, sys, time',
        'from timm_supervit.results import files',
        'from timm_supervit.results.files import fill_folder',
        'folder = sys.argv[1]',
        'def fill(content, names=("a.txt", "b.txt", "c.txt")):',
        '    with fill_folder(folder) as new:',
        '        for name in names:',
        '            (new / name).write_text(content)',
        code,
    ]
    return subprocess.Popen(
        [sys.executable, '-c', '\n'.join(lines), *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **kwargs)


# Permissions


@pytest.mark.parametrize('umask', [0o022, 0o002, 0o077, 0o000, 0o027])
def test_files_have_the_permissions_that_the_umask_says(tmp_path, umask):
    old = os.umask(umask)
    try:
        write_text(tmp_path / 'a', 'text')
        with fill_folder(tmp_path / 'folder') as new:
            os.close(os.open(new / 'b', os.O_CREAT | os.O_WRONLY, 0o600))  # as the safetensors library does
            os.close(os.open(new / 'c', os.O_CREAT | os.O_WRONLY, 0o777))
    finally:
        os.umask(old)
    written = [tmp_path / 'a', tmp_path / 'folder' / 'b', tmp_path / 'folder' / 'c']
    assert [stat.S_IMODE(path.stat().st_mode) for path in written] == [0o666 & ~umask] * 3


def test_the_umask_of_other_threads_is_left_alone(tmp_path, monkeypatch):
    def umask(mask):
        raise AssertionError('the umask was changed')

    monkeypatch.setattr(os, 'umask', umask)
    write_text(tmp_path / 'a', 'text')
    fill(tmp_path, 'new')


# Failures


def fail(at, error, function):
    """Return a function that does as ``function`` but raises an error the ``at``-th time, from 1 on."""
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == at:
            raise error
        return function(*args, **kwargs)

    return failing


def refuse(code):
    def refusing(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return refusing


@pytest.mark.parametrize('error', [OSError(errno.EIO, 'Input/output error'), KeyboardInterrupt()])
@pytest.mark.parametrize('at', [1, 2, 3])
def test_if_not_all_files_can_be_put_in_their_places_none_is(tmp_path, monkeypatch, at, error):
    (tmp_path / 'a.txt').write_text('old')
    (tmp_path / 'c.txt').write_text('old')
    monkeypatch.setattr(os, 'link', refuse(errno.EPERM))  # as where there are no hard links
    monkeypatch.setattr(os, 'replace', fail(at, error, os.replace))
    with pytest.raises(type(error)):
        fill(tmp_path, 'new')
    assert contents(tmp_path) == {'a.txt': 'old', 'c.txt': 'old'}
    fill(tmp_path, 'new')
    assert contents(tmp_path) == dict.fromkeys(NAMES, 'new')


def test_a_folder_in_the_place_of_a_file_is_not_replaced(tmp_path):
    (tmp_path / 'a.txt').write_text('old')
    (tmp_path / 'b.txt').mkdir()
    with pytest.raises(OSError, match=r'b\.txt\): .* was not written to and is as it was'):
        fill(tmp_path, 'new')
    assert {path.name for path in tmp_path.iterdir()} == {'a.txt', 'b.txt'}
    assert (tmp_path / 'a.txt').read_text() == 'old'


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path, monkeypatch):
    with pytest.raises(ZeroDivisionError), fill_folder(tmp_path / 'made'):
        raise ZeroDivisionError
    monkeypatch.setattr(tempfile, 'mkdtemp', refuse(errno.ENOSPC))
    with pytest.raises(OSError, match='No space left'):
        fill(tmp_path / 'made', 'new')
    assert list(tmp_path.iterdir()) == []


# Killed processes


KILLED_AT = """
def kill(function):
    def killing(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return killing
for line in sys.stdin:
    left, folder = int(line), f"{sys.argv[1]}/{line.strip()}"
    child = os.fork()
    if not child:
        for name in ("open", "sendfile", "chmod", "link", "replace", "rename", "rmdir", "unlink", "mkdir"):
            setattr(os, name, kill(getattr(os, name)))
        fill("new")
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_a_process_killed_at_any_step_leaves_the_old_files_or_the_new_ones_to_the_next_run(tmp_path):
    forks = run(KILLED_AT, tmp_path)
    seen = []
    for steps in range(100):
        folder = tmp_path / str(steps)
        fill(folder, 'old', NAMES[:2])
        forks.stdin.write(f'{steps}\n')
        forks.stdin.flush()
        status = int(forks.stdout.readline())
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        for name in NAMES[:2]:
            assert (folder / name).read_text() in ('old', 'new')  # there and whole at any time
        write_text(folder / 'next', 'run')
        found = contents(folder)
        assert found in (
            {'a.txt': 'old', 'b.txt': 'old', 'next': 'run'}, {**dict.fromkeys(NAMES, 'new'), 'next': 'run'})
        seen.append(found['a.txt'])
    forks.communicate()
    assert status == 0 and len(seen) > 12
    assert seen == sorted(seen, reverse=True) and set(seen) == {'old', 'new'}


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    code = 'with fill_folder(folder) as new:\n    (new / sys.argv[2]).write_text("x"); print(flush=True); input()'
    living, killed = (run(code, tmp_path, name) for name in ('living', 'killed'))
    for process in (living, killed):
        process.stdout.readline()
    assert len(list(tmp_path.iterdir())) == 2
    killed.kill()
    killed.wait()
    fill(tmp_path, 'new')
    assert len(list(tmp_path.glob('.*'))) == 1
    living.communicate('\n')
    assert living.returncode == 0
    assert contents(tmp_path) == {**dict.fromkeys(NAMES, 'new'), 'living': 'x'}


def test_files_of_others_whose_names_look_alike_are_left_alone(tmp_path):
    (tmp_path / f'{files.TEMPORARY}notes').write_text('mine')
    fill(tmp_path, 'new')
    assert contents(tmp_path) == {**dict.fromkeys(NAMES, 'new'), f'{files.TEMPORARY}notes': 'mine'}


@pytest.mark.parametrize('code', [errno.ENOSYS, errno.ENOLCK, errno.EBADF])
def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch, code):
    monkeypatch.setattr(fcntl, 'flock', refuse(code))
    other = tmp_path / f'{files.TEMPORARY}other'
    other.mkdir()  # of a process that may live or not
    fill(tmp_path, 'old')
    fill(tmp_path, 'new')
    with pytest.raises(ZeroDivisionError), fill_folder(tmp_path):
        raise ZeroDivisionError
    other.rmdir()
    assert contents(tmp_path) == dict.fromkeys(NAMES, 'new')


def test_sigterm_clears_up_as_ctrl_c_does(tmp_path, monkeypatch):
    from timm_supervit.tools import quickstart

    def train(*args, **kwargs):
        assert list((tmp_path / 'out').iterdir())
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(quickstart, 'train', train)
    result = CliRunner().invoke(main, ['quickstart', '--output', str(tmp_path / 'out')])
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == 'Interrupted.'
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# Several at once


def test_of_several_processes_that_fill_a_folder_at_once_one_whole_result_is_there(tmp_path):
    code = (
        'import random\n'
        'replace = os.replace\n'
        'os.replace = lambda *args: (time.sleep(random.random() / 100), replace(*args))\n'  # others may come between
        'print(flush=True)\n'
        'for folder in sys.argv[2:]:\n'
        '    input()\n'
        '    fill(sys.argv[1])\n'
        '    print(flush=True)\n')
    folders = [tmp_path / str(i) for i in range(6)]
    processes = [run(code, writer, *folders) for writer in range(4)]
    for folder in (None, *folders):
        for process in processes:
            assert process.stdout.readline() == '\n'
            if folder != folders[-1]:
                process.stdin.write('\n')
                process.stdin.flush()
        assert folder is None or contents(folder) in [dict.fromkeys(NAMES, str(writer)) for writer in range(4)]
    assert [process.wait() for process in processes] == [0] * 4


def test_of_several_threads_too(tmp_path, monkeypatch):
    replace = os.replace
    monkeypatch.setattr(os, 'replace', lambda *args: (time.sleep(random.random() / 100), replace(*args)))
    for folder in (tmp_path / str(i) for i in range(6)):
        threads = [threading.Thread(target=fill, args=(folder, str(writer))) for writer in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert contents(folder) in [dict.fromkeys(NAMES, str(writer)) for writer in range(4)]


@pytest.mark.parametrize('place', ['out2', 'out/inner', 'out'])
def test_errors_are_of_the_folder_that_they_are_in(tmp_path, place):
    (tmp_path / 'out2').mkdir()
    (tmp_path / 'out').mkdir()
    with pytest.raises(FileNotFoundError) as caught, fill_folder(tmp_path / 'out'):
        (tmp_path / place / 'missing').read_text()  # of 'out2' or another folder beside it, something that was read
    assert ('was not written to' in str(caught.value)) == (place != 'out2')
