"""A straightforward SuperViT on LV-ViT to compare with, as ``reference.py`` is one on DeiT.

It is written from the description of the method, shares no code with the package, and takes the same state dict.
"""
import math

import torch
import torch.nn.functional as F
from reference import ReferenceBlock, ReferenceSuperViT, sides, soft_cross_entropy
from torch import nn

Box = tuple[int, int, int, int]


def scale_box(box: Box, grid: tuple[int, int], new_grid: tuple[int, int]) -> Box:
    ratios = [old / new for old, new in zip(grid, new_grid, strict=True)]
    return tuple(math.floor(edge // ratio) for edge, ratio in zip(box, ratios * 2, strict=True))  # type: ignore


def swap(x: torch.Tensor, box: Box) -> torch.Tensor:
    """Exchange a box of the maps [B, D, H, W] between each image and its mirror place in the batch."""
    row0, col0, row1, col1 = box
    swapped = x.clone()
    for i in range(len(x)):
        swapped[i, :, row0:row1, col0:col1] = x[len(x) - 1 - i, :, row0:row1, col0:col1]
    return swapped


class ReferenceLVBlock(ReferenceBlock):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, skip_lam: float) -> None:
        super().__init__(dim, num_heads, mlp_ratio)
        self.skip_lam = skip_lam
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-5), nn.LayerNorm(dim, eps=1e-5)
        self.attn.qkv = nn.Linear(dim, 3 * dim, bias=False)

    def scale(self, y: torch.Tensor) -> torch.Tensor:
        return super().scale(y) / self.skip_lam


class ReferenceLVViT(ReferenceSuperViT):
    def __init__(
            self,
            skip_lam: float = 2.,
            patch_size: int = 16,
            embed_dim: int = 384,
            depth: int = 16,
            num_heads: int = 6,
            mlp_ratio: float = 3.,
            num_classes: int = 1000,
            **kwargs: object,
    ) -> None:
        super().__init__(patch_size=patch_size, embed_dim=embed_dim, depth=0, num_classes=num_classes, **kwargs)
        self.patch_embed = nn.ModuleDict({
            'conv1': nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), 'bn1': nn.BatchNorm2d(64),
            'conv2': nn.Conv2d(64, 64, 3, padding=1, bias=False), 'bn2': nn.BatchNorm2d(64),
            'conv3': nn.Conv2d(64, 64, 3, padding=1, bias=False), 'bn3': nn.BatchNorm2d(64),
            'proj': nn.Conv2d(64, embed_dim, patch_size // 2, patch_size // 2)})
        self.blocks = nn.ModuleList(ReferenceLVBlock(embed_dim, num_heads, mlp_ratio, skip_lam) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self.aux_head = nn.Linear(embed_dim, num_classes)

    def features(
            self,
            x: torch.Tensor,
            img_size: int | tuple[int, int],
            keep_rate: float,
            box: Box | None = None,
    ) -> torch.Tensor:
        if tuple(x.shape[-2:]) != sides(img_size):
            x = F.interpolate(x, sides(img_size), mode='bilinear', align_corners=True)
        for i in '123':
            x = self.patch_embed['bn' + i](self.patch_embed['conv' + i](x)).clamp(min=0)
        x = self.patch_embed['proj'](x)
        if box is not None:
            x = swap(x, box)
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        x = x + self.pos_embed_list[self.img_sizes.index(img_size)]
        for i, block in enumerate(self.blocks):
            x = block(x, keep_rate if i in self.drop_layers else 1.)
        return self.norm(x)

    def forward(self, x: torch.Tensor, img_size: int | tuple[int, int], keep_rate: float) -> torch.Tensor:
        x = self.features(x, img_size, keep_rate)
        return self.head(x[:, 0]) + 0.25 * self.aux_head(x[:, 1:]).max(dim=1).values


def token_label_step(
        model: ReferenceLVViT,
        x: torch.Tensor,
        target: torch.Tensor,
        subnets: list,
        box: Box,
        cls_weight: float = 1.,
        dense_weight: float = 1.,
        own_size_teacher: bool = False,
) -> list[torch.Tensor]:
    """Four passes, four backward calls; ``target`` holds soft token labels, ``box`` is one on the largest grid.

    All that drop tokens learn from the first subnet, or each from the network of its own size.
    """
    patch_size = 2 * model.patch_embed['proj'].kernel_size[0]
    grids = {img_size: tuple(side // patch_size for side in sides(img_size)) for img_size in model.img_sizes}
    grid = grids[model.img_sizes[-1]]
    row0, col0, row1, col1 = box
    lam = 1 - (row1 - row0) * (col1 - col0) / (grid[0] * grid[1])
    image_target = lam * target[:, :, 1] + (1 - lam) * target[:, :, 1].flip(0)
    losses, teacher = [], torch.empty(0)
    for i, (img_size, keep_rate) in enumerate(subnets):
        features = model.features(x, img_size, keep_rate, scale_box(box, grid, grids[img_size]))
        logits = model.head(features[:, 0])
        if i % 2 == 0:
            if i == 0 or own_size_teacher:
                teacher = logits.detach().softmax(dim=1)
            loss = soft_cross_entropy(logits, image_target)
            if i == 0:
                maps = model.aux_head(features[:, 1:]).transpose(1, 2).unflatten(2, grid)
                token_logits = swap(maps, box).flatten(2).transpose(1, 2)
                token_loss = soft_cross_entropy(token_logits, target[:, :, 2:].transpose(1, 2))
                loss = cls_weight * loss + dense_weight * token_loss
        else:
            log_ratio = teacher.log() - logits.log_softmax(dim=1)
            loss = (teacher * log_ratio).sum() / len(x)
        loss.backward()
        losses.append(loss.detach())
    return losses
