"""MixToken: give one box of patches of each image to another image of the batch.

The augmentation of LV-ViT (All Tokens Matter, arXiv 2104.10858). The batch is mixed with itself in reverse order, on
patch embeddings before positions are added. One box is drawn for a training step, on the grid of the largest image
size, and scaled to the grids of the others (official SuperViT code, ``main_lvvit.py``).
"""
import math
import random

import torch
from torch import Tensor

Box = tuple[int, int, int, int]  # row0, col0, row1, col1, half-open, in patches


def draw_box(grid_size: tuple[int, int], draws: random.Random) -> Box:
    """Draw a box as CutMix does: its area from lam ~ Beta(1, 1), its center anywhere, cut off at the border.

    Args:
        grid_size: Rows and columns of patches.
        draws: Where the draws come from.
    """
    lam = draws.random()  # Beta(1, 1) is uniform
    half_rows, half_cols = (int(side * math.sqrt(1 - lam)) // 2 for side in grid_size)
    row, col = (draws.randrange(side) for side in grid_size)
    return (max(row - half_rows, 0), max(col - half_cols, 0),
            min(row + half_rows, grid_size[0]), min(col + half_cols, grid_size[1]))


def scale_box(box: Box, grid_size: tuple[int, int], new_grid_size: tuple[int, int]) -> Box:
    """Carry a box over from one grid, in rows and columns, to another.

    It divides floats and rounds down as the official code does, which can be one patch less than the exact quotient:
    the right and lower border of a 14 x 14 grid, 14, becomes 11 on a 12 x 12 grid.
    """
    rows, cols = (old / new for old, new in zip(grid_size, new_grid_size, strict=True))
    row0, col0, row1, col1 = box
    return int(row0 // rows), int(col0 // cols), int(row1 // rows), int(col1 // cols)


def box_share(box: Box, grid_size: tuple[int, int]) -> float:
    """Return the share of the grid that a box covers, in [0, 1]."""
    row0, col0, row1, col1 = box
    return (row1 - row0) * (col1 - col0) / math.prod(grid_size)


def swap_box(x: Tensor, box: Box, grid_size: tuple[int, int]) -> Tensor:
    """Take the patches inside a box from the batch in reverse order. Doing it twice changes nothing.

    Args:
        x: One vector for each patch, row-major [B, rows * columns, D].
        box: What to swap.
        grid_size: Rows and columns of patches.
    """
    row0, col0, row1, col1 = box
    inside = torch.zeros(*grid_size, 1, dtype=torch.bool, device=x.device)
    inside[row0:row1, col0:col1] = True
    return torch.where(inside.flatten(0, 1), x.flip(0), x)
