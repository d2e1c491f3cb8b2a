"""Reading weights: SuperViT's own and the official checkpoints as they are, plain ViT and DeiT weights resampled.

Weights move between grids of subnets: each image size takes the position embedding of the nearest size in the weights.
What does not fit leaves the model as it was. Values are checked in a ``load_state_dict`` pre-hook, which every route
passes; names where all of them must be there: with ``strict=True``, and in a file that ``create_model`` reads.
"""
import itertools
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import clean_state_dict
from torch import Tensor, nn

from ..subnets import find_nearest_size

_logger = logging.getLogger(__name__)


def adapt_state_dict(model: Any, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any) -> None:
    """Make a state dict fit a SuperViT in place, or refuse it; a ``load_state_dict`` pre-hook.

    Position embeddings, the one ``pos_embed`` of a plain ViT or those of another grid of subnets, are resampled
    bicubically for the image sizes that have none. Missing and unknown names are left to torch, which does not tell
    its hooks whether it loads strictly.
    """
    _fit_pos_embeds(model, state_dict, prefix)
    plain = {id(tensor) for module in model.modules() if not _loads_its_own_way(module)
             for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))}
    assign = metadata.get('assign_to_params_buffers', False)
    _refuse(model, state_dict, prefix, [
        f'{key} {fault}'
        for key, value in model.state_dict(prefix=prefix, keep_vars=True).items()
        if id(value) in plain and key in state_dict and (fault := _find_fault(value, state_dict[key], assign))
    ])


def check_names(model: Any, state_dict: Mapping[str, Any], pattern: str = '') -> None:
    """Raise a RuntimeError if names that match a pattern are not those of this SuperViT, or of a plain ViT like it."""
    expected, given = _get_names(model, model.state_dict()), _get_names(model, state_dict)
    if sources := _find_pos_embeds(model, state_dict):
        given = given - {*sources} | {name for name in expected if name.startswith('pos_embed_list.')}
    if not hasattr(state_dict, '_metadata'):  # torch then does without BatchNorm's counters
        expected = {name for name in expected if name in given or not name.endswith('.num_batches_tracked')}
    faults = [f'{name} has no place' for name in sorted(given - expected)]
    faults += [f'{name} is missing' for name in sorted(expected - given)]
    _refuse(model, state_dict, '', [fault for fault in faults if re.match(pattern, fault)])


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return the weights in a file, which timm may load leniently; those of other patches resampled as for its ViT."""
    state_dict = clean_state_dict(state_dict.get('state_dict', state_dict))
    norm = '' if 'fc_norm.weight' in {*state_dict, *model.state_dict()} else r'|norm\.'  # else it goes with the head
    check_names(model, state_dict, 'cls_token|dist_token|reg_token|pos_embed|patch_embed|rope|norm_pre|blocks' + norm)
    key, kernel = 'patch_embed.proj.weight', _get_kernel(model)
    if key in state_dict and state_dict[key].ndim == 4 and state_dict[key].shape[2:] != kernel:
        _fit_pos_embeds(model, state_dict, '')  # while the weights tell what size in pixels theirs are of
        state_dict[key] = resample_patch_embed(state_dict[key], list(kernel), verbose=True)
    return state_dict


class PlainView:
    """A SuperViT as timm's readers of weights see a plain ViT: with one position embedding, of one image size."""

    def __init__(self, target: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes, _target=target)

    def __getattr__(self, name: str) -> Any:
        """Return what a plain ViT has too."""
        return getattr(self._target, name)


def plain_views(model: Any) -> Iterator[PlainView]:
    """Yield a SuperViT as the plain ViT of each of its image sizes."""
    for img_size, pos_embed in itertools.zip_longest(model.img_sizes, model.pos_embed_list):  # there may be none
        patch_embed = PlainView(model.patch_embed, grid_size=model.grid_size(img_size))
        yield PlainView(model, pos_embed=pos_embed, patch_embed=patch_embed)


