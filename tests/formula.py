"""Weights, images and targets by a formula, so that numbers computed from them need no file of inputs.

Whole numbers are hashed and divided by a power of two: each value is exact in float64, and the same with every version
of torch and on every machine. No random generator promises that.
"""
import math
import zlib
from collections.abc import Mapping

import torch

__all__ = ['checksum', 'draw', 'draw_state', 'draw_target']


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the values that belong to a name, in [-1, 1), multiples of 2**-30 [shape]."""
    x = torch.arange(math.prod(shape)) + zlib.crc32(name.encode())
    for factor in (1_000_000_007, 715_225_739, 1):  # odd numbers below 2**30: no product passes 2**62
        x = (x ^ x >> 15) % 2 ** 31 * factor
    return (x.double() / 2 ** 30 - 1).reshape(shape)


def draw_state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return the state dict of a network, in float64.

    Weights of layers are scaled by the number of their inputs. Those of norms, and variances, are around 1. The rest is
    around 0: biases, means, class token and position embeddings.
    """
    state = {}
    for name, shape in shapes.items():
        value = draw(name, shape)
        if len(shape) in (2, 4):
            state[name] = value * (2 / math.sqrt(math.prod(shape[1:])))
        elif name.endswith('num_batches_tracked'):
            state[name] = torch.tensor(0)
        elif name.endswith(('.weight', 'running_var')):
            state[name] = 1 + value / 2
        else:
            state[name] = value / 2
    return state


def draw_target(shape: tuple[int, ...]) -> torch.Tensor:
    """Return soft labels that add up to 1 over the classes [B, classes, ...]."""
    target = 1 + draw('target', shape)
    return target / target.sum(dim=1, keepdim=True)


def checksum(name: str, tensor: torch.Tensor) -> tuple[float, float]:
    """Return the sum of a tensor weighted by the formula, which sees the place of each value, and its norm."""
    return float((tensor.double() * draw(f'checksum.{name}', tuple(tensor.shape))).sum()), float(tensor.double().norm())
