"""Which subnet a server runs next: accurate ones when it is quiet, fast ones in a burst, so that no request is late.

The setting is that of SuperServe (Khare et al., NSDI 2025, arXiv 2312.16733), whose SlackFit also chooses subnet and
batch by the time that is left to the oldest request, without a forecast. It spends that time on the largest batch that
fits into it; here everyone who waits counts, and the rate of arrivals, so that a quiet server runs its best subnet.
"""
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import NamedTuple

import numpy as np

from .results.rows import difference, load_results, name_of, subnet_of
from .subnets import Subnet

# Share of the time left that a plan may use. The rest is for who comes meanwhile, and for calls that take longer than
# measured. In simulations of bursts, 1 is less timely, 0.6 hardly more timely and less accurate.
_USABLE = 0.8


class Batch(NamedTuple):
    """What to run next.

    Attributes:
        subnet: The subnet.
        size: How many of the oldest requests to run on it, in one call.
    """

    subnet: Subnet
    size: int


class SubnetScheduler:
    """Chooses the subnet and the batch that a server of one model runs next. It keeps no state and reads no clock.

    A plan is a subnet and a batch size, in which all who wait are run, oldest first. ``choose`` takes the most accurate
    subnet that keeps up with the arrivals and has a plan by which nobody is late, and of its plans the one of most
    images per second. If there is none, the server is overloaded, and the fastest subnet runs.

    More time left never makes the subnet less accurate, and a higher rate never more accurate, where more accurate
    subnets are nowhere faster. It is never one with which the oldest request is late while another is in time.

    Attributes:
        slo_ms: Time from the arrival of a request in which it should be answered, in ms (service level objective).
        subnets: The subnets, most accurate first.
        fastest: The one of most images per second.
        most_waiting: How many requests the fastest subnet serves in ``slo_ms``. More cannot wait and all be in time.
        shortest_ms: Latency of the shortest call, of one image.
    """

    def __init__(
            self,
            latency_ms: Mapping[Subnet, Mapping[int, float]],
            quality: Mapping[Subnet, float],
            slo_ms: float,
    ) -> None:
        """Make a scheduler from what was measured.

        Args:
            latency_ms: For each subnet the latency of a batch in ms, by its size, as in ``{1: 12.7, 8: 74.0}``. Between
                two sizes it is interpolated; batches are never larger than the largest.
            quality: The accuracy of each of these subnets, in any unit.
            slo_ms: See the attribute.

        Raises:
            ValueError: If the two are not of the same subnets, a value is none of such a quantity, or no subnet answers
                in ``slo_ms``.
        """
        if not 0 < slo_ms < math.inf:
            raise ValueError(f'slo_ms {slo_ms} is no time to answer in; give a number of ms above 0')
        if not latency_ms or latency_ms.keys() != quality.keys():
            odd = sorted({str(Subnet(*subnet)) for subnet in latency_ms.keys() ^ quality.keys()})
            raise ValueError(f'latency_ms and quality are not of the same subnets ({", ".join(odd) or "of none"}); '
                             f'measure both of each subnet')
        for subnet, value in quality.items():
            if not math.isfinite(value):
                raise ValueError(f'quality {value} of {Subnet(*subnet)} is no accuracy; give a number')
        self.slo_ms = slo_ms
        self._latency = {
            Subnet(*subnet): _interpolate(Subnet(*subnet), measured) for subnet, measured in latency_ms.items()}
        # Batch sizes to plan with, that of most images per second first.
        self._sizes = {
            subnet: sorted(
                {*latency_ms[subnet], *_powers_of_2(len(latency) - 1)}, key=lambda size: latency[size] / size)
            for subnet, latency in self._latency.items()}
        # Images per second in batches of at most half the time: who comes when one has started waits for it too.
        self._throughput = throughput = {
            subnet: 1e3 * max(
                size / latency[size] for size in self._sizes[subnet] if size == 1 or 2 * latency[size] <= slo_ms)
            for subnet, latency in self._latency.items()}
        self.subnets = sorted(throughput, key=lambda subnet: (-quality[subnet], -throughput[subnet]))
        self.fastest = max(self.subnets, key=lambda subnet: throughput[subnet])
        self.most_waiting = max(1, int(throughput[self.fastest] * slo_ms / 1e3))
        self.shortest_ms = min(latency[1] for latency in self._latency.values())
        if self.shortest_ms > slo_ms:
            raise ValueError(
                f'no subnet answers in slo_ms {slo_ms:g}: the shortest call takes {self.shortest_ms:.4g} ms; give more')

    @classmethod
    def from_results(
            cls,
            evaluate: str | os.PathLike,
            profile: str | os.PathLike,
            slo_ms: float,
            setting: Mapping[str, str] | None = None,
    ) -> 'SubnetScheduler':
        """Return the scheduler of what ``supervit evaluate`` and ``supervit profile`` wrote: top-1 and median latency.

        Subnets that are in one of the files only take no part.

        Args:
            evaluate: The JSON file of ``supervit evaluate``.
            profile: The JSON file of ``supervit profile``, best with several ``--batch-size``.
            slo_ms: See the class.
            setting: The ``precision`` and ``runtime`` of the rows to take, needed where there are several.

        Raises:
            OSError: If a file cannot be read.
            ValueError: If the files are of different networks, or of several settings, or have no subnet in common.
        """
        results = {key: load_results(path) for key, path in {'top1': evaluate, 'latency_ms': profile}.items()}
        for path, found_there in zip((evaluate, profile), results.values(), strict=True):
            if found_there.partial:
                raise ValueError(f'{path} is of an interrupted run, marked partial; let it run to the end')
        if what := difference(*results.values()):
            raise ValueError(f'{evaluate} and {profile} are of different networks: {what}; give results of one network')
        measured: dict[str, dict[Subnet, dict[int, float]]] = {'top1': {}, 'latency_ms': {}}
        for (key, found), path in zip(measured.items(), (evaluate, profile), strict=True):
            for row in results[key].rows:
                subnet = subnet_of(row)
                if subnet is None or row.get(key) is None or any(
                        row.get(name, value) != value for name, value in (setting or {}).items()):
                    continue
                size = row.get('batch_size', 1) if key == 'latency_ms' else 1
                if size in found.setdefault(subnet, {}):
                    raise ValueError(f'{path}: {key} of {name_of(row)} in several settings; choose precision and '
                                     f'runtime, or give a file of one setting')
                found[subnet][size] = row[key]
        common = measured['top1'].keys() & measured['latency_ms'].keys()
        if not common:
            raise ValueError(
                f'{evaluate} and {profile} have no subnet in common with top1 and latency_ms'
                f'{" in " + " and ".join(setting.values()) if setting else ""}; give the file of "supervit evaluate" '
                f'first and that of "supervit profile" second, of the same subnets')
        return cls(
            {subnet: measured['latency_ms'][subnet] for subnet in common},
            {subnet: measured['top1'][subnet][1] for subnet in common}, slo_ms)

    def choose(self, slack_ms: Sequence[float], rate: float) -> Batch:
        """Return the subnet to run next, and how many of the oldest requests to run on it.

        Args:
            slack_ms: The time left to each request that waits, in ms, oldest first; at least one.
            rate: Arrivals per second of late, such as those of the last ``slo_ms``.

        Raises:
            ValueError: If nobody waits, or the rate is no number from 0.
        """
        if not len(slack_ms):
            raise ValueError('slack_ms is empty: nobody waits, so there is nothing to run; ask when a request is there')
        if not rate >= 0:
            raise ValueError(f'rate {rate} is no number of arrivals per second; give a number from 0')
        for subnet in self.subnets:
            if rate <= self._throughput[subnet] and (size := self._plan(subnet, slack_ms, _USABLE)):
                return Batch(subnet, size)
        if size := self._plan(self.fastest, slack_ms):
            return Batch(self.fastest, size)
        # Not all will be in time, but the oldest, if that is possible at all.
        batches = [Batch(subnet, min(size, len(slack_ms))) for subnet in self.subnets for size in self._sizes[subnet]]
        in_time = [batch for batch in batches if self._latency[batch.subnet][batch.size] <= slack_ms[0]]
        return max(in_time or [batch for batch in batches if batch.subnet == self.fastest],
                   key=lambda batch: batch.size / self._latency[batch.subnet][batch.size])

    def count_hopeless(self, slack_ms: Sequence[float]) -> int:
        """Return how many of the oldest requests to refuse, so that all others can be in time.

        Those whom no subnet answers in time, and under overload as many more as it takes until a plan of the fastest
        subnet brings all others in time. To serve them would cost others their time: a server that runs whoever is
        about to be late runs small batches, so that soon all are about to be late.

        Args:
            slack_ms: See ``choose``; may be empty.
        """
        low, high = 0, len(slack_ms)
        while low < high:  # fewer are in time sooner, so that bisection finds the first of them
            middle = (low + high) // 2
            if self._plan(self.fastest, slack_ms[middle:]) or (
                    middle == len(slack_ms) - 1 and self.shortest_ms <= slack_ms[middle]):
                high = middle
            else:
                low = middle + 1
        return low

    def latency_ms(self, subnet: Subnet, size: int) -> float:
        """Return the measured latency of a batch, interpolated between the sizes that were measured."""
        return self._latency[subnet][size]

    def _plan(self, subnet: Subnet, slack_ms: Sequence[float], usable: float = 1.) -> int:
        """Return the size of the first batch by which all are in time on a subnet, 0 if by none."""
        latency, count = self._latency[subnet], len(slack_ms)
        for size in self._sizes[subnet]:
            whole, rest = divmod(count, size)
            if all(i * latency[size] <= usable * slack for i, slack in enumerate(slack_ms[:whole * size:size], 1)) and (
                    not rest or whole * latency[size] + latency[rest] <= usable * slack_ms[whole * size]):
                return min(size, count)
        return 0


def _powers_of_2(largest: int) -> list[int]:
    return [2 ** i for i in range(largest.bit_length())]


def _interpolate(subnet: Subnet, measured: Mapping[int, float]) -> list[float]:
    """Return the latency of a subnet in ms for each batch size, from 0 to the largest that was measured."""
    for size, latency in measured.items():
        if isinstance(size, bool) or not isinstance(size, Integral) or size < 1 or not 0 < latency < math.inf:
            raise ValueError(f'latency_ms of {subnet} has {size!r}: {latency!r}, which is no batch size and its '
                             f'latency in ms; give them as in {{1: 12.7, 8: 74.0}}')
    if not measured:
        raise ValueError(f'latency_ms of {subnet} is empty; give the latency of a batch size, as in {{1: 12.7}}')
    sizes = sorted(measured)
    return np.interp(range(sizes[-1] + 1), sizes, [measured[size] for size in sizes]).tolist()
