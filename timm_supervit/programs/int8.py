"""int8 forms of exported ONNX files, by onnxruntime's own quantizer.

Only the products with weights are quantized, those of linear layers. onnxruntime's defaults would do the same to the
rest of attention and to the patch embedding, which costs far more accuracy than it saves time.
"""
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset
from torch.utils.data import Subset as Selection

from ..images.datasets import create_evaluation_loader, open_dataset, open_images
from ..images.passes import bad_images
from ..runner import SubnetRunner
from .program import FACTS, Program, load_program

LEAST_IMAGES = 16  # ranges of fewer say little about others
MOST_IMAGES = 128  # onnxruntime keeps what it sees of each tensor of each batch

_OPERATORS = ['MatMul', 'Gemm']


def create_calibration_loader(images: Any, model: SubnetRunner, num_workers: int) -> Any:
    """Return a loader of up to ``MOST_IMAGES`` images, evenly spaced among those of ``open_images``."""
    if isinstance(images, str | os.PathLike):
        images = open_dataset(os.fspath(images), '', model=model, class_map='')  # whatever the classes are
    images = open_images(images, model)
    dataset: Any = images.dataset
    if isinstance(dataset, IterableDataset):
        raise ValueError('a stream of images has none to pick evenly from; give a folder with --calibration-data')
    if len(dataset) < LEAST_IMAGES:
        number = f'{len(dataset)} image{"" if len(dataset) == 1 else "s"}'
        raise ValueError(
            f'{images.data_dir or "the data set"} holds {number}, and static quantization takes the '
            f'ranges of all activations from them; give {LEAST_IMAGES} or more, or leave out --calibration-data')
    indices = np.linspace(0, len(dataset) - 1, min(len(dataset), MOST_IMAGES)).astype(int).tolist()
    # Small batches: onnxruntime has all tensors of one at once.
    return create_evaluation_loader(
        images._replace(dataset=Selection(dataset, indices)), model, batch_size=4, num_workers=num_workers,
        labeled=False)


def quantize_program(
        source: str | os.PathLike,
        path: str | os.PathLike,
        facts: str,
        calibration: Any = None,
) -> None:
    """Write the int8 form of an exported ONNX file.

    Weights are quantized by channel, to 7 bits, since the products of two 8-bit numbers overflow where a CPU has no
    instructions of its own for them. Activations are quantized to 8 bits, by ranges found at each call, or in advance.

    Args:
        source: The file of ``write_program``.
        path: The new file.
        facts: What the new file says about itself, as JSON.
        calibration: Batches of images and classes, by which the ranges of activations are found in advance, over all
            subnets of the file; None finds them at each call.
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
    onnx.save(proto, path)


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
