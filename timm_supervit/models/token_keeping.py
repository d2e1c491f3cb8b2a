"""Token keeping: rank the patch tokens by the class token's attention and go on with the best.

Super Vision Transformer (arXiv 2205.11397) scores patch token i in a dropping block by

    mean over heads of softmax(q_cls . k / sqrt(d))_i

with the queries and keys of that block's own attention, and drops the rest of the tokens between attention and FFN. A
kept token carries its position embedding since the start, so the order of the kept tokens does not matter.
"""
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, register_notrace_function
from timm.models.vision_transformer import Block
from torch import Tensor


@torch.fx.wrap
@register_notrace_function
def class_attention(q_cls: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return the attention that the class token pays to every token, averaged over the heads.

    Only the class token's row of the attention matrix is computed, in float32 at least.

    Args:
        q_cls: Query of the class token [B, H, 1, d].
        k: Keys of all tokens [B, H, T, d].
        scale: Factor on the products, 1 / sqrt(d).

    Returns:
        Scores [B, T], each row sums to 1.
    """
    dtype = torch.promote_types(q_cls.dtype, torch.float32)
    # A product and a sum: half the time of a matrix product here, which would first make the strided keys contiguous.
    logits = ((q_cls.to(dtype) * scale) * k).sum(dim=-1)  # [B, H, T]
    return logits.softmax(dim=-1).mean(dim=1)


@torch.fx.wrap
@register_notrace_function
def rank_tokens(scores: Tensor, num_prefix_tokens: int) -> Tensor:
    """Return the order of the tokens: the prefix tokens as they are, then the patch tokens, best first.

    Of patch tokens with equal scores the earlier goes first. Saturated or half-precision attention gives many zeros.

    Args:
        scores: Score of every token [B, T]; those of prefix tokens are ignored.
        num_prefix_tokens: Tokens at the start that are always kept.

    Returns:
        Indices of the tokens [B, T].
    """
    # Prefix tokens outrank every score, which is 1 at most, and a stable sort leaves them in their order.
    ranked = torch.cat([scores[:, :num_prefix_tokens].clamp(min=2.), scores[:, num_prefix_tokens:]], dim=1)
    if torch.onnx.is_in_onnx_export():
        return ranked.topk(ranked.shape[1], dim=1).indices  # ONNX's TopK is stable, and there is no stable sort in ONNX
    return ranked.argsort(dim=1, descending=True, stable=True)


@torch.fx.wrap
@register_notrace_function
def select_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Return the tokens [B, K, D] of indices [B, K] among tokens [B, T, D]."""
    batch_size, num_tokens, dim = x.shape
    # Whole rows of the flattened batch: over ten times as fast on a CPU as torch.gather with an expanded index.
    row = indices + torch.arange(0, batch_size * num_tokens, num_tokens, device=x.device).unsqueeze(1)
    selected = x.reshape(batch_size * num_tokens, dim).index_select(0, row.flatten())
    return selected.view(batch_size, indices.shape[1], dim)


class TokenKeepingAttention(Attention):
    """timm's attention, able to attend from the first tokens alone, and to say what the class token attends to."""

    # What the pass below runs in the place of timm's. A part that a later timm adds would be left out in silence.
    _parts = {'qkv', 'q_norm', 'k_norm', 'attn_drop', 'norm', 'gate', 'proj', 'proj_drop'}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if unknown := {name for name, _ in self.named_children()} - self._parts:
            raise NotImplementedError(
                f'timm\'s attention has {", ".join(sorted(unknown))}, which blocks that drop tokens do not know; '
                f'leave out what creates it, or use a newer timm-supervit')

    def forward(
            self,
            x: Tensor,
            attn_mask: Tensor | None = None,
            is_causal: bool = False,
            return_scores: bool = False,
            num_queries: int | None = None,
    ) -> Any:
        """Attend as timm's attention does.

        Args:
            x: Tokens of which the class token is the first [B, T, D].
            attn_mask: As in timm's attention, without what follows.
            is_causal: As in timm's attention, without what follows.
            return_scores: Return the scores, too.
            num_queries: Attend from this many of the first tokens alone, to all.

        Returns:
            The attention's output [B, T, D], [B, num_queries, D] if given; with ``return_scores`` a pair of it and of
            the scores [B, T], the class token's row of the attention matrix averaged over the heads, which carry no
            gradient.
        """
        if not return_scores and num_queries is None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        # Unbound where they lie: the gradients of the three are then put together in one copy, without a transpose.
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q[:, :num_queries], k, v))  # [B, H, T, d] each
        q, k, scores = self.q_norm(q), self.k_norm(k), None
        if self.fused_attn:
            if return_scores:
                scores = class_attention(q[:, :, :1].detach(), k.detach(), self.scale)
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            attn = attn.softmax(dim=-1)
            scores = attn[:, :, 0].detach().mean(dim=1)
            y = self.attn_drop(attn) @ v
        y = self.norm(y.transpose(1, 2).flatten(2))
        if self.gate is not None:
            y = y * self.gate(x[:, :num_queries]).sigmoid()
        y = self.proj_drop(self.proj(y))
        return (y, scores) if return_scores else y


