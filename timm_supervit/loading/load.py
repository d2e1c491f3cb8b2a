"""Models to evaluate, export, ...: by name, from a checkpoint, which knows model, settings and classes, or exported.

timm's ``train.py`` keeps its arguments in its checkpoints. What is given beside such a file may repeat them, and choose
what is no property of the trained network, such as the active subnet; anything else is refused.

A plain ViT of timm, by name, in a folder or in a checkpoint, is loaded as the ``supervit`` that has it for a backbone.
"""
import difflib
import inspect
import os
import reprlib
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import to_2tuple
from timm.models import model_entrypoint, resolve_model_input_args, split_model_name_tag

from ..images.datasets import IMG_MODE_NOTE
from ..images.preparation import check_preparation
from ..models.backbone import supervit
from ..models.eva import SuperEva
from ..models.lvvit import SuperLVViT
from ..models.supervit import SuperViT
from ..programs.program import Program, is_program, load_program
from ..results.files import check_regular
from ..results.fingerprint import Source, fingerprint
from ..subnets import check_img_size, size_2d
from .checkpoints import Checkpoint, CheckpointError, read_checkpoint
from .class_names import read_class_names, trained_class_names, trained_data

# Settings that may differ from those that a checkpoint was trained with: they change no trained weight's meaning.
CHANGEABLE = (
    'img_size', 'keep_rate', 'keep_rates', 'train_subnets', 'distill_teacher', 'share_prefix', 'cls_weight',
    'dense_weight', 'drop_rate', 'pos_drop_rate', 'proj_drop_rate', 'attn_drop_rate', 'drop_path_rate', 'weight_init',
    'fix_init')

_GRID_SETTINGS = ('img_sizes', 'drop_layers')  # what a plain ViT has none of
_PLAIN_ONLY = ('img_size', 'patch_drop_rate')  # of a plain ViT; here they mean something else, or act in training
_MOST_RESAMPLED = 2 ** 28  # numbers of position embeddings that a checkpoint has for other sizes
_DATA_SETTINGS = ('mean', 'std', 'interpolation', 'crop_pct')  # of train.py, for the images of its validation
_WORDS = {bool: 'True or False', int: 'a whole number', float: 'a number'}


def load_model(
        model: str | None,
        checkpoint: str | os.PathLike | None = None,
        *,
        device: torch.device | str = 'cpu',
        class_names: str | os.PathLike | None = None,
        **kwargs: Any,
) -> SuperViT | Program:
    """Load a model by its name, from its checkpoint, or an exported file; ``source_of`` says where it is from.

    Args:
        model: As for ``load_supervit``, or the path of a file of ``supervit export``, which is complete.
        checkpoint: As for ``load_supervit``.
        device: As for ``load_supervit``. A ``pt2`` program runs where it was exported.
        class_names: As for ``load_supervit``.
        **kwargs: Further arguments of ``load_supervit``.

    Raises:
        RuntimeError: If an exported file cannot be run here.
        ValueError: If it is damaged; else as ``load_supervit``.
    """
    if not (model and is_program(model)):
        return load_supervit(model, checkpoint, device=device, class_names=class_names, **kwargs)
    check_complete(model, checkpoint, **kwargs)
    program = load_program(model, device)
    if class_names is not None:
        program.class_names = read_class_names(class_names, program.num_classes)
        program.pretrained_cfg['label_names'] = program.class_names
    return program


