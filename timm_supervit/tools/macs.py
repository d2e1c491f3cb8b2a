"""Multiply-accumulates of networks that are no SuperViTs; those know their own, by ``model.macs(subnet)``."""
import copy
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['count_macs']


def count_macs(model: nn.Module) -> int:
    """Return the multiply-accumulates of one forward of one image, as torch's flop counter sees them.

    Matrix products, convolutions and attention are counted. The forward runs on the meta device, on a copy.

    Args:
        model: Any model of timm; the image has the size of its ``pretrained_cfg``.
    """
    config: Any = model.pretrained_cfg
    meta = copy.deepcopy(model).to('meta').eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        meta(torch.empty(1, *config['input_size'], device='meta'))
    return counter.get_total_flops() // 2
