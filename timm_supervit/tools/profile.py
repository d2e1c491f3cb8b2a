"""Measuring what subnets and other networks cost: multiply-accumulates, latency, throughput and peak memory.

All candidates are measured in the same rounds, each once a round and in a new order each time, so that a machine that
gets slower or faster on the way treats them alike. Each measurement follows two calls that warm it up.
"""
import contextlib
import difflib
import itertools
import json
import platform
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from ..fingerprint import fingerprint
from ..models.supervit import SuperVisionTransformer
from ..subnets import Subnet, size_2d
from .export import write_program
from .fixed_subnet import FixedSubnet
from .macs import count_macs
from .program import open_session
from .progress import Progress, silent
from .results import Results, Row

__all__ = ['PRECISIONS', 'RUNTIMES', 'peak_allocation', 'profile']

PRECISIONS = ('float32', 'bfloat16', 'float16')
RUNTIMES = ('eager', 'compile', 'onnx')

_WARM_UP_CALLS = 3


class _Network(NamedTuple):
    """A network to measure: the keys of its rows that name it, and the size of its input (C, H, W)."""

    row: Row
    module: nn.Module
    input_size: tuple[int, int, int]


class _Candidate(NamedTuple):
    """A network in one setting: the row so far, and a call to measure."""

    row: Row
    network: _Network
    run: Callable[[], Any]


def profile(
        model: SuperVisionTransformer,
        subnets: Sequence[Subnet] | None = None,
        name: str = '',
        peers: Sequence[str] = (),
        batch_sizes: Sequence[int] = (1,),
        precisions: Sequence[str] = ('float32',),
        runtimes: Sequence[str] = ('eager',),
        device: torch.device | str = 'cpu',
        rounds: int = 30,
        progress: Progress = silent,
) -> Results:
    """Measure subnets, and other networks of timm in the same rounds, in every combination of the settings.

    Subnets get images of the model's largest size, so resizing them is part of the cost. A row has ``macs`` per image,
    the median ``latency_ms`` of a batch, its 90th percentile ``latency_p90_ms`` and interquartile range
    ``latency_iqr_ms``, the ``throughput`` in images per second at the median, and ``memory_mib``: the weights and what
    one call has allocated beside them at its peak. On a CPU that is what goes through torch's allocator, so not the
    scratch memory of the math libraries under it; of onnxruntime it is not known.

    Args:
        model: The model, in evaluation mode; it is moved to the device.
        subnets: The subnets (default: all of its grid).
        name: Name of the model, for the results.
        peers: Names of other models of timm. They run with random weights at the input size of their configuration.
        batch_sizes: Numbers of images in a batch.
        precisions: ``float32``, or ``bfloat16`` or ``float16`` by autocast.
        runtimes: ``eager``, ``compile`` (``torch.compile``) or ``onnx`` (onnxruntime, in float32 only).
        device: Device to measure on.
        rounds: How often each candidate is measured, at least 2.
        progress: Follows the networks as they are prepared and then the rounds, such as ``tqdm.tqdm``.

    Returns:
        One row for each network and setting. Interrupted by Ctrl-C after the first round, it is of the rounds that were
        complete, and ``info['partial']`` is True.

    Raises:
        RuntimeError: If onnxruntime cannot run on the device, or there is no such peer.
        ValueError: If a setting is unknown, onnx is asked for in another precision, or the model has no such subnet.
    """
    settings: list[Row] = [
        dict(batch_size=batch_size, precision=precision, runtime=runtime)
        for batch_size, precision, runtime in itertools.product(batch_sizes, precisions, runtimes)
    ]
    for setting in settings:
        _check_setting(**setting)
    if rounds < 2:
        raise ValueError(f'rounds {rounds} shows no spread; use 2 or more')
    device = torch.device(device)
    networks = _networks(model, model.subnets if subnets is None else subnets, peers, device)
    candidates = []
    with tempfile.TemporaryDirectory() as folder, _compiling(len(networks) * len(settings)):
        for i, network in enumerate(progress(networks, 'Preparing')):
            for setting in settings:
                run = _callable(network, device, Path(folder) / f'{i}.onnx', **setting)
                for _ in range(_WARM_UP_CALLS):
                    run()
                candidates.append(_Candidate(network.row | setting, network, run))
        memory = [_peak_memory(candidate, device) for candidate in candidates]
        times, partial = _measure(candidates, rounds, progress)
    rows = [
        candidate.row | _summary(seconds, candidate.row['batch_size']) | {'memory_mib': mib}
        for candidate, seconds, mib in zip(candidates, times, memory, strict=True)
    ]
    info = {'partial': partial, 'rounds': len(times[0]), **_describe(device)}
    return Results(name, rows, info, fingerprint(model, weights=False))


