"""Super Vision Transformer on LV-ViT, its second backbone.

Papers: `Super Vision Transformer` - https://arxiv.org/abs/2205.11397 (IJCV 2023)
    `All Tokens Matter: Token Labeling for Training Better Vision Transformers` - https://arxiv.org/abs/2104.10858
Official code: https://github.com/lmbxmu/SuperViT, https://github.com/zihangJiang/TokenLabeling

What LV-ViT changes in a ViT: a convolutional stem, scaled residual branches, no bias on queries, keys and values, and a
second head that classifies every patch token. It trains with MixToken and token labels, see ``TokenLabelTask``.
"""
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import init_weights_vit_timm
from torch import Tensor, nn

from ..subnets import Size, check_patch_size, check_subnet
from .mix_token import Box, scale_box, swap_box
from .supervit import SuperVisionTransformer, create_supervit, linear_macs, supervit_cfg
from .token_keeping import TokenKeepingBlock


class ConvStem(PatchEmbed):
    """timm's patch embedding after three convolutions with BatchNorm, the first of which halves the image.

    Args:
        img_size: As in ``PatchEmbed``.
        patch_size: Side of a patch in pixels, even.
        in_chans: Channels of the images.
        embed_dim: Width of the patch tokens.
        stem_chans: Width of the convolutions.
        **kwargs: As for ``PatchEmbed``.

    Raises:
        ValueError: If the patch size is odd.
    """

    def __init__(
            self,
            img_size: int | tuple[int, int] = 224,
            patch_size: int = 16,
            in_chans: int = 3,
            embed_dim: int = 768,
            stem_chans: int = 64,
            device: Any = None,
            dtype: Any = None,
            **kwargs: Any,
    ) -> None:
        dd = dict(device=device, dtype=dtype)
        # The projection covers a patch of the halved image; to the outside patches are those of the image.
        super().__init__(img_size, _halve(patch_size), stem_chans, embed_dim, device=device, dtype=dtype, **kwargs)
        self.patch_size = (patch_size, patch_size)
        self.set_input_size(img_size)
        self.conv1 = nn.Conv2d(in_chans, stem_chans, 7, stride=2, padding=3, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(stem_chans, **dd)
        self.conv2 = nn.Conv2d(stem_chans, stem_chans, 3, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(stem_chans, **dd)
        self.conv3 = nn.Conv2d(stem_chans, stem_chans, 3, padding=1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(stem_chans, **dd)
        self.relu = nn.ReLU(inplace=True)

    def set_input_size(
            self,
            img_size: int | tuple[int, int] | None = None,
            patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the sizes as ``PatchEmbed`` does; the projection is resampled, the convolutions stay."""
        if patch_size is not None:
            side = check_patch_size(patch_size)
            half = _halve(side)
            self.patch_size = self.proj.kernel_size
            super().set_input_size(patch_size=half)
            self.patch_size = (side, side)
        super().set_input_size(img_size, self.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Turn images [B, C, H, W] into patch tokens [B, N, D]."""
        x = self.relu(self.bn1(self.conv1(x)))  # [B, stem_chans, H / 2, W / 2]
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.relu(self.bn3(self.conv3(x)))
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class Scale(nn.Module):
    """Multiplies by a fixed factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        return x * self.factor

    def extra_repr(self) -> str:
        """Return the factor for ``print``."""
        return f'factor={self.factor}'


class ScaledResidualBlock(TokenKeepingBlock):
    """Block whose residual branches are divided by ``skip_lam``, in the place of timm's learned scale."""

    def __init__(self, *args: Any, skip_lam: float = 1., **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if skip_lam != 1:
            self.ls1, self.ls2 = Scale(1 / skip_lam), Scale(1 / skip_lam)  # type: ignore[assignment]


class SuperLVViT(SuperVisionTransformer):
    """SuperViT with LV-ViT as its backbone.

    The stem has BatchNorm, which in training sees every image size of a step in the order of the subnets. With
    ``share_prefix`` the stem runs once for each size instead of once for each subnet: losses and gradients are the
    same, but the running averages take half as many steps in a sandwich step, a third with three keep rates in an
    ``all`` step. They follow the weights that much more slowly, which in evaluation shows early in training or after
    few steps and fades as the weights settle; ``share_prefix=False`` gives the official code's averages exactly. In
    evaluation itself all subnets of all sizes use the same averages and sharing changes nothing.

    Attributes:
        cls_weight: Weight of the class token's loss in a step of ``TokenLabelTask``.
        dense_weight: Weight of the patch tokens' loss.
    """

    task_class = 'timm_supervit.training.token_labels:TokenLabelTask'

    def __init__(
            self,
            skip_lam: float = 1.,
            cls_weight: float = 1.,
            dense_weight: float = 1.,
            distill_teacher: str = 'largest_size',
            mlp_ratio: float = 3.,
            qkv_bias: bool = False,
            norm_layer: Any = nn.LayerNorm,  # its eps is 1e-5, that of timm's is 1e-6
            embed_layer: Any = ConvStem,
            block_fn: Any = ScaledResidualBlock,
            **kwargs: Any,
    ) -> None:
        """Create the model; the arguments that are not listed are those of ``SuperVisionTransformer``.

        Args:
            skip_lam: What residual branches are divided by.
            cls_weight: Weight of the class token's loss, not negative.
            dense_weight: Weight of the patch tokens' loss, not negative.
            distill_teacher: As for ``SuperVisionTransformer``. The official LV-ViT loop, by which the published weights
                were trained, never replaces its first teacher, the network of the largest size; its DeiT loop does, and
                so says the paper.

        Raises:
            ValueError: If a setting does not fit; the message says what would.
        """
        if cls_weight < 0 or dense_weight < 0 or cls_weight + dense_weight == 0:
            raise ValueError(
                f'cls_weight {cls_weight} and dense_weight {dense_weight} weigh two losses; '
                f'neither may be negative, nor both 0')
        if skip_lam != 1 and kwargs.get('init_values') is not None:
            raise ValueError(f'skip_lam {skip_lam} takes the place of the scale that init_values would learn; '
                             f'leave init_values out or set skip_lam=1')
        super().__init__(
            distill_teacher=distill_teacher,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            norm_layer=norm_layer,
            embed_layer=embed_layer,
            block_fn=partial(block_fn, skip_lam=skip_lam),
            **kwargs,
        )
        self.cls_weight = cls_weight
        self.dense_weight = dense_weight
        head = self.head
        del self.head
        self.aux_head = self._create_aux_head()
        self.head = head  # the last again, see ``SuperVisionTransformer``

    def _create_aux_head(self) -> nn.Module:
        if not self.num_classes:
            return nn.Identity()
        like = next(self.parameters())
        aux_head = nn.Linear(self.embed_dim, self.num_classes, device=like.device, dtype=like.dtype)
        init_weights_vit_timm(aux_head)
        return aux_head.train(self.training)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the class token's head and the patch tokens' head.

        Args:
            num_classes: Classes of the new heads, 0 for none.
            global_pool: As in timm's ViT.
        """
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = self._create_aux_head()

    def head_macs(self, num_patches: int) -> int:
        """Count both heads; the second reads every patch."""
        return super().head_macs(num_patches) + num_patches * linear_macs(self.aux_head)

    def embed_macs(self, num_patches: int) -> int:
        """Count the convolutions of the stem too."""
        stem = self.patch_embed
        pixels = num_patches * _halve(stem.patch_size[0]) ** 2
        convs = sum(linear_macs(conv) for conv in (stem.conv1, stem.conv2, stem.conv3))
        return super().embed_macs(num_patches) + pixels * convs

    def embed_patches(self, x: Tensor, mix_box: Box | None = None) -> Tensor:
        """Turn images [B, C, H, W] into patch tokens [B, N, D].

        Args:
            x: Images of one of ``img_sizes``.
            mix_box: MixToken's box on the grid of the largest size; None mixes nothing.
        """
        height, width = x.shape[-2:]
        grid_size = self.grid_size((height, width))
        x = self.patch_embed(x)
        return x if mix_box is None else swap_box(x, self.scale_box(mix_box, grid_size), grid_size)

    def scale_box(self, mix_box: Box, grid_size: tuple[int, int]) -> Box:
        """Carry MixToken's box over from the grid of the largest size to another."""
        return scale_box(mix_box, self.grid_size(self.img_sizes[-1]), grid_size)

    def class_logits(self, x: Tensor) -> Tensor:
        """Return the class token's logits [B, num_classes] for tokens [B, T, D]."""
        return super().forward_head(x)

    def token_logits(self, x: Tensor) -> Tensor:
        """Return the logits of every patch token [B, T - num_prefix_tokens, num_classes] for tokens [B, T, D]."""
        return self.aux_head(self.head_drop(self.fc_norm(x[:, self.num_prefix_tokens:])))

    @property
    def head_reads_patches(self) -> bool:
        """Yes: the second head classifies them."""
        return True

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify by both heads: the class token's logits + 0.25 * the maximum over the patch tokens' logits.

        The weight is that of the official SuperViT code; plain LV-ViT has 0.5.

        Args:
            x: Tokens [B, T, D], normed.
            pre_logits: Return what the class token's head would see instead.

        Returns:
            Logits [B, num_classes]. Without pooling or classes there is nothing to add to, as in timm's ViT.
        """
        if pre_logits or not self.global_pool or not self.num_classes:
            return super().forward_head(x, pre_logits)
        return self.class_logits(x) + 0.25 * self.token_logits(x).amax(dim=1)

    def forward(
            self,
            x: Tensor,
            attn_mask: Tensor | None = None,
            is_causal: bool = False,
            img_size: Size | None = None,
            keep_rate: float | None = None,
            subnets: Sequence[tuple[Size, float]] | None = None,
            mix_box: Box | None = None,
    ) -> Any:
        """Run subnets as ``SuperVisionTransformer`` does, or those of a training step with MixToken.

        ``mix_box``, with ``subnets``, is MixToken's box on the grid of the largest size, empty for no mixing.

        Returns:
            Logits [B, num_classes]; a list of them with ``subnets``. With a box they are those of the class token
            alone, and the first entry is a pair of them and the logits of every patch [B, N, num_classes], those inside
            the box given back to the images that the patches came from.

        Raises:
            ValueError: As in ``SuperVisionTransformer``; or if there is a box and the first subnet drops tokens.
        """
        if mix_box is None or isinstance(mix_box, torch.fx.Proxy) or subnets is None:
            return super().forward(x, attn_mask, is_causal, img_size, keep_rate, subnets)
        first = check_subnet(subnets[0], self.img_sizes)
        if self.schedule(first):
            raise ValueError(
                f'subnet {first} drops tokens, and token labels need all; put a subnet of keep_rate 1.0 first')
        with_patches = [i == 0 for i in range(len(subnets))]
        features = self.forward_features_subnets(x, subnets, with_patches, mix_box=mix_box)
        logits = [self.class_logits(tokens) for tokens in features]
        grid_size = self.grid_size(first.img_size)
        token_logits = swap_box(self.token_logits(features[0]), self.scale_box(mix_box, grid_size), grid_size)
        return [(logits[0], token_logits), *logits[1:]]

    def forward_subnets(
            self,
            x: Tensor,
            subnets: Sequence[tuple[Size, float]],
            mix_box: Box | None = None,
    ) -> list[Any]:
        """Run several subnets on one batch, or those of a training step with MixToken; see ``forward``."""
        return self(x, subnets=subnets, mix_box=mix_box)


def _halve(patch_size: int) -> int:
    if patch_size % 2:
        raise ValueError(f'patch_size {patch_size} is odd, and the stem halves the image; use {patch_size + 1}')
    return patch_size // 2


def _cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    # Plain LV-ViT weights, a start for super-training; they are not SuperViT-trained.
    return supervit_cfg(**dict(dict(
        url=f'https://github.com/zihangJiang/TokenLabeling/releases/download/{file}',
        crop_pct=0.9, first_conv='patch_embed.conv1', classifier=('head', 'aux_head')), **kwargs))

default_cfgs = generate_default_cfgs({
    'supervit_lvvit_tiny.lvvit_in1k': _cfg('v0.2.0/lvvit_t.pth'),
    'supervit_lvvit_small.lvvit_in1k': _cfg('1.0/lvvit_s-26M-224-83.3.pth.tar'),
    'supervit_lvvit_medium.lvvit_in1k': _cfg('1.0/lvvit_m-56M-224-84.0.pth.tar', crop_pct=1.0),
})


def _create_supervit_lvvit(variant: str, pretrained: bool, **kwargs: Any) -> SuperVisionTransformer:
    return create_supervit(variant, pretrained, model_cls=SuperLVViT, **kwargs)


@register_model
def supervit_lvvit_tiny(pretrained: bool = False, **kwargs: Any) -> SuperVisionTransformer:
    """SuperViT of LV-ViT-T's size."""
    model_args = dict(patch_size=16, embed_dim=240, depth=12, num_heads=4, skip_lam=1.)
    return _create_supervit_lvvit('supervit_lvvit_tiny', pretrained, **dict(model_args, **kwargs))


@register_model
def supervit_lvvit_small(pretrained: bool = False, **kwargs: Any) -> SuperVisionTransformer:
    """SuperViT of LV-ViT-S's size, the better network of the paper."""
    model_args = dict(patch_size=16, embed_dim=384, depth=16, num_heads=6, skip_lam=2.)
    return _create_supervit_lvvit('supervit_lvvit_small', pretrained, **dict(model_args, **kwargs))


@register_model
def supervit_lvvit_medium(pretrained: bool = False, **kwargs: Any) -> SuperVisionTransformer:
    """SuperViT of LV-ViT-M's size."""
    model_args = dict(patch_size=16, embed_dim=512, depth=20, num_heads=8, skip_lam=2.)
    return _create_supervit_lvvit('supervit_lvvit_medium', pretrained, **dict(model_args, **kwargs))
