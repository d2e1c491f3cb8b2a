"""How a tool says how far it is: it hands its steps and what they are to a callable, which passes them on.

Tools print nothing. The command line gives them a callable that draws a bar; ``tqdm.tqdm`` is one too.
"""
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ['Progress', 'silent']

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def silent(steps: Iterable[Any], label: str) -> Iterable[Any]:
    """Return the steps; nobody sees how far they are."""
    return steps
