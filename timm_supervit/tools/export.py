"""Export of a model as files that run without this package: ONNX, and programs of ``torch.export``.

An elastic file runs every subnet: the image size and the keep rate are inputs beside the images. A fixed one is a
single subnet, for runtimes that want static shapes. A file counts as written only when it was loaded again and agreed
with the model; an int8 one when it runs.
"""
import json
import math
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..images.datasets import DEFAULT_WORKERS, IMG_MODES, img_mode, preprocessing
from ..images.labels import label_names
from ..loading.class_names import class_names
from ..models.supervit import SuperViT
from ..programs.int8 import create_calibration_loader, quantize_program
from ..programs.program import checksum, load_program, manifest_path
from ..programs.subnet_modules import ElasticSubnet, FixedSubnet
from ..programs.writing import FORMATS, LEAST_OPSET, write_program
from ..results.files import fill_folder
from ..results.fingerprint import fingerprint
from ..subnets import Subnet, format_size, size_2d
from . import ONE_STEP, Progress, silent

BATCH_SIZES = (1, 5)  # one and several, neither of which is the batch size that the programs are traced with
TOLERANCE = 1e-4  # on logits up to 1, and relative to the largest; the order of sums in matrix products explains less
UNTRAINED_RATE = 0.6  # at which an elastic file is compared too; in float32, 0.6 * 5 is more than 3

_TRACED_BATCH_SIZE = 2
_NUM_DRAWS = 3  # of images to compare on
_PACKAGES = {'onnx': ('timm-supervit', 'timm', 'torch', 'onnx', 'onnxscript', 'onnxruntime'),
             'pt2': ('timm-supervit', 'timm', 'torch')}


class ExportError(RuntimeError):
    """An exported file does not compute what the model does."""


def export(
        model: SuperViT,
        output: str | os.PathLike,
        format: str,
        subnets: Sequence[tuple[Any, float]] = (),
        *,
        quantize: str | None = None,
        calibration_data: Any = None,
        opset: int | None = None,
        workers: int = DEFAULT_WORKERS,
        progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Write a model as one elastic file, or some of its subnets as one fixed file each, with a manifest beside each.

    The files are called ``MODEL.FORMAT`` and ``MODEL-SIZE-RATE.FORMAT``, with ``-int8`` before the ending if they are,
    and their manifests like them with ``.json`` added. Nothing in the folder is touched before all is written and
    checked.

    Args:
        model: The model, on the device that a ``pt2`` program is to run on. It is put into evaluation mode.
        output: Folder for the files; it is made where it is missing.
        format: ``onnx`` or ``pt2``.
        subnets: The subnets to write as fixed files (default: one elastic file of all).
        quantize: ``int8`` writes the int8 forms of ONNX files.
        calibration_data: Images to find the ranges of activations by, of whatever classes, see ``open_images``
            (default: find them at each call).
        opset: Version of ONNX's operators, 18 or later, for runtimes that know no later one (default: that of torch's
            exporter).
        workers: Processes that read these images.
        progress: Follows each file as it is traced, quantized and compared with the model, such as ``tqdm.tqdm``.

    Returns:
        The manifest of each file: what it computes and from what inputs, how to prepare images, the names of the
        classes where they are known, under ``subnets`` the MACs per image, the SHA-256, and the largest difference of
        its logits from the model's at each of ``BATCH_SIZES``; for an int8 file also the size of its float32 form.

    Raises:
        ExportError: If a file's logits differ from the model's by more than ``TOLERANCE``, each time of three, or those
            of an int8 file are not finite.
        OSError: If the folder cannot be written.
        ValueError: If the model has no such subnet, or the format is unknown or has no int8 form.
    """
    if format not in FORMATS:
        raise ValueError(f'format {format!r} is unknown; use {" or ".join(FORMATS)}')
    if quantize and format != 'onnx':
        raise ValueError(f'int8 is for format onnx and not for {format}; export that, or quantize with torchao')
    if calibration_data is not None and not quantize:
        raise ValueError('--calibration-data is for --quantize int8; add it or leave it out')
    if opset is not None and format != 'onnx':
        raise ValueError(f'--opset is for format onnx and not for {format}; leave it out')
    if opset is not None and opset < LEAST_OPSET:
        raise ValueError(f'opset {opset} is older than {LEAST_OPSET}, the first that can be exported to')
    model.eval()
    modules: list[Any] = [FixedSubnet(model, subnet) for subnet in model.subnet_macs(subnets)] or [ElasticSubnet(model)]
    calibration = None if calibration_data is None else create_calibration_loader(calibration_data, model, workers)
    network = fingerprint(model)
    how = {'opset': opset} if opset else {}
    with fill_folder(output) as folder:
        return [
            _export(module, folder, format, network, bool(quantize), calibration, how, progress) for module in modules]


def _export(
        module: Any,
        folder: Path,
        format: str,
        network: dict[str, Any],
        is_int8: bool,
        calibration: Any,
        how: dict[str, Any],
        progress: Progress,
) -> dict[str, Any]:
    facts = _describe(module, format, network)
    stem = facts['model']
    if isinstance(module, FixedSubnet):
        stem += f'-{format_size(module.subnet.img_size)}-{module.subnet.keep_rate}'
    images = _example_images(module.model, _TRACED_BATCH_SIZE)
    checks: dict[str, Any] = {}

    def write(path: Path) -> None:
        for _ in progress(ONE_STEP, f'Tracing {path.name}'):
            write_program(module, images, path, format, facts, **how)

    if not is_int8:
        path = folder / f'{stem}.{format}'
        write(path)
        checks['max_difference'] = _compare(module, path, progress)
    else:
        path = folder / f'{stem}-int8.{format}'
        with tempfile.TemporaryDirectory() as temporary:
            source = Path(temporary) / f'{stem}.{format}'
            write(source)
            _compare(module, source, progress)
            facts |= {'precision': 'int8', 'calibrated': calibration is not None}
            for _ in progress(ONE_STEP, f'Quantizing {path.name}'):
                quantize_program(source, path, json.dumps(facts), calibration)
            checks['float32_bytes'] = source.stat().st_size
        checks['max_difference'] = _compare(module, path, progress, tolerance=math.inf)
    manifest = {'file': path.name, 'bytes': path.stat().st_size, 'sha256': checksum(path), **facts, **checks}
    manifest_path(path).write_text(json.dumps(manifest, indent=2) + '\n', encoding='utf-8')
    return manifest


def _subnets(module: Any) -> dict[Subnet, int | None]:
    return module.model.subnet_macs([module.subnet] if isinstance(module, FixedSubnet) else None)


def _example_images(model: SuperViT, batch_size: int, seed: int = 0) -> Tensor:
    """Return noise in the place of normalized images [B, C, H, W] of the model's largest size, the same each time."""
    shape = (batch_size, model.in_chans, *size_2d(model.img_sizes[-1]))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(model.device)


