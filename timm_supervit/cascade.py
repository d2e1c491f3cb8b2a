"""A cascade: easy images stop at a cheap subnet, and only those that it is not sure of go on to the next.

All stages are subnets of one network. A stage of an image size that an earlier one ran at goes on from the block in
which the two part, with the tokens that both have there.
"""
import functools
import itertools
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .fingerprint import fingerprint
from .models.supervit import SuperVisionTransformer
from .subnets import Size, Subnet, check_subnet, plain_numbers

__all__ = [
    'NUM_STAGES',
    'Cascade',
    'check_stages',
    'check_thresholds',
    'parting_block',
    'probabilities',
    'read_cascade',
    'run_stages',
]

NUM_STAGES = (2, 3, 4)


class Continuation(NamedTuple):
    """Where a stage goes on instead of starting over.

    Attributes:
        stage: The earlier stage, as its place in the cascade.
        block: The block in which the two part. They share all before it.
    """

    stage: int
    block: int


def probabilities(logits: Tensor) -> Tensor:
    """Return the probability of each class [..., classes], in float32 at least, for logits [..., classes]."""
    return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def check_stages(
        stages: Any,
        img_sizes: Sequence[Size],
        macs: Callable[[Subnet], int | None],
) -> tuple[Subnet, ...]:
    """Return the stages of a cascade as subnets.

    Args:
        stages: Pairs (img_size, keep_rate).
        img_sizes: Sizes that there are.
        macs: Says what a subnet costs, or None if that is unknown.

    Raises:
        ValueError: If they are not two to four subnets of these sizes in ascending cost.
    """
    stages = plain_numbers(stages)
    if not isinstance(stages, Sequence) or isinstance(stages, str) or len(stages) not in NUM_STAGES:
        raise ValueError(f'stages {stages!r} are not two to four subnets, as in [(160, 0.5), (224, 1.0)]')
    checked = tuple(check_subnet(stage, img_sizes) for stage in stages)
    costs = {stage: cost for stage in checked if (cost := macs(stage)) is not None}
    known = [costs[stage] for stage in checked if stage in costs]
    if any(later <= earlier for earlier, later in itertools.pairwise(known)):
        raise ValueError(
            f'stages {", ".join(map(str, checked))} are not in ascending cost, which is '
            f'{", ".join(f"{cost / 1e6:.2f}" for cost in known)} MMACs; '
            f'use {", ".join(map(str, sorted(costs, key=lambda stage: costs[stage])))}')
    return checked


def check_thresholds(thresholds: Any, num_stages: int) -> tuple[float, ...]:
    """Return the thresholds of a cascade as floats.

    Raises:
        ValueError: If there is not one for each stage but the last, or one is not in (0, 1).
    """
    thresholds = plain_numbers(thresholds)
    if not isinstance(thresholds, Sequence) or isinstance(thresholds, str) or len(thresholds) != num_stages - 1:
        raise ValueError(
            f'thresholds {thresholds!r} are not one for each of {num_stages} stages but the last, where every image '
            f'stops; give {num_stages - 1}')
    for threshold in thresholds:
        if isinstance(threshold, bool) or not isinstance(threshold, Real) or not 0 < float(threshold) < 1:
            raise ValueError(
                f'threshold {threshold!r} is not in (0, 1); 0.9 lets images stop whose class has a probability of '
                f'90 % or more')
    return tuple(map(float, thresholds))


def parting_block(model: SuperVisionTransformer, stage: Subnet, earlier: Subnet) -> int | None:
    """Return the block in which two subnets part, of which all before is common to them; None if nothing is."""
    if stage.img_size != earlier.img_size:
        return None
    one, other = model._schedule(stage), model._schedule(earlier)
    return min((block for block in {**one, **other} if one.get(block) != other.get(block)), default=len(model.blocks))


