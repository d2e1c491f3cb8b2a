"""Subnets as modules of their own: what export, compilation and measuring need, which take a module and no setting.

``FixedSubnet`` is one subnet. ``ElasticSubnet`` is any subnet, chosen by tensors: what Python code decides in the
model, by comparing sizes and counting tokens, is part of the graph there. The position embedding is chosen by the size,
and each dropping block keeps a number of tokens that is known only when it runs.
"""
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, StdConv2dSame
from torch import Tensor, nn

from ..models.supervit import SuperViT
from ..models.token_keeping import Tokens, select_tokens
from ..subnets import Subnet, format_size, size_2d


class FixedSubnet(nn.Module):
    """Runs one subnet of a model; the weights are the model's own.

    Args:
        model: The model.
        subnet: The subnet, one of the model's sizes.
    """

    def __init__(self, model: SuperViT, subnet: Subnet) -> None:
        super().__init__()
        self.model = model
        self.subnet = subnet
        self.schedule = model.schedule(subnet)
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, num_classes] of images [B, C, H, W] of any size."""
        model = self.model
        tokens = model.run_blocks(model.embed(x, self.subnet.img_size), self.schedule)
        return model.forward_head(model.norm(tokens.x))


class Requirement(nn.Module):
    """A condition on an input of an exported program, which stops with an error where it does not hold.

    ONNX has no assertions. There it is a reshape that fails, of the node that ``write_program`` gives this name.

    Args:
        name: What is required, in words joined by underscores.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, holds: Tensor) -> Tensor:
        """Return the index [1] of the one true value among ``holds`` [N]."""
        if torch.onnx.is_in_onnx_export():
            return holds.nonzero().reshape(1)
        torch._assert_async(holds.any(), self.name.replace('_', ' '))
        return holds.long().argmax().reshape(1)


