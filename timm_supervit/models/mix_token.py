"""MixToken: give one box of patches of each image to another image of the batch.

The augmentation of LV-ViT (All Tokens Matter, arXiv 2104.10858). The batch is mixed with itself in reverse order, on
patch embeddings before positions are added. One box is drawn for a training step, on the grid of the largest image
size, and scaled to the grids of the others (official SuperViT code, ``main_lvvit.py``).
"""
import math
import random

import torch
from torch import Tensor

__all__ = ['Box', 'box_share', 'draw_box', 'scale_box', 'swap_box']

Box = tuple[int, int, int, int]  # row0, col0, row1, col1, half-open, in patches


def draw_box(grid_size: int, draws: random.Random) -> Box:
    """Draw a box as CutMix does: its area from lam ~ Beta(1, 1), its center anywhere, cut off at the border.

    Args:
        grid_size: Patches along one side of the image.
        draws: Where the draws come from.
    """
    lam = draws.random()  # Beta(1, 1) is uniform
    half = int(grid_size * math.sqrt(1 - lam)) // 2
    row, col = draws.randrange(grid_size), draws.randrange(grid_size)
    return max(row - half, 0), max(col - half, 0), min(row + half, grid_size), min(col + half, grid_size)


def scale_box(box: Box, grid_size: int, new_grid_size: int) -> Box:
    """Carry a box over from one grid to a smaller one.

    It divides floats and rounds down as the official code does, which can be one patch less than the exact quotient:
    the right and lower border of a 14 x 14 grid, 14, becomes 11 on a 12 x 12 grid.
    """
    ratio = grid_size / new_grid_size
    row0, col0, row1, col1 = (int(edge // ratio) for edge in box)
    return row0, col0, row1, col1


def box_share(box: Box, grid_size: int) -> float:
    """Return the share of the grid that a box covers, in [0, 1]."""
    row0, col0, row1, col1 = box
    return (row1 - row0) * (col1 - col0) / grid_size ** 2


def swap_box(x: Tensor, box: Box, grid_size: int) -> Tensor:
    """Take the patches inside a box from the batch in reverse order. Doing it twice changes nothing.

    Args:
        x: One vector for each patch, row-major [B, grid_size * grid_size, D].
        box: What to swap.
        grid_size: Patches along one side of the image.
    """
    row0, col0, row1, col1 = box
    inside = torch.zeros(grid_size, grid_size, 1, dtype=torch.bool, device=x.device)
    inside[row0:row1, col0:col1] = True
    return torch.where(inside.flatten(0, 1), x.flip(0), x)
