"""Running exported files: the one way by which all commands load and call them.

A file says what it is and how to prepare images for it, so that it suffices alone. Where its manifest lies beside it,
the file must have the checksum that is written there.
"""
import hashlib
import itertools
import json
import os
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..images.datasets import IMG_MODE_NOTE
from ..images.preparation import check_preparation
from ..results.files import check_regular
from ..results.fingerprint import Source
from ..results.text import visible
from ..subnets import Size, Subnet, check_img_size, format_size, size_2d
from .archives import RefusedError, check_archive, check_onnx

FACTS = 'timm_supervit'  # under which name a file holds what it says about itself, as JSON


def is_program(path: str | os.PathLike) -> bool:
    """Return whether a path is an existing file that by its ending is an exported one."""
    return Path(path).suffix.lower() in ('.onnx', '.pt2') and Path(path).is_file()


def manifest_path(path: str | os.PathLike) -> Path:
    """Return where the manifest of an exported file is."""
    return Path(f'{os.fspath(path)}.json')


def load_program(path: str | os.PathLike, device: torch.device | str = 'cpu') -> 'Program':
    """Load a file of ``supervit export``.

    Args:
        path: The file; its ending tells the format.
        device: Device that onnxruntime runs on. A ``pt2`` program runs where it was exported.

    Raises:
        FileNotFoundError: If there is no such file.
        RuntimeError: If this onnxruntime cannot run on the device, or the installed packages cannot run the file.
        ValueError: If the file is damaged, or none of ``supervit export``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path} is no file; give one that "supervit export" wrote, as in supervit_small.onnx')
    if path.suffix.lower() not in ('.onnx', '.pt2'):
        raise ValueError(f'{path} is no exported file by its ending; give one that ends in .onnx or .pt2')
    _check_sum(path)
    kind: Any = _OnnxProgram if path.suffix.lower() == '.onnx' else _Pt2Program
    return kind(path, torch.device(device))


class Program:
    """An exported file as a ``SubnetRunner``.

    Attributes:
        facts: What the file says about itself: the manifest without what is known only once the file is written.
        source: Name of the model that it was exported from, and the file.
        fixed_setting: Its ``precision``, float32 or int8, and its ``runtime``, onnx (onnxruntime) or pt2 (torch).
        subnets: The subnets of its grid, cheapest first; the one of a file for one subnet.
        subnet: The one that runs where none is named.
        is_elastic: Whether it runs all of ``subnets``, and any other keep rate.
        img_sizes: Image sizes that it runs at, by area.
        in_chans: Channels of the images.
        num_classes: Number of logits.
        class_names: Names of the classes, where they are known.
        pretrained_cfg: How images are prepared, as in timm: input_size, interpolation, crop_pct, crop_mode, mean, std;
            and under what names data sets have its classes, ``label_names``.
        network: Which network it computes, see ``fingerprint``.
        device: Device that it runs on.
    """

    runtime = ''

    def __init__(self, path: Path, content: str | None, device: torch.device) -> None:
        self.path = path
        self.device = device
        try:
            self.facts: dict[str, Any] = json.loads(content or '')
            facts = self.facts
            rows = facts['subnets']
            self._macs: dict[Subnet, int] = {Subnet(row['img_size'], row['keep_rate']): row['macs'] for row in rows}
            self.subnet = Subnet(facts['subnet']['img_size'], facts['subnet']['keep_rate'])
            self.img_sizes = tuple(check_img_size(size) for size in facts['img_sizes'])
            self.source = Source(facts['model'], str(path))
            self.fixed_setting = {'precision': str(facts['precision']), 'runtime': self.runtime}
            self.is_elastic: bool = 'img_size' in facts['inputs']
            self.in_chans: int = facts['inputs']['image']['shape'][1]
            self.num_classes: int = facts['outputs']['logits']['shape'][-1]
            self.class_names: list[str] | None = facts['class_names']
            self.pretrained_cfg: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in facts['preprocessing'].items()}
            self.pretrained_cfg['label_names'] = facts.get('label_names')
            if mode := self.pretrained_cfg.pop('input_img_mode', None):
                self.pretrained_cfg['notes'] = (f'{IMG_MODE_NOTE}{mode}',)
            self.network: dict[str, Any] = dict(facts['network'])
            self._check_facts()
        except Exception as error:  # what a file of any content raises can be of any kind
            raise ValueError(
                f'{path} does not say what network it holds and how to prepare images for it ({error!r:.200}); '
                f'give a file that "supervit export" wrote') from error
        self.subnets = list(self._macs)

    def _check_facts(self) -> None:
        check_preparation(self.pretrained_cfg)
        names, counts = self.class_names, [self.in_chans, *self._macs.values()]
        if not all(type(count) is int and 0 < count < 2 ** 63 for count in counts):
            raise ValueError(f'of {reprlib.repr(counts)} one is no count')
        are_names = names is None or (
            len(names) == self.num_classes and all(isinstance(name, str) for name in names))
        if type(self.num_classes) is not int or not are_names:
            raise ValueError(f'{reprlib.repr(self.num_classes)} classes have the names {reprlib.repr(names)}')
        if not all(isinstance(text, str) for text in (*self.source[:1], *self.fixed_setting.values())):
            raise ValueError(f'its model is {reprlib.repr(self.source.name)}')

    def subnet_macs(self, subnets: Iterable[tuple[Size, float]] | None = None) -> dict[Subnet, int | None]:
        """Return subnets (default: those of the grid) with their multiply-accumulates, None where it does not say."""
        checked = self.subnets if subnets is None else map(self._check, subnets)
        return {subnet: self._macs.get(subnet) for subnet in checked}

    def macs(self, subnet: tuple[Size, float]) -> int:
        """Return the multiply-accumulates of one of ``subnets`` for one image."""
        if subnet not in self._macs:
            raise ValueError(f'{self.path} does not say what {Subnet(*subnet)} costs, '
                             f'but what {", ".join(map(str, self.subnets))} do')
        return self._macs[Subnet(*subnet)]

    def parting_block(self, subnet: Subnet, other: Subnet) -> None:
        """Return None: each call starts anew."""

    def _check(self, subnet: tuple[Size, float]) -> Subnet:
        subnet = subnet if isinstance(subnet, Subnet) else Subnet(*subnet)
        if subnet.img_size not in self.img_sizes or not (self.is_elastic or subnet == self.subnet):
            sizes = ', '.join(map(format_size, self.img_sizes))
            runs = f'the image sizes {sizes} at any keep rate' if self.is_elastic else str(self.subnet)
            raise ValueError(f'{self.path} has no subnet {subnet}; it runs {runs}')
        return subnet

    def __call__(self, images: Tensor, img_size: Size | None = None, keep_rate: float | None = None) -> Tensor:
        """Return the logits [B, num_classes] of images, as the model that was exported does.

        Args:
            images: Normalized images [B, in_chans, H, W]; any size for an elastic file, else
                ``pretrained_cfg['input_size']``.
            img_size: Size of the subnet, one of ``img_sizes`` (default: that of ``subnet``).
            keep_rate: Keep rate of the subnet, in (0, 1] (default: that of ``subnet``).

        Raises:
            TypeError: If the images are no tensor.
            ValueError: If the file has no such subnet, or the images have another shape.
        """
        if not isinstance(images, Tensor):
            raise TypeError(f'images are a {type(images).__name__}, and should be a tensor; use torch.as_tensor')
        expected = ['B', *self.facts['inputs']['image']['shape'][1:]]
        if images.ndim != 4 or any(
                isinstance(side, int) and side != given for side, given in zip(expected, images.shape, strict=True)):
            raise ValueError(f'images of shape {tuple(images.shape)} are no batch [{", ".join(map(str, expected))}]')
        subnet = self.subnet
        if img_size is not None or keep_rate is not None:
            subnet = self._check((
                subnet.img_size if img_size is None else img_size,
                subnet.keep_rate if keep_rate is None else keep_rate))
        return self._run(*self._inputs(images.float(), subnet)).to(images.device)

    def named_inputs(self, images: Tensor, subnet: Subnet) -> dict[str, Any]:
        """Return the inputs of a call by their names, as arrays, for runtimes that take them so."""
        values = [value.cpu().numpy() for value in self._inputs(images, subnet)]
        return dict(zip(self.facts['inputs'], values, strict=True))

    def _inputs(self, images: Tensor, subnet: Subnet) -> list[Tensor]:
        if not self.is_elastic:
            return [images]
        is_pair = bool(self.facts['inputs']['img_size']['shape'])
        img_size = torch.tensor(size_2d(subnet.img_size) if is_pair else subnet.img_size)
        return [images, img_size, torch.tensor(subnet.keep_rate, dtype=torch.float64)]

    def forward_subnets(self, images: Tensor, subnets: Sequence[tuple[Size, float]]) -> list[Tensor]:
        """Return the logits [B, num_classes] of several subnets on one batch."""
        return [self(images, *subnet) for subnet in subnets]

    def _run(self, *inputs: Tensor) -> Tensor:
        raise NotImplementedError


class _OnnxProgram(Program):

    runtime = 'onnx'

    def __init__(self, path: Path, device: torch.device) -> None:
        self.session = open_session(path, device)
        super().__init__(path, self.session.get_modelmeta().custom_metadata_map.get(FACTS), device)

    def _run(self, *inputs: Tensor) -> Tensor:
        values = [value.cpu().numpy() for value in inputs]
        return torch.from_numpy(self.session.run(None, dict(zip(self.facts['inputs'], values, strict=True)))[0])


class _Pt2Program(Program):

    runtime = 'pt2'

    def __init__(self, path: Path, device: torch.device) -> None:
        facts = {f'{FACTS}.json': ''}
        try:
            check_archive(path)
            self.module = torch.export.load(path, extra_files=facts).module()
        except RefusedError:
            raise
        except Exception as error:  # what a broken or newer file raises can be of any kind
            raise RuntimeError(
                f'{path} cannot be run by torch {torch.__version__} ({" ".join(str(error).split())[:300]}); '
                f'if it is of a newer torch, update this one, else export it again') from error
        weights = itertools.chain(self.module.parameters(), self.module.buffers())
        super().__init__(path, facts[f'{FACTS}.json'], next(weights).device)

    @torch.no_grad()
    def _run(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs)


def open_session(path: str | os.PathLike, device: torch.device | str = 'cpu') -> Any:
    """Return onnxruntime's session of an ONNX file, with as many threads as torch has."""
    import onnxruntime

    provider = f'{torch.device(device).type.upper()}ExecutionProvider'
    if provider not in onnxruntime.get_available_providers():
        raise RuntimeError(
            f'this onnxruntime has no {provider}, only {", ".join(onnxruntime.get_available_providers())}; '
            f'install the onnxruntime package for {device} or use device cpu')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised, too
    # Threads that spin between calls would keep the cores from torch and from other sessions, and are hardly faster.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    try:
        check_onnx(path)
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=[provider])
    except (ModuleNotFoundError, RefusedError):
        raise
    except Exception as error:  # its kinds have no class in common
        raise RuntimeError(
            f'{path} cannot be run by onnxruntime {onnxruntime.__version__} ({" ".join(str(error).split())[:300]}); '
            f'if it is of a newer opset or onnxruntime, update this one, else export it again') from error


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open('rb') as file:
        if hasattr(hashlib, 'file_digest'):
            return hashlib.file_digest(file, 'sha256').hexdigest()
        return hashlib.sha256(file.read()).hexdigest()


def _check_sum(path: Path) -> None:
    try:
        check_regular(manifest_path(path))
        expected = json.loads(manifest_path(path).read_text(encoding='utf-8'))['sha256']
    except FileNotFoundError:
        return
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f'{manifest_path(path)} is damaged ({error}); export the file again') from error
    actual = checksum(path)
    if actual != expected:
        raise ValueError(
            f'{path} is damaged: its SHA-256 is {actual}, and {visible(str(expected))[:64]} in '
            f'{manifest_path(path).name}; fetch or export it again')
