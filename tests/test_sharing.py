"""What subnets of one image size share: planned without a network, as a tree of blocks."""
from typing import Any

import pytest

from timm_supervit.sharing import Branch, plan_sharing
from timm_supervit.subnets import keep_schedule

DEPTH = 12


def walk(branch: Branch, schedule: dict[int, int] | None = None) -> list[tuple[Branch, dict[int, int]]]:
    """Return each leaf with all that was dropped on the way to it."""
    schedule = {} if schedule is None else schedule
    schedule = schedule | branch.drops
    if not branch.parts:
        return [(branch, schedule)]
    leaves = []
    for part in branch.parts:
        number_before = min([branch.num_patches, *branch.drops.values()])
        dropped = {} if part.num_patches == number_before else {branch.blocks.stop: part.num_patches}
        leaves += walk(part, schedule | dropped)
    return leaves


def plan(rates: list[float], drop_layers: tuple[int, ...] = (3, 6, 9), **kwargs: Any) -> tuple[list, Branch]:
    schedules = [keep_schedule(196, rate, drop_layers, DEPTH) for rate in rates]
    return schedules, plan_sharing(schedules, kwargs.get('with_patches', [True] * len(rates)), 196, DEPTH)


def test_the_published_rates_part_in_the_first_block_that_drops() -> None:
    _, root = plan([0.5, 0.7, 1.0])
    assert root == Branch(
        (0, 1, 2), 196, range(0, 3), {}, False, (
            Branch((2,), 196, range(4, 12), {}, False, ()),
            Branch((1,), 138, range(4, 12), {6: 98, 9: 70}, False, ()),
            Branch((0,), 99, range(4, 12), {6: 50, 9: 26}, False, ()),
        ))


@pytest.mark.parametrize('rates', [[1.0], [0.5], [0.5, 0.5], [0.7, 1.0, 0.7, 0.3], [0.5, 0.501], [0.02, 0.01]])
@pytest.mark.parametrize('drop_layers', [(3, 6, 9), (), (0,), (11,), (0, 11), tuple(range(12))])
def test_each_subnet_ends_in_one_leaf_that_its_own_schedule_leads_to(
        rates: list[float],
        drop_layers: tuple[int, ...],
) -> None:
    schedules, root = plan(rates, drop_layers)
    leaves = walk(root)
    assert sorted(member for leaf, _ in leaves for member in leaf.members) == list(range(len(rates)))
    for leaf, schedule in leaves:
        assert all(schedules[member] == schedule for member in leaf.members)
    assert len(leaves) == len({tuple(schedule.items()) for schedule in schedules})


def test_rates_that_keep_as_many_for_a_while_part_later() -> None:
    schedules, root = plan([0.5, 0.502])
    assert schedules[0][3] == schedules[1][3] == 99
    assert schedules[0][6] != schedules[1][6]
    assert (root.blocks, root.drops) == (range(0, 6), {3: 99})


def test_the_last_block_runs_for_the_prefix_tokens_where_nobody_reads_the_patches() -> None:
    _, root = plan([0.5, 1.0], with_patches=[False, True])
    full, dropping = root.parts
    assert (full.members, full.prefix_only) == ((1,), False)
    assert (dropping.members, dropping.prefix_only) == ((0,), True)
    _, root = plan([0.7, 0.7], with_patches=[False, True])
    assert not root.prefix_only  # one of them needs the patches
    _, root = plan([0.5, 1.0], drop_layers=(11,), with_patches=[False, False])
    assert (root.blocks, root.drops, root.prefix_only, root.parts) == (range(0, 12), {}, True, ())
