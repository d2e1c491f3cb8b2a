"""Measuring what subnets and other networks cost: multiply-accumulates, latency, throughput and peak memory.

All candidates are measured in the same rounds, each once a round and in a new order each time, so that a machine that
gets slower or faster on the way treats them alike. Each measurement follows two calls that warm it up.
"""
import contextlib
import copy
import difflib
import functools
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
from torch.utils.flop_counter import FlopCounterMode

from ..models.supervit import SuperViT
from ..programs.program import open_session
from ..programs.subnet_modules import FixedSubnet
from ..programs.writing import write_program
from ..results.rows import Results, Row, results_of
from ..runner import SubnetRunner, setting_of
from ..subnets import Size, size_2d
from . import Progress, silent

PRECISIONS = ('float32', 'bfloat16', 'float16')
RUNTIMES = ('eager', 'compile', 'onnx')

_WARM_UP_CALLS = 3


class _Subject(NamedTuple):
    """What is measured: the keys of its rows that name it, what is called with images, and their size (C, H, W)."""

    row: Row
    call: Callable[[Tensor], Tensor]
    input_size: tuple[int, int, int]


class _Candidate(NamedTuple):
    """A subject in one setting: the row so far, and a call to measure."""

    row: Row
    subject: _Subject
    run: Callable[[], Any]


def profile(
        model: SubnetRunner,
        subnets: Sequence[tuple[Size, float]] | None = None,
        *,
        peers: Sequence[str] = (),
        batch_sizes: Sequence[int] = (1,),
        precisions: Sequence[str] = ('float32',),
        runtimes: Sequence[str] = ('eager',),
        rounds: int = 30,
        progress: Progress = silent,
) -> Results:
    """Measure subnets, and other networks of timm in the same rounds, in every combination of the settings.

    Subnets get images of the model's largest size, so resizing them is part of the cost. A row has ``macs`` per image,
    the median ``latency_ms`` of a batch, its 90th percentile ``latency_p90_ms`` and interquartile range
    ``latency_iqr_ms``, the ``throughput`` in images per second at the median, and ``memory_mib``: the weights and what
    one call has allocated beside them at its peak. On a CPU that is what goes through torch's allocator, so not the
    scratch memory of the math libraries under it; of onnxruntime and of exported files it is not known.

    Args:
        model: A SuperViT in evaluation mode, or an exported file, which runs in its own precision and runtime. The
            device is the model's.
        subnets: The subnets (default: all of the grid).
        peers: Names of other models of timm. They run with random weights at the input size of their configuration.
        batch_sizes: Numbers of images in a batch.
        precisions: ``float32``, or ``bfloat16`` or ``float16`` by autocast.
        runtimes: ``eager``, ``compile`` (``torch.compile``) or ``onnx`` (onnxruntime, in float32 only).
        rounds: How often each candidate is measured, at least 2.
        progress: Follows the networks as they are prepared and then the rounds, such as ``tqdm.tqdm``.

    Returns:
        One row for each network and setting. Interrupted by Ctrl-C after the first round, it is of the rounds that were
        complete, and ``info['partial']`` is True.

    Raises:
        RuntimeError: If onnxruntime cannot run on the device.
        ValueError: If a setting is unknown or not possible, the model has no such subnet, or there is no such peer.
    """
    settings: list[Row] = [
        dict(batch_size=batch_size, precision=precision, runtime=runtime)
        for batch_size, precision, runtime in itertools.product(batch_sizes, precisions, runtimes)
    ]
    for setting in settings:
        _check_setting(**setting)
    if rounds < 2:
        raise ValueError(f'rounds {rounds} shows no spread; use 2 or more')
    if not isinstance(model, SuperViT) and (*precisions, *runtimes) != ('float32', 'eager'):
        raise ValueError('an exported file runs in its own precision and runtime; leave --precision and --runtime out')
    device = model.device
    subjects = [*_subnet_subjects(model, subnets), *(_peer_subject(peer, device) for peer in peers)]
    candidates = []
    with tempfile.TemporaryDirectory() as folder, _compiling(len(subjects) * len(settings)):
        for i, subject in enumerate(progress(subjects, 'Preparing')):
            for setting in settings:
                run = _callable(subject, device, Path(folder) / f'{i}.onnx', **setting)
                for _ in range(_WARM_UP_CALLS):
                    run()
                own = {} if 'model' in subject.row else setting_of(model, setting['precision'], setting['runtime'])
                candidates.append(_Candidate({**subject.row, **setting, **own}, subject, run))
        memory = [_peak_memory(candidate, device) for candidate in candidates]
        times, partial = _measure(candidates, rounds, progress)
    rows = [
        candidate.row | _summary(seconds, candidate.row['batch_size']) | {'memory_mib': mib}
        for candidate, seconds, mib in zip(candidates, times, memory, strict=True)
    ]
    info = {'partial': partial, 'rounds': len(times[0]), **_describe(device)}
    return results_of(model, rows, info, weights=False)


