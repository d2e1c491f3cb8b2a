"""Token labels from label maps: a data set of images beside one map of machine-made labels for each image.

The maps are those of Token Labeling (All Tokens Matter, arXiv 2104.10858): a ``.pt`` file for each image with the five
best classes at each place of a coarse grid. They are cropped and flipped with the image; RoI align makes the crop one
label for each patch, as in Re-labeling ImageNet (arXiv 2101.05022).
"""
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import roi_align
from torchvision.transforms import RandomHorizontalFlip, RandomVerticalFlip
from torchvision.transforms import functional as F

__all__ = ['LabelMapDataset']


class LabelMapDataset(Dataset):
    """Adds token labels to a data set of images, for timm's ``create_loader(..., is_training=True)``.

    Each item is an image and its labels [num_classes, 2 + N]: along the last axis the ground truth, the image's label
    and one label for each of the N patches, row-major, as ``TokenLabelTask`` takes them. At 1,000 classes and 14 x 14
    patches that is 0.8 MB for each image.

    The labels follow timm's random resized crop and its flips, but not the rotations, shears and translations of
    RandAugment and its kind. The official code crops the maps with the axes swapped; here they are cropped as the
    image is.
    """

    def __init__(
            self,
            dataset: Any,
            label_root: str | Path,
            num_classes: int = 1000,
            grid_size: int = 14,
            smoothing: float = 0.,
    ) -> None:
        """Create the data set.

        Args:
            dataset: timm's ``ImageDataset`` without a transform, or one with the same ``filename(index)``.
            label_root: Folder of the label maps. That of an image has its path in the data set, with the suffix
                ``.pt``; it holds a tensor [2, K, H, H] of the scores, before softmax, and the indices of the K best
                classes at each place.
            num_classes: Classes of the labels.
            grid_size: Patches along one side of the largest image size.
            smoothing: Share of each label that is spread over all classes, in [0, 1).
        """
        self.dataset = dataset
        self.label_root = Path(label_root)
        self.num_classes = num_classes
        self.grid_size = grid_size
        self.smoothing = smoothing
        self._transform: Any = None

    @property
    def transform(self) -> Any:
        """The transform of the images, which ``create_loader`` sets.

        Raises:
            ValueError: On assignment, if it does not begin with timm's random resized crop.
        """
        return self._transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        steps = getattr(transform, 'transforms', None)
        if not steps or not isinstance(steps[0], RandomResizedCropAndInterpolation):
            raise ValueError(
                f'label maps cannot follow the transform {transform}; they follow one that begins with timm\'s random '
                f'resized crop, as create_loader makes with is_training=True and neither no_aug, num_aug_splits nor '
                f'another train_crop_mode')
        self._transform = transform

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        """Return an image as the transform leaves it, and its labels [num_classes, 2 + N].

        Raises:
            FileNotFoundError: If the image has no label map.
            ValueError: If its label map is damaged or not finite, or has another shape or a class beyond
                ``num_classes``.
        """
        image, target = self.dataset[index]
        crop, flips = (0., 0., 1., 1.), []
        for step in [] if self.transform is None else self.transform.transforms:
            # The draws are those of the transforms themselves, in their order.
            if isinstance(step, RandomResizedCropAndInterpolation):
                image_width, image_height = image.size
                top, left, height, width = step.get_params(image, step.scale, step.ratio)
                crop = (
                    left / image_width, top / image_height,
                    (left + width) / image_width, (top + height) / image_height)
                modes = step.interpolation
                mode = random.choice(modes) if isinstance(modes, (tuple, list)) else modes
                image = F.resized_crop(image, top, left, height, width, step.size, mode)
            elif isinstance(step, RandomHorizontalFlip):
                if torch.rand(1) < step.p:
                    image = F.hflip(image)
                    flips.append(2)
            elif isinstance(step, RandomVerticalFlip):
                if torch.rand(1) < step.p:
                    image = F.vflip(image)
                    flips.append(1)
            else:
                image = step(image)
        return image, self._label(index, target, crop, flips)

    def _label(self, index: int, target: int, crop: Sequence[float], flips: list[int]) -> Tensor:
        scores = self._read_map(self.label_root / Path(self.dataset.filename(index)).with_suffix('.pt'))
        box = torch.tensor([crop]) * scores.shape[-1]  # x0, y0, x1, y1 in places of the map
        whole, tokens = (roi_align(scores[None], [box], size, aligned=True)[0] for size in (1, self.grid_size))
        labels = torch.cat([whole.flatten(1), tokens.flip(flips).flatten(1)], dim=1).softmax(dim=0)
        truth = torch.zeros(self.num_classes, 1)
        truth[target] = 1
        return torch.cat([truth, labels], dim=1) * (1 - self.smoothing) + self.smoothing / self.num_classes

    def _read_map(self, path: Path) -> Tensor:
        """Read a label map as scores [num_classes, H, H], 0 for the classes that are not in it."""
        try:
            label_map = torch.load(path, map_location='cpu', weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # what a broken file raises can be of any kind
            raise ValueError(f'{path} cannot be read as a label map, with weights_only so that it runs no code '
                             f'({type(error).__name__}: {str(error)[:80]}); fetch it again') from error
        shape = tuple(getattr(label_map, 'shape', ()))
        if len(shape) != 4 or shape[0] != 2 or shape[2] != shape[3] or 0 in shape:
            raise ValueError(f'{path} holds {type(label_map).__name__} {shape} and no label map [2, K, H, H] of scores '
                             f'and class indices')
        if not label_map.isfinite().all():
            raise ValueError(f'{path} holds scores or classes that are not finite; fetch it again')
        scores, classes = label_map[0].float(), label_map[1].long()
        strange = classes[(classes < 0) | (classes >= self.num_classes)]
        if len(strange):
            raise ValueError(f'{path} names class {int(strange[0])}, beyond num_classes={self.num_classes}; '
                             f'create the data set with the num_classes of its label maps')
        return scores.new_zeros(self.num_classes, *shape[2:]).scatter_(0, classes, scores)
