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
from torch import Tensor, nn

__all__ = ['TokenKeepingAttention', 'TokenKeepingBlock', 'best_places', 'class_attention', 'select_tokens']


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
def best_places(scores: Tensor, num_keep: int, num_prefix_tokens: int) -> Tensor:
    """Return the places of the prefix tokens and of the best patch tokens.

    Args:
        scores: Score of every token [B, T]; those of prefix tokens are ignored.
        num_keep: Patch tokens to keep, in [1, T - num_prefix_tokens].
        num_prefix_tokens: Tokens at the start that are always kept.

    Returns:
        Places among the tokens [B, num_prefix_tokens + num_keep], prefix first, then best first.
    """
    # Prefix tokens outrank every score, in their order: one topk then gives the places of all that is kept.
    prefix = torch.arange(num_prefix_tokens + 1, 1, -1, dtype=scores.dtype, device=scores.device)
    ranked = torch.cat([prefix.expand(scores.shape[0], -1), scores[:, num_prefix_tokens:]], dim=1)
    return ranked.topk(num_prefix_tokens + num_keep, dim=1).indices


@torch.fx.wrap
@register_notrace_function
def select_tokens(x: Tensor, places: Tensor) -> Tensor:
    """Return the tokens [B, K, D] at the places [B, K] among tokens [B, T, D]."""
    batch_size, num_tokens, dim = x.shape
    # Whole rows of the flattened batch: over ten times as fast on a CPU as torch.gather with an expanded index.
    row = places + torch.arange(0, batch_size * num_tokens, num_tokens, device=x.device).unsqueeze(1)
    selected = x.reshape(batch_size * num_tokens, dim).index_select(0, row.flatten())
    return selected.view(batch_size, places.shape[1], dim)


