"""How close results must be, and one subnet of a model on images."""
from typing import Any

from torch import Tensor

EXACT = dict(atol=0, rtol=0)
# Two ways to compute the same in float32: sums in another order, some hundreds of terms of size 1.
ROUNDING = dict(atol=2e-5, rtol=1e-4)


def run_subnet(model: Any, images: Tensor, subnet: tuple[int, float]) -> Tensor:
    return model(images, img_size=subnet[0], keep_rate=subnet[1])
