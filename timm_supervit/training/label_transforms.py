"""How a label map follows its image through timm's training transform: flips, RandAugment's geometry and the crop.

No geometry of timm is repeated here. What moves an image also moves another image of the same size, whose pixels are
the numbers of the map's places; where they end up is where the map's places do.
"""
import copy
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import RandomHorizontalFlip, RandomVerticalFlip, ToTensor
from torchvision.transforms import functional as F

_GEOMETRY = ('Rotate', 'Shear', 'Translate')
_UNCOVERED = -1


class MovedImage(NamedTuple):
    """An image, and what has happened to its pixels.

    Attributes:
        image: The image.
        moves: What moved them, in this order; each takes an image and returns one of its size.
        size: Width and height of the image before its crop.
        crop: Left, top, right and bottom of the crop, as shares of the sides.
        crop_size: Width and height after its crop.
    """

    image: Any
    moves: tuple[Callable[[Any], Any], ...] = ()
    size: tuple[int, int] = (0, 0)
    crop: tuple[float, float, float, float] = (0., 0., 1., 1.)
    crop_size: tuple[int, int] = (0, 0)

    def move(self, function: Callable[[Any], Any]) -> 'MovedImage':
        """Return the image moved by a function."""
        return self._replace(image=function(self.image), moves=(*self.moves, function))

    def move_map(self, scores: Tensor) -> Tensor:
        """Move a label map as the image was moved, each place by its nearest, before the crop.

        Args:
            scores: The map [C, H, W] over the whole image, however the image is shaped.

        Returns:
            The map [C, H, W]; 0 in places that show nothing of the image.
        """
        if not self.moves:
            return scores
        height, width = scores.shape[-2:]
        places = Image.fromarray(np.arange(height * width, dtype=np.int32).reshape(height, width))
        places = places.resize(self.size, Image.Resampling.NEAREST)
        for move in self.moves:
            places = move(places)
        numbers = torch.from_numpy(np.array(places.resize((width, height), Image.Resampling.NEAREST))).long()
        return scores.flatten(1)[:, numbers.clamp(min=0)] * (numbers != _UNCOVERED)


class FollowedTransform:
    """timm's training transform in the official code's order, with a record of what it does to an image.

    timm crops first; the official code flips and augments the whole image and crops it last. The draws are those of the
    transforms themselves.
    """

    def __init__(self, transform: Any) -> None:
        """Take a transform apart.

        Args:
            transform: What timm's ``create_transform(..., is_training=True)`` returns.
        """
        steps = getattr(transform, 'transforms', None)
        if not steps or not isinstance(steps[0], RandomResizedCropAndInterpolation):
            raise ValueError(
                f'label maps cannot follow the transform {transform}; they follow one that begins with timm\'s random '
                f'resized crop, as create_loader makes with is_training=True and neither no_aug, num_aug_splits nor '
                f'another train_crop_mode')
        if any(isinstance(step, AugMixAugment) for step in steps):
            raise ValueError(
                'label maps cannot follow AugMix, which blends several moves of an image; use auto_augment="rand-..." '
                'or a policy of AutoAugment')
        crop, *steps = (_follow(step) if isinstance(step, (RandAugment, AutoAugment)) else step for step in steps)
        to_tensor = [i for i, step in enumerate(steps) if isinstance(step, (ToTensor, MaybePILToTensor))]
        if not to_tensor:  # the first of the parts into which timm takes it for splits
            raise ValueError(
                f'label maps cannot follow the splits of a batch, which move one image in several ways, nor another '
                f'transform that ends before the image is a tensor, as {transform}; leave out --aug-splits')
        steps.insert(to_tensor[0], crop)
        self.steps = steps

    def __call__(self, image: Any) -> MovedImage:
        """Transform an image."""
        moved = MovedImage(image, size=image.size)
        for step in self.steps:
            if isinstance(step, RandomHorizontalFlip):
                moved = moved.move(F.hflip) if torch.rand(1) < step.p else moved
            elif isinstance(step, RandomVerticalFlip):
                moved = moved.move(F.vflip) if torch.rand(1) < step.p else moved
            elif isinstance(step, (RandAugment, AutoAugment)):
                moved = step(moved)
            elif isinstance(step, RandomResizedCropAndInterpolation):
                moved = _crop(moved, step)
            else:
                moved = moved._replace(image=step(moved.image))
        return moved


def _crop(moved: MovedImage, step: RandomResizedCropAndInterpolation) -> MovedImage:
    image_width, image_height = moved.size
    top, left, height, width = step.get_params(moved.image, step.scale, step.ratio)
    modes = step.interpolation
    mode = random.choice(modes) if isinstance(modes, (tuple, list)) else modes
    image = F.resized_crop(moved.image, top, left, height, width, step.size, mode)
    return moved._replace(
        image=image,
        crop=(
            left / image_width, top / image_height, (left + width) / image_width, (top + height) / image_height),
        crop_size=image.size,
    )


def _follow(augment: RandAugment | AutoAugment) -> RandAugment | AutoAugment:
    """Return a copy of an augmentation that takes and returns a ``MovedImage`` instead of an image."""
    augment = copy.deepcopy(augment)
    operations = augment.ops if isinstance(augment, RandAugment) else [op for ops in augment.policy for op in ops]
    for operation in operations:
        operation.aug_fn = _Follow(operation.aug_fn, operation.name.startswith(_GEOMETRY))
    return augment


class _Follow:
    """Operation of timm's augmentations on a ``MovedImage``; a class, since workers that are spawned unpickle it."""

    def __init__(self, operation: Callable[..., Any], moves_pixels: bool) -> None:
        self.operation = operation
        self.moves_pixels = moves_pixels

    def __call__(self, moved: MovedImage, *args: Any, **kwargs: Any) -> MovedImage:
        image, moves = self.operation(moved.image, *args, **kwargs), moved.moves
        if self.moves_pixels:
            kwargs = {**kwargs, 'resample': Image.Resampling.NEAREST, 'fillcolor': _UNCOVERED}
            moves = (*moves, lambda places: self.operation(places, *args, **kwargs))
        return moved._replace(image=image, moves=moves)
