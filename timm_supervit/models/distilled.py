"""SuperViT on a distilled DeiT: a second token next to the class token, and a head that reads it.

Paper: `Training data-efficient image transformers & distillation through attention` - https://arxiv.org/abs/2012.12877
"""
from timm.models import VisionTransformerDistilled

from .supervit import SuperVisionTransformer


class SuperVisionTransformerDistilled(SuperVisionTransformer, VisionTransformerDistilled):
    """SuperViT with timm's distilled DeiT as its backbone.

    The distillation token is never dropped, and the class token alone ranks the patches. As in timm, the logits are the
    mean of both heads', in super-training too; only after ``set_distilled_training()``, which timm's task for it calls,
    does a call in training return a pair.
    """

    class_tokens = ('cls_token', 'dist_token')
