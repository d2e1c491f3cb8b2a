"""Super-training: the objective of SuperViT (arXiv 2205.11397) as a task of timm's Task API.

One step runs several subnets on one batch and adds up their losses: networks that keep all tokens learn from the
labels, networks that drop some learn from one that keeps all. One backward pass and one
update follow, both done by the training script.
"""
import logging
import math
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .models.supervit import SuperVisionTransformer
from .subnets import Subnet

__all__ = ['SubnetLoss', 'SuperViTTask', 'is_supervit']

_logger = logging.getLogger(__name__)


class SubnetLoss(NamedTuple):
    """What one subnet contributed to a training step.

    Attributes:
        subnet: The subnet.
        role: ``label``, it learned from the labels, or ``distill``, from a network that keeps all tokens.
        loss: Its loss.
    """

    subnet: Subnet
    role: str
    loss: float


def is_supervit(model: nn.Module) -> bool:
    """Return whether a model, wrapped or not, is a SuperViT."""
    return isinstance(unwrap_model(model), SuperVisionTransformer)


def distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return KL(softmax(teacher) || softmax(logits)), summed over classes and averaged over the batch.

    Args:
        logits: The student's logits [B, classes].
        teacher_logits: The teacher's logits [B, classes]; no gradient flows into them.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)  # autocast on a CPU would stay in half precision
    student, teacher = (x.log_softmax(dim=-1, dtype=dtype) for x in (logits, teacher_logits.detach()))
    return F.kl_div(student, teacher, reduction='batchmean', log_target=True)


