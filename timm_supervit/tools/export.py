"""Export of subnets as files that run without this package: ONNX, and programs of ``torch.export``.

Each file is one subnet with the resizing inside: it takes a batch of any number of images of the model's largest size.
A file counts as written only when it was loaded again and agreed with the model.
"""
import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ..models.supervit import SuperVisionTransformer
from ..subnets import Subnet, format_size, size_2d
from .files import fill_folder
from .fixed_subnet import FixedSubnet
from .progress import Progress, silent

__all__ = ['BATCH_SIZES', 'FORMATS', 'TOLERANCE', 'ExportError', 'export_subnets', 'load_program', 'write_program']

BATCH_SIZES = (1, 5)  # one and several, neither of which is the batch size that the programs are traced with
TOLERANCE = 1e-4  # on logits; the order of sums in another runtime's matrix products explains less
FORMATS = ('onnx', 'pt2')

_TRACED_BATCH_SIZE = 2
_PACKAGES = {'onnx': ('timm-supervit', 'timm', 'torch', 'onnx', 'onnxscript', 'onnxruntime'),
             'pt2': ('timm-supervit', 'timm', 'torch')}


class ExportError(RuntimeError):
    """An exported file does not compute what the model does."""


def export_subnets(
        model: SuperVisionTransformer,
        subnets: Sequence[Subnet],
        output_dir: str | os.PathLike,
        format: str,
        progress: Progress = silent,
) -> dict[str, Any]:
    """Write one file for each subnet, and a manifest of them, into a folder.

    The files are called ``MODEL-SIZE-RATE.FORMAT`` and the manifest ``MODEL-FORMAT.json``. Nothing in the folder is
    touched before all files are written and checked.

    Args:
        model: The model, on the device that a ``pt2`` program is to run on. It is put into evaluation mode.
        subnets: The subnets to export.
        output_dir: Folder for the files; it is made where it is missing.
        format: ``onnx`` or ``pt2``.
        progress: Follows the subnets as they are exported, such as ``tqdm.tqdm``.

    Returns:
        The manifest: how to prepare images for the model and, under ``files``, one entry for each subnet with its MACs
        per image, the file's SHA-256, and the largest difference of its logits from the model's at each of
        ``BATCH_SIZES``.

    Raises:
        ExportError: If a file's logits differ from the model's by more than ``TOLERANCE``.
        OSError: If the folder cannot be written.
        ValueError: If the model has no such subnet or the format is unknown.
    """
    if format not in FORMATS:
        raise ValueError(f'format {format!r} is unknown; use {" or ".join(FORMATS)}')
    model.eval()
    pretrained_cfg: Any = model.pretrained_cfg
    name = pretrained_cfg['architecture']
    with fill_folder(output_dir) as folder:
        try:
            files = [_export(model, subnet, folder, name, format) for subnet in progress(subnets, 'Exporting')]
            manifest = {'model': name, 'format': format, **_describe(model), 'versions': _versions(format)}
            manifest['files'] = files
            (folder / f'{name}-{format}.json').write_text(json.dumps(manifest, indent=2) + '\n')
        except OSError as error:  # a full disk, above all
            message = f'{error.strerror or error}: {os.fspath(output_dir)} was not written to and is as it was'
            raise OSError(error.errno, message) from error
    return manifest


def _export(model: SuperVisionTransformer, subnet: Subnet, folder: Path, name: str, format: str) -> dict[str, Any]:
    path = folder / f'{name}-{format_size(subnet.img_size)}-{subnet.keep_rate}.{format}'
    network = FixedSubnet(model, subnet)
    write_program(network, _example_images(model, _TRACED_BATCH_SIZE), path, format)
    return {
        'file': path.name,
        'img_size': subnet.img_size,
        'keep_rate': subnet.keep_rate,
        'macs': model.macs(subnet),
        'bytes': path.stat().st_size,
        'sha256': hashlib.sha256(path.read_bytes()).hexdigest(),
        'max_difference': _compare(network, path),
    }


def write_program(network: nn.Module, images: Tensor, path: str | os.PathLike, format: str) -> None:
    """Write a network as a program that takes ``image`` [B, C, H, W] and returns ``logits`` [B, num_classes].

    Args:
        network: A network of images alone, such as a ``FixedSubnet``, in evaluation mode.
        images: Two images or more to trace it with [B, C, H, W]; the program takes any number of that size.
        path: The file.
        format: ``onnx`` or ``pt2``.
    """
    shapes = ({0: torch.export.Dim('batch', min=1)},)
    if format == 'pt2':
        with torch.no_grad():
            program = torch.export.export(network, (images,), dynamic_shapes=shapes)
        # By way of memory: on a full disk torch's own writer ends the process.
        content = io.BytesIO()
        torch.export.save(program, content)
        Path(path).write_bytes(content.getbuffer())
        return
    with torch.no_grad():
        torch.onnx.export(
            network,
            (images,),
            f=path,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=['image'],
            output_names=['logits'],
            external_data=False,
            verbose=False,
        )


def load_program(path: str | os.PathLike, device: torch.device | str = 'cpu') -> Callable[[Tensor], Tensor]:
    """Load a program of ``write_program`` as a function from images [B, C, H, W] to logits [B, num_classes].

    Args:
        path: The file; its ending tells the format.
        device: Device that onnxruntime runs on. A ``pt2`` program runs where it was exported.

    Raises:
        RuntimeError: If this onnxruntime cannot run on the device.
    """
    if Path(path).suffix == '.pt2':
        module = torch.export.load(path).module()
        return lambda x: module(x)
    import onnxruntime

    provider = f'{torch.device(device).type.upper()}ExecutionProvider'
    if provider not in onnxruntime.get_available_providers():
        raise RuntimeError(
            f'this onnxruntime has no {provider}, only {", ".join(onnxruntime.get_available_providers())}; '
            f'install the onnxruntime package for {device} or use device cpu')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=[provider])
    return lambda x: torch.from_numpy(session.run(None, {'image': x.cpu().numpy()})[0])


def _example_images(model: SuperVisionTransformer, batch_size: int) -> Tensor:
    """Return noise in the place of normalized images [B, C, H, W] of the model's largest size, the same each time."""
    shape = (batch_size, model.in_chans, *size_2d(model.img_sizes[-1]))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(batch_size))
    return noise.to(next(model.parameters()).device)


@torch.inference_mode()
def _compare(network: FixedSubnet, path: Path) -> dict[str, float]:
    program = load_program(path)
    differences = {}
    for batch_size in BATCH_SIZES:
        images = _example_images(network.model, batch_size)
        logits, expected = program(images).cpu(), network(images).cpu()
        differences[str(batch_size)] = difference = (logits - expected).abs().max().item()
        if not difference <= TOLERANCE:
            raise ExportError(
                f'{path.name} differs from the model by {difference:.2g} on logits at batch size {batch_size}, '
                f'more than {TOLERANCE:g}; nothing was written')
    return differences


def _describe(model: SuperVisionTransformer) -> dict[str, Any]:
    keys = ('interpolation', 'crop_pct', 'crop_mode', 'mean', 'std')
    config = resolve_model_data_config(model)
    return {
        'input': {'name': 'image', 'shape': ['batch', model.in_chans, *size_2d(model.img_sizes[-1])]},
        'output': {'name': 'logits', 'shape': ['batch', model.num_classes]},
        'preprocessing': {key: config[key] for key in keys},
    }


def _versions(format: str) -> dict[str, str]:
    return {package: version(package) for package in _PACKAGES[format]}