@torch.inference_mode()
def _compare(module: Any, path: Path, progress: Progress, tolerance: float = TOLERANCE) -> dict[str, float]:
    program, model, subnets = load_program(path), module.model, list(_subnets(module))
    if isinstance(module, ElasticSubnet):
        subnets += [Subnet(img_size, UNTRAINED_RATE) for img_size in model.img_sizes]
    differences = {}
    for batch_size in BATCH_SIZES:
        differences[str(batch_size)] = 0.
        draws = [_example_images(model, batch_size, seed) for seed in range(_NUM_DRAWS)]
        for subnet in progress(subnets, f'Comparing {path.name} with the model, batch {batch_size}'):
            # Where two patches score alike to the last digit, another order of sums keeps the other one; so an image
            # may differ, but what computes something else differs on any image.
            for images in draws:
                expected = model(images, img_size=subnet.img_size, keep_rate=subnet.keep_rate).cpu()
                difference = (program(images, *subnet).cpu() - expected).abs().max().item()
                limit = tolerance * max(1., expected.abs().max().item())
                if difference <= limit and math.isfinite(difference):
                    break
            else:
                raise ExportError(
                    f'{path.name} differs from the model by {difference:.2g} on logits at subnet {subnet} and batch '
                    f'size {batch_size}, more than {limit:.2g}; nothing was written')
            differences[str(batch_size)] = max(differences[str(batch_size)], difference)
    return differences


def _describe(module: Any, format: str, network: dict[str, Any]) -> dict[str, Any]:
    model = module.model
    config = preprocessing(model)
    largest = size_2d(model.img_sizes[-1])
    image = {'dtype': 'float32', 'shape': ['batch', model.in_chans, *largest]}
    inputs = {'image': image}
    subnets = _subnets(module)
    if isinstance(module, ElasticSubnet):
        inputs = {
            'image': image | {'shape': ['batch', model.in_chans, 'height', 'width']},
            'img_size': {'dtype': 'int64', 'shape': [] if module.is_square else [2]},
            'keep_rate': {'dtype': 'float64', 'shape': []},
        }
    return {
        'model': model.pretrained_cfg['architecture'],
        'format': format,
        'precision': 'float32',
        'inputs': inputs,
        'outputs': {'logits': {
            'dtype': 'float32', 'shape': ['batch', *([] if model.global_pool else ['tokens']), model.num_classes]}},
        'preprocessing': {
            'input_size': [model.in_chans, *largest],
            **{key: config[key] for key in ('interpolation', 'crop_pct', 'crop_mode', 'mean', 'std')},
            'input_img_mode': img_mode(model) if model.in_chans in IMG_MODES else None,
        },
        'img_sizes': [size for size in model.img_sizes if any(subnet.img_size == size for subnet in subnets)],
        'subnet': (model.subnet if isinstance(module, ElasticSubnet) else module.subnet)._asdict(),
        'subnets': [{**subnet._asdict(), 'macs': cost} for subnet, cost in subnets.items()],
        'class_names': class_names(model),
        'label_names': label_names(model) or None,
        'network': network,
        'versions': {package: version(package) for package in _PACKAGES[format]},
    }
