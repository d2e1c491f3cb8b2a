"""Further networks for timm's own model tests, whose ``conftest.py`` this file becomes there."""
from typing import Any

from timm.models import register_model

from timm_supervit.models.backbone import supervit


@register_model
def supervit_hybrid(pretrained: bool = False, **kwargs: Any) -> Any:
    """SuperViT on a network whose patches are of a convolutional stem's map."""
    return supervit(pretrained, backbone='vit_tiny_r_s16_p8_224', **kwargs)


@register_model
def supervit_rectangles(pretrained: bool = False, **kwargs: Any) -> Any:
    """SuperViT at sizes that are not square."""
    sizes = dict(img_sizes=((96, 48), (160, 80), (224, 112)))
    return supervit(pretrained, backbone='deit_tiny_patch16_224', **sizes, **kwargs)


@register_model
def supervit_eva02(pretrained: bool = False, **kwargs: Any) -> Any:
    """SuperViT on a network with rotary positions and learned ones."""
    return supervit(pretrained, backbone='eva02_tiny_patch14_224', **kwargs)


@register_model
def supervit_rope_mixed(pretrained: bool = False, **kwargs: Any) -> Any:
    """SuperViT on a network that learns its rotations."""
    return supervit(pretrained, backbone='vit_small_patch16_rope_mixed_224', **kwargs)


@register_model
def supervit_dinov3(pretrained: bool = False, **kwargs: Any) -> Any:
    """SuperViT on a network with register tokens, and with rotary positions alone."""
    return supervit(pretrained, backbone='vit_small_patch16_dinov3', **kwargs)


@register_model
def supervit_distilled(pretrained: bool = False, **kwargs: Any) -> Any:
    """SuperViT on a network with two heads."""
    return supervit(pretrained, backbone='deit_tiny_distilled_patch16_224', **kwargs)
