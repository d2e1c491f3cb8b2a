"""What the tests share: a small network, its inputs and its exported files."""
import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from filelock import FileLock

# Four blocks of which two drop, three sizes of 2 x 2 to 4 x 4 patches: each rate keeps another number of tokens.
SMALL = dict(
    img_sizes=(32, 48, 64), keep_rates=(0.3, 0.6, 1.0), drop_layers=(1, 2),
    embed_dim=48, depth=4, num_heads=3, num_classes=10)
# What takes seconds to export, so a block less that drops nothing; three sizes of 2 x 2 to 6 x 6 patches.
TO_EXPORT = dict(
    img_sizes=(8, 16, 24), keep_rates=(0.5, 1.0), drop_layers=(0, 1),
    embed_dim=48, depth=2, num_heads=3, num_classes=10)


@pytest.fixture(scope='session', autouse=True)
def _one_thread() -> None:
    """Small tensors run no faster on more, and results are then the same from run to run."""
    torch.set_num_threads(1)


@pytest.fixture(scope='session', autouse=True)
def _interruptible() -> None:
    """Let processes that the tests start receive SIGINT, which a shell makes its background jobs ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small_model() -> Callable[..., Any]:
    """Build a network that runs in milliseconds, with weights large enough for its subnets to differ clearly."""

    def create(name: str = 'supervit_tiny', **kwargs: Any) -> Any:
        model = timm.create_model(name, **{**SMALL, **kwargs})
        if any(parameter.is_meta for parameter in model.parameters()):
            return model.eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise.to(parameter))
        return model.eval()

    return create


@pytest.fixture(scope='session')
def model_to_export() -> Callable[..., Any]:
    """Build the network of an ``exported`` file, of the same settings the same; its classes have names."""

    def create(name: str = 'supervit_digits', **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = timm.create_model(name, **{**TO_EXPORT, **kwargs})
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        model.pretrained_cfg['label_names'] = [f'name {i}' for i in range(model.num_classes)]
        return model.eval()

    return create


@pytest.fixture(scope='session')
def exported(model_to_export: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Export the network of ``model_to_export``, once for all processes that run tests.

    ``exported('onnx')`` returns the path of the elastic file, with its manifest beside it and nothing else.
    ``subnet=`` makes it a fixed one, ``quantize='int8'`` an int8 one; what else is given are settings of the network.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if 'PYTEST_XDIST_WORKER' in os.environ else folder) / 'exported'
    folder.mkdir(exist_ok=True)

    def export_once(
            format: str = 'onnx',
            subnet: Any = None,
            quantize: str | None = None,
            **settings: Any,
    ) -> Path:
        from timm_supervit.tools.export import export

        what = (format, subnet and tuple(subnet), quantize, sorted(settings.items()))
        place = folder / hashlib.sha256(repr(what).encode()).hexdigest()[:16]
        with FileLock(f'{place}.lock'):
            if not any(place.glob(f'*.{format}')):
                export(model_to_export(**settings), place, format, [subnet] if subnet else (), quantize=quantize)
        path, = place.glob(f'*.{format}')
        return path

    return export_once


@pytest.fixture
def close(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make a folder that may not be read; root may read any, so it is done in Python."""
    scan, closed = os.scandir, []

    def refuse(path: Any) -> Any:
        if str(path) in closed:
            raise PermissionError(13, 'Permission denied', str(path))
        return scan(path)

    def make(folder: Path) -> None:
        folder.mkdir()
        closed.append(str(folder))

    monkeypatch.setattr(os, 'scandir', refuse)
    return make


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