def _check_setting(batch_size: int, precision: str, runtime: str) -> None:
    if batch_size < 1:
        raise ValueError(f'batch size {batch_size} is not positive')
    if precision not in PRECISIONS:
        raise ValueError(f'precision {precision!r} is unknown; use one of {", ".join(PRECISIONS)}')
    if runtime not in RUNTIMES:
        raise ValueError(f'runtime {runtime!r} is unknown; use one of {", ".join(RUNTIMES)}')
    if runtime == 'onnx' and precision != 'float32':
        raise ValueError(f'runtime onnx runs in float32 only, not in {precision}; measure it in a run of its own')


def _networks(
        model: SuperVisionTransformer,
        subnets: Sequence[Subnet],
        peers: Sequence[str],
        device: torch.device,
) -> list[_Network]:
    networks = []
    for subnet in subnets:
        row = dict(subnet._asdict(), macs=model.macs(subnet))
        input_size = (model.in_chans, *size_2d(model.img_sizes[-1]))
        networks.append(_Network(row, FixedSubnet(model.to(device), subnet), input_size))
    for peer in peers:
        if ':' not in peer and not timm.is_model(peer):
            near = difflib.get_close_matches(peer, timm.list_models(), 1)
            raise ValueError(f'timm has no model {peer} to measure beside it; '
                             + (f'did you mean {near[0]}?' if near else 'timm.list_models() lists those that it has'))
        module: Any = timm.create_model(peer).eval()
        networks.append(_Network(
            dict(model=peer, macs=count_macs(module)), module.to(device), module.pretrained_cfg['input_size']))
    return networks


@contextlib.contextmanager
def _compiling(count: int) -> Iterator[None]:
    # All subnets compile the same forward, and torch would go back to eager after the eighth.
    config = torch._dynamo.config
    with config.patch(cache_size_limit=max(count, config.cache_size_limit)):
        yield


def _callable(
        network: _Network,
        device: torch.device,
        onnx_path: Path,
        batch_size: int,
        precision: str,
        runtime: str,
) -> Callable[[], Any]:
    images = torch.randn(batch_size, *network.input_size, device=device)
    if runtime == 'onnx':
        if not onnx_path.exists():
            write_program(network.module, torch.randn(2, *network.input_size, device=device), onnx_path, 'onnx')
        session, array = open_session(onnx_path, device), images.cpu().numpy()
        return lambda: session.run(None, {'image': array})
    forward = torch.compile(network.module, dynamic=False) if runtime == 'compile' else network.module
    dtype = getattr(torch, precision)

    @torch.inference_mode()
    def run() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=precision != 'float32'):
            return forward(images)

    return run


def _measure(
        candidates: Sequence[_Candidate],
        rounds: int,
        progress: Progress,
) -> tuple[list[list[float]], bool]:
    """Return the seconds that each call took, for each candidate, and whether an interrupt cut the rounds short."""
    # Timer would run on one thread, and it waits for the device before it stops the clock.
    timers = [Timer('run()', globals={'run': c.run}, num_threads=torch.get_num_threads()) for c in candidates]
    times: list[list[float]] = [[] for _ in candidates]
    order = list(range(len(candidates)))
    shuffle = random.Random(0).shuffle
    try:
        for _ in progress(range(rounds), 'Measuring'):
            shuffle(order)
            seconds = {i: timers[i].timeit(1).times for i in order}
            # In one go, so that an interrupt finds whole rounds.
            times = [known + seconds[i] for i, known in enumerate(times)]
    except KeyboardInterrupt:
        if not times[0]:
            raise
        return times, True
    return times, False


def _summary(seconds: Sequence[float], batch_size: int) -> Row:
    low, median, high, p90 = (1e3 * q for q in np.percentile(seconds, [25, 50, 75, 90]).tolist())
    return dict(
        latency_ms=median, latency_p90_ms=p90, latency_iqr_ms=high - low, throughput=1e3 * batch_size / median)


def _peak_memory(candidate: _Candidate, device: torch.device) -> float | None:
    """Return the MiB of the weights and of what a call allocates beside them at its peak; None where it is unknown."""
    if candidate.row['runtime'] == 'onnx' or device.type not in ('cpu', 'cuda'):
        return None
    module = candidate.network.module
    weights = sum(tensor.nbytes for tensor in itertools.chain(module.parameters(), module.buffers()))
    return (weights + peak_allocation(candidate.run, device)) / 2 ** 20


def peak_allocation(run: Callable[[], Any], device: torch.device | str) -> int:
    """Return the bytes that a call has allocated at its peak, through torch's allocator.

    Args:
        run: The call.
        device: Device whose memory is counted, a CPU or a CUDA device.
    """
    device = torch.device(device)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    # The trace is the only public form in which each single allocation is seen; sums over an operator hide its peak.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'trace.json'
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())['traceEvents']
    changes = [event['args'] for event in events if event['name'] == '[memory]']
    changes.sort(key=lambda change: change['Ev Idx'])
    return max(itertools.accumulate(change['Bytes'] for change in changes), default=0)


def _describe(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or platform.machine()
    return {'device': str(device), 'device_name': name, 'threads': torch.get_num_threads(), 'torch': torch.__version__}
