"""Progress bars, on stderr since stdout is for results."""
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import track as rich_track

__all__ = ['track']


def track(steps: Iterable[Any], label: str) -> Iterable[Any]:
    """Return the steps, with a bar that follows them where stderr is a terminal; see ``tools/progress.py``."""
    console = Console(stderr=True)
    return rich_track(steps, label, console=console, transient=True, disable=not console.is_terminal)
