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
from ..programs.program import is_program, load_program, open_session
from ..programs.subnet_modules import FixedSubnet
from ..programs.writing import write_program
from ..results.fingerprint import differing, fingerprint, source_of
from ..results.rows import Results, Row, name_of, results_of, subnet_of
from ..runner import SubnetRunner
from ..subnets import Size, check_img_size, find_size, size_2d
from . import Progress, silent

PRECISIONS = ('float32', 'bfloat16', 'float16')
RUNTIMES = ('eager', 'compile', 'onnx')

_WARM_UP_CALLS = 3
_CLEARLY_MORE = 1.5  # times the multiply-accumulates of another subnet, which noise does not make faster


class _Subject(NamedTuple):
    """What is measured.

    Attributes:
        row: The keys of its rows that name it.
        call: What is called with images.
        input_size: The size of these (C, H, W).
        fixed_setting: The ``precision`` and ``runtime`` of an exported file, which has its own; empty for others.
    """

    row: Row
    call: Callable[[Tensor], Tensor]
    input_size: tuple[int, int, int]
    fixed_setting: Row


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
    """Measure subnets, and other networks in the same rounds, in every combination of the settings.

    Subnets get images of the model's largest size, so resizing them is part of the cost. A row has ``macs`` per image,
    the median ``latency_ms`` of a batch, its 90th percentile ``latency_p90_ms`` and interquartile range
    ``latency_iqr_ms``, the ``throughput`` in images per second at the median, and ``memory_mib``: the weights and what
    one call has allocated beside them at its peak. On a CPU that is what goes through torch's allocator, so not the
    scratch memory of the math libraries under it; of onnxruntime and of exported files it is not known.

    Args:
        model: A SuperViT in evaluation mode, or an exported file, which runs in its own precision and runtime. The
            device is the model's.
        subnets: The subnets (default: all of the grid).
        peers: Names of other models of timm, or exported files of this model. Models of timm run with random weights,
            and one that does not take images of that size gets those of its configuration; ``img_size`` of its row says
            which. A file runs the subnets in its own precision and runtime.
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
        ValueError: If a setting is unknown or not possible, the model has no such subnet, there is no such peer, or a
            file is of another model, or of what is measured anyway.
    """
    batch_sizes, precisions = list(dict.fromkeys(batch_sizes)), list(dict.fromkeys(precisions))
    runtimes, peers = list(dict.fromkeys(runtimes)), list(dict.fromkeys(peers))
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
    subjects = _subnet_subjects(model, subnets)
    for peer in peers:
        subjects += _file_subjects(peer, model, subnets) if is_program(peer) else [_peer_subject(peer, model)]
    _check_distinct(subjects, precisions, runtimes)
    candidates = []
    with tempfile.TemporaryDirectory() as folder, _compiling(len(subjects) * len(settings)):
        for i, subject in enumerate(progress(subjects, 'Preparing')):
            # An exported file has one setting of its own, whatever the others are measured in.
            for setting in [_own_setting(size) for size in batch_sizes] if subject.fixed_setting else settings:
                run = _callable(subject, device, Path(folder) / f'{i}.onnx', **setting)
                for _ in range(_WARM_UP_CALLS):
                    run()
                candidates.append(_Candidate({**subject.row, **setting, **subject.fixed_setting}, subject, run))
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


def _own_setting(batch_size: int) -> Row:
    return dict(batch_size=batch_size, precision='float32', runtime='eager')  # of the call, not of what it runs


def _check_distinct(subjects: Sequence[_Subject], precisions: Sequence[str], runtimes: Sequence[str]) -> None:
    """Refuse a file that runs what is measured anyway, which could not be told apart from it."""
    seen: set[Any] = set()
    for subject in subjects:
        own = tuple(subject.fixed_setting.values())
        for setting in [own] if own else itertools.product(precisions, runtimes):
            key = (subject.row.get('model'), subnet_of(subject.row), *setting)
            if key in seen:
                raise ValueError(
                    f'{name_of(subject.row)} would be measured twice in {" by ".join(setting)}; leave out a --vs, or '
                    f'measure the model itself in another --precision or --runtime')
            seen.add(key)


