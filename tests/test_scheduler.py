"""Choosing subnet and batch under load: what holds for every table, queue and rate, and the files it reads."""
import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from timm_supervit import Subnet, SubnetScheduler
from timm_supervit.results.rows import Results, save_results

SEEDS = range(60)
NETWORK = {'architecture': 'supervit_small', 'img_sizes': [128, 224]}


class Case:
    """A random table in which the more accurate subnet is nowhere faster, and random queues."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        r = self.random
        sizes = sorted({1, *r.sample(range(2, 40), r.randint(0, 4))})
        fixed, growth = r.uniform(0, 20), r.choice([0.6, 0.9, 1.0])
        costs = sorted(r.uniform(1, 30) for _ in range(r.randint(1, 8)))
        self.subnets = [Subnet(16 * (i + 1), 1.0) for i in range(len(costs))]
        self.latency = {
            subnet: {size: fixed + cost * size ** growth for size in sizes}
            for subnet, cost in zip(self.subnets, costs, strict=True)}
        self.quality = {subnet: 60. + i for i, subnet in enumerate(self.subnets)}
        self.slo = r.uniform(1.05, 30) * self.latency[self.subnets[0]][1]
        self.scheduler = SubnetScheduler(self.latency, self.quality, self.slo)

    def queue(self) -> list[float]:
        r = self.random
        return sorted(r.uniform(-0.1, 1) * self.slo for _ in range(r.choice([1, 2, 3, 8, 30, 200])))

    def rate(self) -> float:
        return self.random.choice([0., self.random.uniform(0, 300), self.random.uniform(0, 30)])

    def ms(self, subnet: Subnet, size: int) -> float:
        """Latency between measured sizes on the line from one to the next, worked out apart from the code."""
        known = self.latency[subnet]
        if size in known:
            return known[size]
        low = max(known_size for known_size in known if known_size < size)
        high = min(known_size for known_size in known if known_size > size)
        return known[low] + (known[high] - known[low]) * (size - low) / (high - low)

    def throughput(self, subnet: Subnet) -> float:
        return max(1e3 * size / self.ms(subnet, size) for size in range(1, max(self.latency[subnet]) + 1))


@pytest.fixture(params=SEEDS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_the_oldest_is_not_late_where_a_subnet_is_in_time(case: Case) -> None:
    for _ in range(30):
        queue, rate = case.queue(), case.rate()
        subnet, size = case.scheduler.choose(queue, rate)
        assert 1 <= size <= min(len(queue), max(case.latency[subnet]))
        if case.ms(subnet, size) > queue[0]:
            assert min(case.ms(other, 1) for other in case.subnets) > queue[0]


def test_more_time_left_never_makes_it_less_accurate(case: Case) -> None:
    for _ in range(30):
        queue, rate = case.queue(), case.rate()
        before = case.scheduler.choose(queue, rate).subnet
        more = [slack + extra for slack, extra in zip(
            queue, sorted(case.random.uniform(0, 0.3) * case.slo for _ in queue), strict=True)]
        for longer in (more, [slack + 0.1 * case.slo for slack in queue], [2 * abs(slack) for slack in queue]):
            assert case.quality[case.scheduler.choose(sorted(longer), rate).subnet] >= case.quality[before]


def test_more_arrivals_never_make_it_more_accurate(case: Case) -> None:
    for _ in range(20):
        queue = case.queue()
        accuracy = [case.quality[case.scheduler.choose(queue, rate).subnet] for rate in (0, 3, 10, 30, 100, 1e3, 1e9)]
        assert accuracy == sorted(accuracy, reverse=True)
        assert case.quality[case.scheduler.choose([*queue, queue[-1]], 3).subnet] <= accuracy[1]


def test_the_smallest_runs_under_overload(case: Case) -> None:
    for _ in range(20):
        queue = case.queue()
        assert case.scheduler.choose(queue, 1.01 * case.throughput(case.subnets[0])).subnet == case.subnets[0]
        behind = [case.slo] * (1 + int(1.01 * case.slo / 1e3 * case.throughput(case.subnets[0])))
        assert case.scheduler.choose(behind, 0).subnet == case.subnets[0]
    assert case.scheduler.choose([-1.], 0).subnet == case.subnets[0]


def test_the_best_runs_when_it_is_quiet(case: Case) -> None:
    best = case.subnets[-1]
    needed = case.ms(best, 1) * 1.3
    if needed <= case.slo:
        assert case.scheduler.choose([needed], 0) == (best, 1)


def test_whoever_is_left_can_be_in_time_and_nobody_is_refused_in_vain(case: Case) -> None:
    """Against a search of its own over the batches that the fastest subnet could run."""
    fastest = case.subnets[0]
    for _ in range(15):
        queue = case.queue()
        hopeless = case.scheduler.count_hopeless(queue)
        assert hopeless == len(queue) or is_served_in_time(case, fastest, queue[hopeless:])
        if all(slack < case.ms(fastest, 1) for slack in queue):
            assert hopeless == len(queue)
        if hopeless and queue[hopeless - 1] >= case.ms(fastest, 1):
            # Of those who could have been served alone, one more would have been too many in batches of one size.
            rest = queue[hopeless - 1:]
            assert not any(
                all((i // size) * case.ms(fastest, size) + case.ms(fastest, min(size, len(rest) - i // size * size))
                    <= slack for i, slack in enumerate(rest)) for size in case.latency[fastest])
    assert case.scheduler.count_hopeless([]) == 0
    assert case.scheduler.count_hopeless([case.slo]) == 0


def is_served_in_time(case: Case, subnet: Subnet, queue: list[float]) -> bool:
    """Whether any sequence of batches serves all in time: the earliest end for each number served, oldest first."""
    largest = max(case.latency[subnet])
    ends = [0.]
    for served in range(1, len(queue) + 1):
        ends.append(min(
            (ends[served - size] + case.ms(subnet, size) for size in range(1, min(largest, served) + 1)
             if ends[served - size] + case.ms(subnet, size) <= queue[served - size] + 1e-6), default=float('inf')))
    return ends[-1] < float('inf')


def test_a_server_that_refuses_the_hopeless_does_not_collapse() -> None:
    """Twice what it can serve: running whoever is about to be late would leave batches of one, an eighth of that."""
    small = Subnet(128, 0.5)
    scheduler = SubnetScheduler({small: {1: 10., 8: 10.}}, {small: 70.}, 50.)
    arrivals = [1000 / 1600 * i for i in range(4000)]  # 1,600 a second against 800
    now, waiting, in_time = 0., [], 0
    arrivals_left = iter(arrivals)
    upcoming = next(arrivals_left, None)
    while upcoming is not None:
        while upcoming is not None and upcoming <= now:
            waiting.append(upcoming)
            upcoming = next(arrivals_left, None)
        del waiting[:scheduler.count_hopeless([arrival + 50 - now for arrival in waiting])]
        if not waiting:
            now = upcoming if upcoming is not None else now
            continue
        size = scheduler.choose([arrival + 50 - now for arrival in waiting], 1600).size
        now += 10.
        in_time += sum(now <= arrival + 50 for arrival in waiting[:size])
        del waiting[:size]
    assert in_time > 0.95 * 800 * 2.5


def test_it_is_quick_with_a_thousand_waiting() -> None:
    subnets = [Subnet(size, rate) for size in (128, 160, 192, 224) for rate in (0.5, 0.7, 1.0)]
    scheduler = SubnetScheduler(
        {subnet: {size: 4 + 0.02 * (i + 3) * size for size in (1, 2, 4, 8, 16, 32, 64)}
         for i, subnet in enumerate(subnets)},
        {subnet: 70. + i for i, subnet in enumerate(subnets)}, 100.)
    for queue in ([100.] * 1000, [0.1 * i for i in range(1000)], [1e5] * 1000, [-1., *[100.] * 999]):
        times = []
        for _ in range(20):
            start = time.perf_counter()
            scheduler.choose(queue, 100.)
            times.append(time.perf_counter() - start)
        assert min(times) < 1e-3


def test_between_sizes_latency_is_interpolated_and_never_beyond_the_largest() -> None:
    small, large = Subnet(128, 0.5), Subnet(224, 1.0)
    scheduler = SubnetScheduler({small: {1: 10, 8: 24}, large: {1: 20, 8: 90}}, {small: 70, large: 80}, 1000)
    assert scheduler.choose([1000.] * 50, 0) == (large, 8)
    assert scheduler.choose([40 / 0.8] * 3, 0) == (large, 3)  # 20 + 10 * 2 = 40 ms
    assert scheduler.choose([39.9 / 0.8] * 3, 0) == (small, 3)


def test_keys_may_be_plain_pairs() -> None:
    assert SubnetScheduler({(128, 0.5): {1: 10}}, {(128, 0.5): 70}, 20).choose([20.], 0) == ((128, 0.5), 1)


A, B = Subnet(128, 0.5), Subnet(224, 1.0)


@pytest.mark.parametrize(('latency', 'quality', 'slo', 'message'), [
    ({}, {}, 10, 'of none'),
    ({A: {1: 5}}, {A: 70, B: 80}, 10, '224:1'),
    ({A: {}}, {A: 70}, 10, '128:0.5 is empty'),
    ({A: {0: 5}}, {A: 70}, 10, '0: 5'),
    ({A: {1.5: 5}}, {A: 70}, 10, '1.5: 5'),
    ({A: {1: -5}}, {A: 70}, 10, '1: -5'),
    ({A: {1: float('nan')}}, {A: 70}, 10, '1: nan'),
    ({A: {1: 5}}, {A: float('nan')}, 10, 'quality nan'),
    ({A: {1: 5}}, {A: 70}, 0, 'slo_ms 0'),
    ({A: {1: 5}}, {A: 70}, float('nan'), 'slo_ms nan'),
    ({A: {1: 5}}, {A: 70}, 4, 'slo_ms 4: .* 5 ms; give more'),
])
def test_what_was_not_measured_is_refused(latency: Any, quality: Any, slo: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SubnetScheduler(latency, quality, slo)


def test_calls_that_mean_nothing_are_refused() -> None:
    scheduler = SubnetScheduler({A: {1: 5}}, {A: 70}, 10)
    for queue, rate, message in (([], 0, 'nobody waits'), ([5.], -1, 'rate -1'), ([5.], float('nan'), 'rate nan')):
        with pytest.raises(ValueError, match=message):
            scheduler.choose(queue, rate)


def save(folder: Path, name: str, rows: list[Any], **network: Any) -> Path:
    return folder / save_results(Results('small', rows, {}, NETWORK | network), folder, name)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    subnets = [subnet._asdict() for subnet in (A, B)]
    evaluate = save(tmp_path, 'evaluate', [dict(row, top1=t) for row, t in zip(subnets, (70., 80.), strict=True)])
    profile = save(tmp_path, 'profile', [
        dict(row, batch_size=size, precision='float32', runtime=runtime, latency_ms=cost * (3 + size) * factor)
        for (row, cost), size, (runtime, factor) in itertools.product(
            zip(subnets, (1., 5.), strict=True), (1, 8), (('eager', 1.), ('onnx', 0.5)))
    ] + [dict(model='deit_small_patch16_224', batch_size=1, latency_ms=3.)])
    return evaluate, profile


def test_results_of_evaluate_and_profile_are_read(files: tuple[Path, Path]) -> None:
    scheduler = SubnetScheduler.from_results(*files, 1000, {'runtime': 'eager'})
    expected = SubnetScheduler({A: {1: 4., 8: 11.}, B: {1: 20., 8: 55.}}, {A: 70., B: 80.}, 1000)
    rng = random.Random(0)
    for _ in range(200):
        queue, rate = sorted(rng.uniform(0, 100) for _ in range(rng.randint(1, 12))), rng.uniform(0, 300)
        assert scheduler.choose(queue, rate) == expected.choose(queue, rate)
    assert SubnetScheduler.from_results(*files, 1000, {'runtime': 'onnx'}).choose([13.], 0).subnet == B


def test_results_of_several_settings_or_networks_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    evaluate, profile = files
    with pytest.raises(ValueError, match='several settings'):
        SubnetScheduler.from_results(evaluate, profile, 1000)
    with pytest.raises(ValueError, match='in compile'):
        SubnetScheduler.from_results(evaluate, profile, 1000, {'runtime': 'compile'})
    with pytest.raises(ValueError, match='first and that of'):
        SubnetScheduler.from_results(profile, evaluate, 1000, {'runtime': 'eager'})
    other = save(tmp_path, 'other', json.loads(profile.read_text())['rows'], architecture='supervit_tiny')
    with pytest.raises(ValueError, match='supervit_small and supervit_tiny'):
        SubnetScheduler.from_results(evaluate, other, 1000)


def test_results_of_an_interrupted_run_are_refused(tmp_path: Path) -> None:
    network = {'architecture': 'm'}
    row: dict[str, Any] = {'img_size': 16, 'keep_rate': 1.0, 'batch_size': 1, 'top1': 90., 'latency_ms': 1.}
    paths = [tmp_path / save_results(Results('m', [row], {'partial': partial}, network), tmp_path, name)
             for name, partial in (('evaluate', True), ('profile', False))]
    with pytest.raises(ValueError, match=r'evaluate-partial\.json.*partial'):
        SubnetScheduler.from_results(*paths, slo_ms=10)
