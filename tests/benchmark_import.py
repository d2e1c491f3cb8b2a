"""Measure what this package adds to ``import torch``: ``python tests/benchmark_import.py [PROCESSES]``.

torch looks for entry points in any case; what is added is loading and calling ours. Each measurement is a fresh process
that has imported torch with autoload off and then does with our entry point what torch would do. The difference of two
whole imports of over a second each would drown it. Run it with the package installed as a user installs it: an editable
install adds an import finder of its own.
"""
import os
import statistics
import subprocess
import sys

LOAD = '''
import time, torch
from importlib.metadata import entry_points
ours, = (e for e in entry_points(group='torch.backends') if e.value.startswith('timm_supervit.'))
start = time.perf_counter()
ours.load()()
print(time.perf_counter() - start)
'''


def measure() -> float:
    """Return the milliseconds that our entry point takes in a fresh process."""
    output = subprocess.check_output(
        [sys.executable, '-c', LOAD], env={**os.environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'}, cwd='/', text=True)
    return 1000 * float(output)


def main(processes: int = 20) -> None:
    """Print the median and the quartiles."""
    measure()  # fills the file cache
    low, median, high = statistics.quantiles([measure() for _ in range(processes)], n=4)
    print(f'added to import torch: median of {processes} processes {median:.1f} ms, quartiles {low:.1f}, {high:.1f} ms')


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
