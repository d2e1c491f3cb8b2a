"""Super-training: the objective of SuperViT (arXiv 2205.11397) as a task of timm's Task API.

One step runs several subnets on one batch and adds up their losses: networks that keep all tokens learn from the
labels, networks that drop some learn from one that keeps all. One backward pass and one update follow, both done by the
training script.
"""
import logging
import math
import random
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

from ..models.supervit import SuperViT, find_supervit
from ..subnets import Size, Subnet
from .distillation import Loss, choose_distillation
from .distillation import distillation_loss as distillation_loss  # where it has been imported from

_logger = logging.getLogger(__name__)


class SubnetLoss(NamedTuple):
    """What one subnet contributed to a training step.

    Attributes:
        subnet: The subnet.
        role: ``label``, it learned from the labels, or ``distill``, from a network that keeps all tokens.
        loss: Its loss, without a gradient, on the device of the step [].
    """

    subnet: Subnet
    role: str
    loss: Tensor


class SuperViTTask(ClassificationTask):
    """Trains all subnets of a SuperViT at once.

    It is what ``timm.task.ClassificationTask(model, ...)`` creates for a SuperViT, so timm's ``train.py`` super-trains.
    The model's setting ``train_subnets`` chooses the subnets of a step, with S the largest size:

    - ``sandwich``, the official sampling: (S, 1.0) and a random smaller size at 1.0 learn from the labels; both sizes
      at a random lower rate each learn from a network that keeps all tokens.
    - ``all``: every size at 1.0 learns from the labels, and every lower rate from a network that keeps all tokens.
    - ``active``: the active subnet learns from the labels, as any timm model.

    That network is the one of their own size with ``distill_teacher='own_size'``, as in the paper and the official DeiT
    loop, or (S, 1.0) for all with ``largest_size``, as in the official LV-ViT loop. How depends on the criterion, see
    ``choose_distillation``.

    The draws come from a generator of the task's own, seeded from torch's seed. It is the same on every rank and part
    of the checkpoint. Evaluation, EMA and checkpoints see the plain model.

    A step does not wait for the device. Every ``log_interval`` steps and before each checkpoint the task logs the mean
    loss of each subnet since the last time, so that one that diverges shows; one that is not finite ends the training
    then. An interval of 1 finds it in its own step.

    Attributes:
        log_interval: Steps from one log line to the next: ``--log-interval`` of the command line, where it is there, or
            the default of timm's ``train.py``, which hands no arguments to its task.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Create the task.

        Args:
            model: A SuperViT.
            *args: As for ``ClassificationTask``.
            **kwargs: As for ``ClassificationTask``.

        Raises:
            ValueError: If subnets learn from others, and it is not known how with this criterion and number of classes.
        """
        super().__init__(model, *args, **kwargs)
        if self.model.train_subnets != 'active' and self.model.keep_rates[0] < 1:
            self.choose_distillation()
        self.draws = random.Random(torch.initial_seed())
        self._sums: dict[tuple[str, Subnet], tuple[Tensor, int]] = {}  # of the losses since the last log line
        self._num_steps = 0
        given = re.search(r'--log-interval[= ](\d+)', ' '.join(sys.argv))
        self.log_interval = max(1, int(given[1])) if given else 50
        if self.verbose:
            _logger.info(
                f'Super-training img_sizes {self.model.img_sizes} x keep_rates {self.model.keep_rates}, '
                f'train_subnets={self.model.train_subnets}')

    @property
    def model(self) -> SuperViT:
        """The SuperViT without wrappers."""
        return cast(SuperViT, find_supervit(self.trainable_module))

    def choose_distillation(self) -> Loss:
        """Return the loss by which one subnet learns from the logits of another, see ``distillation.py``."""
        return choose_distillation(self.criterion, self.model.num_classes)

    def sample_subnets(self) -> list[Subnet]:
        """Draw the subnets of one step, each size's network that keeps all tokens before those that learn from it."""
        model = self.model
        if model.train_subnets == 'active':
            return [model.subnet]
        lower_rates = [rate for rate in model.keep_rates if rate < 1]
        if model.train_subnets == 'all':
            return [Subnet(size, rate) for size in reversed(model.img_sizes) for rate in (1.0, *lower_rates)]
        *smaller_sizes, largest = model.img_sizes
        # One order of draws, whatever the grid: the rate of the largest size, a smaller size, its rate.
        subnets = []
        for sizes in filter(None, ([largest], smaller_sizes)):
            size = self.draws.choice(sizes)
            subnets.append(Subnet(size, 1.0))
            if lower_rates:
                subnets.append(Subnet(size, self.draws.choice(lower_rates)))
        return subnets

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        """Run one training step's forward passes.

        Args:
            input: Images [B, C, H, W].
            target: What the criterion takes: class indices [B] or soft labels [B, classes].

        Returns:
            ``loss``, the sum of all losses; ``output``, the first subnet's logits [B, classes]; ``subnet_losses``, one
            ``SubnetLoss`` for each subnet.

        Raises:
            FloatingPointError: If a loss since the last log line is not finite; the message names the subnet.
            ValueError: If the batch is empty, the target has labels of tokens, or the criterion does not return one
                number.
        """
        if target.ndim > 2:
            raise ValueError(
                f'target of shape {tuple(target.shape)} has labels of tokens, which only LV-ViT learns; train one, as '
                f'supervit_lvvit_tiny, or leave out --dataset label_maps')
        subnets = self.sample_subnets()
        outputs = self.run_subnets(input, subnets)
        return self.add_up(subnets, outputs, lambda logits: self.criterion_loss(logits, target))

    def run_subnets(self, input: Tensor, subnets: Sequence[Subnet], **kwargs: Any) -> list[Any]:
        """Return what the model, with its wrappers, says of a batch for each subnet."""
        if not len(input):
            raise ValueError(f'this batch of shape {tuple(input.shape)} holds no image; leave it out')
        return self.trainable_module(input, subnets=subnets, **kwargs)

    def criterion_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of the training script's criterion [], which must be one number."""
        loss = self.criterion(logits, target)
        if loss.ndim:
            raise ValueError(
                f'the criterion returned a loss of shape {tuple(loss.shape)}, and the losses of the subnets add up to '
                f'one number; use one with reduction="mean"')
        return loss

    def add_up(
            self,
            subnets: Sequence[Subnet],
            outputs: Sequence[Tensor],
            label_loss: Callable[[Tensor], Tensor],
            distill: Loss | None = None,
    ) -> dict[str, Any]:
        """Return what a step returns.

        Args:
            subnets: The subnets.
            outputs: The logits of each [B, classes].
            label_loss: Returns the loss of the logits of a subnet that learns from the labels.
            distill: As from ``choose_distillation`` (default: that).
        """
        teachers: dict[Size, Tensor] = {}
        losses, roles = [], []
        for subnet, logits in zip(subnets, outputs, strict=True):
            if subnet.img_size in teachers:
                teacher = teachers[subnet.img_size] if self.model.distill_teacher == 'own_size' else outputs[0]
                roles.append('distill')
                distill = distill or self.choose_distillation()
                losses.append(distill(logits, teacher))
            else:
                roles.append('label')
                losses.append(label_loss(logits))
                teachers[subnet.img_size] = logits
        loss = torch.stack(losses)
        subnet_losses = [SubnetLoss(*row) for row in zip(subnets, roles, loss.detach().unbind(), strict=True)]
        self._keep_for_log(subnet_losses)
        return {'loss': loss.sum(), 'output': outputs[0], 'subnet_losses': subnet_losses}

    def _keep_for_log(self, subnet_losses: Sequence[SubnetLoss]) -> None:
        for subnet, role, loss in subnet_losses:
            total, count = self._sums.get((role, subnet), (torch.zeros_like(loss), 0))
            self._sums[role, subnet] = total + loss, count + 1
        self._num_steps += 1
        if self._num_steps % self.log_interval == 0:
            self.log_losses()

    def log_losses(self) -> None:
        """Log the mean loss of each role and subnet since the last time, on the first rank.

        Raises:
            FloatingPointError: If one is not finite; the message names the subnet.
        """
        keys = sorted(self._sums, key=lambda key: (key[0], self.model.macs(key[1])))
        totals = torch.stack([self._sums[key][0] for key in keys]).tolist() if keys else []
        means = {key: total / self._sums[key][1] for key, total in zip(keys, totals, strict=True)}
        self._sums.clear()
        faulty = ', '.join(f'{subnet} ({role}): {x}' for (role, subnet), x in means.items() if not math.isfinite(x))
        if faulty:
            raise FloatingPointError(
                f'loss is not finite for {faulty}; lower the learning rate, clip gradients or train in bfloat16, '
                f'and resume from the last checkpoint')
        is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if self.verbose and is_first and means:
            parts = []
            for role in sorted({role for role, _ in means}, reverse=True):  # label, distill
                own = {subnet: mean for (r, subnet), mean in means.items() if r == role}
                subnets = ', '.join(f'{subnet} {mean:#.3g}' for subnet, mean in own.items())
                parts.append(f'{role} {statistics.fmean(own.values()):#.3g} ({subnets})')
            _logger.info(f'Subnets: {", ".join(parts)}')

    def compile(  # type: ignore[override]
            self,
            backend: str = 'inductor',
            mode: str | None = None,
            **compile_kwargs: Any,
    ) -> nn.Module:
        """Compile the model in place, see its ``compile``.

        Args:
            backend: As for ``torch.compile``.
            mode: As for ``torch.compile``.
            **compile_kwargs: Further arguments of ``torch.compile``.
        """
        self.model.compile(backend=backend, mode=mode, **compile_kwargs)
        return self.trainable_module

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> 'SuperViTTask':
        """Wrap the model in DistributedDataParallel, one gradient synchronization for all subnets of a step.

        Args:
            device_ids: As for ``DistributedDataParallel``; ignored for a model on the CPU, where torch takes none.
            **ddp_kwargs: Further arguments of ``DistributedDataParallel``.
        """
        device = next(self.model.parameters()).device
        state = [self.draws.getstate()]
        torch.distributed.broadcast_object_list(state, src=0, device=device)  # the seeds differ, the draws must not
        self.draws.setstate(state[0])
        super().prepare_distributed(None if device.type == 'cpu' else device_ids, **ddp_kwargs)
        return self

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the state of the generator that draws the subnets, for the checkpoint.

        Raises:
            FloatingPointError: If a loss since the last log line is not finite: such a network is not worth keeping.
        """
        if ema:
            return {}
        self.log_losses()
        return {'subnet_draws': self.draws.getstate()}

    def load_task_state(
            self,
            state: dict[str, Any] | None,
            strict: bool = True,
            module: nn.Module | None = None,
            ema: bool = False,
    ) -> None:
        """Go on drawing subnets where the checkpoint stopped; one without this state leaves the generator alone."""
        if state and not ema and 'subnet_draws' in state:
            self.draws.setstate(state['subnet_draws'])