def _check_setting(batch_size: int, precision: str, runtime: str) -> None:
    if batch_size < 1:
        raise ValueError(f'batch size {batch_size} is not positive')
    if precision not in PRECISIONS:
        raise ValueError(f'precision {precision!r} is unknown; use one of {", ".join(PRECISIONS)}')
    if runtime not in RUNTIMES:
        raise ValueError(f'runtime {runtime!r} is unknown; use one of {", ".join(RUNTIMES)}')
    if runtime == 'onnx' and precision != 'float32':
        raise ValueError(f'runtime onnx runs in float32 only, not in {precision}; measure it in a run of its own')


def _subnet_subjects(model: Any, subnets: Sequence[tuple[Size, float]] | None) -> list[_Subject]:
    input_size = (model.in_chans, *size_2d(model.img_sizes[-1]))
    return [
        _Subject(
            {**subnet._asdict(), 'macs': cost},
            FixedSubnet(model, subnet) if isinstance(model, SuperViT)
            else functools.partial(model, img_size=subnet.img_size, keep_rate=subnet.keep_rate),
            input_size)
        for subnet, cost in model.subnet_macs(subnets).items()]


def _peer_subject(name: str, device: torch.device) -> _Subject:
    if ':' not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 1)
        raise ValueError(f'timm has no model {name} to measure beside it; '
                         + (f'did you mean {near[0]}?' if near else 'timm.list_models() lists those that it has'))
    module: Any = timm.create_model(name).eval()
    return _Subject(dict(model=name, macs=count_macs(module)), module.to(device), module.pretrained_cfg['input_size'])


def count_macs(model: nn.Module) -> int:
    """Return the multiply-accumulates of one forward of one image, as torch's flop counter sees them.

    Matrix products, convolutions and attention are counted. The forward runs on the meta device, on a copy.

    Args:
        model: Any model of timm; the image has the size of its ``pretrained_cfg``.
    """
    config: Any = model.pretrained_cfg
    meta = copy.deepcopy(model).to('meta').eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        meta(torch.empty(1, *config['input_size'], device='meta'))
    return counter.get_total_flops() // 2


@contextlib.contextmanager
def _compiling(count: int) -> Iterator[None]:
    # All subnets compile the same forward, and torch would go back to eager after the eighth.
    config = torch._dynamo.config
    with config.patch(cache_size_limit=max(count, config.cache_size_limit)):
        yield


def _callable(
        subject: _Subject,
        device: torch.device,
        onnx_path: Path,
        batch_size: int,
        precision: str,
        runtime: str,
) -> Callable[[], Any]:
    images = torch.randn(batch_size, *subject.input_size, device=device)
    call: Any = subject.call
    if runtime == 'onnx':
        if not onnx_path.exists():
            write_program(call, torch.randn(2, *subject.input_size, device=device), onnx_path, 'onnx')
        session, array = open_session(onnx_path, device), images.cpu().numpy()
        return lambda: session.run(None, {'image': array})
    forward = torch.compile(call, dynamic=False) if runtime == 'compile' else call
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
    module = candidate.subject.call
    if not isinstance(module, nn.Module) or candidate.row['runtime'] == 'onnx' or device.type not in ('cpu', 'cuda'):
        return None
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
