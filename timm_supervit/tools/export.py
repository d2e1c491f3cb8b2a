"""Export of a model as files that run without this package: ONNX, and programs of ``torch.export``.

An elastic file runs every subnet: the image size and the keep rate are inputs beside the images. A fixed one is a
single subnet, for runtimes that want static shapes. A file counts as written only when it was loaded again and agreed
with the model.
"""
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..fingerprint import fingerprint
from ..models.supervit import SuperVisionTransformer
from ..subnets import Subnet, format_size, size_2d
from .class_names import class_names
from .data import preprocessing
from .elastic import ElasticNetwork, Requirement
from .files import fill_folder
from .fixed_subnet import FixedSubnet
from .program import FACTS, load_program, manifest_path
from .progress import Progress, silent
from .quantize import compare_programs, quantize_program
from .results import Results, save_results

__all__ = ['BATCH_SIZES', 'FORMATS', 'TOLERANCE', 'UNTRAINED_RATE', 'ExportError', 'Int8', 'export_model',
           'write_program']

BATCH_SIZES = (1, 5)  # one and several, neither of which is the batch size that the programs are traced with
TOLERANCE = 1e-4  # on logits up to 1, and relative to the largest; the order of sums in matrix products explains less
UNTRAINED_RATE = 0.6  # at which an elastic file is compared too; in float32, 0.6 * 5 is more than 3
FORMATS = ('onnx', 'pt2')

_TRACED_BATCH_SIZE = 2
_NUM_DRAWS = 3  # of images to compare on
_PACKAGES = {'onnx': ('timm-supervit', 'timm', 'torch', 'onnx', 'onnxscript', 'onnxruntime'),
             'pt2': ('timm-supervit', 'timm', 'torch')}


class ExportError(RuntimeError):
    """An exported file does not compute what the model does."""


class Int8(NamedTuple):
    """How to quantize.

    Attributes:
        calibration: Batches of images and classes to find the ranges of activations by; None finds them at each call.
        evaluation: Batches of images and classes to compare the accuracy with float32 on.
    """

    calibration: Any = None
    evaluation: Any = None