def read_backbone(filter_fn: Callable[..., Any], state_dict: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return the weights in a file of a backbone, read as a plain ViT of each image size reads them.

    Args:
        filter_fn: The backbone's own reader, which takes a state dict and the model.
        state_dict: What is in the file.
        model: The SuperViT.
    """
    state_dict = clean_state_dict(state_dict.get('state_dict', state_dict))
    if 'pos_embed_list.0' in state_dict:  # a SuperViT's own
        return checkpoint_filter_fn(state_dict, model)
    *others, largest = plain_views(model)
    result = filter_fn(_copy(state_dict), largest)  # readers change what they are given
    if 'pos_embed' in result:
        for i, plain in enumerate(others):
            result[f'pos_embed_list.{i}'] = filter_fn(_copy(state_dict), plain)['pos_embed']
        result[f'pos_embed_list.{len(others)}'] = result.pop('pos_embed')
    return checkpoint_filter_fn(result, model)


def _copy(state_dict: Any) -> Any:
    return {key: _copy(value) for key, value in state_dict.items()} if isinstance(state_dict, dict) else state_dict


def _find_pos_embeds(model: Any, names: Iterable[str]) -> list[str]:
    """Return the names of the position embeddings of a network, smallest size first.

    There are none in a part of a network, such as a shard, from which it can't be known how many sizes there are.
    """
    given = _get_names(model, names)
    own = [name for name in given if name.startswith('pos_embed_list.')]
    if not own:
        return ['pos_embed'] if 'pos_embed' in given else []
    body = {name for name in _get_names(model, model.state_dict()) if re.match('cls_token|patch_embed|blocks', name)}
    ordered = [f'pos_embed_list.{i}' for i in range(len(own))]
    return ordered if {*own} == {*ordered} and body <= given else []


def _fit_pos_embeds(model: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Put a position embedding for every image size of a model in the place of those in a state dict."""
    own = [name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)]
    names = [prefix + name for name in _find_pos_embeds(model, own)]
    kernel = _get_kernel(model)[-1]
    grids, num_prefix_tokens = list(map(model.grid_size, model.img_sizes)), model.num_embed_prefix_tokens
    lengths = {f'{prefix}pos_embed_list.{i}': (math.prod(grid) + num_prefix_tokens,) for i, grid in enumerate(grids)}
    old = [state_dict[name] for name in names]
    if not old or {name: getattr(state_dict[name], 'shape', ())[1:2] for name in names} == lengths:
        return
    try:
        old_grids = [_guess_grid(value.shape[1] - num_prefix_tokens, grids) for value in old]
        weight: Any = state_dict.get(f'{prefix}patch_embed.proj.weight')
        old_kernel = weight.shape[-1] if getattr(weight, 'ndim', 0) == 4 else kernel
        old_sizes = [(rows * old_kernel, cols * old_kernel) for rows, cols in old_grids]
        nearest = [find_nearest_size((rows * kernel, cols * kernel), old_sizes) for rows, cols in grids]
        resample = partial(resample_abs_pos_embed, num_prefix_tokens=num_prefix_tokens, **model.pos_embed_resampling)
        new = [resample(old[i], list(grid), list(old_grids[i])) for grid, i in zip(grids, nearest, strict=True)]
    except Exception as error:  # no tensor, another layout, ...
        _refuse(model, state_dict, prefix, [f'{names[0]} cannot be resampled: {error}'])
    for name in names:
        del state_dict[name]
    state_dict.update(zip(lengths, new, strict=True))
    _logger.info(
        f'Position embeddings of {", ".join(f"{rows} x {cols}" for rows, cols in old_grids)} patches resampled for '
        f'img_sizes {model.img_sizes}, each from the nearest')


def _get_kernel(model: Any) -> Sequence[int]:
    weight = getattr(model.patch_embed.proj, 'weight', None)  # none where a convolutional stem makes the tokens
    return (1, 1) if weight is None else weight.shape[2:]


def _guess_grid(num_patches: int, grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the rows and columns of a position embedding: square, or else most like those that a model has."""
    side = math.isqrt(max(num_patches, 0))
    alike = [grid for grid in grids if math.prod(grid) == num_patches]
    if side ** 2 == num_patches and not (alike and all(rows != cols for rows, cols in grids)):
        return side, side
    candidates = alike or [(rows, num_patches // rows) for rows in range(1, num_patches + 1) if not num_patches % rows]
    distance, grid = min((
        (abs(math.log(rows / cols * other_cols / other_rows)), (rows, cols))
        for rows, cols in candidates for other_rows, other_cols in grids if other_rows != other_cols
    ), default=(math.inf, (0, 0)))
    if distance > math.log(1.25):
        raise ValueError(f'{num_patches} patches are no square grid, nor one shaped like {grids}; create the model '
                         f'with the reg_tokens, no_embed_class and shape of img_sizes of these weights')
    return grid


def _loads_its_own_way(module: nn.Module) -> bool:
    # Quantized modules do: they keep entries of other names, shapes and types than their tensors.
    return not type(module)._load_from_state_dict.__module__.startswith('torch.nn.modules.')


def _get_names(model: Any, state_dict: Iterable[str]) -> set[str]:
    """Return the names in a state dict, with that of a module that loads its own way for all that belongs to it."""
    modules = [name for name, module in model.named_modules() if _loads_its_own_way(module)]
    return {next((name for name in modules if key.startswith(f'{name}.')), key) for key in state_dict}


def _find_fault(value: Tensor, given: Any, assign: bool) -> str | None:
    shape = tuple(given.shape) if isinstance(given, Tensor) else f'no tensor but of type {type(given).__name__}'
    if shape != tuple(value.shape):
        return f'is {shape} and should be {tuple(value.shape)}'
    try:  # on copies what torch will do
        loaded = given if assign else value.detach().clone().copy_(given.detach())
        loaded.detach().requires_grad_(value.requires_grad)
    except Exception as error:  # its type depends on layout, dtype and device
        return f'cannot be copied: {error}'
    return None


def _refuse(model: Any, state_dict: Mapping[str, Any], prefix: str, faults: list[str]) -> None:
    if not faults:
        return
    shown = '; '.join(faults[:4]) + (f'; and {len(faults) - 4} more' if len(faults) > 4 else '')
    names = [name.removeprefix(prefix) for name in state_dict]
    blocks = len({name.split('.')[1] for name in names if name.startswith('blocks.')})
    raise RuntimeError(
        f'These weights do not fit this {type(model).__name__}, and nothing was loaded: {shown}. They hold {blocks} '
        f'blocks and {sum(name.startswith("pos_embed") for name in names)} position embedding(s); this model has '
        f'{len(model.blocks)} blocks of width {model.embed_dim} and img_sizes {model.img_sizes}. '
        f'Create it with the settings of the weights.')
