"""Names of a network's classes: those that it knows, and those in the data that it was trained on."""
import os
import re
from collections.abc import Mapping
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset

# Private, since create_dataset, which finds the folder of a split by it, would open archives too.
from timm.data.dataset_factory import _search_split
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import find_images_and_targets

from ..programs.program import Program


def class_names(model: Any) -> list[str] | None:
    """Return the name of each class of a model, or None where they are not known.

    They are those of its ``pretrained_cfg``, where timm keeps ``label_names``, or ImageNet's where the number of its
    classes is one of ImageNet's. Identifiers of WordNet, as ImageNet's folders have, become words.

    Args:
        model: A model of timm, or an exported file, which says so itself.
    """
    if isinstance(model, Program):
        return model.class_names
    config = getattr(model, 'pretrained_cfg', None) or {}
    names, subset = config.get('label_names'), infer_imagenet_subset(model)
    if isinstance(names, Mapping):  # of only some classes, perhaps
        known = {int(index): name for index, name in names.items()}
        names = [known.get(i, f'class {i}') for i in range(model.num_classes)]
    if not names or len(names) != model.num_classes:
        if subset is None:
            return None
        names = ImageNetInfo(subset).label_names()
    if descriptions := config.get('label_descriptions'):
        return [descriptions.get(name, name).split(',')[0] for name in names]
    if all(re.fullmatch(r'n\d{8}', name) for name in names):
        info = ImageNetInfo(subset or 'imagenet-1k')
        return [info.label_name_to_description(name).split(',')[0] for name in names]
    return list(names)


def shown_class_names(model: Any) -> list[str]:
    """Return what to call each class of a model: by its name, or where that is not known by its number."""
    return class_names(model) or [f'class {i}' for i in range(model.num_classes)]


def trained_class_names(args: Mapping[str, Any], num_classes: int) -> list[str]:
    """Return the names of the classes that a run of timm's ``train.py`` learned, from its class map or its folders.

    Args:
        args: The arguments of the script.
        num_classes: How many classes there are.
    """
    folder, class_map = (str(args.get(key) or '') for key in ('data_dir', 'class_map'))
    kind = str(args.get('dataset') or '')
    if kind and kind.partition('/')[0].lower() != 'label_maps':
        raise ValueError(f'it was trained on --dataset {kind}, which keeps no folder for each class')
    split = str(args.get('train_split') or 'train')
    if class_map and not os.path.exists(class_map):
        class_map = os.path.join(_search_split(folder, split), class_map)  # where timm looks next
    return read_class_names(class_map or folder, num_classes, split)


def read_class_names(path: str | os.PathLike, num_classes: int, split: str = 'train') -> list[str]:
    """Return the names of classes in timm's order, from a folder of images for each, or from a class map.

    Args:
        path: The folder of such folders, or one with such folders for each split; or a class map as timm's scripts
            take it, a text file of one name on each line.
        num_classes: How many classes there are.
        split: Name of the split.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f'{os.fspath(path)!r} does not exist')
    if os.path.isdir(path):
        _, indices = find_images_and_targets(_search_split(os.fspath(path), split), sort=False)
    else:
        try:
            indices = load_class_map(os.fspath(path))
        except (AssertionError, ValueError) as error:
            raise ValueError(
                f'{os.fspath(path)!r} is no class map, a .txt of one name on each line: {error}') from error
    names = {index: str(name) for name, index in indices.items()}
    if sorted(names) != list(range(num_classes)):
        raise ValueError(f'{os.fspath(path)!r} has {len(names)} classes, and the network {num_classes}')
    return [names[i] for i in range(num_classes)]