def load_supervit(
        model: str | None,
        checkpoint: str | os.PathLike | None = None,
        *,
        use_ema: bool = False,
        settings: Mapping[str, Any] | None = None,
        class_names: str | os.PathLike | None = None,
        pretrained: bool = True,
        name_classes: bool = True,
        device: torch.device | str = 'cpu',
) -> SuperViT:
    """Create a SuperViT as its name or its checkpoint says, and load its weights.

    Args:
        model: Name, as for ``timm.create_model``, or the path of a checkpoint that says its model; None leaves it to
            ``checkpoint``.
        checkpoint: Weights to load.
        use_ema: Take the averaged weights of the checkpoint where it has them.
        settings: Settings of the model, for ``timm.create_model``.
        class_names: Where the names of the classes are, see ``read_class_names`` (default: the class map or folders
            that the checkpoint was trained with, where they still are).
        pretrained: Without a checkpoint, load the model's pretrained weights.
        name_classes: Look for the names of a checkpoint's classes, which lists its training folder.
        device: Where it is to run.

    Returns:
        The model in evaluation mode. Its ``pretrained_cfg`` has ``label_names`` where its file tells them.

    Raises:
        CheckpointError: If the weights cannot be read or do not fit.
        ModuleNotFoundError: If the model needs a package that is missing.
        OSError: If there is no such file.
        ValueError: If there is no such model, it is no SuperViT, it cannot be created with these settings, or they
            contradict the checkpoint.
    """
    if model and is_program(model):
        raise ValueError(f'{model} is an exported file, and this takes a model that can be looked into; give that')
    if model and not timm.is_model(model) and Path(model).is_file():
        if checkpoint:
            raise ValueError(f'{model} and --checkpoint {checkpoint} are both checkpoints; leave one out')
        model, checkpoint = None, model
    if checkpoint:
        return model_of(read_checkpoint(checkpoint, use_ema), model, settings, class_names, name_classes).to(device)
    model, settings = model or '', dict(settings or {})
    if pretrained and timm.is_model(model) and not timm.models.is_model_pretrained(model):
        raise ValueError(f'{model} has no pretrained weights; give trained ones with --checkpoint')
    created = _create(model, settings, pretrained)  # which notes its source
    own = created.pretrained_cfg['num_classes']
    if pretrained and created.num_classes != own:  # timm would leave the head as it was drawn
        raise ValueError(
            f'num_classes={created.num_classes} contradicts the weights of {model}, which have {own} classes; '
            f'leave it out, or give weights of {created.num_classes} classes with --checkpoint')
    _name_classes(created, class_names)
    return created.to(device)


def model_of(
        checkpoint: Checkpoint,
        model: str | None = None,
        settings: Mapping[str, Any] | None = None,
        class_names: str | os.PathLike | None = None,
        name_classes: bool = True,
) -> SuperViT:
    """Create the model that a checkpoint is of, with its weights; the arguments are as in ``load_supervit``."""
    settings = dict(settings or {})
    trained_model, trained = _read_settings(checkpoint.args)
    try:
        check_settings(trained)
        size = _trained_size(checkpoint.args, trained)
    except ValueError as error:
        raise ValueError(f'{checkpoint.path} holds settings of no SuperViT: {error}') from error
    if not model and not trained_model:
        raise ValueError(f'{checkpoint.path} does not say which model it is of; name the model and its settings')
    backbone = trained.get('backbone')
    _stay_offline(
        checkpoint.path, '' if model else trained_model, '' if backbone == settings.get('backbone') else backbone)
    plain = _plain_architecture(model if _is_fetched(trained_model) else trained_model)
    if plain:
        trained = {key: value for key, value in trained.items() if key not in _PLAIN_ONLY}
        if split_model_name_tag(str(settings.get('backbone')))[0] == plain:
            del settings['backbone']
        model = trained_model if model == 'supervit' else model
        if not model or _plain_architecture(model):  # else it is a SuperViT that starts from these weights
            trained['backbone'] = plain if ':' in trained_model else trained_model
            trained |= {'pretrained_cfg_overlay': {'input_size': (3, *size)}} if size else {}
    # Of a folder or a repository only the weights can tell whether it is the same.
    names = {split_model_name_tag(name)[0] for name in (model, trained_model) if name and ':' not in name}
    if len(names) > 1 and ('backbone' in trained or not plain):
        raise ValueError(f'{model} contradicts {Path(checkpoint.path).name}, which is of {trained_model}; '
                         f'give the file alone, as MODEL')
    free = (*CHANGEABLE, *(_GRID_SETTINGS if plain else ()))
    changed = {key: value for key, value in settings.items() if not trained_model or key in free}
    name, source = model or trained_model, '' if model else f', which {checkpoint.path} is of,'
    _check_room(checkpoint, name, {**trained, **changed}, source)
    created = _create(name, {**trained, **changed}, source=source)
    _refuse_contradictions(created, checkpoint, trained, {k: v for k, v in settings.items() if k not in changed})
    load_weights(created, checkpoint)
    if trained_model:
        data_settings = {key: checkpoint.args[key] for key in _DATA_SETTINGS if checkpoint.args.get(key)}
        try:
            config = resolve_data_config({**data_settings, 'in_chans': created.in_chans}, model=created)
            check_preparation(config)
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(
                f'{checkpoint.path} does not say how to prepare images: {" ".join(map(str, data_settings.items()))} '
                f'({type(error).__name__}: {error})') from error
        created.pretrained_cfg.update({key: config[key] for key in data_settings})
        if mode := checkpoint.args.get('input_img_mode'):
            created.pretrained_cfg['notes'] = (*(created.pretrained_cfg.get('notes') or ()), f'{IMG_MODE_NOTE}{mode}')
    args = checkpoint.args if trained_model else None
    unnamed = _name_classes(created, class_names, args) if name_classes else ''
    created.source = checkpoint.source(
        created.source.name, unnamed, trained_data(args) if args else None)._replace(plain=created.source.plain)
    return created


