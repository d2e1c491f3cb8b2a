"""Several processes for a test, as torchrun starts them, without the seconds that their imports would take.

They are forks of a process that has torch and timm loaded, and never runs a network: a fork of one that has, such as
that of the tests, may be unable to go back through one.
"""
import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

forks = multiprocessing.get_context('forkserver')


def preload(*modules: str) -> None:
    """Load these modules too, where the process that is forked has not been started yet."""
    forks.set_forkserver_preload(['pytest', 'timm', 'timm_supervit.training.token_labels', *modules])


def run_ranks(function: Callable[..., Any], *args: Any, ranks: int = 2) -> None:
    """Call ``function(rank, *args)`` in as many processes at once; raise what one of them raises."""
    torch.multiprocessing.start_processes(function, args, nprocs=ranks, start_method='forkserver')


preload()
