"""Measure what this package adds to ``import torch``: ``python tests/benchmark_import.py [PROCESSES]``.

Each measurement is a fresh process. Those in which torch calls its entry points and those in which it doesn't take
turns, so that whatever else the machine does falls on both alike. Run it with the package installed as a user installs
it: an editable install adds an import finder of its own.
"""
import os
import statistics
import subprocess
import sys
from importlib.metadata import entry_points

IMPORT_TORCH = 'import time; start = time.perf_counter(); import torch; print(time.perf_counter() - start)'
AUTOLOAD = 'TORCH_DEVICE_BACKEND_AUTOLOAD'


def measure(autoload: str) -> float:
    """Return the milliseconds that ``import torch`` takes in a fresh process."""
    output = subprocess.check_output(
        [sys.executable, '-c', IMPORT_TORCH], env={**os.environ, AUTOLOAD: autoload}, cwd='/', text=True)
    return 1000 * float(output)


def main(processes: int = 20) -> None:
    """Print the median of both and of their differences, pair by pair."""
    print('entry points of torch.backends:', ', '.join(e.value for e in entry_points(group='torch.backends')))
    measure('1'), measure('0')  # fills the file cache
    with_us, without = [], []
    for i in range(processes):
        for autoload in ('10', '01')[i % 2]:
            (with_us if autoload == '1' else without).append(measure(autoload))
    print(f'import torch, {processes} processes each, median: {statistics.median(with_us):.1f} ms with autoload, '
          f'{statistics.median(without):.1f} ms without; '
          f'difference of the medians {statistics.median(with_us) - statistics.median(without):+.1f} ms, median of the '
          f'pairwise differences {statistics.median(a - b for a, b in zip(with_us, without, strict=True)):+.1f} ms')


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