def _plain_architecture(model: str | None) -> str:
    """Return the name, without its tag, of timm's own architecture that a model is of, which is no SuperViT, or ''."""
    try:
        _check_folder(model or '')
        name = resolve_model_input_args(model or '')['model_name']  # a folder and the Hub say it themselves
    except Exception:  # of any kind; creating the model says what is wrong
        return ''
    return name if model_entrypoint(name).__module__.startswith('timm.') else ''


def _trained_size(args: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the size (height, width) of the images that ``train.py`` trained a plain ViT on, if it was told one."""
    size = args.get('img_size') or settings.get('img_size')
    if isinstance(input_size := args.get('input_size'), list | tuple):
        size = input_size[1:]
    return size_2d(check_img_size(size)) if size else None


def _stay_offline(path: str, *unasked: Any) -> None:
    """Refuse a checkpoint that would have something fetched that its user has not named."""
    for value in unasked:
        if _is_fetched(value):
            raise ValueError(
                f'{path} is of {reprlib.repr(value)}, and what a file names is not fetched unasked; name it yourself: '
                f'MODEL and --checkpoint {path}, with --model-kwargs backbone= where it is the backbone')


def _is_fetched(model: Any) -> bool:
    scheme, colon, _ = str(model).partition(':')
    return bool(colon) and scheme != 'local-dir'


def _check_room(checkpoint: Checkpoint, name: str, settings: Mapping[str, Any], source: str) -> None:
    """Refuse settings of a network that the checkpoint cannot fill, before memory is taken for it."""
    size, depth = os.path.getsize(checkpoint.path), settings.get('depth')
    too_large = isinstance(depth, int) and depth > len(checkpoint.state_dict)  # a block has several weights
    if not too_large:
        model = _create(name, {**settings, 'device': 'meta'}, source=source)
        counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
        own = sum(count for name, count in counts.items() if not name.startswith('pos_embed_list.'))
        computed = sum(buffer.numel() for buffer in model.buffers())  # rotations above all
        too_large = own > size or sum(counts.values()) + computed > size + _MOST_RESAMPLED
    if too_large:
        raise ValueError(
            f'{checkpoint.path} has {size} bytes, which cannot fill {name} with '
            f'{" ".join(f"{key}={reprlib.repr(value)}" for key, value in settings.items())}; check these settings')


def load_weights(model: SuperViT, checkpoint: Checkpoint) -> None:
    """Load the weights of a checkpoint into a model, all of them or, with a ``CheckpointError``, none."""
    try:
        model.load_state_dict(checkpoint.state_dict)
    except Exception as error:  # what weights of any shape and dtype raise can be of any kind
        raise CheckpointError(f'{checkpoint.path}: {error}') from error


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings that no SuperViT has, text where a number or True or False belongs ("false" would be true), and
    counts below 0.
    """
    parameters: dict[str, inspect.Parameter] = {}
    # Of these classes, the other SuperViTs and timm's; not of ``object``.
    for cls in (*reversed(SuperEva.__mro__[:-1]), *reversed(SuperLVViT.__mro__[:-1])):
        parameters |= inspect.signature(cls).parameters
    parameters |= inspect.signature(supervit).parameters  # of all factories the only one with a setting of its own
    names = parameters.keys() - {'args', 'kwargs', 'pretrained'}
    for name, value in settings.items():
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1)
            remedy = f'did you mean {near[0]}?' if near else f'it has {", ".join(sorted(names))}'
            raise ValueError(f'SuperViT has no setting {name!r}; {remedy}')
        kind = _WORDS.get(type(parameters[name].default))
        if kind and isinstance(value, str):
            raise ValueError(f'{name}={value} should be {kind}')
        if kind == _WORDS[int] and isinstance(value, int) and value < 0:
            raise ValueError(f'{name}={value} should be 0 or more')


def check_complete(
        model: str | None,
        checkpoint: str | os.PathLike | None = None,
        *,
        use_ema: bool = False,
        settings: Mapping[str, Any] | None = None,
        **others: Any,
) -> None:
    """Refuse weights and settings beside an exported file; the arguments are those of ``load_model``."""
    if model and is_program(model) and (checkpoint or use_ema or settings):
        raise ValueError(f'{model} is complete; leave out --checkpoint, --use-ema, --num-classes and settings')


def check_no_model_folder(path: str) -> None:
    """Refuse the folder of a model, which has a name of its own for timm."""
    if Path(path, 'config.json').is_file():
        raise ValueError(f'{path} is the folder of a model; give local-dir:{path}')


