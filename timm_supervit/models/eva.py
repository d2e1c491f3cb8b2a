"""SuperViT on timm's ``Eva``: vision transformers with rotary positions, as EVA-02, DINOv3 and Perception Encoder.

Papers: `EVA-02` - https://arxiv.org/abs/2303.11331, `DINOv3` - https://arxiv.org/abs/2508.10104,
    `Perception Encoder` - https://arxiv.org/abs/2504.13181, `RoPE for ViT` - https://arxiv.org/abs/2403.13298

Every block rotates queries and keys by the place of their patch. ``Tokens`` say which patches are left, so each keeps
its rotation when others are dropped. A rotation is a function of the place: no weights depend on the image size, unless
there is a learned position embedding too.
"""
import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, RotaryEmbeddingCat, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from ..subnets import Size, find_size
from .supervit import SuperViT
from .token_keeping import TokenKeeping, TokenScoring


class RotaryTokenScoring(TokenScoring):
    """``TokenScoring`` for timm's attentions with rotary positions, which have the same parts."""

    def project(self, x: Tensor, num_queries: int | None, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, of the first tokens alone if so many are given, keys and values of tokens [B, T, D].

        Queries and keys are rotated. Where heads share keys and values, each has its copy.
        """
        if self.qkv is None:
            parts: Any = self.q_proj(x[:, :num_queries]), self.k_proj(x), self.v_proj(x)
        else:
            q, k, v = self.project_at_once(x).chunk(3, dim=2)
            parts = q[:, :num_queries], k, v
        q, k, v = (part.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        q, k = self._rotate(self.q_norm(q), rope).type_as(v), self._rotate(self.k_norm(k), rope).type_as(v)
        if k.shape[1] < self.num_heads:
            k, v = (part.repeat_interleave(self.num_heads // k.shape[1], dim=1) for part in (k, v))
        return q, k, v

    def project_at_once(self, x: Tensor) -> Tensor:
        """Return queries, keys and values of tokens [B, T, D] beside each other [B, T, 3 * H * d]."""
        return self.qkv(x)

    def _rotate(self, x: Tensor, rope: Tensor | None) -> Tensor:
        """Rotate all but the prefix tokens of queries or keys [B, H, T, d]."""
        num_patches = x.shape[2] - self.num_prefix_tokens
        if rope is None or num_patches <= 0:
            return x
        prefix, patches = x[:, :, :self.num_prefix_tokens], x[:, :, self.num_prefix_tokens:]
        patches = apply_rot_embed_cat(patches, rope[..., :num_patches, :], half=self.rotate_half)
        return torch.cat([prefix, patches], dim=2)


class TokenKeepingEvaAttention(RotaryTokenScoring, EvaAttention):  # type: ignore[misc]
    """timm's attention of EVA, with what ``TokenScoring`` adds."""

    @property
    def qkv_bias_separate(self) -> bool:  # type: ignore[override]
        """Whether to call the projection and add the bias, or to take its weight.

        timm takes the weight, by which an adapter in its place, such as LoRA's, would be passed over in silence.
        """
        return type(self.qkv) is not nn.Linear

    def project_at_once(self, x: Tensor) -> Tensor:
        """Add the bias, which the keys have none of."""
        if self.q_bias is None:
            return self.qkv(x)
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))  # type: ignore[arg-type]
        return self.qkv(x) + bias if self.qkv_bias_separate else F.linear(x, self.qkv.weight, bias)


class TokenKeepingAttentionRope(RotaryTokenScoring, AttentionRope):  # type: ignore[misc]
    """timm's attention with rotary positions, with what ``TokenScoring`` adds."""


class TokenKeepingEvaBlock(TokenKeeping, EvaBlock):  # type: ignore[misc]
    """timm's block of EVA, with what ``TokenKeeping`` adds."""

    def before_attention(self, x: Tensor) -> Tensor:
        """Norm it."""
        return self.norm1(x)

    def after_attention(self, y: Tensor) -> Tensor:
        """Scale it."""
        return self.drop_path1(y if self.gamma_1 is None else self.gamma_1 * y)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Norm, FFN, scale, and add."""
        y = self.mlp(self.norm2(x))
        return x + self.drop_path2(y if self.gamma_2 is None else self.gamma_2 * y)


class TokenKeepingEvaBlockPostNorm(TokenKeeping, EvaBlockPostNorm):  # type: ignore[misc]
    """timm's block of EVA whose norms follow attention and FFN, with what ``TokenKeeping`` adds."""

    def before_attention(self, x: Tensor) -> Tensor:
        """Take it as it is."""
        return x

    def after_attention(self, y: Tensor) -> Tensor:
        """Norm it."""
        return self.drop_path1(self.norm1(y))

    def feed_forward(self, x: Tensor) -> Tensor:
        """FFN, norm, and add."""
        return x + self.drop_path2(self.norm2(self.mlp(x)))


