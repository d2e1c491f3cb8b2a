"""Token labels from label maps: a data set of images beside one map of machine-made labels for each image.

The maps are those of Token Labeling (All Tokens Matter, arXiv 2104.10858): a ``.pt`` file for each image with the five
best classes at each place of a coarse grid. They are moved and cropped with the image; RoI align makes the crop one
label for each patch, as in Re-labeling ImageNet (arXiv 2101.05022).
"""
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import roi_align

from .label_transforms import FollowedTransform, MovedImage


class LabelMapDataset(Dataset):
    """Adds token labels to a data set of images, for timm's ``create_loader(..., is_training=True)``.

    It is what ``timm.data.create_dataset('label_maps/PATH', root, is_training=True)`` creates, so timm's ``train.py``
    reads label maps by ``--dataset label_maps/PATH``.

    Each item is an image and its labels [num_classes, 2 + N]: along the last axis the ground truth, the image's label
    and one label for each of the N patches, row-major, as ``TokenLabelTask`` takes them. At 1,000 classes and 14 x 14
    patches that is 0.8 MB for each image.

    As in the official code, the whole image is flipped and augmented and then cropped, where timm crops first. Its map
    is flipped, turned, sheared and shifted with it, each place by its nearest; a place that then shows nothing of the
    image has all classes alike. In three things the official code strays from the image, and this does not: it crops
    maps with the axes swapped, it turns and shears the map of an oblong image as if the image were square, and it does
    so half a place off.
    """

    def __init__(
            self,
            dataset: Any,
            label_root: str | Path,
            num_classes: int = 1000,
            grid_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Create the data set.

        Args:
            dataset: timm's ``ImageDataset`` without a transform, or one with the same ``filename(index)``.
            label_root: Folder of the label maps. That of an image has its path in the data set, with the suffix
                ``.pt``; it holds a tensor [2, K, H, H] of the scores, before softmax, and the indices of the K best
                classes at each place.
            num_classes: Classes of the labels.
            grid_size: Rows and columns of patches of the largest image size, one number if alike; None is one for
                every 16 pixels of the crop.

        Raises:
            FileNotFoundError: If there is no such folder.
        """
        self.dataset = dataset
        self.label_root = Path(label_root)
        self.num_classes = num_classes
        self.grid_size = grid_size
        self._transform: Any = None
        self._followed: FollowedTransform | None = None
        if not self.label_root.is_dir():
            raise FileNotFoundError(f'there is no folder of label maps {label_root}')

    @property
    def transform(self) -> Any:
        """The transform of the images, which ``create_loader`` sets.

        Raises:
            ValueError: On assignment, as ``FollowedTransform``.
        """
        return self._transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self._followed = FollowedTransform(transform)
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
        if self._followed is None:
            moved = MovedImage(image, size=image.size, crop_size=image.size)
        else:
            moved = self._followed(image)
        return moved.image, self._label(index, target, moved)

    def _label(self, index: int, target: int, moved: MovedImage) -> Tensor:
        scores = self._read_map(self.label_root / Path(self.dataset.filename(index)).with_suffix('.pt'))
        scores = moved.move_map(scores)
        box = torch.tensor([moved.crop]) * scores.shape[-1]  # x0, y0, x1, y1 in places of the map
        width, height = moved.crop_size
        grid = (height // 16, width // 16) if self.grid_size is None else self.grid_size
        whole, tokens = (roi_align(scores[None], [box], size, aligned=True)[0].flatten(1) for size in (1, grid))
        truth = torch.zeros(self.num_classes, 1)
        truth[target] = 1
        return torch.cat([truth, torch.cat([whole, tokens], dim=1).softmax(dim=0)], dim=1)

    def _read_map(self, path: Path) -> Tensor:
        """Read a label map as scores [num_classes, H, H], 0 for the classes that are not in it."""
        if path.exists() and not path.is_file():
            raise ValueError(f'{path} is no file but a FIFO, a device or the like, and no label map; fetch it again')
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
