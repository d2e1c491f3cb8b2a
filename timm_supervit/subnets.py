"""The grid of subnets: the image sizes and keep rates of one SuperViT, and how many tokens each block keeps.

A subnet is one operating point of a super vision transformer (SuperViT, arXiv 2205.11397): the image at one size, and
a share of its tokens. This file is arithmetic only; it knows neither torch nor timm.
"""
import itertools
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

__all__ = [
    'DISTILL_TEACHERS',
    'TRAIN_SUBNETS',
    'Subnet',
    'check_choice',
    'check_drop_layers',
    'check_img_size',
    'check_img_sizes',
    'check_keep_rate',
    'check_keep_rates',
    'check_subnet',
    'keep_schedule',
]

TRAIN_SUBNETS = ('sandwich', 'all', 'active')
DISTILL_TEACHERS = ('own_size', 'largest_size')


class Subnet(NamedTuple):
    """One operating point of a super vision transformer.

    Attributes:
        img_size: Side of the square image that the network sees, in pixels.
        keep_rate: Share of the tokens that each dropping block keeps, in (0, 1]; 1.0 drops nothing.
    """

    img_size: int
    keep_rate: float


def check_img_size(img_size: Any) -> int:
    """Return a square image size, given as a side or as an equal (height, width) pair, as its side in pixels.

    Raises:
        ValueError: If the size is no positive whole number or the pair is not square.
    """
    side = img_size
    if isinstance(img_size, Sequence) and not isinstance(img_size, str):
        if len(img_size) != 2 or img_size[0] != img_size[1]:
            raise ValueError(f'img_size {img_size} is not square; give one side in pixels, as in img_size=224')
        side = img_size[0]
    if isinstance(side, bool) or not isinstance(side, Integral) or side < 1:
        raise ValueError(f'img_size {img_size!r} is not a positive whole number of pixels, as in img_size=224')
    return int(side)


def check_img_sizes(img_sizes: Any, patch_size: int) -> tuple[int, ...]:
    """Return the image sizes of a grid as a tuple of sides in pixels.

    Raises:
        ValueError: If there is none, one is not divisible by ``patch_size``, or they are not strictly ascending.
    """
    sizes = tuple(check_img_size(size) for size in _as_sequence(img_sizes, 'img_sizes', '(128, 160, 192, 224)'))
    for size in sizes:
        if size % patch_size:
            lower = size // patch_size * patch_size
            near = ' or '.join(str(s) for s in (lower, lower + patch_size) if s)
            raise ValueError(f'img_sizes {sizes}: {size} is not divisible by the patch size {patch_size}; use {near}')
    if any(a >= b for a, b in itertools.pairwise(sizes)):
        raise ValueError(f'img_sizes {sizes} are not ascending without repeats; use {tuple(sorted(set(sizes)))}')
    return sizes


def check_keep_rate(keep_rate: Any) -> float:
    """Return a keep rate as a float.

    Raises:
        ValueError: If it is not in (0, 1].
    """
    if isinstance(keep_rate, bool) or not isinstance(keep_rate, Real) or not 0 < float(keep_rate) <= 1:
        raise ValueError(f'keep_rate {keep_rate!r} is not in (0, 1]; 0.7 keeps 70 % of the tokens, 1.0 all of them')
    return float(keep_rate)


def check_keep_rates(keep_rates: Any) -> tuple[float, ...]:
    """Return the keep rates of a grid as an ascending tuple.

    Raises:
        ValueError: If there is none, one is not in (0, 1], or one is repeated.
    """
    rates = tuple(check_keep_rate(rate) for rate in _as_sequence(keep_rates, 'keep_rates', '(0.5, 0.7, 1.0)'))
    if len(set(rates)) < len(rates):
        raise ValueError(f'keep_rates {rates} repeat a rate; use {tuple(sorted(set(rates)))}')
    return tuple(sorted(rates))


def check_subnet(subnet: Any, img_sizes: Sequence[int]) -> Subnet:
    """Return a pair (img_size, keep_rate) as a subnet of a grid; its rate need not be one of the grid's.

    Raises:
        ValueError: If it is no such pair, the size is none of ``img_sizes``, or the rate is not in (0, 1].
    """
    if isinstance(subnet, str) or not isinstance(subnet, Sequence) or len(subnet) != 2:
        raise ValueError(f'subnet {subnet!r} is no pair (img_size, keep_rate), as in ({img_sizes[-1]}, 0.7)')
    img_size, keep_rate = check_img_size(subnet[0]), check_keep_rate(subnet[1])
    if img_size not in img_sizes:
        raise ValueError(
            f'img_size {img_size} is none of img_sizes {tuple(img_sizes)}; '
            f'choose one of them, or add it with set_input_size({img_size})')
    return Subnet(img_size, keep_rate)


def check_drop_layers(drop_layers: Any, depth: int) -> tuple[int, ...]:
    """Return the indices of the blocks that drop tokens, counted from 0, as an ascending tuple.

    Raises:
        ValueError: If an index is not in [0, depth) or is repeated.
    """
    layers = tuple(drop_layers) if isinstance(drop_layers, Sequence) else (drop_layers,)
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < depth:
            raise ValueError(
                f'drop_layers {layers}: {layer!r} is no block of this network; '
                f'its {depth} blocks are counted from 0 to {depth - 1}')
    if len(set(layers)) < len(layers):
        raise ValueError(f'drop_layers {layers} repeat a block; use {tuple(sorted(set(layers)))}')
    return tuple(sorted(layers))


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return the value of a setting that is one of several words.

    Raises:
        ValueError: If it is none of ``choices``.
    """
    if value not in choices:
        raise ValueError(f'{name} {value!r} is unknown; use one of {", ".join(choices)}')
    return str(value)


def keep_schedule(
        num_patches: int,
        keep_rate: float,
        drop_layers: Sequence[int],
        depth: int,
) -> dict[int, int]:
    """Return how many patch tokens are kept by each block that drops some, in the order of the blocks.

    A dropping block that sees T tokens, the class token included, keeps the class token and the
    ``min(T - 1, ceil(keep_rate * T))`` best patch tokens (official code, ``deit/super_deit.py``). Register tokens are
    always kept and not counted. One patch token at least remains, whatever the rate.

    Args:
        num_patches: Patch tokens that enter the first block.
        keep_rate: Share of the tokens that is kept, in (0, 1].
        drop_layers: Indices of the dropping blocks, ascending. Those beyond ``depth`` do nothing.
        depth: Number of blocks.
    """
    schedule = {}
    for layer in drop_layers:
        num_keep = min(num_patches, math.ceil(keep_rate * (num_patches + 1)))
        if layer < depth and num_keep < num_patches:
            schedule[layer] = num_patches = num_keep
    return schedule


def _as_sequence(values: Any, name: str, example: str) -> Sequence[Any]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f'{name} {values!r} lists nothing to run; give at least one, as in {name}={example}')
    return values