def _read_settings(args: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the model and the settings that ``train.py`` created it with; an empty name for another script's."""
    model, settings = args.get('model'), args.get('model_kwargs')
    if not isinstance(model, str) or not isinstance(settings, dict):
        return '', {}
    input_size = args.get('input_size')
    in_chans = args.get('in_chans') or (input_size[0] if isinstance(input_size, list | tuple) and input_size else None)
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
    _check_folder(model)
    shown = ' '.join(f'{key}={value:.200}' if isinstance(value, str) else f'{key}={reprlib.repr(value)}'
                     for key, value in settings.items() if key not in ('device', 'pretrained_cfg_overlay'))
    plain = _plain_architecture(model)
    try:
        if plain:
            created = timm.create_model('supervit', pretrained=pretrained, **{**_plain_settings(model), **settings})
        else:
            created = timm.create_model(model, pretrained=pretrained, **settings)
    except ImportError:
        raise
    except Exception as error:  # what settings and files of any content raise can be of any kind
        # A network that is no ViT is not known before it is created.
        what = 'is no SuperViT, and none can be made of it' if plain and 'cannot become' in str(error) else \
            'cannot be created'
        raise ValueError(f'{model}{source} {what}{f" with {shown}" if shown else ""}: {_reason(error)}') from error
    if not isinstance(created, SuperViT):
        raise ValueError(f'{model}{source} is no SuperViT; {remedy}')
    created.source = Source('supervit' if plain and ':' not in model else model, plain=plain)
    return created.eval()


def _check_folder(model: str) -> None:
    """Refuse a folder of a model, if it is one, with what is no file in it; timm reads what has the name of one."""
    if model.startswith('local-dir:'):
        for path in Path(model.partition(':')[2]).glob('*.*'):
            if path.exists():
                check_regular(path)


def _plain_settings(model: str) -> dict[str, Any]:
    """Return the settings of a ``supervit`` that has a plain model for its backbone, and its size for the largest."""
    if ':' not in model:
        return {'backbone': model}
    saved = resolve_model_input_args(model)
    config = saved['pretrained_cfg']
    channels, *size = config['input_size']
    input_size = (channels, *to_2tuple(saved.get('img_size', size)))
    own = ('model_name', 'pretrained_cfg', 'pretrained_model_args', *_PLAIN_ONLY)
    return {key: value for key, value in saved.items() if key not in own} | {
        'backbone': saved['model_name'], 'pretrained_cfg': config, 'pretrained_cfg_overlay': {'input_size': input_size}}


def _reason(error: Exception) -> str:
    if isinstance(error, AssertionError) and not str(error):  # the condition says what would have been right
        return str(traceback.extract_tb(error.__traceback__)[-1].line)
    text = ' '.join(str(error).split())[:300]
    clear = isinstance(error, (AssertionError, OSError, RuntimeError)) or type(error) is ValueError
    return text if clear and text else f'{type(error).__name__}: {text}'


def _refuse_contradictions(
        created: SuperViT,
        checkpoint: Checkpoint,
        recorded: Mapping[str, Any],
        settings: Mapping[str, Any],
) -> None:
    """Raise a ValueError if a setting is another one than that of the network that a checkpoint is of."""
    properties = fingerprint(created, weights=False) if settings else {}
    for key, value in settings.items():
        trained = recorded.get(key, properties.get(key, getattr(created, key, None)))
        if trained is None or _plain(trained) != _plain(value):
            has = f'the model\'s properties {key}' if trained is None else f'{key}={_plain(trained)}'
            raise ValueError(
                f'{key}={_plain(value)} contradicts {Path(checkpoint.path).name}, whose network has {has}; '
                f'leave {key} out, since the file says it, or give the checkpoint of another network')


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _name_classes(
        model: Any,
        source: str | os.PathLike | None,
        args: Mapping[str, Any] | None = None,
) -> str:
    """Tell a model the names of its classes; return why they are not known, if that is so."""
    if source is not None:  # without a look at the folders that the checkpoint remembers, which may be far away
        names = read_class_names(source, model.num_classes)
    elif args is not None:
        try:
            names = trained_class_names(args, model.num_classes)
        except (OSError, ValueError) as error:
            for key in ('label_descriptions', 'label_names'):  # of what was trained on, maybe for other classes
                model.pretrained_cfg.pop(key, None)
            return str(error)
    else:
        return ''
    model.pretrained_cfg.pop('label_descriptions', None)
    model.pretrained_cfg['label_names'] = names
    return ''
