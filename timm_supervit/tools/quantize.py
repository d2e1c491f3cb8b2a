"""int8 forms of exported ONNX files, by onnxruntime's own quantizer, and how they compare with float32.

Only the products with weights are quantized, those of linear layers. onnxruntime's defaults would do the same to the
rest of attention and to the patch embedding, which costs far more accuracy than it saves time.
"""
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset as Selection

from ..models.supervit import SuperVisionTransformer
from ..subnets import Subnet, keep_schedule
from .data import create_evaluation_loader, open_dataset
from .evaluate import bad_images, count_hits
from .program import FACTS, Program, load_program
from .progress import Progress, silent
from .results import Row

__all__ = ['LEAST_IMAGES', 'MOST_IMAGES', 'compare_programs', 'create_calibration_loader', 'quantize_program']

LEAST_IMAGES = 16  # ranges of fewer say little about others
MOST_IMAGES = 128  # onnxruntime keeps what it sees of each tensor of each batch

_OPERATORS = ['MatMul', 'Gemm']
_ROUNDS = 11


def create_calibration_loader(data_dir: str, model: SuperVisionTransformer, num_workers: int) -> Any:
    """Return a loader of up to ``MOST_IMAGES`` images, evenly spaced among those of a folder, of whatever classes.

    Raises:
        FileNotFoundError: If there is no such folder.
        RuntimeError: If it holds no image.
        ValueError: If it holds fewer than ``LEAST_IMAGES``.
    """
    dataset = open_dataset(data_dir)
    if len(dataset) < LEAST_IMAGES:
        raise ValueError(
            f'{data_dir} holds {len(dataset)} image{"s" * (len(dataset) != 1)}, and static quantization takes the '
            f'ranges of all activations from them; give {LEAST_IMAGES} or more, or leave out --calibration-data')
    indices = np.linspace(0, len(dataset) - 1, min(len(dataset), MOST_IMAGES)).astype(int).tolist()
    return create_evaluation_loader(Selection(dataset, indices), model, batch_size=16, num_workers=num_workers)


def quantize_program(
        source: str | os.PathLike,
        facts: str,
        calibration: Any = None,
) -> bytes:
    """Return the int8 form of an exported ONNX file, as the content of a file.

    Weights are quantized by channel, to 7 bits, since the products of two 8-bit numbers overflow where a CPU has no
    instructions of its own for them. Activations are quantized to 8 bits, by ranges found at each call, or in advance.

    Args:
        source: The file of ``write_program``.
        facts: What the new file says about itself, as JSON.
        calibration: Batches of images and classes, by which the ranges of activations are found in advance, over all
            subnets of the file; None finds them at each call.

    Raises:
        RuntimeError: If onnxruntime cannot quantize it; the message says where that needs room.
    """
    import onnx
    from google.protobuf.message import DecodeError
    from onnxruntime import quantization

    settings: dict[str, Any] = dict(
        op_types_to_quantize=_OPERATORS, per_channel=True, reduce_range=True, weight_type=quantization.QuantType.QInt8,
        extra_options={'MatMulConstBOnly': True})
    with tempfile.TemporaryDirectory() as folder:
        prepared, quantized = Path(folder) / 'prepared.onnx', Path(folder) / 'int8.onnx'
        try:
            # Of what it can do only to say that it was done, or the quantizer asks for it.
            quantization.quant_pre_process(
                source, prepared, skip_optimization=True, skip_onnx_shape=True, skip_symbolic_shape=True)
            if calibration is None:
                quantization.quantize_dynamic(prepared, quantized, **settings)
            else:
                quantization.quantize_static(
                    prepared, quantized, _Reader(load_program(source), calibration), **settings)
            proto = onnx.load(quantized)
        except (DecodeError, OSError, RuntimeError) as error:  # it does not notice what it could not write
            raise RuntimeError(
                f'onnxruntime could not quantize {os.fspath(source)} ({" ".join(str(error).split())[:300]}); it needs '
                f'room for four copies of that in {tempfile.gettempdir()}') from error
    for entry in proto.metadata_props:
        if entry.key == FACTS:
            entry.value = facts
    return proto.SerializeToString()


class _Reader:
    """What onnxruntime takes the inputs for calibration from: each batch at each subnet of a file."""

    def __init__(self, program: Program, loader: Any) -> None:
        self.inputs = self._inputs(program, loader)

    def _inputs(self, program: Program, loader: Any) -> Iterator[dict[str, Any]]:
        for images, target in loader:
            bad_images(target.clamp(max=0), 1, loader.dataset, skip=None)  # whatever the classes are
            for subnet in program.subnets:
                yield program.named_inputs(images, subnet)

    def get_next(self) -> dict[str, Any] | None:
        return next(self.inputs, None)


