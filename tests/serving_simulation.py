"""Timeliness and accuracy under load, simulated, for what one machine cannot show: many replicas, and a GPU.

    python tests/serving_simulation.py docs/serving.json FILE.json

Latencies are those that ``tests/serving_benchmark.py`` measured on a CPU, or those of a GPU: DeiT-S runs 4,586 images a
second on an RTX 3090, as timm publishes it (results/benchmark-infer-amp-nchw-pt240-cu124-rtx3090.csv), subnets in
proportion to their MACs, and each call takes 4 ms more, which is an assumption. Accuracy is published (published.json).
Requests come as in the benchmark, and go to the shorter queue of two replicas drawn at random, as Ray Serve sends them.
A replica does what ``serving.py`` does. Contestants are the scheduler, each subnet alone, and SlackFit as its paper
describes it (SuperServe, NSDI 2025), which refuses whom the scheduler would refuse.
"""
import argparse
import heapq
import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from timm_supervit import Subnet, SubnetScheduler

ROOT = Path(__file__).parents[1]
Policy = Callable[[Sequence[float], float], tuple[Subnet, int]]


def published() -> list[tuple[Subnet, float, float]]:
    """Return the subnets of SuperViT (DeiT-S) with their GMACs and top-1."""
    points = json.loads((ROOT / 'docs' / 'published.json').read_text())['systems'][0]['points']
    subnets = [Subnet(size, rate) for size in (128, 160, 192, 224) for rate in (0.5, 0.7, 1.0)]
    return [(subnet, *point) for subnet, point in zip(subnets, points, strict=True)]


def arrivals(rng: np.random.Generator, rates: Sequence[float], seconds: float, cv2: float) -> list[float]:
    """Return the times of a gamma renewal process, at a rate per second that is constant over equal parts."""
    steps = np.arange(len(rates) + 1) * seconds / len(rates)
    expected = np.concatenate([[0], np.cumsum(rates)]) * seconds / len(rates)
    times = rng.gamma(1 / cv2, cv2, int(2 * expected[-1] + 20 * cv2 + 50)).cumsum() - rng.uniform(0, 1)
    return np.interp(times[(times > 0) & (times < expected[-1])], expected, steps).tolist()


def day(low: float, high: float, parts: int = 20) -> list[float]:
    """Return rates that go from low to high and back."""
    return [low + (high - low) * math.sin(math.pi * (i + 0.5) / parts) ** 2 for i in range(parts)]


def slackfit(scheduler: SubnetScheduler, quality: dict[Subnet, float], sizes: Sequence[int], buckets: int) -> Policy:
    """Return SlackFit: of the latency bucket next below the slack of the oldest, the largest batch, then accuracy."""
    pairs = [
        (scheduler.latency_ms(subnet, size), size, quality[subnet], subnet) for subnet in quality for size in sizes]
    low, high = min(pairs)[0], max(pairs)[0]

    def choose(slack: Sequence[float], rate: float) -> tuple[Subnet, int]:
        fitting = [pair for pair in pairs if pair[0] <= slack[0]] or [min(pairs)]
        index = [int((pair[0] - low) / (high - low) * buckets) for pair in fitting]
        _, size, _, subnet = max(
            (pair for pair, i in zip(fitting, index, strict=True) if i == max(index)), key=lambda pair: pair[1:3])
        return subnet, min(size, len(slack))

    return choose


class Replica:
    """A queue of arrival times, and when the batch that runs ends."""

    def __init__(self) -> None:
        self.queue: deque[float] = deque()
        self.batch: list[float] = []
        self.subnet: Subnet | None = None
        self.rate, self.last = 0., 0.


