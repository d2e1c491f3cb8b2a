"""A cascade: easy images stop at a cheap subnet, and only those that it is not sure of go on to the next.

All stages are subnets of one network. A stage of an image size that an earlier one ran at goes on from the block in
which the two part, with the tokens that both have there; in an exported file each stage starts over.
"""
import itertools
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .results.files import check_regular
from .results.fingerprint import Source, differing, fingerprint, source_of
from .results.text import visible
from .runner import SubnetRunner, check_predicts
from .subnets import Size, Subnet, check_subnet, plain_numbers

NUM_STAGES = (2, 3, 4)


class Continuation(NamedTuple):
    """Where a stage goes on instead of starting over.

    Attributes:
        stage: Index of the earlier stage.
        block: The block in which the two part. They share all before it.
    """

    stage: int
    block: int


def probabilities(logits: Tensor) -> Tensor:
    """Return the probability of each class [..., classes], in float32 at least, for logits [..., classes]."""
    return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def cascade_text(stages: Sequence[Subnet], thresholds: Sequence[float]) -> str:
    """Return a cascade as it is printed: its stages, with the thresholds between them, as in 12:0.5 (0.9) 24:0.7."""
    parts = [str(stage) for stage in stages]
    for i, threshold in enumerate(thresholds):
        parts[i] += f' ({threshold:.4g})'
    return ' '.join(parts)