class TokenKeepingAttention(Attention):
    """timm's attention, which can also return the class token's attention row, or attend from some tokens alone."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend as timm's attention does; where nothing forbids it, with a backward pass that copies less."""
        if attn_mask is None and is_causal is False and self.fused_attn:
            return self.forward_projected(self.qkv(x))
        return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)

    def forward_projected(self, qkv: Tensor) -> Tensor:
        """Attend as ``forward`` does, the output of ``qkv`` [B, T, 3 * H * d] given; return [B, T, D]."""
        return self._attend(*self._split_heads(qkv))

    def forward_scored(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Attend as ``forward_projected`` does, and score every token by the class token's attention to it.

        Args:
            qkv: The output of ``qkv`` for tokens of which the class token is the first [B, T, 3 * H * d].

        Returns:
            The attention's output [B, T, D] and the scores [B, T], which carry no gradient.
        """
        q, k, v = self._split_heads(qkv)
        scores = class_attention(q[:, :, :1].detach(), k.detach(), self.scale)
        return self._attend(q, k, v), scores

    def forward_first(self, x: Tensor, num_first: int) -> Tensor:
        """Return what ``forward`` returns for the first tokens, without computing the others.

        A few queries need no keys and values of all tokens. With the weights of one head

            softmax_j(q (W_k x_j + b_k)) (W_v x_j + b_v) = W_v (softmax_j((q W_k) x_j) x_j) + b_v

        since what all products of a query have in common cancels in the softmax, and its values sum to 1. So the
        queries of all heads attend to the tokens themselves: 2 * num_heads * num_first * T * D multiply-adds in the
        place of 3 * T * D ** 2 for the projection. Where ``qkv`` is more than a weight and a bias, it is run as it is.

        Args:
            x: Tokens [B, T, D].
            num_first: Tokens to compute, in [1, T].

        Returns:
            The attention's output [B, num_first, D].
        """
        if not self._is_plain():
            q, k, v = self._split_heads(self.qkv(x))
            return self._attend(q[:, :, :num_first], k, v)
        B = x.shape[0]
        w_q, w_k, w_v = self.qkv.weight.unflatten(0, (3, self.num_heads, self.head_dim)).unbind()  # [H, d, D]
        b_q, _, b_v = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.unflatten(0, (3, -1))
        q = F.linear(x[:, :num_first].flatten(0, 1), w_q.flatten(0, 1), b_q)  # [B * P, H * d]
        # The heads lead in products with their weights, which a batch in front would copy for each of its images.
        q = q.unflatten(1, (self.num_heads, -1)).transpose(0, 1) @ w_k  # [H, B * P, D]
        q = q.unflatten(1, (B, num_first)).transpose(0, 1).flatten(1, 2)  # [B, H * P, D]
        x = F.scaled_dot_product_attention(q[:, None], x[:, None], x[:, None], scale=self.scale)[:, 0]
        x = x.unflatten(1, (-1, num_first)).transpose(0, 1).flatten(1, 2) @ w_v.mT  # [H, B * P, d]
        x = x.transpose(0, 1).flatten(1).unflatten(0, (B, num_first))  # [B, P, H * d]
        return self._project_out(x if b_v is None else x + b_v)

    def _is_plain(self) -> bool:
        # Adapters, parametrizations, pruning and quantization change one of the types, offloading replaces the forward
        # of the instance; hooks have no public query.
        parts = (self.qkv, self.q_norm, self.k_norm)
        hooks = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
        return (
            type(self.qkv) is nn.Linear and type(self.qkv.weight) is nn.Parameter
            and isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)
            and not any('forward' in vars(part) or any(getattr(part, kind) for kind in hooks) for part in parts)
            and not (self.training and self.attn_drop.p > 0)
        )

    def _split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Unbound where they lie: the gradients of the three are then put together in one copy, without a transpose.
        q, k, v = qkv.unflatten(2, (3, self.num_heads, self.head_dim)).unbind(2)
        return self.q_norm(q.transpose(1, 2)), self.k_norm(k.transpose(1, 2)), v.transpose(1, 2)  # [B, H, T, d] each

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.)
        return self._project_out(x.transpose(1, 2).flatten(2))

    def _project_out(self, x: Tensor) -> Tensor:
        return self.proj_drop(self.proj(self.norm(x)))  # [B, T, H * d] -> [B, T, D]


class TokenKeepingBlock(Block):
    """timm's transformer block, able to drop patch tokens between attention and FFN.

    Args:
        num_prefix_tokens: Class and register tokens, which are never dropped.
    """

    attn: TokenKeepingAttention

    def __init__(self, *args: Any, num_prefix_tokens: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_prefix_tokens = num_prefix_tokens

    def project(self, x: Tensor) -> Tensor:
        """Return queries, keys and values [B, T, 3 * H * d] of tokens [B, T, D], which depend on no other token."""
        return self.attn.qkv(self.norm1(x))

    def attend(self, x: Tensor, qkv: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the attention half; return the tokens [B, T, D] and their scores [B, T]."""
        y, scores = self.attn.forward_scored(self.project(x) if qkv is None else qkv)
        return x + self.drop_path1(self.ls1(y)), scores

    def keep(self, x: Tensor, scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
        """Drop all but the prefix tokens and the ``num_keep`` best patch tokens; return what is kept and its places."""
        places = best_places(scores, num_keep, self.num_prefix_tokens)
        return select_tokens(x, places), places

    def feed_forward(self, x: Tensor) -> Tensor:
        """Run the FFN half on tokens [B, T, D]."""
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def forward(
            self,
            x: Tensor,
            attn_mask: Tensor | None = None,
            is_causal: bool = False,
            num_keep: int | tuple[int | None, ...] | None = None,
            qkv: Tensor | None = None,
    ) -> Any:
        """Run the block.

        Args:
            x: Tokens [B, T, D].
            attn_mask: As in timm's block, for a block that drops nothing.
            is_causal: As in timm's block, for a block that drops nothing.
            num_keep: Patch tokens to keep; None drops nothing, and 0 computes the prefix tokens alone. A tuple asks for
                several numbers after a common attention, see ``part``.
            qkv: What ``project`` returned for these tokens, if it was called before; of no use to ``num_keep=0``.

        Returns:
            Tokens [B, num_prefix_tokens + num_keep, D], [B, T, D] where nothing is dropped. For a tuple, what ``part``
            returns.
        """
        if num_keep is None:
            if qkv is None:
                return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
            return self.feed_forward(x + self.drop_path1(self.ls1(self.attn.forward_projected(qkv))))
        if num_keep == 0:
            y = self.attn.forward_first(self.norm1(x), self.num_prefix_tokens)
            return self.feed_forward(x[:, :self.num_prefix_tokens] + self.drop_path1(self.ls1(y)))
        x, scores = self.attend(x, qkv)
        if isinstance(num_keep, tuple):
            return self.part(x, scores, num_keep)
        return self.feed_forward(self.keep(x, scores, num_keep)[0])

    def part(
            self,
            x: Tensor,
            scores: Tensor,
            num_keep: tuple[int | None, ...],
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Run the FFN half once for several numbers of patch tokens to keep.

        The FFN treats each token by itself, and the tokens of a smaller number are the best of those of a larger one.

        Args:
            x: Tokens [B, T, D].
            scores: Score of every token [B, T].
            num_keep: Numbers of patch tokens to keep, None for all, at most one of each.

        Returns:
            Tokens of the largest number, and for each number the places of its tokens among them
            [B, num_prefix_tokens + number], None for all.
        """
        most = max(number for number in num_keep if number is not None)
        widest = None if None in num_keep else most
        if widest is None:
            places = best_places(scores, most, self.num_prefix_tokens)
        else:
            x, places = self.keep(x, scores, widest)
            places = torch.arange(x.shape[1], device=x.device).expand_as(places)  # the best come first now
        parts = [
            None if number is None or number == widest else places[:, :self.num_prefix_tokens + number]
            for number in num_keep
        ]
        return self.feed_forward(x), parts
