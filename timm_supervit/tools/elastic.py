"""All subnets of a model as one network, which takes the image size and the keep rate as tensors: what export needs.

What Python code decides in the model, by comparing sizes and counting tokens, is part of the graph here: the position
embedding is cut out of a table, and each dropping block keeps a number of tokens that is known only when it runs.
"""
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from ..models.supervit import SuperVisionTransformer

__all__ = ['ElasticNetwork', 'Requirement']


class Requirement(nn.Module):
    """A condition on an input of an exported program, which stops with an error where it does not hold.

    ONNX has no assertions. There it is a reshape that fails, and ``name``, given to that node, is in the error.

    Args:
        name: What is required, in words joined by underscores.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, holds: Tensor) -> Tensor:
        """Return at which place of ``holds`` [N], of which at most one is true, it is true [1]."""
        if torch.onnx.is_in_onnx_export():
            return holds.nonzero().reshape(1)
        torch._assert_async(holds.any(), self.name.replace('_', ' '))
        return holds.long().argmax().reshape(1)


class ElasticNetwork(nn.Module):
    """Runs any subnet of a model, chosen by tensors; the weights and modules are the model's own.

    Args:
        model: The model, in evaluation mode and on its device.
    """

    def __init__(self, model: SuperVisionTransformer) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        sizes = [to_2tuple(size) for size in model.img_sizes]
        self.is_square = all(height == width for height, width in sizes)
        patch_size = model.patch_embed.patch_size
        grids = [(height // patch_size[0], width // patch_size[1]) for height, width in sizes]
        lengths = [pos_embed.shape[1] for pos_embed in model.pos_embed_list]
        # Not buffers: they stay on the CPU, where the scalars are.
        self.sizes = torch.tensor([height for height, _ in sizes] if self.is_square else sizes)
        self.table = torch.tensor([
            (*grid, grid[0] * grid[1], sum(lengths[:i])) for i, grid in enumerate(grids)])
        self.largest = [max(side) for side in zip(*grids, strict=True)]
        self.num_embed_prefix_tokens = model.num_embed_prefix_tokens
        shown = '_'.join(f'{height}' if self.is_square else f'{height}x{width}' for height, width in sizes)
        self.img_size_requirement = Requirement(f'img_size_must_be_one_of_{shown}')
        self.keep_rate_requirement = Requirement('keep_rate_must_be_above_0_and_at_most_1')

    def example_scalars(self) -> tuple[Tensor, Tensor]:
        """Return an image size and a keep rate, of a subnet that drops tokens, to trace with."""
        return self.sizes[len(self.sizes) // 2].clone(), torch.tensor(0.7, dtype=torch.float64)

    def forward(self, image: Tensor, img_size: Tensor, keep_rate: Tensor) -> Tensor:
        """Return the logits [B, num_classes] of one subnet.

        Args:
            image: Images [B, C, H, W] of any size.
            img_size: One of the model's sizes, int64: a scalar, or [2] (height, width) if not all of them are square.
            keep_rate: Rate in (0, 1], a float64 scalar; in float32 the products of ``keep_schedule`` would be others.
        """
        model: Any = self.model
        matches = self.sizes == img_size
        index = self.img_size_requirement(matches if self.is_square else matches.all(dim=1))
        valid = ((keep_rate > 0) & (keep_rate <= 1)).reshape(1)
        keep_rate = keep_rate.reshape(1).index_select(0, self.keep_rate_requirement(valid))
        row = self.table.index_select(0, index).flatten()
        height, width, num_patches, start = row.tolist()
        for side, largest in zip((height, width), self.largest, strict=True):
            torch._check(side >= 1)
            torch._check(side <= largest)
        patch_height, patch_width = model.patch_embed.patch_size
        # As ``resize_images``, which does nothing to images of that size; so does this, up to rounding.
        x = F.interpolate(
            image, size=(height * patch_height, width * patch_width), mode='bilinear', align_corners=True)
        x = model.embed_patches(x)
        torch._check(num_patches == x.shape[1])
        table = torch.cat(list(model.pos_embed_list), dim=1)
        length = x.shape[1] + self.num_embed_prefix_tokens
        torch._check(start >= 0)
        torch._check(start + length <= table.shape[1])
        x = model.add_positions(x, table.narrow(1, start, length))
        kept = row[2:3].double()
        for i, block in enumerate(model.blocks):
            if i in model.drop_layers:  # see ``keep_schedule``
                kept = torch.minimum(kept, torch.ceil(keep_rate * (kept + 1)))
                num_keep = kept.long().item()
                torch._check(num_keep >= 1)
                torch._check(num_keep <= x.shape[1] - model.num_prefix_tokens)
                x = block(x, num_keep=num_keep)
            else:
                x = block(x)
        return model.forward_head(model.norm(x))