def export_model(
        model: SuperVisionTransformer,
        output_dir: str | os.PathLike,
        format: str,
        subnets: Sequence[tuple[Any, float]] = (),
        int8: Int8 | None = None,
        progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Write a model as one elastic file, or some of its subnets as one fixed file each, with a manifest beside each.

    The files are called ``MODEL.FORMAT`` and ``MODEL-SIZE-RATE.FORMAT``, with ``-int8`` before the ending if they are,
    and their manifests like them with ``.json`` added. What ``compare_programs`` finds of an int8 file is saved as the
    results ``MODEL-int8-compared``, for ``supervit choose``, too. Nothing in the folder is touched before all is
    written and checked.

    Args:
        model: The model, on the device that a ``pt2`` program is to run on. It is put into evaluation mode.
        output_dir: Folder for the files; it is made where it is missing.
        format: ``onnx`` or ``pt2``.
        subnets: The subnets to write as fixed files (default: one elastic file of all).
        int8: Write the int8 forms of ONNX files, and compare them with float32.
        progress: Follows the files as they are exported, such as ``tqdm.tqdm``.

    Returns:
        The manifest of each file: what it computes and from what inputs, how to prepare images, the names of the
        classes where they are known, under ``subnets`` the MACs per image, the SHA-256, and the largest difference of
        its logits from the model's at each of ``BATCH_SIZES``; or in the place of that, for an int8 file, its
        ``comparison`` with float32, see ``compare_programs``.

    Raises:
        ExportError: If a file's logits differ from the model's by more than ``TOLERANCE``, each time of three.
        OSError: If the folder cannot be written.
        ValueError: If the model has no such subnet, or the format is unknown or has no int8 form.
    """
    if format not in FORMATS:
        raise ValueError(f'format {format!r} is unknown; use {" or ".join(FORMATS)}')
    if int8 and format != 'onnx':
        raise ValueError(f'int8 is for format onnx and not for {format}; export that, or quantize with torchao')
    model.eval()
    networks: list[Any] = [FixedSubnet(model, Subnet(*subnet)) for subnet in subnets] or [ElasticNetwork(model)]
    for network in networks:
        model.macs(_subnets(network)[0])  # which checks it
    with fill_folder(output_dir) as folder:
        try:
            return [_export(network, folder, format, int8, progress) for network in progress(networks, 'Exporting')]
        except OSError as error:  # a full disk, above all
            if error.errno is None:  # an image that cannot be read
                raise
            message = f'{error.strerror or error}: {os.fspath(output_dir)} was not written to and is as it was'
            raise OSError(error.errno, message) from error


def _export(network: Any, folder: Path, format: str, int8: Int8 | None, progress: Progress) -> dict[str, Any]:
    facts = _describe(network, format)
    stem = facts['model']
    if isinstance(network, FixedSubnet):
        stem += f'-{format_size(network.subnet.img_size)}-{network.subnet.keep_rate}'
    images = _example_images(network.model, _TRACED_BATCH_SIZE)
    checks: dict[str, Any]
    if int8 is None:
        path = folder / f'{stem}.{format}'
        write_program(network, images, path, format, facts)
        checks = {'max_difference': _compare(network, path)}
    else:
        path = folder / f'{stem}-int8.{format}'
        with tempfile.TemporaryDirectory() as temporary:
            source = Path(temporary) / f'{stem}.{format}'
            write_program(network, images, source, format, facts)
            _compare(network, source)
            facts |= {'precision': 'int8', 'calibrated': int8.calibration is not None}
            path.write_bytes(quantize_program(source, json.dumps(facts), int8.calibration))
            rows = compare_programs(network.model, source, path, int8.evaluation, progress)
            save_results(Results(stem, rows, {'partial': False}, facts['network']), folder, f'{stem}-int8-compared')
            checks = {'float32_bytes': source.stat().st_size, 'comparison': rows}
    content = path.read_bytes()
    manifest = {
        'file': path.name, 'bytes': len(content), 'sha256': hashlib.sha256(content).hexdigest(), **facts, **checks}
    manifest_path(path).write_text(json.dumps(manifest, indent=2) + '\n', encoding='utf-8')
    return manifest


def write_program(
        network: nn.Module,
        images: Tensor,
        path: str | os.PathLike,
        format: str,
        facts: dict[str, Any] | None = None,
) -> None:
    """Write a network as a program that takes ``image`` [B, C, H, W] and returns ``logits`` [B, num_classes].

    Args:
        network: A network of images alone, such as a ``FixedSubnet``, in evaluation mode; or an ``ElasticNetwork``,
            whose program takes images of any size, and ``img_size`` and ``keep_rate`` too.
        images: Two images or more to trace it with [B, C, H, W]; the program takes any number of that size.
        path: The file.
        format: ``onnx`` or ``pt2``.
        facts: What the file is to say about itself.
    """
    batch = torch.export.Dim('batch', min=1)
    inputs: tuple[Tensor, ...] = (images,)
    shapes: tuple[Any, ...] = ({0: batch},)
    if isinstance(network, ElasticNetwork):
        inputs = (images, *network.example_subnet)
        shapes = ({0: batch, 2: torch.export.Dim('height', min=1), 3: torch.export.Dim('width', min=1)}, None, None)
    if format == 'pt2':
        with torch.no_grad():
            exported = torch.export.export(network, inputs, dynamic_shapes=shapes)
        # By way of memory: on a full disk torch's own writer ends the process.
        content = io.BytesIO()
        torch.export.save(exported, content, extra_files={f'{FACTS}.json': json.dumps(facts)} if facts else None)
        Path(path).write_bytes(content.getbuffer())
        return
    with torch.no_grad():
        program: Any = torch.onnx.export(
            network,
            inputs,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=['image', 'img_size', 'keep_rate'][:len(inputs)],
            output_names=['logits'],
            verbose=False,
        )
    graph = program.model.graph
    if isinstance(network, ElasticNetwork):
        _name_requirement(graph, 'img_size', network.img_size)
        _name_requirement(graph, 'keep_rate', network.keep_rate)
    for node in graph:
        node.metadata_props.clear()  # where each operator comes from: half of a small file, and paths of this machine
    if facts:
        program.model.metadata_props[FACTS] = json.dumps(facts)
    program.save(path, external_data=False)


def _name_requirement(graph: Any, name: str, requirement: Requirement) -> None:
    """Name the node that fails where an input of an ONNX graph is not what it must be."""
    values = [next(value for value in graph.inputs if value.name == name)]
    for value in values:  # which grows: all that is computed from the input, in this order
        for node, _ in value.uses():
            if any(source is not None and (producer := source.producer()) is not None
                   and producer.op_type in ('NonZero', 'Transpose') for source in node.inputs) \
                    and node.op_type == 'Reshape':
                node.name = requirement.name
                return
            values += [output for output in node.outputs if output not in values]


def _subnets(network: Any) -> list[Subnet]:
    return [network.subnet] if isinstance(network, FixedSubnet) else network.model.subnets


def _example_images(model: SuperVisionTransformer, batch_size: int, seed: int = 0) -> Tensor:
    """Return noise in the place of normalized images [B, C, H, W] of the model's largest size, the same each time."""
    shape = (batch_size, model.in_chans, *size_2d(model.img_sizes[-1]))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(next(model.parameters()).device)


@torch.inference_mode()
def _compare(network: Any, path: Path) -> dict[str, float]:
    program, model, subnets = load_program(path), network.model, _subnets(network)
    if isinstance(network, ElasticNetwork):
        subnets = [*subnets, *(Subnet(img_size, UNTRAINED_RATE) for img_size in model.img_sizes)]
    differences = {}
    for batch_size in BATCH_SIZES:
        differences[str(batch_size)] = 0.
        draws = [_example_images(model, batch_size, seed) for seed in range(_NUM_DRAWS)]
        for subnet in subnets:
            # Where two patches score alike to the last digit, another order of sums keeps the other one; so an image
            # may differ, but what computes something else differs on any image.
            for images in draws:
                expected = model(images, img_size=subnet.img_size, keep_rate=subnet.keep_rate).cpu()
                difference = (program(images, *subnet).cpu() - expected).abs().max().item()
                limit = TOLERANCE * max(1., expected.abs().max().item())
                if difference <= limit:
                    break
            else:
                raise ExportError(
                    f'{path.name} differs from the model by {difference:.2g} on logits at subnet {subnet} and batch '
                    f'size {batch_size}, more than {limit:.2g}; nothing was written')
            differences[str(batch_size)] = max(differences[str(batch_size)], difference)
    return differences


def _describe(network: Any, format: str) -> dict[str, Any]:
    model = network.model
    config = preprocessing(model)
    largest = size_2d(model.img_sizes[-1])
    image = {'dtype': 'float32', 'shape': ['batch', model.in_chans, *largest]}
    inputs = {'image': image}
    subnets = _subnets(network)
    if isinstance(network, ElasticNetwork):
        inputs = {
            'image': image | {'shape': ['batch', model.in_chans, 'height', 'width']},
            'img_size': {'dtype': 'int64', 'shape': [] if network.is_square else [2]},
            'keep_rate': {'dtype': 'float64', 'shape': []},
        }
    return {
        'model': model.pretrained_cfg['architecture'],
        'format': format,
        'precision': 'float32',
        'inputs': inputs,
        'outputs': {'logits': {'dtype': 'float32', 'shape': ['batch', model.num_classes]}},
        'preprocessing': {
            'input_size': [model.in_chans, *largest],
            **{key: config[key] for key in ('interpolation', 'crop_pct', 'crop_mode', 'mean', 'std')},
        },
        'img_sizes': [size for size in model.img_sizes if any(subnet.img_size == size for subnet in subnets)],
        'subnet': (model.subnet if isinstance(network, ElasticNetwork) else network.subnet)._asdict(),
        'subnets': [{**subnet._asdict(), 'macs': model.macs(subnet)} for subnet in subnets],
        'class_names': class_names(model),
        'network': fingerprint(model),
        'versions': {package: version(package) for package in _PACKAGES[format]},
    }
