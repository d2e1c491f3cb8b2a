"""Networks to evaluate, export, ...: by name, or from a checkpoint, which knows model, settings, data and classes.

timm's ``train.py`` keeps its arguments in its checkpoints. What is given beside such a file may repeat them, and choose
what is no property of the trained network, such as the active subnet; what contradicts them is refused.
"""
import difflib
import inspect
import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_data_config

from ..fingerprint import fingerprint
from ..models.backbone import supervit
from ..models.lvvit import SuperLVViT
from ..models.supervit import SuperVisionTransformer
from .checkpoints import Checkpoint, CheckpointError, read_checkpoint
from .class_names import read_class_names, trained_class_names
from .program import is_program

__all__ = ['Network', 'check_no_model_folder', 'check_settings', 'load_network']

_DATA_SETTINGS = ('mean', 'std', 'interpolation', 'crop_pct')  # of train.py, for the images of its validation
_WORDS = {bool: 'True or False', int: 'a whole number', float: 'a number'}


class Network(NamedTuple):
    """A network and where it is from.

    Attributes:
        model: It, in evaluation mode on the CPU. Its ``pretrained_cfg`` has ``label_names`` where its file tells them.
        name: Name of the model, as for ``timm.create_model``.
        path: The checkpoint that its weights are from; None for a model's own.
        checkpoint: What was read of that file.
        unnamed: Why the names of the classes that the file's network was trained on are not known; empty if they are,
            or if the file does not say what it was trained on.
    """

    model: SuperVisionTransformer
    name: str
    path: str | None = None
    checkpoint: Checkpoint | None = None
    unnamed: str = ''

    @property
    def weights_kind(self) -> str:
        """Which weights it has: ``pretrained``, or the ``raw`` or ``averaged`` ones of a file."""
        return self.checkpoint.kind if self.checkpoint else 'pretrained'


def load_network(
        model: str | None,
        checkpoint: str | os.PathLike | None = None,
        use_ema: bool = False,
        settings: Mapping[str, Any] | None = None,
        class_names: str | os.PathLike | None = None,
        pretrained: bool = True,
        name_classes: bool = True,
) -> Network:
    """Create a network as its name or its checkpoint says, and load its weights.

    Args:
        model: Name, as for ``timm.create_model``, or the path of a checkpoint that says its model; None leaves it to
            ``checkpoint``.
        checkpoint: Weights to load.
        use_ema: Take the averaged weights of the checkpoint where it has them.
        settings: Settings of the model, for ``timm.create_model``.
        class_names: Where the names of the classes are, see ``read_class_names`` (default: the class map or folders
            that the checkpoint was trained with, where they still are).
        pretrained: Without a checkpoint, load the model's pretrained weights.
        name_classes: Look for the names of a checkpoint's classes, which reads the list of its training images.

    Raises:
        CheckpointError: If the weights cannot be read or do not fit.
        ModuleNotFoundError: If the model needs a package that is missing.
        OSError: If there is no such file.
        ValueError: If there is no such model, it is no SuperViT, it cannot be created with these settings, or they
            contradict the checkpoint.
    """
    settings = dict(settings or {})
    if model and is_program(model):
        raise ValueError(f'{model} is an exported file, which only "supervit predict" runs; give the model itself')
    if model and not timm.is_model(model) and Path(model).is_file():
        if checkpoint:
            raise ValueError(f'{model} and --checkpoint {checkpoint} are both checkpoints; leave one out')
        model, checkpoint = None, model
    if not checkpoint:
        model = model or ''
        if pretrained and timm.is_model(model) and not timm.models.is_model_pretrained(model):
            raise ValueError(f'{model} has no pretrained weights; give trained ones with --checkpoint')
        network = _create(model, settings, pretrained)
        own = network.pretrained_cfg['num_classes']
        if pretrained and network.num_classes != own:  # timm would leave the head as it was drawn
            raise ValueError(
                f'num_classes={network.num_classes} contradicts the weights of {model}, which have {own} classes; '
                f'leave it out, or give weights of {network.num_classes} classes with --checkpoint')
        _name_classes(network, class_names)
        return Network(network, model)

    read = read_checkpoint(checkpoint, use_ema)
    known_model, known = _read_settings(read.args)
    try:
        check_settings(known)
    except ValueError as error:
        raise ValueError(f'{os.fspath(checkpoint)} holds settings of no SuperViT: {error}') from error
    if not model and not known_model:
        raise ValueError(f'{os.fspath(checkpoint)} does not say which model it is of; name the model and its settings')
    if known_model and (model or settings):
        _refuse_contradictions(checkpoint, known_model, known, model, settings)
    name = model or known_model
    network = _create(name, {**known, **settings}, source='' if model else f', which {os.fspath(checkpoint)} is of,')
    try:
        network.load_state_dict(read.state_dict)
    except Exception as error:  # what weights of any shape and dtype raise can be of any kind
        raise CheckpointError(f'{os.fspath(checkpoint)}: {error}') from error
    if known_model:
        given = {key: read.args[key] for key in _DATA_SETTINGS if read.args.get(key)}
        config = resolve_data_config(given, model=network)
        network.pretrained_cfg.update({key: config[key] for key in given})
    unnamed = _name_classes(network, class_names, read.args if known_model else None) if name_classes else ''
    return Network(network, name, os.fspath(checkpoint), read, unnamed)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings that no SuperViT has, and words where numbers, True or False belong; "false" would be true.

    Raises:
        ValueError: If there is one; the message names it and what may have been meant.
    """
    known: dict[str, inspect.Parameter] = {}
    for cls in reversed(SuperLVViT.__mro__[:-1]):  # it, the other SuperViTs and timm's ViT; not ``object``
        known |= inspect.signature(cls).parameters
    known |= inspect.signature(supervit).parameters  # of all factories the only one with a setting of its own
    names = known.keys() - {'args', 'kwargs', 'pretrained'}
    for name, value in settings.items():
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1)
            remedy = f'did you mean {near[0]}?' if near else f'it has {", ".join(sorted(names))}'
            raise ValueError(f'SuperViT has no setting {name!r}; {remedy}')
        wanted = _WORDS.get(type(known[name].default))
        if wanted and isinstance(value, str):
            raise ValueError(f'{name}={value} should be {wanted}')


def check_no_model_folder(path: str) -> None:
    """Refuse the folder of a model, which has a name of its own for timm.

    Raises:
        ValueError: If it is one.
    """
    if Path(path, 'config.json').is_file():
        raise ValueError(f'{path} is the folder of a model; give local-dir:{path}')


def _read_settings(args: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the model and the settings that ``train.py`` created it with; an empty name for another script's."""
    model, settings = args.get('model'), args.get('model_kwargs')
    if not isinstance(model, str) or not isinstance(settings, dict):
        return '', {}
    in_chans = args.get('in_chans') or next(iter(args.get('input_size') or ()), None)
    others = dict(num_classes=args.get('num_classes'), in_chans=in_chans, global_pool=args.get('gp'))
    return model, {**settings, **{key: value for key, value in others.items() if value is not None}}


