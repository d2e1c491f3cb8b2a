"""Progress bars, on stderr since stdout is for results."""
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import track as rich_track

__all__ = ['track']


def track(steps: Iterable[Any]) -> Iterable[Any]:
    """Return the steps, with a bar that follows them."""
    return rich_track(steps, description='', console=Console(stderr=True))
