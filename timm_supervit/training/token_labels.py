"""Super-training of LV-ViT: MixToken and token labels (All Tokens Matter, arXiv 2104.10858) on SuperViT's objective.

With one label for the image, every patch token learns that label; with a label for each patch, its own.
"""
import functools
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from ..models.lvvit import SuperLVViT
from ..models.mix_token import box_share, draw_box
from .distillation import distillation_loss
from .task import SuperViTTask


class TokenLabelTask(SuperViTTask):
    """Trains all subnets of a ``SuperLVViT`` at once.

    It is what ``timm.task.ClassificationTask(model, ...)`` creates for one, and differs from ``SuperViTTask`` in what
    the labels teach. One MixToken box is drawn for each step. The first subnet learns from the labels with all its
    tokens, by ``cls_weight`` * the class token's loss + ``dense_weight`` * the patch tokens' loss, the latter after the
    box is swapped back; the others that learn from labels do so with their class token. The class token's loss is that
    against the image's label and that against the label of the image that the box came from, in the proportion of the
    box on the first subnet's grid.

    Image labels, hard or soft, are learned by the training script's criterion; labels of tokens, and the image's label
    beside them, by soft cross-entropy. Both have the label smoothing of the criterion, as in the official code.
    """

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        """Run one training step's forward passes.

        With ``train_subnets='active'`` and an active subnet that drops tokens, which therefore has no token for each
        label, that subnet learns image labels by its evaluation logits and without MixToken, as any timm model.

        Args:
            input: Images [B, C, H, W]; B may be odd.
            target: Image labels as the criterion takes them, class indices [B] or soft labels [B, classes]; or token
                labels [B, classes, 2 + N]: along the last axis the ground truth (not used), the image's label, and one
                label for each of the N patches of the first subnet's grid, row-major.

        Returns:
            As ``SuperViTTask``; ``output`` holds the logits of the first subnet's class token.

        Raises:
            ValueError: If the target has another shape.
            FloatingPointError: If a loss is not finite; the message names the subnet.
        """
        model = cast(SuperLVViT, self.model)
        subnets = self.sample_subnets()
        num_patches = model.num_patches(subnets[0].img_size)
        self._check_target(input, target, num_patches, subnets[0].keep_rate)
        if subnets[0].keep_rate < 1:
            return super().forward(input, target)

        box = draw_box(model.grid_size(model.img_sizes[-1]), self.draws)
        grid_size = model.grid_size(subnets[0].img_size)
        share = box_share(model.scale_box(box, grid_size), grid_size)
        outputs = self.run_subnets(input, subnets, mix_box=box)
        (first, token_logits), *others = outputs  # [B, classes], [B, N, classes]; the others [B, classes]
        if target.ndim == 3:
            # It has this name in timm's criteria, the other in torch's.
            smoothing = getattr(self.criterion, 'smoothing', getattr(self.criterion, 'label_smoothing', 0.))
            criterion: Any = functools.partial(F.cross_entropy, label_smoothing=smoothing)
            image_target, token_target = target[:, :, 1], target[:, :, 2:].transpose(1, 2).flatten(0, 1)
        else:
            criterion = self.criterion_loss
            image_target, token_target = target, target.repeat_interleave(num_patches, dim=0)

        def label_loss(logits: Tensor) -> Tensor:
            loss = (1 - share) * criterion(logits, image_target) + share * criterion(logits, image_target.flip(0))
            if logits is first:
                token_loss = criterion(token_logits.flatten(0, 1), token_target)
                loss = model.cls_weight * loss + model.dense_weight * token_loss
            return loss

        distill = distillation_loss if target.ndim == 3 else None  # of the form of the criterion that these labels have
        return self.add_up(subnets, [first, *others], label_loss, distill)

    def _check_target(self, input: Tensor, target: Tensor, num_patches: int, keep_rate: float) -> None:
        shapes = [(len(input),), (len(input), self.model.num_classes)]
        if keep_rate == 1:
            shapes.append((len(input), self.model.num_classes, 2 + num_patches))
        if tuple(target.shape) not in shapes:
            raise ValueError(
                f'target of shape {tuple(target.shape)} fits neither image nor token labels of this batch and model; '
                f'use one of the shapes {", ".join(map(str, shapes))}: class indices, soft labels, or token labels '
                f'[B, classes, 2 + patches] where the first subnet keeps all its patches')
