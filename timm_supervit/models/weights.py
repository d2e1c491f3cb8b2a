"""Reading weights: SuperViT's own and the official checkpoints as they are, plain ViT and DeiT weights resampled.

The check runs before anything is copied, in a ``load_state_dict`` pre-hook, which serves every route by which timm
loads weights. So weights that do not fit leave the model as it was.
"""
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import Tensor

__all__ = ['adapt_state_dict', 'check_state_dict']


def adapt_state_dict(
        model: Any,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
) -> None:
    """Make a state dict fit a SuperViT in place, or refuse it; a ``load_state_dict`` pre-hook.

    The one ``pos_embed`` of a plain ViT becomes the position embedding of every image size, by bicubic resampling of
    its grid.

    Raises:
        RuntimeError: If a shape differs or a part of the structure is missing or unknown. Nothing is loaded then.
    """
    _spread_pos_embed(model, state_dict, prefix)
    _check_fit(model, state_dict, prefix, strict=False)  # torch tells its hooks True whatever the caller said


def check_state_dict(model: Any, state_dict: Mapping[str, Any]) -> None:
    """Check that a state dict fits a SuperViT strictly: every key is known, and none is missing.

    Raises:
        RuntimeError: If it does not.
    """
    adapted = dict(state_dict)
    _spread_pos_embed(model, adapted, '')
    _check_fit(model, adapted, '', strict=True)


def _spread_pos_embed(model: Any, state_dict: dict[str, Any], prefix: str) -> None:
    plain = state_dict.get(f'{prefix}pos_embed')
    if plain is None or f'{prefix}pos_embed_list.0' in state_dict:
        return
    num_prefix_tokens = model.num_embed_prefix_tokens
    num_patches = plain.shape[1] - num_prefix_tokens
    if math.isqrt(max(num_patches, 0)) ** 2 != num_patches:
        raise RuntimeError(
            f'pos_embed of shape {tuple(plain.shape)} is no square grid after {num_prefix_tokens} prefix token(s); '
            f'create the model with the reg_tokens and no_embed_class of these weights')
    for i, grid_size in enumerate(map(model.grid_size, model.img_sizes)):
        state_dict[f'{prefix}pos_embed_list.{i}'] = resample_abs_pos_embed(
            plain, new_size=[grid_size, grid_size], num_prefix_tokens=num_prefix_tokens)
    del state_dict[f'{prefix}pos_embed']


def _check_fit(model: Any, state_dict: dict[str, Any], prefix: str, strict: bool) -> None:
    expected = model.state_dict()
    given = {key[len(prefix):]: value for key, value in state_dict.items() if key.startswith(prefix)}
    faults = [
        f'{key} is {_describe_value(given[key])} and should be {tuple(value.shape)}'
        for key, value in expected.items()
        if key in given and not (isinstance(given[key], Tensor) and given[key].shape == value.shape)
    ]
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    # Lenient loading may pass over a head or load a head alone, but never half of the blocks or some of the sizes.
    half = _is_structure(unknown) or (_is_structure(missing) and _is_structure(given))
    if strict or half:
        faults += [f'{key} is missing' for key in missing] + [f'{key} has no place' for key in unknown]
    if faults:
        shown = '; '.join(faults[:4]) + (f'; and {len(faults) - 4} more' if len(faults) > 4 else '')
        raise RuntimeError(
            f'These weights do not fit this {type(model).__name__}, and nothing was loaded: {shown}. '
            f'{_describe(given)} This model has {_count(expected, "blocks")} blocks of width {model.embed_dim} and '
            f'img_sizes {model.img_sizes}; create it with the settings of the weights.')


def _is_structure(keys: Iterable[str]) -> bool:
    return any(key.startswith(('blocks.', 'pos_embed')) for key in keys)


def _count(state_dict: dict[str, Any], name: str) -> int:
    return len({m[1] for key in state_dict if (m := re.match(rf'{name}\.(\d+)', key))})


def _describe_value(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f'no tensor but of type {type(value).__name__}'


def _describe(state_dict: dict[str, Any]) -> str:
    cls_token = state_dict.get('cls_token')
    if not isinstance(cls_token, Tensor):
        return f'They hold {", ".join(sorted(state_dict)[:3])}, ... and no vision transformer with a class token.'
    return (
        f'They hold {_count(state_dict, "blocks")} blocks of width {cls_token.shape[-1]} and position embeddings '
        f'for {_count(state_dict, "pos_embed_list")} image size(s).')
