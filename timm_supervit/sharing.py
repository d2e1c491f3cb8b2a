"""What several subnets of one image size compute in common, as a tree that is planned first and run later.

Subnets of one size are the same network up to the attention of the first block in which they keep different numbers
of patch tokens. There they part: that block ranks the tokens once, and each goes on with its best. This file is
arithmetic on schedules only; ``SuperViT.forward_features_subnets`` runs the tree.
"""
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Branch(NamedTuple):
    """Consecutive blocks that some subnets run as one, and what they part into behind them.

    Attributes:
        members: The subnets, as indices of the list that was planned.
        num_patches: Patch tokens that enter the first of the blocks.
        blocks: The blocks, in order; it may be empty.
        drops: Patch tokens kept by those of the blocks that drop some.
        prefix_only: Whether of the last of the blocks nothing but the prefix tokens is of use.
        parts: What the members part into in block ``blocks.stop``; empty at the end of the network.
    """

    members: tuple[int, ...]
    num_patches: int
    blocks: range
    drops: dict[int, int]
    prefix_only: bool
    parts: tuple['Branch', ...]


def plan_sharing(
        schedules: Sequence[Mapping[int, int]],
        with_patches: Sequence[bool],
        num_patches: int,
        depth: int,
) -> Branch:
    """Plan how subnets of one image size run together.

    The keep rates 0.5, 0.7 and 1.0 at 224 pixels, dropping in blocks 3, 6 and 9 of 12, part in block 3 (the numbers are
    patch tokens)::

        block  0  1  2  3     4  5  6    7  8  9    10 11
                         ┌ 196 ────────────────────────────  1.0
               196 ──────┼ 138 ────── 98 ────── 70 ────────  0.7
                         └  99 ────── 50 ────── 26 ────────  0.5

    Args:
        schedules: For each subnet the patch tokens that its dropping blocks keep, from ``keep_schedule``.
        with_patches: For each subnet whether its patch tokens are of use behind the last block.
        num_patches: Patch tokens that enter the first block.
        depth: Number of blocks.

    Returns:
        The root of the tree. All subnets are members of it, and each is a member of one leaf.
    """
    last = depth - 1
    # What the last block drops makes no difference to those that read no patches.
    schedules = [
        schedule if needed else {block: number for block, number in schedule.items() if block < last}
        for schedule, needed in zip(schedules, with_patches, strict=True)
    ]

    def grow(members: tuple[int, ...], num_patches: int, start: int) -> Branch:
        def kept(member: int, block: int) -> int:
            return schedules[member].get(block, num_left)

        num_left, drops, stop = num_patches, {}, start
        while stop < depth and len({kept(member, stop) for member in members}) == 1:
            if stop in schedules[members[0]]:
                drops[stop] = num_left = kept(members[0], stop)
            stop += 1
        numbers = sorted({kept(member, stop) for member in members}, reverse=True) if stop < depth else []
        parts = tuple(
            grow(tuple(member for member in members if kept(member, stop) == number), number, stop + 1)
            for number in numbers
        )
        prefix_only = start < stop == depth and not any(with_patches[member] for member in members)
        return Branch(members, num_patches, range(start, stop), drops, prefix_only, parts)

    return grow(tuple(range(len(schedules))), num_patches, 0)
