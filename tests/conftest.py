"""What the tests share: a small network, its inputs, and the numbers of the official implementation."""
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open

GOLDEN = Path(__file__).parents[2] / 'shared' / 'golden'

# Four blocks of which two drop, three sizes of 2 x 2 to 4 x 4 patches: each rate keeps another number of tokens.
SMALL = dict(
    img_sizes=(32, 48, 64), keep_rates=(0.3, 0.6, 1.0), drop_layers=(1, 2),
    embed_dim=48, depth=4, num_heads=3, num_classes=10)


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


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def load_golden() -> Callable[[str], tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Read the tensors and the metadata of one file of reference numbers; skip the test where it is absent."""

    def load(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        path = GOLDEN / f'{name}.safetensors'
        if not path.exists():
            pytest.skip(f'the numbers of the official implementation are not at {path}')
        with safe_open(path, 'pt') as file:
            metadata = {key: json.loads(value) for key, value in file.metadata().items()}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118, not a dict

    return load
