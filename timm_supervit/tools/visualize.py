"""Pictures of token keeping: an image as a subnet sees it, with the patches masked that each dropping block dropped."""
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms.functional import to_pil_image, to_tensor

from ..images.datasets import img_mode, preprocessing
from ..images.passes import check_finite
from ..loading.class_names import shown_class_names
from ..models.supervit import SuperViT, resize_images
from ..results.files import check_regular
from ..results.pictures import plain_text
from ..results.rows import Results, column_of, results_of
from ..runner import predicts
from ..subnets import Size, Subnet, format_size

_MASK_COLOR, _MASK_OPACITY = 0.93, 0.85  # light, as on paper; what was dropped shines through
_ROWS_OF_A_PICTURE = 4


class Visualization(NamedTuple):
    """What subnets predict and keep.

    Attributes:
        results: One row for each image and subnet: the prediction, if the model has classes to choose from, and how
            many patches are left after each block.
        pictures: Pictures of that, of four rows at most.
    """

    results: Results
    pictures: list[Figure]


def visualize(
        model: SuperViT,
        images: Sequence[str | os.PathLike],
        subnets: Sequence[tuple[Size, float]] | None = None,
) -> Visualization:
    """Draw which patches of images subnets keep.

    Args:
        model: The model, in evaluation mode.
        images: Image files.
        subnets: Pairs (img_size, keep_rate) (default: those of ``telling_subnets``).

    Raises:
        OSError: If an image cannot be read; the message names it.
        RuntimeError: If a subnet's logits are not finite; the message names it.
        ValueError: If the model has no such subnet.
    """
    macs = model.subnet_macs(subnets or telling_subnets(model, len(images)))
    found = [
        kept for path in images
        for kept in find_kept_tokens(model, read_image(path, model), macs, Path(path).stem)]
    rows = [
        dict(image=row.title, **row.subnet._asdict(), macs=row.macs, prediction=row.prediction,
             probability=row.probability, kept={block: int(kept.sum()) for block, kept in row.kept.items()})
        for row in found]
    pages = [found[i:i + _ROWS_OF_A_PICTURE] for i in range(0, len(found), _ROWS_OF_A_PICTURE)]
    return Visualization(results_of(model, rows, {}), [draw_kept_tokens(page) for page in pages])


class KeptTokens(NamedTuple):
    """What one subnet did with one image.

    Attributes:
        title: Name of the image.
        subnet: The subnet.
        macs: Its multiply-accumulates for one image.
        prediction: Name of the class that it predicts; None for a model without classes.
        probability: Probability of that class, in [0, 1]; None as for ``prediction``.
        image: The image at the subnet's size, values in [0, 1] [H, W, C].
        kept: For each block that drops tokens, whether each patch is left after it [grid, grid].
    """

    title: str
    subnet: Subnet
    macs: int
    prediction: str | None
    probability: float | None
    image: np.ndarray
    kept: dict[int, np.ndarray]


def read_image(path: str | os.PathLike, model: SuperViT) -> Tensor:
    """Read an image file and prepare it as for the model's evaluation, [C, H, W]."""
    transform: Any = create_transform(**preprocessing(model))
    mode = img_mode(model)
    try:
        check_regular(path)
        with Image.open(path) as image:
            return transform(image.convert(mode))
    except Exception as error:  # Pillow raises more: SyntaxError, struct.error, DecompressionBombError, ...
        raise OSError(f'{os.fspath(path)} cannot be read as an image: {error}') from error


def telling_subnets(model: SuperViT, num_images: int) -> list[Subnet]:
    """Return the subnets to draw where none are asked for: few, that drop most.

    Args:
        model: The model.
        num_images: Images in the picture.
    """
    sizes = dict.fromkeys([model.img_sizes[-1], model.img_sizes[0]])
    return [Subnet(size, model.keep_rates[0]) for size in sizes][:2 if num_images == 1 else 1]


