"""The few members that all that runs subnets has, so that every tool takes any of them."""
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .subnets import Size, Subnet


class SubnetRunner(Protocol):
    """A SuperViT, an exported ``Program``, or a ``Cascade`` of either, whose subnets are its stages."""

    @property
    def img_sizes(self) -> tuple[Size, ...]:
        """Image sizes that it runs at, by area."""

    @property
    def subnets(self) -> list[Subnet]:
        """Its subnets, cheapest first."""

    @property
    def subnet(self) -> Subnet:
        """The one that runs where none is named."""

    @property
    def in_chans(self) -> int:
        """Channels of the images."""

    @property
    def num_classes(self) -> int:
        """Number of logits."""

    @property
    def pretrained_cfg(self) -> Any:
        """How images are prepared, as in timm."""

    @property
    def device(self) -> torch.device:
        """Where its images go."""

    @property
    def fixed_setting(self) -> dict[str, str]:
        """The ``precision`` and ``runtime`` of an exported file; empty for what runs in any."""

    def subnet_macs(self, subnets: Iterable[tuple[Size, float]] | None = None) -> dict[Subnet, Any]:
        """Return subnets (default: its own) with their multiply-accumulates for one image, None where unknown.

        Raises:
            ValueError: If one of them is none that it runs.
        """

    def parting_block(self, subnet: Subnet, other: Subnet) -> int | None:
        """Return the block before which two subnets have all in common, so that one can go on from the other."""

    def __call__(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the logits [B, num_classes] of images [B, C, H, W], of the subnet ``img_size``, ``keep_rate``."""

    def forward_subnets(self, images: Tensor, subnets: Sequence[Subnet]) -> list[Tensor]:
        """Return the logits [B, num_classes] of several subnets on one batch."""


def predicts(model: Any) -> bool:
    """Return whether a model has classes to choose from, and does not give features, one number or all its tokens."""
    pool = model.network.get('global_pool') if hasattr(model, 'network') else model.global_pool
    return model.num_classes > 1 and pool != ''


def check_predicts(model: SubnetRunner) -> None:
    """Refuse a model of which ``predicts`` is False."""
    if not predicts(model):
        what = f'num_classes {model.num_classes}' if model.num_classes < 2 else 'global_pool \'\''
        raise ValueError(
            f'a model of {what} has no classes to choose from for an image, so it predicts none and has no accuracy; '
            f'give one of 2 or more, and of pooled tokens')


def setting_of(model: SubnetRunner, precision: str = 'float32', runtime: str = 'eager') -> dict[str, str]:
    """Return the precision and runtime that a model runs in, which are an exported file's own."""
    return {'precision': precision, 'runtime': runtime} | model.fixed_setting