def _create(model: str, settings: Mapping[str, Any], pretrained: bool = False, source: str = '') -> Any:
    remedy = 'timm.list_models("supervit*") lists those that are'
    if ':' not in model and not timm.is_model(model):
        check_no_model_folder(model)
        near = difflib.get_close_matches(model, timm.list_models('*supervit*'), 1)
        raise ValueError(
            f'Unknown model{source}: there is no file {model} and no model of that name; '
            f'{f"did you mean {near[0]}?" if near else remedy}')
    given = ' '.join(f'{key}={value}' for key, value in settings.items())
    try:
        network = timm.create_model(model, pretrained=pretrained, **settings)
    except ImportError:
        raise
    except Exception as error:  # what settings and files of any content raise can be of any kind
        raise ValueError(
            f'{model}{source} cannot be created{" with " * bool(given)}{given}: {_reason(error)}') from error
    if not isinstance(network, SuperVisionTransformer):
        raise ValueError(f'{model}{source} is no SuperViT; {remedy}')
    return network.eval()


def _reason(error: Exception) -> str:
    if isinstance(error, AssertionError) and not str(error):  # the condition says what would have been right
        return str(traceback.extract_tb(error.__traceback__)[-1].line)
    text = ' '.join(str(error).split())[:300]
    clear = isinstance(error, (AssertionError, OSError, RuntimeError)) or type(error) is ValueError
    return text if clear and text else f'{type(error).__name__}: {text}'


def _refuse_contradictions(
        path: str | os.PathLike,
        known_model: str,
        known: Mapping[str, Any],
        model: str | None,
        settings: Mapping[str, Any],
) -> None:
    """Raise a ValueError if a model or a setting makes another network than the one that a checkpoint is of."""
    try:
        theirs = _describe(known_model, known)
    except (ImportError, ValueError):  # it may have been a folder that is gone; then all hangs on the weights
        return
    name = Path(path).name
    if model and model != known_model:
        try:
            same = _describe(model, known) == theirs
        except ValueError:
            same = False
        if not same:
            raise ValueError(f'{model} contradicts {name}, which is of {known_model}; give the file alone, as MODEL')
    for key, value in settings.items():
        if key in known and _plain(known[key]) == _plain(value):
            continue
        trained = known.get(key, theirs.get(key))
        own = f'the model\'s own {key}' if trained is None else f'{key}={_plain(trained)}'
        try:
            same = _describe(known_model, {**known, key: value}) == theirs
        except ValueError as error:
            raise ValueError(f'{error}; the network of {name} has {own}') from error
        if not same:
            raise ValueError(
                f'{key}={_plain(value)} contradicts {name}, whose network has {own}; '
                f'leave {key} out, since the file says it, or give the checkpoint of another network')


def _describe(model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a network is, apart from its weights."""
    with torch.device('meta'):
        return fingerprint(_create(model, settings), weights=False)


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _name_classes(
        network: Any,
        source: str | os.PathLike | None,
        args: Mapping[str, Any] | None = None,
) -> str:
    """Tell a network the names of its classes; return why they are not known, if that is so."""
    names = reason = None
    if args is not None:
        try:
            names = trained_class_names(args, network.num_classes)
        except (OSError, ValueError) as error:
            reason = str(error)
    if source is not None:
        given = read_class_names(source, network.num_classes)
        if names is not None and given != names:
            raise ValueError(
                f'the class names in {os.fspath(source)} contradict the checkpoint, which was trained on '
                f'{", ".join(names[:3])}, ...; leave --class-names out')
        names = given
    if names is not None:
        network.pretrained_cfg.pop('label_descriptions', None)
        network.pretrained_cfg['label_names'] = names
        reason = None
    return reason or ''