class TokenKeepingBlock(Block):
    """timm's transformer block, able to drop patch tokens between attention and FFN.

    Args:
        num_prefix_tokens: Class and register tokens, which are never dropped.
    """

    def __init__(self, *args: Any, num_prefix_tokens: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_prefix_tokens = num_prefix_tokens

    def forward(
            self,
            x: Tensor,
            attn_mask: Tensor | None = None,
            is_causal: bool = False,
            num_keep: int | None = None,
            rank: bool = False,
            prefix_only: bool = False,
    ) -> Any:
        """Run the block as timm's, or in one of three other ways.

        Args:
            x: Tokens [B, T, D].
            attn_mask: As in timm's block.
            is_causal: As in timm's block.
            num_keep: Drop all but this many patch tokens, at least 1 and at most all.
            rank: Drop none, but say which are the best.
            prefix_only: Attend to all tokens and leave out what follows for the patch tokens.

        Returns:
            Tokens [B, T, D]; with ``num_keep`` those that are left [B, num_prefix_tokens + num_keep, D], best first;
            with ``prefix_only`` the prefix tokens [B, num_prefix_tokens, D]. With ``rank`` all tokens, the same between
            attention and FFN [B, T, D], and their order [B, T], of which the first are what is kept.

        Raises:
            TypeError: If tokens are to be ranked and the attention was replaced by one that gives no scores.
        """
        if num_keep is not None:
            x, order = self._attend_and_rank(x)
            return self._feed_forward(select_tokens(x, order[:, :self.num_prefix_tokens + num_keep]))
        if rank:
            x, order = self._attend_and_rank(x)
            return self._feed_forward(x), x, order
        if prefix_only:
            y, num_queries = self.norm1(x), self.num_prefix_tokens
            try:
                y = self.attn(y, num_queries=num_queries)
            except TypeError:  # what was put in its place knows no such argument
                y = self.attn(y)[:, :num_queries]
            return self._feed_forward(x[:, :self.num_prefix_tokens] + self.drop_path1(self.ls1(y)))
        return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)

    def _attend_and_rank(self, x: Tensor) -> tuple[Tensor, Tensor]:
        try:
            result = self.attn(self.norm1(x), return_scores=True)
        except TypeError as error:
            raise self._no_scores(error) from error
        if not isinstance(result, tuple):
            raise self._no_scores(f'it returned a {type(result).__name__}')
        y, scores = result
        return x + self.drop_path1(self.ls1(y)), rank_tokens(scores, self.num_prefix_tokens)

    def _no_scores(self, reason: object) -> TypeError:
        return TypeError(
            f'this block drops tokens, and its attn, {type(self.attn).__name__}, gives no scores to rank them by '
            f'({reason}); let what replaces it take return_scores=True and return (output, scores), '
            f'or use keep_rate=1.0')

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