@torch.inference_mode()
def find_kept_tokens(
        model: SuperViT,
        image: Tensor,
        macs: Mapping[Subnet, Any],
        title: str = '',
) -> list[KeptTokens]:
    """Run subnets on one image and see which patches they keep.

    Args:
        model: The model, in evaluation mode.
        image: A prepared image [C, H, W].
        macs: The subnets to run, with their multiply-accumulates.
        title: Name of the image.
    """
    config, names = preprocessing(model), shown_class_names(model)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    x = image.unsqueeze(0).to(model.device)
    kept_tokens = []
    for subnet, cost in macs.items():
        logits = model(x, **subnet._asdict())
        check_finite([logits], [subnet])
        prediction = probability = None
        if predicts(model):
            best, index = logits.softmax(dim=1).max(dim=1)
            prediction, probability = names[int(index)], best.item()
        pixels = (resize_images(x, subnet.img_size, model.in_chans)[0].cpu() * std + mean).clamp(0, 1)  # [C, H, W]
        if img_mode(model) not in ('L', 'RGB'):
            pixels = to_tensor(to_pil_image(pixels, img_mode(model)).convert('RGB'))
        kept_tokens.append(KeptTokens(
            title, subnet, cost, prediction, probability, pixels.permute(1, 2, 0).numpy(),
            {block: _to_grid(patches[0].cpu(), model.grid_size(subnet.img_size))
             for block, patches in model.kept_patches(x, **subnet._asdict()).items()},
        ))
    return kept_tokens


def _to_grid(patches: Tensor, grid_size: tuple[int, int]) -> np.ndarray:
    kept = np.zeros(math.prod(grid_size), dtype=bool)
    kept[patches.numpy()] = True
    return kept.reshape(grid_size)


def draw_kept_tokens(kept_tokens: Sequence[KeptTokens]) -> Figure:
    """Draw each image before and after each dropping block, one row for each subnet."""
    columns = 1 + max(len(row.kept) for row in kept_tokens)
    # Figure without pyplot: no display, no global state. 1600 pixels wide for the usual three dropping blocks.
    figure = Figure(figsize=(max(8, 2 * columns), 2.55 * len(kept_tokens)), layout='constrained')
    for part, row in zip(np.ravel(figure.subfigures(len(kept_tokens), 1, squeeze=False)), kept_tokens, strict=True):
        part.suptitle(_caption(row), x=0.01, horizontalalignment='left', fontsize=12, fontweight='bold')
        cells = part.subplots(1, columns, squeeze=False)[0]
        steps = {f'input, {format_size(row.subnet.img_size)} px': row.image}
        for block, kept in row.kept.items():
            steps[f'block {block}: {kept.sum()} of {kept.size}'] = mask_dropped(row.image, kept)
        for cell in cells:
            cell.set_axis_off()
        for cell, (title, image) in zip(cells, steps.items(), strict=False):
            cell.set_title(title, fontsize=11)
            cell.imshow(image, cmap='gray', vmin=0, vmax=1)  # the colour map is for images of one channel
    return plain_text(figure)


def _caption(row: KeptTokens) -> str:
    cost = column_of([{'macs': row.macs}], 'macs')
    prediction = '' if row.probability is None else f': {row.prediction} ({row.probability:.0%})'
    return (
        f'{f"{row.title}, " if row.title else ""}size {format_size(row.subnet.img_size)}, '
        f'keep rate {row.subnet.keep_rate:g}{prediction} at {cost.text(row.macs)} {cost.unit}MACs')


def mask_dropped(image: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return an image [H, W, C] with the patches lightened that are not kept [grid, grid]."""
    patch_size = image.shape[0] // kept.shape[0]
    dropped = ~kept.repeat(patch_size, axis=0).repeat(patch_size, axis=1)[..., None]  # [H, W, 1]
    return np.where(dropped, image * (1 - _MASK_OPACITY) + _MASK_COLOR * _MASK_OPACITY, image)
