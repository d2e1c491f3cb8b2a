"""Labels: which class of a network each class of a data set is, by its name.

A data set numbers its classes by itself, folders by the order of their names. A network may number them otherwise,
since it was trained by a class map or on more classes; so what both know by a name is matched by it.
"""
import contextlib
import functools
import re
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch.utils.data import Subset


def label_names(model: Any) -> dict[int, str]:
    """Return the names that a model knows its classes by, as ``label_names`` of its ``pretrained_cfg`` tells them.

    Args:
        model: A model of timm, an exported file or a cascade.

    Returns:
        Them by the number of the class; empty where they are not known.
    """
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names') or ()
    if isinstance(names, Mapping):  # of only some classes, perhaps
        known = {int(index): str(name) for index, name in names.items()}
        return known if known.keys() <= set(range(model.num_classes)) else {}  # of a head that was replaced
    return {i: str(name) for i, name in enumerate(names)} if len(names) == model.num_classes else {}


def class_numbers(dataset: Any) -> dict[Any, int]:
    """Return the classes of a data set by name, each with the number that it has there; empty where it has no names."""
    dataset = _whole(dataset)
    numbers = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
    if numbers is None:  # torchvision's ImageNet has several names for each
        names = getattr(dataset, 'classes', None) or ()
        numbers = {', '.join(name) if isinstance(name, tuple) else name: i for i, name in enumerate(names)}
    return dict(numbers)


def _whole(dataset: Any) -> Any:
    """Return the data set that a part, or a part of a part, is of."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def follow_names(
        dataset: Any,
        model: Any,
        class_map: Mapping[Any, int] | None = None,
) -> Callable[[int], int] | None:
    """Return what turns the class of an image in a data set into the model's; None where they are the same.

    Classes are matched by name; a WordNet identifier and its words are names of the same class. Where the model's are
    not known, or the names of the data set are plain numbers, they are numbered as in the data set, which then has as
    many; a model of as many classes as ImageNet is taken for one of ImageNet where all names of the data set agree.

    Args:
        dataset: The data set. One without names, as streams often are, is taken as it is.
        model: The model, see ``label_names``.
        class_map: The model's classes by the names in the data set, instead of those that the model knows.

    Raises:
        ValueError: If a class of the data set is none of the model's, the class map contradicts the model, or no names
            are known and the numbers of classes differ.
    """
    found, names, num_classes = class_numbers(dataset), label_names(model), model.num_classes
    if class_map:
        _check_class_map(class_map, names, num_classes)
        numbers: dict[Any, int | None] = {name: class_map.get(name) for name in found}
    else:
        subset = infer_imagenet_subset({'num_classes': num_classes})
        numbers = _match(found, names or dict(enumerate(ImageNetInfo(subset).label_names() if subset else ())))
    foreign = [name for name, number in numbers.items() if number is None]
    if foreign and not class_map and (not names or _are_numbers(found, names, dataset)):
        if len(found) != num_classes:
            unclear = f' ({foreign[0]!r} is no name of one alone)' if len(foreign) < len(found) else ''
            raise ValueError(
                f'the data set has {len(found)} classes and the model {num_classes}{unclear}; check the folder, or '
                f'give a --class-map, or a checkpoint of {len(found)} classes, with --num-classes {len(found)} if it '
                f'is no one of train.py')
        return None
    if foreign:
        known = list(map(str, class_map or names.values()))
        shown = ', '.join(known[:5] + ['...'] * (len(known) > 5))
        raise ValueError(
            f'class {foreign[0]!r}{f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""} of the data set is '
            f'none of the {num_classes} classes of the model, {shown}; '
            f'give images of those, or a --class-map, which says the number of each class and leaves others out')
    moved = {found[name]: number for name, number in numbers.items() if number is not None}
    if all(theirs == ours for theirs, ours in moved.items()):
        return None
    return functools.partial(_renumber, moved, num_classes)


def _renumber(numbers: Mapping[int, int], num_classes: int, target: int) -> int:
    return numbers.get(int(target), num_classes)  # which is none, and refused as such


def _check_class_map(class_map: Mapping[Any, int], names: Mapping[int, str], num_classes: int) -> None:
    known = {name: i for i, name in names.items()}
    for name, number in class_map.items():
        if not isinstance(number, Integral) or not 0 <= number < num_classes:
            raise ValueError(
                f'the class map gives {name!r} the number {number}, and the model has {num_classes} classes; give the '
                f'map that it was trained with')
        if known.get(name, number) != number and names.get(number) != name:
            raise ValueError(
                f'the class map gives {name!r} the number {number}, which is {known[name]} in the model; '
                f'leave --class-map out, since the model knows its classes')


def _are_numbers(found: Mapping[Any, int], names: Mapping[int, str], dataset: Any) -> bool:
    """Return whether the names of a data set are but the numbers of its classes, as a collection without names has.

    So may be the model's, then, unless the data set is one of folders, whose names were read from folders like them.
    """
    dataset = _whole(dataset)
    has_files = hasattr(getattr(dataset, 'reader', dataset), 'samples')  # of folders and tars, timm's and torchvision's
    return all(str(name) == str(i) for name, i in found.items()) or (
        not has_files and all(name == str(i) for i, name in names.items()))


def _match(found: Mapping[Any, int], names: Mapping[int, str]) -> dict[Any, int | None]:
    """Return the number of each name found; None where there is no such name, or several."""
    by_name: dict[str, set[int]] = {}
    by_alias: dict[str, set[int]] = {}
    for i, name in names.items():
        by_name.setdefault(name, set()).add(i)
        for alias in _aliases(name):
            by_alias.setdefault(alias, set()).add(i)
    numbers: dict[Any, int | None] = {}
    for name, index in found.items():
        candidates = by_name.get(str(name)) or set().union(*(by_alias.get(a, ()) for a in _aliases(str(name))))
        # Names may be alike, as of the two cranes of ImageNet; then the order tells, where it agrees.
        numbers[name] = index if index in candidates else next(iter(candidates)) if len(candidates) == 1 else None
    return numbers


def _aliases(name: str) -> set[str]:
    """Return a name and what means the same: the words of a WordNet identifier, and the first of several words."""
    words = name
    if re.fullmatch(r'n\d{8}', name):
        with contextlib.suppress(KeyError):  # of one that no ImageNet has
            words = _imagenet_info().label_name_to_description(name)
    return {name, words, words.split(',')[0]}


_imagenet_info = functools.cache(ImageNetInfo)