class Cascade(nn.Module):
    """Runs an image through subnets of ascending cost until one is sure of its class.

    ``cascade(images)`` gives each image the logits of the stage at which it stopped: the first whose most probable
    class has at least the probability of the stage's threshold, or the last. The images that are left after a stage go
    on as one smaller batch. A call changes nothing on the cascade or the model, so any number of threads can call.

    An image stops where it stops alone, and has the logits that it has alone, up to rounding: math libraries add in
    another order for some numbers of rows, so the last bits, and a decision that hangs on them, can differ.

    As a ``SubnetRunner`` its subnets are its stages: what a stage says and costs where no image stops before.

    Attributes:
        model: The network, a SuperViT or an exported file.
        stages: The subnets, cheapest first.
        thresholds: For each stage but the last the probability, in (0, 1), from which an image stops there.
        calibration: What its file says of the images that it was calibrated on.
    """

    def __init__(
            self,
            model: SubnetRunner,
            stages: Sequence[tuple[Size, float]],
            thresholds: Sequence[float],
            calibration: Mapping[str, Any] | None = None,
    ) -> None:
        """Make a cascade of subnets.

        Args:
            model: A SuperViT, or a ``Program`` that runs all subnets of one, of two classes or more.
            stages: Two to four pairs (img_size, keep_rate), in ascending cost.
            thresholds: One for each stage but the last, in (0, 1).
            calibration: See the attribute.

        Raises:
            TypeError: If the model runs no subnets.
            ValueError: If the stages or thresholds are no such ones, or the model has no two classes; the message says
                what would be right.
        """
        super().__init__()
        if not hasattr(model, 'forward_subnets') or isinstance(model, Cascade):
            raise TypeError(f'a cascade runs subnets of a SuperViT, not of a {type(model).__name__}')
        check_predicts(model)
        self.model: Any = model
        self.img_sizes, self.in_chans, self.num_classes = model.img_sizes, model.in_chans, model.num_classes
        self.pretrained_cfg = model.pretrained_cfg
        self.stages, self._stage_macs = _check_stages(stages, model)
        self.thresholds = _check_thresholds(thresholds, len(self.stages))
        self.calibration = dict(calibration or {})

    @classmethod
    def load(cls, model: SubnetRunner, path: str | os.PathLike) -> 'Cascade':
        """Return the cascade of a file that ``supervit cascade`` wrote.

        A model of the same kind with other weights gets a warning, since they decide how sure it is of what.

        Args:
            model: The network that it was calibrated on, or an exported file of it.
            path: The file, ``cascade.json``.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds no cascade, or one of another network; the message says what differs.
        """
        check_regular(path)
        here = fingerprint(model)
        try:
            content = json.loads(Path(path).read_text(encoding='utf-8'))
            stages, thresholds, there = (content[key] for key in ('stages', 'thresholds', 'network'))
            differences = differing(here, {**dict(there), 'weights': there.get('weights', 'unknown')})
        except OSError:
            raise
        except Exception as error:  # what a file of any content raises can be of any kind
            raise ValueError(
                f'{path} holds no cascade ({type(error).__name__}: {error}); give a file that "supervit cascade" wrote',
            ) from error
        differences = [key for key in differences if key in here]
        if differences and differences != ['weights']:
            key = differences[0]
            raise ValueError(
                f'{path} is a cascade of another network: its {key} is {visible(str(there.get(key)))[:200]} '
                f'and here {here[key]}; give the model that it was calibrated on, or calibrate this one with '
                f'"supervit cascade"')
        if differences:
            warnings.warn(
                f'{path} was calibrated on other weights of this network, and its thresholds may not suit these; '
                f'calibrate them with "supervit cascade"', stacklevel=2)
        calibration = content.get('calibration')
        try:
            return cls(model, stages, thresholds, calibration if isinstance(calibration, dict) else None)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f'{path}: {error}') from error

    def to_json(self, network: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
        """Return the content of ``cascade.json``, which ``load`` reads.

        Args:
            network: Fingerprint of the model.
            expected: What the cascade is expected to reach.
        """
        content = {
            'model': source_of(self.model).name,
            'img_sizes': list(self.img_sizes),
            'stages': [list(stage) for stage in self.stages],
            'thresholds': list(self.thresholds),
            'calibration': self.calibration,
            'expected': {**expected, 'macs_of_stages': self.macs},
            'network': dict(network),
        }
        return json.dumps(content, indent=2) + '\n'

    @property
    def macs(self) -> list[int | None]:
        """Multiply-accumulates of an image that stops at each stage, all stages up to there together."""
        totals: list[int | None] = []
        for stage, continuation in zip(self.stages, self._continuations(), strict=True):
            cost = self._stage_macs[stage]
            if cost is not None and continuation:
                cost -= self.model.macs(stage, before=continuation.block)
            before = totals[-1] if totals else 0
            totals.append(None if cost is None or before is None else before + cost)
        return totals

    def forward(
            self,
            images: Tensor,
            return_exits: bool = False,
            img_size: Size | None = None,
            keep_rate: float | None = None,
    ) -> Any:
        """Classify images.

        Args:
            images: Images [B, C, H, W] of any size.
            return_exits: Return the stages too.
            img_size: With ``keep_rate``, the stage at which all images stop, and none before.
            keep_rate: See ``img_size``.

        Returns:
            Logits [B, num_classes]; with ``return_exits`` a pair of them and of the stage at which each image stopped,
            counted from 0, int64 [B].
        """
        thresholds = [*self.thresholds, 0.]
        if img_size is not None or keep_rate is not None:
            thresholds = [2.] * self._index((img_size, keep_rate)) + [0.]  # of which no probability reaches the first
        elif warn := getattr(self.model, 'warn_of_other_size', None):  # an exported file has none
            warn(images, 'every stage')
        continuations = self._continuations()
        indices = torch.arange(len(images), device=images.device)  # of the images that have not stopped yet
        shared: dict[int, Any] = {}  # by stage, the tokens that it goes on from
        stopped: list[tuple[Tensor, Tensor, Tensor]] = []  # logits, indices and stages
        for stage, threshold in enumerate(thresholds):
            logits = self._run_stage(stage, images, shared, continuations).to(images.device)
            stops = probabilities(logits).amax(dim=1) >= threshold if threshold else torch.ones_like(indices).bool()
            stopped.append((logits[stops], indices[stops], torch.full_like(indices[stops], stage)))
            goes_on = (~stops).nonzero().squeeze(1)
            if not len(goes_on):
                break
            images, indices = images[goes_on], indices[goes_on]
            shared = {later: tokens.of_images(goes_on) for later, tokens in shared.items()}
        logits, indices, exits = (torch.cat(parts) for parts in zip(*stopped, strict=True))
        back = indices.argsort()
        return (logits[back], exits[back]) if return_exits else logits[back]

    def _run_stage(
            self,
            stage: int,
            images: Tensor,
            shared: dict[int, Any],
            continuations: Sequence[Continuation | None],
    ) -> Tensor:
        """Return the logits of a stage; keep in ``shared`` the tokens that later ones go on from."""
        model, subnet = self.model, self.stages[stage]
        if not any(continuations):
            return model(images, img_size=subnet.img_size, keep_rate=subnet.keep_rate)
        schedule, origin = model.schedule(subnet), continuations[stage]
        tokens, start = (shared.pop(stage), origin.block) if origin else (model.embed(images, subnet.img_size), 0)
        later = {i: continuation.block for i, continuation in enumerate(continuations)
                 if continuation and continuation.stage == stage}
        for block in sorted({*later.values(), len(model.blocks)}):
            tokens, start = model.run_blocks(tokens, schedule, start, block), block
            shared |= {i: tokens for i, parting in later.items() if parting == block}
        return model.forward_head(model.norm(tokens.x))

    def _continuations(self) -> list[Continuation | None]:
        """Return for each stage where it goes on; None where it starts over."""
        continuations: list[Continuation | None] = []
        for i, stage in enumerate(self.stages):
            parting = [(self.model.parting_block(stage, earlier), j) for j, earlier in enumerate(self.stages[:i])]
            common = [Continuation(j, block) for block, j in parting if block is not None]
            # The first of equals: it has run that block itself, where a later one may have gone on from it.
            continuations.append(max(common, key=lambda continuation: continuation.block, default=None))
        return continuations

    def _index(self, stage: tuple[Any, Any]) -> int:
        if stage not in self.stages:
            raise ValueError(f'{stage} is no stage of this cascade; it has {", ".join(map(str, self.stages))}')
        return self.stages.index(Subnet(*stage))

    # What else a ``SubnetRunner`` has

    @property
    def subnets(self) -> list[Subnet]:
        """The stages."""
        return list(self.stages)

    @property
    def subnet(self) -> Subnet:
        """The last stage, at which all images stop that none before was sure of."""
        return self.stages[-1]

    def subnet_macs(self, subnets: Iterable[tuple[Size, float]] | None = None) -> dict[Subnet, int | None]:
        """Return stages (default: all) with ``macs``."""
        macs = dict(zip(self.stages, self.macs, strict=True))
        if subnets is None:
            return macs
        return {self.stages[i]: macs[self.stages[i]] for i in map(self._index, subnets)}

    def parting_block(self, subnet: Subnet, other: Subnet) -> None:
        """Return None: stages have gone on from each other already."""

    def forward_subnets(self, images: Tensor, subnets: Sequence[tuple[Size, float]]) -> list[Tensor]:
        """Return the logits [B, num_classes] of several stages on one batch."""
        return [self(images, img_size=img_size, keep_rate=keep_rate) for img_size, keep_rate in subnets]

    @property
    def fixed_setting(self) -> dict[str, str]:
        """That of the model."""
        return self.model.fixed_setting

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    @property
    def source(self) -> Source | None:
        """Where the model is from, if that was noted."""
        return getattr(self.model, 'source', None)

    @property
    def network(self) -> dict[str, Any]:
        """The fingerprint of the model."""
        return fingerprint(self.model)

    def extra_repr(self) -> str:
        """Return the stages and thresholds for ``print``."""
        return f'stages={", ".join(map(str, self.stages))}; thresholds={list(self.thresholds)}'


def _check_stages(stages: Any, model: SubnetRunner) -> tuple[tuple[Subnet, ...], dict[Subnet, int | None]]:
    """Return the stages of a cascade as subnets, and what each costs alone."""
    stages = plain_numbers(stages)
    if not isinstance(stages, Sequence) or isinstance(stages, str) or len(stages) not in NUM_STAGES:
        raise ValueError(f'stages {stages!r} are not two to four subnets, as in [(160, 0.5), (224, 1.0)]')
    checked = tuple(check_subnet(stage, model.img_sizes) for stage in stages)
    macs = model.subnet_macs(checked)
    costs = [cost for stage in checked if (cost := macs[stage]) is not None]
    if any(later <= earlier for earlier, later in itertools.pairwise(costs)):
        ordered = sorted((cost, stage) for stage, cost in macs.items() if cost is not None)
        raise ValueError(
            f'stages {", ".join(map(str, checked))} are not in ascending cost, which is '
            f'{", ".join(f"{cost / 1e6:.2f}" for cost in costs)} MMACs; '
            f'use {", ".join(str(stage) for _, stage in ordered)}')
    return checked, macs


def _check_thresholds(thresholds: Any, num_stages: int) -> tuple[float, ...]:
    """Return the thresholds of a cascade as floats."""
    thresholds = plain_numbers(thresholds)
    if not isinstance(thresholds, Sequence) or isinstance(thresholds, str) or len(thresholds) != num_stages - 1:
        raise ValueError(
            f'thresholds {thresholds!r} are not one for each of {num_stages} stages but the last, where every image '
            f'stops; give {num_stages - 1}')
    for threshold in thresholds:
        if isinstance(threshold, bool) or not isinstance(threshold, Real) or \
                not 0 < threshold < 1:  # type: ignore[operator]
            raise ValueError(
                f'threshold {threshold!r} is not in (0, 1); 0.9 lets images stop whose class has a probability of '
                f'90 % or more')
    return tuple(map(float, thresholds))
