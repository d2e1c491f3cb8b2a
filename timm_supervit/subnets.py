"""The grid of subnets: the image sizes and keep rates of one SuperViT, and how many tokens each block keeps.

A subnet is one operating point of a super vision transformer (SuperViT, arXiv 2205.11397): the image at one size, and
a share of its tokens. This file is arithmetic only; it knows neither torch nor timm.
"""
import math
import reprlib
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

TRAIN_SUBNETS = ('sandwich', 'all', 'active')
DISTILL_TEACHERS = ('own_size', 'largest_size')

MAX_PIXELS = 178_956_970  # of an image; Pillow takes more for a decompression bomb

Size = int | tuple[int, int]  # an image's side in pixels where it is square, (height, width) where it is not


class _Pair(NamedTuple):
    img_size: Size
    keep_rate: float


class Subnet(_Pair):
    """One operating point of a super vision transformer; valid by being one.

    Attributes:
        img_size: Size of the image that the network sees, in pixels: its side, or (height, width) of a rectangle.
        keep_rate: Share of the tokens that each dropping block keeps, in (0, 1]; 1.0 drops nothing.

    Raises:
        ValueError: If a side is no positive whole number, or the rate is not in (0, 1].
    """

    __slots__ = ()

    def __new__(cls, img_size: Any, keep_rate: Any) -> 'Subnet':
        """Check both values, and put the size into the form of ``Size``."""
        return super().__new__(cls, check_img_size(img_size), check_keep_rate(keep_rate))

    def __str__(self) -> str:
        """Return the subnet as the command line takes it, such as 160:0.7 or 256x128:0.7."""
        return f'{format_size(self.img_size)}:{self.keep_rate:g}'


def size_2d(size: Size) -> tuple[int, int]:
    """Return a size as (height, width)."""
    return (size, size) if isinstance(size, int) else size


def format_size(size: Size) -> str:
    """Return a size as it is written in tables and file names: 224, or 256x128 for (height, width)."""
    return str(size) if isinstance(size, int) else f'{size[0]}x{size[1]}'


def sort_sizes(sizes: Iterable[Size]) -> tuple[Size, ...]:
    """Return sizes by area, those of equal area by height."""
    return tuple(sorted(sizes, key=lambda size: (math.prod(size_2d(size)), size_2d(size))))


def find_nearest_size(size: Size, sizes: Sequence[Size]) -> int:
    """Return the index of the size that differs least from another in height and width together."""
    height, width = size_2d(size)
    return min(range(len(sizes)), key=lambda i: abs(size_2d(sizes[i])[0] - height) + abs(size_2d(sizes[i])[1] - width))


def check_img_size(img_size: Any) -> Size:
    """Return an image size, given as a side or as (height, width), in the form of ``Size``."""
    sides = tuple(img_size) if isinstance(img_size, Sequence) and not isinstance(img_size, str) else (img_size,) * 2
    if len(sides) != 2 or any(isinstance(s, bool) or not isinstance(s, Integral) or s < 1 for s in sides):
        raise ValueError(f'img_size {img_size!r} is neither a positive whole number of pixels, as in img_size=224, '
                         f'nor a pair of them, height and width, as in img_size=(256, 128)')
    height, width = map(int, sides)
    if height * width > MAX_PIXELS:
        raise ValueError(f'img_size {reprlib.repr(img_size)} is of more pixels than an image has, {MAX_PIXELS} at most')
    return height if height == width else (height, width)


def check_img_sizes(img_sizes: Any, patch_size: int) -> tuple[Size, ...]:
    """Return the image sizes of a grid as a tuple, by area."""
    sizes = tuple(check_img_size(size) for size in _as_sequence(img_sizes, 'img_sizes', '(128, 160, 192, 224)'))
    for size in sizes:
        for side in size_2d(size):
            if side % patch_size:
                lower = side // patch_size * patch_size
                near = ' or '.join(str(s) for s in (lower, lower + patch_size) if s)
                raise ValueError(
                    f'img_sizes {sizes}: {side} is not divisible by the patch size {patch_size}; use {near}')
    if sizes != sort_sizes(set(sizes)):
        raise ValueError(f'img_sizes {sizes} are not ascending by area without repeats; use {sort_sizes(set(sizes))}')
    return sizes


def check_patch_size(patch_size: Any) -> int:
    """Return a patch size, given as a side or as an equal (height, width) pair, as its side in pixels."""
    side = check_img_size(patch_size)
    if not isinstance(side, int):
        raise ValueError(f'patch_size {patch_size} is not square; give one side in pixels, as in patch_size=16')
    return side


def check_keep_rate(keep_rate: Any) -> float:
    """Return a keep rate as a float."""
    if not isinstance(keep_rate, Real):  # first, since the compiler cannot ask its numbers for attributes
        keep_rate = plain_numbers(keep_rate)
    if isinstance(keep_rate, bool) or not isinstance(keep_rate, Real) or \
            not 0 < keep_rate <= 1:  # type: ignore[operator]
        raise ValueError(f'keep_rate {keep_rate!r} is not in (0, 1]; 0.7 keeps 70 % of the tokens, 1.0 all of them')
    return float(keep_rate)


def check_keep_rates(keep_rates: Any) -> tuple[float, ...]:
    """Return the keep rates of a grid as an ascending tuple."""
    rates = tuple(check_keep_rate(rate) for rate in _as_sequence(keep_rates, 'keep_rates', '(0.5, 0.7, 1.0)'))
    if len(set(rates)) < len(rates):
        raise ValueError(f'keep_rates {rates} repeat a rate; use {tuple(sorted(set(rates)))}')
    return tuple(sorted(rates))


def check_subnet(subnet: Any, img_sizes: Sequence[Size]) -> Subnet:
    """Return a pair (img_size, keep_rate) as a subnet of a grid; its rate need not be one of the grid's."""
    if not isinstance(subnet, Subnet):
        if isinstance(subnet, str) or not isinstance(subnet, Sequence) or len(subnet) != 2:
            raise ValueError(f'subnet {subnet!r} is no pair (img_size, keep_rate), as in ({img_sizes[-1]}, 0.7)')
        subnet = Subnet(*subnet)
    find_size(subnet.img_size, img_sizes)
    return subnet


def find_size(img_size: Size, img_sizes: Sequence[Size]) -> int:
    """Return the index of a size in a grid, which must have it."""
    if img_size not in img_sizes:
        raise ValueError(
            f'img_size {img_size} is none of img_sizes {tuple(img_sizes)}; '
            f'choose one of them, or a model of img_sizes that has it')
    return img_sizes.index(img_size)


def check_drop_layers(drop_layers: Any, depth: int) -> tuple[int, ...]:
    """Return the indices of the blocks that drop tokens, counted from 0, as an ascending tuple."""
    drop_layers = plain_numbers(drop_layers)
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
    """Return the value of a setting that is one of several words."""
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
    values = plain_numbers(values)
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f'{name} {values!r} is no list; give at least one number in a list, as in {name}={example}')
    if not values:
        raise ValueError(f'{name} {values!r} lists nothing to run; give at least one, as in {name}={example}')
    return values


def plain_numbers(values: Any) -> Any:
    """Return the numbers of an array or tensor as Python's, and anything else as it is."""
    return values.tolist() if hasattr(values, 'tolist') else values