class ElasticSubnet(nn.Module):
    """Runs any subnet of a model, chosen by tensors; the weights and modules are the model's own.

    Args:
        model: The model, in evaluation mode and on its device.
    """

    def __init__(self, model: SuperViT) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        sizes = [size_2d(size) for size in model.img_sizes]
        self.is_square = all(height == width for height, width in sizes)
        self.grids = [model.grid_size(size) for size in model.img_sizes]
        self.patch_size = sizes[0][0] // self.grids[0][0]  # in the image, whatever a convolutional stem does to it
        # Not buffers: they stay on the CPU, as do the inputs that they are compared with.
        self.sizes = torch.tensor([height for height, _ in sizes] if self.is_square else sizes)
        counts = [rows * columns for rows, columns in self.grids]
        self.table = torch.tensor([  # rows, columns and patches of each size, and the patches of all sizes before it
            (*grid, counts[i], sum(counts[:i]), i) for i, grid in enumerate(self.grids)])
        # The size of these paddings and the check of these means are no arithmetic that the exporter to ONNX follows.
        self.has_fixed_stem = any(
            isinstance(module, nn.GroupNorm | Conv2dSame | StdConv2dSame) for module in model.patch_embed.modules())
        self.require_size = Requirement(f'img_size_must_be_one_of_{"_".join(map(format_size, model.img_sizes))}')
        self.require_rate = Requirement('keep_rate_must_be_above_0_and_at_most_1')

    @property
    def example_subnet(self) -> tuple[Tensor, Tensor]:
        """An image size and a keep rate that drops tokens, to trace with."""
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
        index = self.require_size(matches if self.is_square else matches.all(dim=1))
        valid = self.require_rate(((keep_rate > 0) & (keep_rate <= 1)).reshape(1))
        keep_rate = keep_rate.reshape(1).index_select(0, valid)
        row = self.table.index_select(0, index).flatten()
        is_one_graph = torch.onnx.is_in_onnx_export() and not self.has_fixed_stem
        x = (self._embed if is_one_graph else self._embed_by_branches)(image, index, row)
        tokens = Tokens(x, rotations=self._rotations(x, row))
        schedule, drops = self._schedule(x, row, keep_rate)
        if model.global_pool:
            tokens = model.run_blocks(tokens, schedule)
        else:
            tokens = self._run_blocks_in_order(tokens, schedule, drops)
        return model.forward_head(model.norm(tokens.x))

    def _schedule(self, x: Tensor, row: Tensor, keep_rate: Tensor) -> tuple[dict[int, Any], dict[int, Tensor]]:
        """Return for each dropping block how many patches it keeps, see ``keep_schedule``, and if it drops any."""
        num_patches: Any = x.shape[1] - self.model.num_prefix_tokens
        kept, schedule, drops = row[2:3].double(), dict[int, Any](), dict[int, Tensor]()
        for i in self.model.drop_layers:
            before, kept = kept, torch.minimum(kept, torch.ceil(keep_rate * (kept + 1)))
            num_keep = kept.long().item()
            torch._check(num_keep >= 1)
            torch._check(num_keep <= num_patches)
            schedule[i] = num_patches = num_keep
            drops[i] = kept < before
        return schedule, drops

    def _run_blocks_in_order(self, tokens: Tokens, schedule: dict[int, Any], drops: dict[int, Tensor]) -> Tokens:
        """Run the blocks for a network that returns its tokens, whose order is then seen.

        Where a block drops nothing, the model does not rank its tokens. Here it does, and they are left in their order.
        """
        model: Any = self.model
        for i, block in enumerate(model.blocks):
            rotations = tokens.rotations_in(i, model.num_prefix_tokens)
            if i in schedule:
                x, _, order = block(tokens.x, rank=True, **rotations)
                order = torch.where(drops[i].to(x.device), order, torch.arange(x.shape[1], device=x.device))
                kept = order[:, :model.num_prefix_tokens + schedule[i]]
                tokens = tokens.keep(select_tokens(x, kept), kept)
            else:
                tokens = tokens._replace(x=block(tokens.x, **rotations))
        return tokens

    def _rotations(self, x: Tensor, row: Tensor) -> Tensor | None:
        """Return the rotations of the size of a row of the table, for tokens [B, T, D], where positions are rotary."""
        parts = [part for size in self.model.img_sizes if (part := self.model.rotations(size)) is not None]
        if not parts:
            return None
        return _take(torch.cat(parts, dim=2), 2, row[3].item(), x.shape[1] - self.model.num_prefix_tokens)

    def _embed(self, image: Tensor, index: Tensor, row: Tensor) -> Tensor:
        """Return the tokens [B, T, D] of images in the size of a row of the table."""
        model: Any = self.model
        rows, columns, num_patches, start, number = row.tolist()
        for side, sides in zip((rows, columns), zip(*self.grids, strict=True), strict=True):
            torch._check(side >= 1)
            torch._check(side <= max(sides))
        x = model.embed_patches(_resize(image, (rows * self.patch_size, columns * self.patch_size)))
        torch._check(num_patches == x.shape[1])
        if not len(model.pos_embed_list):
            return model.add_positions(x, None)
        num_prefix = model.num_embed_prefix_tokens  # in each of them
        pos_embeds = torch.cat(list(model.pos_embed_list), dim=1)
        return model.add_positions(x, _take(pos_embeds, 1, start + number * num_prefix, x.shape[1] + num_prefix))

    def _embed_by_branches(self, image: Tensor, index: Tensor, row: Tensor) -> Tensor:
        """Do the same with a branch for each size.

        ONNX needs it where ``has_fixed_stem``. pt2 does everywhere: torch's compiler takes a convolution of images
        whose size is known only when it runs for one in another memory format than it is, and the results would be
        wrong (torch 2.14).
        """
        model: Any = self.model
        most = max(rows * columns for rows, columns in self.grids)

        length = most + model.num_prefix_tokens

        def nothing(x: Tensor) -> Tensor:
            return x.new_zeros(x.shape[0], length, model.embed_dim)

        def embed(i: int) -> Any:
            def embed_in_size(x: Tensor) -> Tensor:
                x = model.embed_patches(_resize(x, size_2d(model.img_sizes[i])))
                x = model.add_positions(x, model.pos_embed_list[i] if len(model.pos_embed_list) else None)
                return F.pad(x, (0, 0, 0, length - x.shape[1])).contiguous()

            return embed_in_size

        x = sum(torch.cond(index == i, embed(i), nothing, (image,)) for i in range(len(model.img_sizes)))
        num_patches = row[2].item()
        torch._check(num_patches >= 1)
        torch._check(num_patches <= most)
        return x.narrow(1, 0, num_patches + model.num_prefix_tokens)


def _take(x: Tensor, dim: int, start: Any, length: Any) -> Tensor:
    """Return a part of a tensor that is known only when the program runs."""
    torch._check(start >= 0)
    torch._check(start + length <= x.shape[dim])
    return x.narrow(dim, start, length)


def _resize(x: Tensor, size: Any) -> Tensor:
    # As ``resize_images``, which leaves out what does nothing; here that would be a branch on the size of the images.
    return F.interpolate(x, size=size, mode='bilinear', align_corners=True)