def _subnet_subjects(model: Any, subnets: Sequence[tuple[Size, float]] | None) -> list[_Subject]:
    return [
        _Subject(
            {**subnet._asdict(), 'macs': cost},
            FixedSubnet(model, subnet) if isinstance(model, SuperViT)
            else functools.partial(model, img_size=subnet.img_size, keep_rate=subnet.keep_rate),
            _input_size(model), model.fixed_setting)
        for subnet, cost in model.subnet_macs(subnets).items()]


def _input_size(model: Any) -> tuple[int, int, int]:
    size = size_2d(model.img_sizes[-1]) if isinstance(model, SuperViT) else model.pretrained_cfg['input_size'][-2:]
    return (model.in_chans, *size)


def _file_subjects(path: str, model: SubnetRunner, subnets: Sequence[tuple[Size, float]] | None) -> list[_Subject]:
    program = load_program(path, model.device)
    if program.device.type != model.device.type:
        raise ValueError(f'{path} runs on {program.device}, and the model on {model.device}; give that as --device')
    if different := differing(fingerprint(model, weights=False), fingerprint(program, weights=False)):
        raise ValueError(f'{path} is of another network than {source_of(model).name}, with other '
                         f'{" and ".join(different)}; give a file that was exported from this one, or measure it alone')
    return _subnet_subjects(program, subnets)


def _peer_subject(name: str, model: SubnetRunner) -> _Subject:
    if ':' not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 1)
        raise ValueError(f'timm has no model {name} to measure beside it, and there is no file of that name; '
                         + (f'did you mean {near[0]}?' if near else 'timm.list_models() lists those that it has'))
    size = _input_size(model)[1:]
    sized: dict[str, Any] = {'img_size': size}
    # Some are created for a size, others take any. Those that cannot say so in many ways, created or called.
    for settings in (sized, {}):
        with contextlib.suppress(Exception):
            peer: Any = timm.create_model(name, **settings).eval()
            if isinstance(peer, SuperViT):
                find_size(check_img_size(size), peer.img_sizes)  # others it would resize
            input_size = (peer.pretrained_cfg['input_size'][0], *size)
            macs = count_macs(peer, input_size)
            break
    else:
        peer = timm.create_model(name).eval()
        input_size = peer.pretrained_cfg['input_size']
        macs = count_macs(peer)
    row = dict(model=name, img_size=check_img_size(input_size[1:]), macs=macs)
    return _Subject(row, peer.to(model.device), input_size, {})


def count_macs(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> int:
    """Return the multiply-accumulates of one forward of one image, as torch's flop counter sees them.

    Matrix products, convolutions and attention are counted. The forward runs on the meta device, on a copy.

    Args:
        model: Any model of timm.
        input_size: Size of the image (C, H, W) (default: that of the model's ``pretrained_cfg``).
    """
    config: Any = model.pretrained_cfg
    meta = copy.deepcopy(model).to('meta').eval().requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        meta(torch.empty(1, *(input_size or config['input_size']), device='meta'))
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


def find_overhead(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Return where fewer multiply-accumulates save no time, since overhead takes most of it.

    Args:
        rows: Rows of ``profile``.

    Returns:
        For each setting in which that is so, two subnets: one that is not faster than the other, which has at least 1.5
        times its multiply-accumulates; of all such pairs the one with the largest ratio.
    """
    pairs: dict[Any, tuple[Row, Row]] = {}
    known = [row for row in rows if subnet_of(row) and row['macs']]
    for row, other in itertools.permutations(known, 2):
        setting, of_other = ([one[key] for key in ('batch_size', 'precision', 'runtime')] for one in (row, other))
        if setting != of_other or row['latency_ms'] < other['latency_ms']:
            continue
        ratio, (cheap, dear) = other['macs'] / row['macs'], pairs.get(str(setting), (row, row))
        if ratio >= _CLEARLY_MORE and ratio > dear['macs'] / cheap['macs']:
            pairs[str(setting)] = row, other
    return list(pairs.values())


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
