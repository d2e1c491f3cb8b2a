"""SuperViT on any vision transformer of timm: ``create_model('supervit', backbone='vit_small_patch14_dinov2')``.

What makes a ViT of timm is written out in its factory: the registered function of its name fills in the architecture
and hands it, with the reader of its weights, to ``build_model_with_cfg``. Here that factory runs as it is, but in a
copy of its module's namespace in which ``build_model_with_cfg`` is ours: it takes the same arguments and builds a
SuperViT of them. timm itself is not touched, so threads may create plain models at the same time.
"""
import difflib
import os
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, cast

from timm.layers import Attention, to_2tuple
from timm.models import (
    VisionTransformer,
    VisionTransformerDistilled,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    is_model,
    list_models,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from timm.models.eva import Eva
from timm.models.vision_transformer import Block

from ..subnets import Size, check_img_size, check_img_sizes, check_patch_size, sort_sizes
from .distilled import SuperVisionTransformerDistilled
from .eva import SuperEva
from .hybrid_stem import get_reduction
from .supervit import SuperVisionTransformer, SuperViT, create_supervit
from .token_keeping import TokenKeepingAttention, TokenKeepingBlock
from .weights import checkpoint_filter_fn, read_backbone

DEFAULT_BACKBONE = 'deit_small_patch16_224'  # the paper's

_CLASSES: dict[type, type[SuperViT]] = {
    Eva: SuperEva,
    VisionTransformer: SuperVisionTransformer,
    VisionTransformerDistilled: SuperVisionTransformerDistilled,
}

default_cfgs = generate_default_cfgs({'supervit': cast(Any, get_pretrained_cfg(DEFAULT_BACKBONE))})


@register_model
def supervit(pretrained: bool = False, backbone: str = DEFAULT_BACKBONE, **kwargs: Any) -> SuperViT:
    """SuperViT of a vision transformer of timm, and with its weights: at full size and rate 1.0 the same logits.

    By default its image sizes are 4/7, 5/7, 6/7 and 7/7 of the backbone's, in whole patches, and it drops tokens after
    a quarter, a half and three quarters of its blocks. The backbone's size is that of its configuration, so an
    ``input_size`` in ``pretrained_cfg_overlay`` says another, such as that on which its weights were fine-tuned.

    Args:
        pretrained: Load the backbone's weights.
        backbone: Name of the backbone, its tag included, as for ``timm.create_model``.
        **kwargs: Settings of the backbone and of ``SuperViT``.

    Raises:
        RuntimeError: If the weights cannot be read or do not fit, or there are none.
        ValueError: If there is no such backbone, or it cannot become a SuperViT; the message says why.
    """
    factory, pretrained_cfg = _find(backbone), kwargs.pop('pretrained_cfg', None)
    overlay = kwargs.pop('pretrained_cfg_overlay', None) or {}
    cfg = _resolve_cfg(backbone, pretrained_cfg, overlay)
    models = []

    def build(model_cls: Any, *_: Any, pretrained_filter_fn: Any = None, **settings: Any) -> Any:
        settings.pop('feature_cfg', None)  # that of every ViT, which ours adds
        own_size = settings.pop('img_size', cfg['input_size'][-2:])
        own_size = overlay.get('input_size', to_2tuple(own_size))[-2:]
        settings |= kwargs
        super_cls = _choose_class(backbone, model_cls, settings)
        if pretrained and not any(cfg.get(key) for key in ('url', 'file', 'hf_hub_id', 'state_dict')):
            raise RuntimeError(
                f'backbone {backbone!r} has no pretrained weights; use pretrained=False, a tag that has some, or '
                f'pretrained_cfg_overlay=dict(file=PATH)')
        side = _pixels_per_patch(settings)
        settings['img_sizes'] = check_img_sizes(settings.get('img_sizes', _default_sizes(own_size, side)), side)
        depth = settings.get('depth', 12)
        settings.setdefault('drop_layers', sorted({depth * quarter // 4 for quarter in (1, 2, 3)}))
        resampling = {key: value for key, value in getattr(pretrained_filter_fn, 'keywords', {}).items()
                      if key in ('interpolation', 'antialias', 'align_corners')}

        def create(**kwargs: Any) -> SuperViT:
            model = super_cls(**kwargs)
            model.pos_embed_resampling = resampling
            # The model is then rebuilt from its own configuration, whatever a later timm says of the backbone.
            model.record_settings(backbone=backbone, img_sizes=model.img_sizes, drop_layers=model.drop_layers)
            return model

        models.append(create_supervit(
            'supervit', pretrained, create,
            partial(read_backbone, pretrained_filter_fn) if pretrained_filter_fn else checkpoint_filter_fn,
            pretrained_cfg=cfg, **settings))
        return models[0]

    # Of the settings it sees those of which a convolutional stem is made. The others join in above, so that a factory
    # which does not know them is refused and does not fail.
    _rebind(factory, build)(**{key: kwargs[key] for key in ('in_chans', 'device', 'dtype') if key in kwargs})
    if not models:
        raise ValueError(
            f'backbone {backbone!r} cannot become a SuperViT: {factory.__module__} builds it otherwise than by calling '
            f'build_model_with_cfg, or a helper _create_*, by its name')
    return models[0]


def _find(backbone: Any) -> FunctionType:
    """Return the factory of a backbone, which must be registered, with its tag."""
    name, tag = split_model_name_tag(str(backbone))
    if name.startswith('supervit') and is_model(name):
        raise ValueError(f'backbone {backbone!r} is a SuperViT itself; create it by its own name')
    # A name that timm keeps for old code belongs to a function that warns and calls another.
    if not is_model(name) or model_entrypoint(name).__name__ != name:
        source, _, place = str(backbone).rpartition(':')
        last_part = split_model_name_tag(place.rstrip('/').rpartition('/')[2])[0]
        near = difflib.get_close_matches(last_part, list_models(exclude_filters='supervit*'))
        remedy = f'did you mean {" or ".join(near)}?' if near else 'timm.list_models("vit_*") lists some'
        if source or '/' in place:
            is_folder = source == 'local-dir' or os.path.exists(place)
            weights = dict(file=os.path.join(place, 'model.safetensors')) if is_folder else dict(hf_hub_id=place)
            remedy = (
                f'name the architecture, and where its weights are, as in backbone={(*near, DEFAULT_BACKBONE)[0]!r}, '
                f'pretrained=True, pretrained_cfg_overlay={weights}; to keep a head of other classes, give its '
                f'num_classes, and in the overlay too')
        raise ValueError(f'backbone {backbone!r} is no name of a model of timm; {remedy}')
    tags = [split_model_name_tag(tagged)[1] for tagged in get_arch_pretrained_cfgs(name)]
    if tag and tag not in tags:
        raise ValueError(f'backbone {backbone!r} has no tag {tag!r}; use {" or ".join(filter(None, tags)) or "none"}')
    return cast(FunctionType, model_entrypoint(name))


def _resolve_cfg(backbone: str, given: Any, overlay: dict[str, Any]) -> dict[str, Any]:
    """Return the backbone's pretrained configuration with what was changed in it, or that of a saved model."""
    overlay = {**overlay, 'architecture': 'supervit'}  # by which a saved model is created again
    given = given if isinstance(given, dict) else resolve_pretrained_cfg('supervit', given).to_dict()
    if given.get('source'):  # of a folder or the Hub, complete
        return resolve_pretrained_cfg('supervit', given, overlay).to_dict()
    default = default_cfgs['supervit'].default.to_dict()
    changed = {key: value for key, value in given.items() if value is not None and value != default.get(key)}
    return resolve_pretrained_cfg(backbone, None, {**changed, **overlay}).to_dict()


def _rebind(function: FunctionType, build: Callable[..., Any]) -> FunctionType:
    """Return a copy of a factory for which ``build_model_with_cfg`` is another function.

    What it calls of its own module, and helpers ``_create_*`` of others, is copied along.
    """
    namespace = dict(function.__globals__, build_model_with_cfg=build)

    def copy(original: FunctionType) -> FunctionType:
        result = FunctionType(
            original.__code__, namespace, original.__name__, original.__defaults__, original.__closure__)
        result.__kwdefaults__ = original.__kwdefaults__
        return result

    for name, value in function.__globals__.items():
        if isinstance(value, FunctionType):
            if value.__globals__ is function.__globals__:
                namespace[name] = copy(value)
            elif name.startswith('_create_'):
                namespace[name] = _rebind(value, build)
    return copy(function)


def _choose_class(backbone: str, model_cls: Any, settings: dict[str, Any]) -> type[SuperViT]:
    """Return the SuperViT of a class of timm's; raise a ValueError if there is none with these settings."""
    kind, reason = _name(model_cls), ''
    block_fn, attn_layer = settings.get('block_fn', Block), settings.get('attn_layer', Attention)
    if model_cls not in _CLASSES:
        relative = 'RelPos' in kind or any('rel_pos' in key and settings[key] for key in settings)
        found = 'its positions are relative' if relative else 'it is no VisionTransformer'
        reason = f'{found} ({kind})'
    elif block_fn is not Block and not _is_subclass(block_fn, TokenKeepingBlock):
        reason = f'its blocks are {_name(block_fn)}, not Block'
    elif attn_layer not in ('', 'attn', Attention) and not _is_subclass(attn_layer, TokenKeepingAttention):
        reason = f'its attention is {"differential" if attn_layer == "diff" else _name(attn_layer)}, not Attention'
    elif not settings.get('class_token', True):
        reason = 'it has no class token, by whose attention tokens are ranked'
    elif settings.get('pos_embed', 'learn') != 'learn':
        reason = 'it has no learned position embedding'
    if reason:
        raise ValueError(
            f'backbone {backbone!r} cannot become a SuperViT: {reason}. Choose a ViT of timm that has a class token '
            f'and learned or rotary positions, as vit_small_patch16_224, vit_*_dinov2, vit_*_dinov3, deit*, eva02*')
    if block_fn is Block:
        settings.pop('block_fn', None)
    return _CLASSES[model_cls]


def _name(cls: Any) -> str:
    return getattr(cls, '__name__', str(cls))


def _is_subclass(cls: Any, parent: type) -> bool:
    return isinstance(cls, type) and issubclass(cls, parent)


def _pixels_per_patch(settings: dict[str, Any]) -> int:
    stem = getattr(settings.get('embed_layer'), 'keywords', {}).get('backbone')  # a convolutional one
    return check_patch_size(settings.get('patch_size', 16)) * (get_reduction(stem) if stem is not None else 1)


def _default_sizes(img_size: Any, patch_size: int) -> tuple[Size, ...]:
    """Return 4/7, 5/7, 6/7 and 7/7 of an image size in whole patches."""
    return sort_sizes({
        check_img_size([max(1, round(side // patch_size * sevenths / 7)) * patch_size for side in to_2tuple(img_size)])
        for sevenths in (4, 5, 6, 7)})
