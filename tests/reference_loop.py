"""The official training loops' rules, written anew: four losses a step, AdamW, its schedule, and averaged weights.

The numbers are those of the official command lines on 4 GPUs with 256 images each.
"""
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from reference import ReferenceSuperViT, training_step
from reference_lvvit import Box, ReferenceLVViT, token_label_step
from timm.data import Mixup
from torch import Tensor


class Settings(NamedTuple):
    lr: float  # of 1,024 images
    decay: float  # of the averaged weights
    epochs: int
    cooldown_epochs: int
    weight_decay: float = 0.05
    warmup_epochs: int = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    drop_path: float = 0.1
    smoothing: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


DEIT = Settings(lr=5e-4 * 1024 / 512, decay=0.99996, epochs=300, cooldown_epochs=0)
LVVIT = Settings(lr=1.6e-3, decay=0.99992, epochs=300, cooldown_epochs=10)


def learning_rate(settings: Settings, epoch: int) -> float:
    """Rise in a straight line, fall by half a cosine that counts from epoch 0, and stay."""
    if epoch < settings.warmup_epochs:
        return settings.warmup_lr + (settings.lr - settings.warmup_lr) * epoch / settings.warmup_epochs
    cosine = math.cos(math.pi * min(epoch, settings.epochs) / settings.epochs)
    return settings.min_lr + (settings.lr - settings.min_lr) * (1 + cosine) / 2


def mix(images: Tensor, classes: Tensor, num_classes: int, smoothing: float, seed: int) -> tuple[Tensor, Tensor]:
    """Mix a batch by mixup or by cutmix, one of both in each step; the official loop uses timm's class, too."""
    np.random.seed(seed)
    mixup = Mixup(
        mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode='batch', label_smoothing=smoothing,
        num_classes=num_classes)
    images, target = mixup(images.clone(), classes)
    return images, target.to(images.dtype)


def smooth(labels: Tensor, smoothing: float) -> Tensor:
    """Spread a share of labels [B, classes, ...] over all classes."""
    return (1 - smoothing) * labels + smoothing / labels.shape[1]


def spread(classes: Tensor, num_classes: int, num_patches: int) -> Tensor:
    """Make token labels [B, classes, 2 + patches] of classes [B]: all tokens have the image's."""
    labels = torch.zeros(len(classes), num_classes, 2 + num_patches, dtype=torch.float64)
    for label, index in zip(labels, classes.tolist(), strict=True):
        label[index] = 1
    return labels


class OfficialLoop:
    """Trains a reference network as the official loops do.

    In four things they differ from timm's ``train.py``; each argument, if true, has it their way.
    """

    def __init__(
            self,
            model: ReferenceSuperViT,
            settings: Settings,
            late_schedule: bool = False,
            decayed_positions: bool = False,
            awaited_gradients: bool = False,
            averaged_start: bool = False,
    ) -> None:
        """Start.

        Args:
            model: The network, with the weights to start from.
            settings: What the command line says.
            late_schedule: Set the rate of an epoch behind it, so that the next one has it (DeiT alone).
            decayed_positions: Decay position embeddings, whose names the list of exceptions misses.
            awaited_gradients: Leave the position embedding of a size alone until that size is drawn, instead of
                updating it by gradients of zero.
            averaged_start: Begin the average with the weights before the first update, instead of those behind it.
        """
        self.model, self.settings = model.train(), settings
        self.late_schedule, self.decayed_positions = late_schedule, decayed_positions
        self.awaited_gradients, self.averaged_start = awaited_gradients, averaged_start
        self.moments: dict[str, tuple[Any, Any, int]] = {}
        self.average = {name: value.clone() for name, value in model.state_dict().items()}

    def step(self, epoch: int, images: Tensor, target: Tensor, subnets: list, box: Box | None) -> None:
        if box is None:
            training_step(self.model, images, target, subnets)
        else:
            token_label_step(self.model, images, target, subnets, box)
        self.update(learning_rate(self.settings, max(epoch - 1, 0) if self.late_schedule else epoch))
        self.update_average(self.settings.decay if self.averaged_start or epoch else 0.)

    @torch.no_grad()
    def update(self, lr: float) -> None:
        beta1, beta2 = self.settings.betas
        for name, parameter in self.model.named_parameters():
            gradient = parameter.grad
            if gradient is None:
                if self.awaited_gradients:
                    continue
                gradient = torch.zeros_like(parameter)
            mean, square, count = self.moments.get(name, (0., 0., 0))
            mean, square, count = (
                beta1 * mean + (1 - beta1) * gradient, beta2 * square + (1 - beta2) * gradient ** 2, count + 1)
            self.moments[name] = mean, square, count
            if self.decays(name, parameter):
                parameter.mul_(1 - lr * self.settings.weight_decay)
            size = (square / (1 - beta2 ** count)).sqrt() + self.settings.eps
            parameter.sub_(lr * mean / (1 - beta1 ** count) / size)
        self.model.zero_grad(set_to_none=False)

    def decays(self, name: str, parameter: Tensor) -> bool:
        if name.startswith('pos_embed_list'):
            return self.decayed_positions
        return parameter.ndim > 1 and name != 'cls_token'

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():  # BatchNorm's count of batches is not read
                self.average[name] = decay * self.average[name] + (1 - decay) * value


def create_reference(settings: Settings, weights: dict[str, Tensor], **shape: Any) -> ReferenceSuperViT:
    model = ReferenceSuperViT(**shape) if settings is DEIT else ReferenceLVViT(**shape)
    model.double().load_state_dict(weights)
    return model
