"""Names of a network's classes: those that it knows, and those in the data that it was trained on."""
import os
import pickle
import re
from collections.abc import Collection, Mapping
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset

# Private, since create_dataset, which finds the folder of a split by it, would open archives too.
from timm.data.dataset_factory import _search_split
from timm.data.readers import get_img_extensions
from timm.data.readers.class_map import load_class_map
from timm.utils import natural_key

from ..images.labels import label_names
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
    known, subset = label_names(model), infer_imagenet_subset(model)
    names = [known.get(i, f'class {i}') for i in range(model.num_classes)]
    if not known:
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
    data = trained_data(args)
    if data['dataset'] and not data['class_map']:
        raise ValueError(f'it was trained on --dataset {data["dataset"]}, which keeps no folder for each class')
    split = str(args.get('train_split') or 'train')
    return read_class_names(data['class_map'] or str(args.get('data_dir') or ''), num_classes, split, data['input_key'])


def trained_data(args: Mapping[str, Any]) -> dict[str, str]:
    """Return what a run of timm's ``train.py`` was told of its data, see ``Source``; empty text where it was not."""
    data = {key: str(args.get(key) or '') for key in ('dataset', 'class_map', 'input_key', 'target_key')}
    if data['dataset'].partition('/')[0].lower() == 'label_maps':
        data['dataset'] = ''  # folders, to which the maps add labels in training
    if data['class_map'] and not os.path.exists(data['class_map']):  # timm looks in the folder next
        folder = _search_split(str(args.get('data_dir') or ''), str(args.get('train_split') or 'train'))
        data['class_map'] = os.path.join(folder, data['class_map'])
    return data


def read_class_names(
        path: str | os.PathLike,
        num_classes: int,
        split: str = 'train',
        input_key: str = '',
) -> list[str]:
    """Return the names of classes in timm's order, from a folder of images for each, or from a class map.

    Of a folder only that of each class is looked for, and not into: a training set may have millions of images.

    Args:
        path: The folder of such folders, or one with such folders for each split; or a class map as timm's scripts
            take it, a text file of one name on each line.
        num_classes: How many classes there are.
        split: Name of the split.
        input_key: Endings of image files, separated by semicolons (default: timm's).
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f'{path!r} does not exist')
    if os.path.isdir(path):
        extensions = set(input_key.split(';')) if input_key else get_img_extensions(as_set=True)
        with os.scandir(_search_split(path, split)) as entries:
            folders = [entry for entry in entries if entry.is_dir() and _has_image(entry.path, extensions)]
        names = dict(enumerate(sorted((folder.name for folder in folders), key=natural_key)))
    elif os.path.isfile(path):
        try:
            indices = load_class_map(path)
        except (AssertionError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(f'{path!r} is no class map, a .txt of one name on each line: {error}') from error
        names = {index: str(name) for name, index in indices.items()}
    else:
        raise ValueError(f'{path!r} is neither a folder nor a file')
    if len(names) != num_classes or names.keys() != set(range(num_classes)):
        raise ValueError(f'{path!r} has {len(names)} classes, and the network {num_classes}')
    return [names[i] for i in range(num_classes)]


def _has_image(folder: str, extensions: Collection[str]) -> bool:
    with os.scandir(folder) as entries:
        return any(os.path.splitext(entry.name)[1].lower() in extensions for entry in entries)