def read_cascade(path: str | os.PathLike, network: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the stages and thresholds of a file that ``supervit cascade`` wrote, as they stand there.

    Args:
        path: The file.
        network: The network that it must be of, from ``fingerprint``. If only the weights differ, there is a warning.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no cascade, or one of another network; the message says what differs.
    """
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
        stages, thresholds, known = (content[key] for key in ('stages', 'thresholds', 'network'))
        there, here = dict(known), json.loads(json.dumps(network))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f'{path} holds no cascade ({type(error).__name__}: {error}); give a file that "supervit cascade" wrote',
        ) from error
    differing = [key for key in here if there.get(key) != here[key]]
    if differing and differing != ['weights']:
        key = differing[0]
        raise ValueError(
            f'{path} is a cascade of another network: its {key} is {there.get(key)} and here {here[key]}; give the '
            f'model that it was calibrated on, or calibrate this one with "supervit cascade"')
    if differing:
        warnings.warn(
            f'{path} was calibrated on other weights of this network, and its thresholds may not suit these; '
            f'calibrate them with "supervit cascade"', stacklevel=3)
    return stages, thresholds


def run_stages(
        images: Tensor,
        thresholds: Sequence[float],
        run_stage: Callable[[int, Tensor, dict[int, Tensor]], Tensor],
) -> tuple[Tensor, Tensor]:
    """Run stages, each on the images of which none before was sure.

    Args:
        images: Images [B, C, H, W].
        thresholds: For each stage but the last the probability of the most probable class from which an image stops.
        run_stage: Takes the place of a stage, the images [N, C, H, W] that are left, and what earlier stages have kept
            of them for later ones, tensors [N, ...] by stage, to take from and add to. Returns logits [N, classes].

    Returns:
        Logits [B, classes], and the stage at which each image stopped, counted from 0, int64 [B].
    """
    left = torch.arange(len(images), device=images.device)  # the images that have not stopped yet
    kept: dict[int, Tensor] = {}
    found, places, exits = [], [], []
    for stage, threshold in enumerate([*thresholds, None]):
        logits = run_stage(stage, images, kept)
        stops = torch.ones_like(left, dtype=torch.bool)
        if threshold is not None:
            stops = probabilities(logits).amax(dim=1) >= threshold
        found.append(logits[stops])
        places.append(left[stops])
        exits.append(torch.full_like(places[-1], stage))
        goes_on = (~stops).nonzero().squeeze(1)
        if not len(goes_on):
            break
        images, left = images[goes_on], left[goes_on]
        kept = {later: tokens[goes_on] for later, tokens in kept.items()}
    back = torch.cat(places).argsort()
    return torch.cat(found)[back], torch.cat(exits)[back]


class Cascade(nn.Module):
    """Runs an image through subnets of ascending cost until one is sure of its class.

    ``cascade(images)`` gives each image the logits of the stage at which it stopped: the first whose most probable
    class has at least the probability of the stage's threshold, or the last. The images that are left after a stage go
    on as one smaller batch. A call changes nothing on the cascade or the model, so any number of threads can call.

    An image stops where it stops alone, and has the logits that it has alone, up to rounding: math libraries add in
    another order for some numbers of rows, so the last bits, and a decision that hangs on them, can differ.

    Attributes:
        model: The network.
        stages: The subnets, cheapest first.
        thresholds: For each stage but the last the probability, in (0, 1), from which an image stops there.
    """

    def __init__(
            self,
            model: SuperVisionTransformer,
            stages: Sequence[tuple[Size, float]],
            thresholds: Sequence[float],
    ) -> None:
        """Make a cascade of subnets.

        Args:
            model: A SuperViT of two classes or more.
            stages: Two to four pairs (img_size, keep_rate), in ascending cost.
            thresholds: One for each stage but the last, in (0, 1).

        Raises:
            TypeError: If the model is no SuperViT.
            ValueError: If the stages or thresholds are no such ones; the message says what would be right.
        """
        super().__init__()
        if not isinstance(model, SuperVisionTransformer):
            raise TypeError(f'a cascade runs subnets of a SuperViT, not of a {type(model).__name__}')
        if model.num_classes < 2:
            raise ValueError(f'a model of num_classes {model.num_classes} is always sure; a cascade needs 2 or more')
        self.model = model
        self.stages = check_stages(stages, model.img_sizes, model.macs)
        self.thresholds = check_thresholds(thresholds, len(self.stages))

    @classmethod
    def load(cls, model: SuperVisionTransformer, path: str | os.PathLike) -> 'Cascade':
        """Return the cascade of a file that ``supervit cascade`` wrote.

        A model of the same kind with other weights gets a warning, since they decide how sure it is of what.

        Args:
            model: The network that it was calibrated on.
            path: The file, ``cascade.json``.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds no cascade, or one of another network; the message says what differs.
        """
        stages, thresholds = read_cascade(path, fingerprint(model))
        try:
            return cls(model, stages, thresholds)
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from error

    @property
    def macs(self) -> list[int]:
        """Multiply-accumulates of an image that stops at each stage, all stages up to there together."""
        model, total, totals = self.model, 0, []
        for stage, continuation in zip(self.stages, self._continuations(), strict=True):
            total += model.macs(stage)
            if continuation:
                total -= model.macs(stage, before=continuation.block)
            totals.append(total)
        return totals

    def forward(self, images: Tensor, return_exits: bool = False) -> Any:
        """Classify images.

        Args:
            images: Images [B, C, H, W] of any size.
            return_exits: Return the stages too.

        Returns:
            Logits [B, num_classes]; with ``return_exits`` a pair of them and of the stage at which each image stopped,
            counted from 0, int64 [B].
        """
        run_stage = functools.partial(self._run_stage, continuations=self._continuations())
        logits, exits = run_stages(images, self.thresholds, run_stage)
        return (logits, exits) if return_exits else logits

    def _run_stage(
            self,
            stage: int,
            images: Tensor,
            shared: dict[int, Tensor],
            continuations: Sequence[Continuation | None],
    ) -> Tensor:
        """Return the logits of a stage; keep in ``shared``, by stage, the tokens that later ones go on from."""
        model: Any = self.model
        schedule = model._schedule(self.stages[stage])
        own, start = continuations[stage], 0
        if own:
            x, start = shared.pop(stage), own.block
        else:
            x = model.embed(images, self.stages[stage].img_size)
        for i in range(start, len(model.blocks)):
            shared |= {k: x for k, continuation in enumerate(continuations) if continuation == (stage, i)}
            x = model.blocks[i](x, num_keep=schedule[i]) if i in schedule else model.blocks[i](x)
        return model.forward_head(model.norm(x))

    def _continuations(self) -> list[Continuation | None]:
        """Return for each stage where it goes on; None where it starts over."""
        found: list[Continuation | None] = []
        for i, stage in enumerate(self.stages):
            parting = [(parting_block(self.model, stage, earlier), j) for j, earlier in enumerate(self.stages[:i])]
            common = [Continuation(j, block) for block, j in parting if block is not None]
            # The first of equals: it has run that block itself, where a later one may have gone on from it.
            found.append(max(common, key=lambda continuation: continuation.block, default=None))
        return found

    def extra_repr(self) -> str:
        """Return the stages and thresholds for ``print``."""
        return f'stages={", ".join(map(str, self.stages))}; thresholds={list(self.thresholds)}'
