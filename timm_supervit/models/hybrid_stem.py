"""What a convolutional stem of timm's hybrid ViTs does to an image, found by a forward pass on the meta device."""
import copy
from typing import Any

import torch
from torch import Tensor, nn


def get_reduction(stem: nn.Module) -> int:
    """Return by how much a stem makes an image smaller, in each direction."""
    side = 256  # a multiple of every stem's reduction
    return side // _run_on_meta(stem, (side, side)).shape[-1]


def count_positions(stem: nn.Module, img_size: tuple[int, int]) -> dict[str, int]:
    """Return at how many positions each convolution of a stem is computed for an image of a size, by its name."""
    positions: dict[str, int] = {}
    _run_on_meta(stem, img_size, positions)
    return positions


def _run_on_meta(stem: nn.Module, img_size: tuple[int, int], positions: dict[str, int] | None = None) -> Tensor:
    tensors = [*stem.parameters(), *stem.buffers()]
    # The copy takes tensors on the meta device for those of the stem, which are never copied.
    meta: Any = copy.deepcopy(stem, {id(tensor): torch.empty_like(tensor, device='meta') for tensor in tensors})
    convs = {name: module for name, module in meta.named_modules() if isinstance(module, nn.Conv2d)}
    for name, conv in convs.items():
        conv.register_forward_hook(
            lambda _, __, y, name=name: None if positions is None else positions.update({name: y[0, 0].numel()}))
    first = next(iter(convs.values()))
    with torch.no_grad():
        result = meta.eval()(torch.empty(1, first.in_channels, *img_size, dtype=first.weight.dtype, device='meta'))
    return result[-1] if isinstance(result, list | tuple) else result