_CLASSES = {
    EvaBlock: TokenKeepingEvaBlock,
    EvaBlockPostNorm: TokenKeepingEvaBlockPostNorm,
    EvaAttention: TokenKeepingEvaAttention,
    AttentionRope: TokenKeepingAttentionRope,
}


class SuperEva(SuperViT, Eva):  # type: ignore[misc]
    """SuperViT on timm's ``Eva``."""

    pool_include_prefix = True  # as timm pools here
    rope: Any
    blocks: Any
    rotation_table: Any

    def __init__(
            self,
            num_reg_tokens: int = 0,
            use_abs_pos_emb: bool = True,
            device: Any = None,
            dtype: Any = None,
            **kwargs: Any,
    ) -> None:
        """Create the model; the arguments that are not listed are those of ``SuperViT`` and timm's class.

        Raises:
            ValueError: If a setting does not fit, or timm builds it of blocks that are not known here.
        """
        super().__init__(
            num_reg_tokens=num_reg_tokens,
            use_abs_pos_emb=False,  # see ``learn_positions``
            device=device,
            dtype=dtype,
            # For this network a size is one of several, so nothing is to be kept for the largest alone.
            **{**kwargs, 'dynamic_img_size': True},
        )
        for block in self.blocks:
            for module in (block, block.attn):
                # timm's class writes out what its blocks are, so they are built as they are and changed then.
                if type(module) not in _CLASSES:
                    raise ValueError(
                        f'blocks with {type(module).__name__} cannot drop tokens; use a newer timm-supervit')
                module.__class__ = _CLASSES[type(module)]
            block.attn.check_parts()
            block.num_prefix_tokens = self.num_prefix_tokens
        if use_abs_pos_emb:
            self.learn_positions(device, dtype)
        self._make_table()

    def _make_table(self) -> None:
        """Compute the rotations of all image sizes, where the weights are and for their dtype.

        They are no part of the state dict. Where frequencies are learned there is no table.
        """
        table = None
        if self.rope is not None and not self.rope_mixed:
            rope = copy.deepcopy(self.rope).eval()  # or it would draw other coordinates
            # What timm computes once for this kind is in the dtype of the weights; the others are always precise.
            dtype = next(self.parameters()).dtype if isinstance(rope, RotaryEmbeddingCat) else None
            grids = map(self.grid_size, self.img_sizes)
            table = torch.cat([rope.get_embed(shape=list(grid), dtype=dtype) for grid in grids])
        self.register_buffer('rotation_table', table, persistent=False)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # Tables that torch has cast are not those of the new dtype.
        super()._apply(*args, **kwargs)
        self._make_table()
        return self

    def init_non_persistent_buffers(self) -> None:
        """Compute what is in no file, on a model that was made on the meta device; timm calls it."""
        if self.rope is not None:
            self.rope.init_non_persistent_buffers()
        self._make_table()

    def rotations(self, img_size: Size) -> Tensor | None:
        """Return the rotations of all patches at an image size for each block [depth, 1 or H, N, 2 * d].

        In training they are drawn anew for each call where timm is asked to shift or rescale the coordinates.
        """
        if self.rope is None:
            return None
        if self.rope_mixed or (self.training and self.rope.aug_active):
            table = self.rope.get_embed(shape=list(self.grid_size(img_size)))
        else:
            sizes = list(map(self.num_patches, self.img_sizes))
            index = find_size(img_size, self.img_sizes)
            table = self.rotation_table.narrow(0, sum(sizes[:index]), sizes[index])
        return table if self.rope_mixed else table.expand(len(self.blocks), 1, -1, -1)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Do as any SuperViT; rotations are computed anew."""
        super().set_input_size(img_size, patch_size)
        self._make_table()

    def embed_patches(self, x: Tensor) -> Tensor:
        """Turn images [B, C, H, W] into patch tokens [B, N, D]."""
        return self.patch_embed(x).flatten(1, 2)
