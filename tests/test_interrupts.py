"""A signal at any moment ends a command with one line and exit code 130."""
import signal
import subprocess
import sys

import pytest

# A signal while something is imported; what imports may lose the exception, as some of torch's and timm's modules do.
CODE = '''
import os, signal, sys
from timm_supervit.__main__ import run

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), {number})
            except BaseException as error:
                {handling}

sys.meta_path.insert(0, Finder())
sys.argv[1:] = ['visualize', 'supervit_digits', {photo!r}, '--output', 'out']
run()
'''


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('module, handling', [
    ('click', 'raise'), ('timm_supervit.cli.visualize', 'raise'), ('timm', 'raise'), ('timm', 'pass'),
    ('timm', 'raise ImportError("lost")'), ('timm.models', 'raise RuntimeError("lost") from error')])
def test_a_signal_during_an_import_ends_the_command(tmp_path, number, module, handling):
    photo = tmp_path / 'photo.png'
    photo.write_bytes(b'no image, which would be found out later')
    code = CODE.format(module=module, number=int(number), handling=handling, photo=str(photo))
    result = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr.splitlines()[-1:]) == (130, ['Interrupted.'])
    assert 'Traceback' not in result.stderr


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_stays_so(number):  # as of a job in the background
    code = f"""
import os, signal, sys
signal.signal({int(number)}, signal.SIG_IGN)
from timm_supervit.__main__ import run
sys.argv[1:] = ["recipe", "digits"]
try:
    run()
finally:
    os.kill(os.getpid(), {int(number)})
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, '')