def simulate(
        scheduler: SubnetScheduler,
        choose: Policy,
        quality: dict[Subnet, float],
        times: Sequence[float],
        replicas: int,
        rng: np.random.Generator,
) -> tuple[float, float]:
    """Return the timeliness in % and the mean accuracy of what was in time."""
    slo = scheduler.slo_ms / 1e3
    servers = [Replica() for _ in range(replicas)]
    ends: list[tuple[float, int]] = []
    in_time, total = 0, 0.

    def start(i: int, now: float) -> None:
        server = servers[i]
        server.batch = []
        slack = [1e3 * (arrival + slo - now) for arrival in server.queue]
        hopeless = scheduler.count_hopeless(slack)
        for _ in range(hopeless):
            server.queue.popleft()
        if server.queue:
            server.subnet, size = choose(slack[hopeless:], server.rate * math.exp((server.last - now) / slo))
            server.batch = [server.queue.popleft() for _ in range(size)]
            heapq.heappush(ends, (now + scheduler.latency_ms(server.subnet, size) / 1e3, i))

    pairs = rng.integers(0, replicas, (len(times), 2)).tolist()
    for (one, other), now in [*zip(pairs, times, strict=True), ((0, 0), math.inf)]:
        while ends and ends[0][0] <= now:
            end, i = heapq.heappop(ends)
            answered = sum(end <= arrival + slo + 1e-9 for arrival in servers[i].batch)
            in_time, total = in_time + answered, total + answered * quality[servers[i].subnet]  # type: ignore[index]
            start(i, end)
        if now == math.inf:
            break
        i = min(one, other, key=lambda i: len(servers[i].queue) + len(servers[i].batch))
        server = servers[i]
        server.rate, server.last = 1 / slo + server.rate * math.exp((server.last - now) / slo), now
        if len(server.queue) < scheduler.most_waiting:
            server.queue.append(now)
            if not server.batch:
                start(i, now)
    return 100 * in_time / len(times), total / max(in_time, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('measured', type=Path, help='what serving_benchmark.py wrote')
    parser.add_argument('output', type=Path)
    options = parser.parse_args()
    measured = json.loads(options.measured.read_text())
    quality = {subnet: top1 for subnet, _, top1 in published()}
    cpu = {subnet: {int(size): ms for size, ms in measured['latency_ms'][str(subnet)].items()} for subnet in quality}
    gpu = {
        subnet: {2 ** i: 4 + 1e3 * 2 ** i * gmacs / 4.61 / 4586 for i in range(7)} for subnet, gmacs, _ in published()}
    content: dict[str, Any] = {'about': __doc__, 'results': []}
    for machine, latency, slo_ms, replicas, seconds in (
            ('CPU', cpu, measured['limit_ms'], 1, 900), ('CPU', cpu, measured['limit_ms'], 100, 10),
            ('RTX 3090', gpu, 100., 1, 20), ('RTX 3090', gpu, 100., 100, 1)):
        scheduler = SubnetScheduler(latency, quality, slo_ms)
        full = latency[Subnet(224, 1.0)]
        capacity = replicas * max(1e3 * size / ms for size, ms in full.items())
        contestants: dict[str, tuple[SubnetScheduler, Policy]] = {'scheduler': (scheduler, scheduler.choose)}
        contestants['SlackFit'] = scheduler, slackfit(scheduler, quality, list(full), 20)
        for subnet in quality:
            alone = SubnetScheduler({subnet: latency[subnet]}, {subnet: quality[subnet]}, slo_ms)
            contestants[str(subnet)] = alone, alone.choose
        loads = {'day': day(0.3 * capacity, 3 * capacity)} | ({'quiet': [0.3 * capacity]} if replicas == 1 else {})
        for load, rates in loads.items():
            for cv2 in (1, 4, 8):
                for name, (own, choose) in contestants.items():
                    timeliness, top1 = simulate(
                        own, choose, quality, arrivals(np.random.default_rng(cv2), rates, seconds, cv2), replicas,
                        np.random.default_rng(0))
                    row = {'machine': machine, 'replicas': replicas, 'load': load, 'cv2': cv2, 'contestant': name,
                           'timeliness': round(timeliness, 2), 'top1': round(top1, 2)}
                    content['results'].append(row)
                    print(row, flush=True)
    options.output.write_text(json.dumps(content, indent=1) + '\n')


if __name__ == '__main__':
    main()
