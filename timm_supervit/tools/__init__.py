"""One file for each command of ``supervit``: a function that does what it does, prints nothing and returns data.

Where a function takes ``progress``, it hands that its steps and what they are, and goes on with what comes back. The
command line gives it what draws a bar; ``tqdm.tqdm`` is one too.
"""
from collections.abc import Callable, Iterable
from typing import Any

Progress = Callable[[Iterable[Any], str], Iterable[Any]]

ONE_STEP = (None,)  # the steps of what takes long and shows nothing until it is done


def silent(steps: Iterable[Any], label: str) -> Iterable[Any]:
    """Return the steps; nobody sees how far they are."""
    return steps
