"""Progress on stderr, since stdout is for results: a bar on a terminal, a line now and then elsewhere."""
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..tools import ONE_STEP
from .stdout import is_quiet, note

_SECONDS_BETWEEN_LINES = 20


def track(steps: Iterable[Any], label: str) -> Iterable[Any]:
    """Return the steps, and show how many are done and how long the rest will take; see ``timm_supervit.tools``."""
    console = Console(stderr=True)
    if is_quiet():
        return steps
    return _draw_bar(steps, label, console) if console.is_terminal else _write_lines(steps, label)


def _draw_bar(steps: Iterable[Any], label: str, console: Console) -> Iterator[Any]:
    columns = (TextColumn('{task.description}', markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(steps, _length(steps), description=label)


def _write_lines(steps: Iterable[Any], label: str) -> Iterator[Any]:
    start = last = time.monotonic()
    total = _length(steps)
    if steps is ONE_STEP:
        note(f'{label} ...')
    for done, step in enumerate(steps):
        now = time.monotonic()
        if done and now - last >= _SECONDS_BETWEEN_LINES:
            left = f' of {total}, about {(now - start) / done * (total - done):.0f} s left' if total else ''
            note(f'{label}: {done}{left}')
            last = now
        yield step


def _length(steps: Iterable[Any]) -> int | None:
    return len(steps) if isinstance(steps, Sized) else None
