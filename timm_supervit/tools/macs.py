"""Multiply-accumulates of a network as torch's flop counter sees them, without running it."""
import copy
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['count_macs']


def count_macs(model: nn.Module, **forward_kwargs: Any) -> int:
    """Return the multiply-accumulates of one forward of one image.

    Matrix products, convolutions and attention are counted. The forward runs on the meta device, on a copy.

    Args:
        model: Any model of timm; the image has the size of its ``pretrained_cfg``.
        **forward_kwargs: Arguments of its forward, such as ``img_size=160, keep_rate=0.7`` for a SuperViT.
    """
    config: Any = model.pretrained_cfg
    meta = copy.deepcopy(model).to('meta').eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        meta(torch.empty(1, *config['input_size'], device='meta'), **forward_kwargs)
    return counter.get_total_flops() // 2