def compare_programs(
        model: SuperVisionTransformer,
        float_path: str | os.PathLike,
        int8_path: str | os.PathLike,
        loader: Any = None,
        progress: Progress = silent,
) -> list[Row]:
    """Compare a file with its int8 form, subnet by subnet.

    Args:
        model: The model that the files are of.
        float_path: The float32 file.
        int8_path: The int8 file.
        loader: Batches of images and classes to compare the accuracy on, from ``create_evaluation_loader``.
        progress: Follows the batches.

    Returns:
        Two rows for each subnet of the files, of precision ``float32`` and ``int8``: ``latency_ms``, the median of
        single images in turns; with a loader ``top1`` in percent and ``count``; and for int8 with a loader
        ``kept_same``, the share of the patch tokens kept to the end that float32 keeps too, in percent.

    Raises:
        OSError: If an image cannot be read; the message names it.
    """
    programs = [load_program(path) for path in (float_path, int8_path)]
    subnets = programs[0].subnets
    pairs: list[tuple[Row, Row]] = []
    images = torch.randn(1, *programs[0].pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    for subnet in subnets:
        row = {**subnet._asdict(), 'batch_size': 1, 'runtime': 'onnx', 'macs': programs[0].macs(subnet)}
        float_ms, int8_ms = _latencies(programs, images, subnet)
        pairs.append((
            row | {'precision': 'float32', 'latency_ms': float_ms}, row | {'precision': 'int8', 'latency_ms': int8_ms}))
    if loader is not None:
        tracers = [_Tracer(model, path) for path in (float_path, int8_path)]
        correct, same, count = torch.zeros(2, len(subnets), dtype=torch.int64), torch.zeros(len(subnets)), 0
        for images, target in progress(loader, 'Comparing'):
            bad_images(target, model.num_classes, loader.dataset, skip=None)
            traces = [[tracer(images, subnet) for subnet in subnets] for tracer in tracers]
            correct += torch.stack([count_hits([logits for logits, _ in trace], target)[:, 0] for trace in traces])
            kept = zip(*([kept for _, kept in trace] for trace in traces), strict=True)
            same += torch.tensor([float((one & other).sum() / one[0].sum()) for one, other in kept])
            count += len(target)
        for pair, *hits, kept_same in zip(pairs, *correct.tolist(), same.tolist(), strict=True):
            for row, correct1 in zip(pair, hits, strict=True):
                row |= {'top1': 100 * correct1 / count, 'correct1': correct1, 'count': count}
            pair[1]['kept_same'] = 100 * kept_same / count
    return list(itertools.chain.from_iterable(pairs))


def _latencies(programs: Sequence[Program], images: Tensor, subnet: Subnet) -> list[float]:
    times: list[list[float]] = [[] for _ in programs]
    for _ in range(_ROUNDS + 1):
        for program, seconds in zip(programs, times, strict=True):
            start = time.perf_counter()
            program(images, *subnet)
            seconds.append(time.perf_counter() - start)
    return [1e3 * statistics.median(seconds[1:]) for seconds in times]  # without the first, which warms it up


class _Tracer:
    """Runs an ONNX file and says which patches it kept, from the ranking in each block that drops some."""

    def __init__(self, model: SuperVisionTransformer, path: str | os.PathLike) -> None:
        import onnx
        from onnxruntime import InferenceSession

        self.model = model
        self.program = load_program(path)
        proto = onnx.load(path)
        self.rankings = [node.output[1] for node in proto.graph.node if node.op_type == 'TopK']
        proto.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None) for name in self.rankings)
        self.session = InferenceSession(proto.SerializeToString(), providers=['CPUExecutionProvider'])

    def __call__(self, images: Tensor, subnet: Subnet) -> tuple[Tensor, Any]:
        """Return the logits [B, num_classes] and which patches were kept to the end [B, N]."""
        model = self.model
        logits, *orders = self.session.run(
            ['logits', *self.rankings], self.program.named_inputs(images, subnet))
        num_prefix, num_patches = model.num_prefix_tokens, model.num_patches(subnet.img_size)
        schedule = keep_schedule(num_patches, subnet.keep_rate, model.drop_layers, len(model.blocks))
        places = np.arange(num_prefix + num_patches)[None].repeat(len(images), 0)
        for layer, order in zip(model.drop_layers if self.program.is_elastic else schedule, orders, strict=True):
            num_keep = schedule.get(layer, order.shape[1] - num_prefix)
            places = np.take_along_axis(places, order[:, :num_prefix + num_keep], 1)
        kept = np.zeros((len(images), num_patches), bool)
        np.put_along_axis(kept, places[:, num_prefix:] - num_prefix, True, 1)
        return torch.from_numpy(logits), kept