class SuperViTTask(ClassificationTask):
    """Trains all subnets of a SuperViT at once.

    It is what ``timm.task.ClassificationTask(model, ...)`` creates for a SuperViT, so timm's ``train.py`` super-trains.
    The model's setting ``train_subnets`` chooses the subnets of a step, with S the largest size:

    - ``sandwich``, the official sampling: (S, 1.0) and a random smaller size at 1.0 learn from the labels; both sizes
      at a random lower rate each learn from them.
    - ``all``: every size at 1.0 learns from the labels, and every lower rate from its own size at 1.0.
    - ``active``: the active subnet learns from the labels, as any timm model.

    ``distill_teacher`` chooses what is meant by "them" and "its own size": ``own_size``, as the paper and the official
    DeiT loop have it, or (S, 1.0) for all, ``largest_size``, as the official LV-ViT loop has it.

    The draws come from a generator of the task's own, seeded from torch's seed. It is the same on every rank and part
    of the checkpoint. Evaluation, EMA and checkpoints see the plain model. Whenever timm's script logs its training
    loss, the task logs each subnet's mean loss since the last time, so that one that diverges shows.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Create the task.

        Args:
            model: A SuperViT.
            *args: As for ``ClassificationTask``.
            **kwargs: As for ``ClassificationTask``.
        """
        super().__init__(model, *args, **kwargs)
        self.recent_losses: dict[tuple[str, Subnet], list[float]] = defaultdict(list)
        self.generator = torch.Generator().manual_seed(torch.initial_seed())
        if self.verbose:
            _logger.info(
                f'Super-training img_sizes {self.model.img_sizes} x keep_rates {self.model.keep_rates}, '
                f'train_subnets={self.model.train_subnets}')
            _follow_training_log(self)

    @property
    def model(self) -> SuperVisionTransformer:
        """The plain model, without the wrappers of distributed training."""
        return unwrap_model(self.trainable_module)

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
            size = self._draw(sizes)
            subnets.append(Subnet(size, 1.0))
            if lower_rates:
                subnets.append(Subnet(size, self._draw(lower_rates)))
        return subnets

    def _draw(self, choices: Sequence[Any]) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=self.generator))]

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        """Run one training step's forward passes.

        Args:
            input: Images [B, C, H, W].
            target: What the criterion takes: class indices [B] or soft labels [B, classes].

        Returns:
            ``loss``, the sum of all losses; ``output``, the first subnet's logits [B, classes]; ``subnet_losses``, one
            ``SubnetLoss`` for each subnet.

        Raises:
            FloatingPointError: If a loss is not finite; the message names the subnet.
        """
        subnets = self.sample_subnets()
        outputs = self._forward_subnets(input, subnets)
        return self._add_up(subnets, outputs, lambda logits: self.criterion(logits, target))

    def _add_up(
            self,
            subnets: Sequence[Subnet],
            outputs: Sequence[Tensor],
            label_loss: Any,
    ) -> dict[str, Any]:
        # label_loss(logits) is the loss of a subnet that learns from the labels.
        teachers: dict[int, Tensor] = {}
        losses, roles = [], []
        for subnet, logits in zip(subnets, outputs, strict=True):
            if subnet.img_size in teachers:
                teacher = teachers[subnet.img_size] if self.model.distill_teacher == 'own_size' else outputs[0]
                roles.append('distill')
                losses.append(distillation_loss(logits, teacher))
            else:
                roles.append('label')
                losses.append(label_loss(logits))
                teachers[subnet.img_size] = logits
        loss = torch.stack(losses)
        subnet_losses = [SubnetLoss(*row) for row in zip(subnets, roles, loss.detach().tolist(), strict=True)]
        faulty = ', '.join(f'{s.subnet} ({s.role}): {s.loss}' for s in subnet_losses if not math.isfinite(s.loss))
        if faulty:
            raise FloatingPointError(
                f'loss is not finite for {faulty}; lower the learning rate, clip gradients or train in bfloat16, '
                f'and resume from the last checkpoint')
        for s in subnet_losses:
            self.recent_losses[s.role, s.subnet].append(s.loss)
        return {'loss': loss.sum(), 'output': outputs[0], 'subnet_losses': subnet_losses}

    def _forward_subnets(self, *args: Any) -> list[Any]:
        if isinstance(self.trainable_module, DistributedDataParallel):
            return self.trainable_module(*args)
        return self.model.forward_subnets(*args)

    def log_recent_losses(self) -> None:
        """Log the mean loss of each role and subnet since the last call, by standard logging."""
        parts = []
        for role in ('label', 'distill'):
            means = {s: math.fsum(x) / len(x) for (r, s), x in sorted(self.recent_losses.items()) if r == role}
            if means:
                subnets = ', '.join(f'{s.img_size}@{s.keep_rate:g} {mean:#.3g}' for s, mean in means.items())
                values = [x for (r, _), losses in self.recent_losses.items() if r == role for x in losses]
                parts.append(f'{role} {math.fsum(values) / len(values):#.3g} ({subnets})')
        self.recent_losses.clear()
        if parts:
            _logger.info(f'Subnets: {", ".join(parts)}')

    def compile(  # type: ignore[override]
            self,
            backend: str = 'inductor',
            mode: str | None = None,
            **compile_kwargs: Any,
    ) -> nn.Module:
        """Compile the blocks in place, each for any number of tokens, so that no subnet compiles anew.

        Stochastic depth stays outside, since its rate, a constant in a compiled graph, differs in every block: the
        blocks share their graphs then.

        Args:
            backend: As for ``torch.compile``.
            mode: As for ``torch.compile``.
            **compile_kwargs: Further arguments of ``torch.compile``.
        """
        if any(isinstance(module, DropPath) for module in self.model.modules()):
            for block in self.model.blocks:
                for name in ('drop_path1', 'drop_path2'):
                    # timm gives a block of rate 0, the first, none of them; with one it shares the graphs, too.
                    drop_path = getattr(block, name)
                    drop_path = drop_path if isinstance(drop_path, DropPath) else DropPath()
                    drop_path.forward = torch.compiler.disable(drop_path.forward)  # type: ignore[method-assign]
                    setattr(block, name, drop_path)
        for block in self.model.blocks:
            block.compile(backend=backend, mode=mode, **{'dynamic': True, **compile_kwargs})
        return self.trainable_module

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> 'SuperViTTask':
        """Wrap the model in DistributedDataParallel, one gradient synchronization for all subnets of a step.

        Args:
            device_ids: As for ``DistributedDataParallel``; ignored for a model on the CPU, where torch takes none.
            **ddp_kwargs: Further arguments of ``DistributedDataParallel``.
        """
        parameter = next(self.model.parameters())
        state = self.generator.get_state().to(parameter.device)
        torch.distributed.broadcast(state, src=0)  # the ranks' torch seeds differ, their draws must not
        self.generator.set_state(state.cpu())
        self.eval_model: Any = self.get_eval_model()
        self.trainable_module = DistributedDataParallel(
            _ForwardSubnets(self.trainable_module),
            device_ids=None if parameter.device.type == 'cpu' else device_ids,
            **ddp_kwargs,
        )
        return self

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the state of the generator that draws the subnets, for the checkpoint."""
        return {} if ema else {'subnet_generator': self.generator.get_state()}

    def load_task_state(
            self,
            state: dict[str, Any] | None,
            strict: bool = True,
            module: nn.Module | None = None,
            ema: bool = False,
    ) -> None:
        """Go on drawing subnets where the checkpoint stopped; one without this state leaves the generator alone."""
        if state and not ema:
            self.generator.set_state(state['subnet_generator'])


def _follow_training_log(task: SuperViTTask) -> None:
    """Let a task log its losses whenever timm's train.py logs its own: the interval is known to the script alone."""
    reference = weakref.ref(task)

    def follow(record: logging.LogRecord) -> bool:
        task = reference()
        if task is not None and record.getMessage().startswith('Train:'):
            task.log_recent_losses()
        return True

    logging.getLogger('train').addFilter(follow)


class _ForwardSubnets(nn.Module):
    """Makes ``forward_subnets`` the forward that DistributedDataParallel prepares; unwrapped by timm as any wrapper."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module: Any = module

    def forward(self, *args: Any) -> list[Any]:
        return self.module.forward_subnets(*args)
