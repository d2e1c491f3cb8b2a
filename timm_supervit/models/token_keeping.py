"""Token keeping: rank the patch tokens by the class token's attention and go on with the best.

Super Vision Transformer (arXiv 2205.11397) scores patch token i in a dropping block by

    mean over heads of softmax(q_cls . k / sqrt(d))_i

with the queries and keys of that block's own attention, and drops the rest of the tokens between attention and FFN. A
kept token carries its position embedding since the start, so the order of the kept tokens does not matter; where
positions are rotary, each block rotates it by its place in the grid, which goes along as an index.
"""
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, register_notrace_function
from timm.models.vision_transformer import Block
from torch import Tensor, nn

BeforeTimm: Any = nn.Module  # a class that stands before one of timm among the bases, and so has all members of that


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


class Tokens(NamedTuple):
    """Tokens on their way through the blocks.

    Attributes:
        x: Those that are left, the prefix tokens first [B, T, D].
        kept: What was kept each time that some were dropped: the indices [B, K] among those before.
        rotations: The rotations of all patches of the grid, for each block [depth, 1 or H, N, 2 * d], where the network
            has rotary positions.
    """

    x: Tensor
    kept: tuple[Tensor, ...] = ()
    rotations: Tensor | None = None

    @property
    def indices(self) -> Tensor | None:
        """Which of the tokens that entered the first block they are [B, T]; None while they are all, in order."""
        return _compose(self.kept) if self.kept else None

    def keep(self, x: Tensor, kept: Tensor) -> 'Tokens':
        """Return the tokens [B, K, D] that are left of these, and have the indices [B, K] among them."""
        every = (*self.kept, kept)
        # Where each block asks for the indices, they are put together once.
        return self._replace(x=x, kept=every if self.rotations is None else (_compose(every),))

    def of_images(self, rows: Tensor) -> 'Tokens':
        """Return the tokens of some images of the batch, by their indices [B]."""
        return self._replace(x=self.x[rows], kept=tuple(kept[rows] for kept in self.kept))

    def rotations_in(self, block: int, num_prefix_tokens: int) -> dict[str, Tensor]:
        """Return the argument ``rope`` of a block, the rotations of the patches that are left, if there are any.

        They are [1 or H, N, 2 * d] for all patches, or [B, 1 or H, K, 2 * d]: a kept patch is rotated as its place in
        the grid asks, wherever it stands among the tokens.
        """
        if self.rotations is None:
            return {}
        rope, indices = self.rotations[block], self.indices
        if indices is not None:
            patches = indices[:, num_prefix_tokens:] - num_prefix_tokens
            # Whole rows, as in ``select_tokens``.
            rope = rope.index_select(1, patches.flatten()).unflatten(1, patches.shape).transpose(0, 1)
        return {'rope': rope}


def _compose(kept: Sequence[Tensor]) -> Tensor:
    return functools.reduce(lambda before, indices: select_tokens(before.unsqueeze(2), indices).squeeze(2), kept)


class TokenScoring(BeforeTimm):
    """What an attention of timm gains: it can attend from the first tokens alone, and say what the class token sees.

    It stands before timm's class among the bases. ``project`` is what differs between them.
    """

    # What the pass below runs in the place of timm's. A part that a later timm adds would be left out in silence.
    _parts = {
        'qkv', 'q_proj', 'k_proj', 'v_proj', 'q_norm', 'k_norm', 'attn_drop', 'norm', 'gate', 'proj', 'proj_drop'}

    def check_parts(self) -> None:
        """Raise a NotImplementedError if timm's attention has a part that is not known here."""
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
            **rotations: Tensor,
    ) -> Any:
        """Attend as timm's attention does.

        Args:
            x: Tokens of which the class token is the first [B, T, D].
            attn_mask: As in timm's attention, without what follows.
            is_causal: As in timm's attention, without what follows.
            return_scores: Return the scores, too.
            num_queries: Attend from this many of the first tokens alone, to all.
            **rotations: ``rope`` of an attention with rotary positions, as in timm, or for each image its own
                [B, 1 or H, T - num_prefix_tokens, 2 * d].

        Returns:
            The attention's output [B, T, D], [B, num_queries, D] if given; with ``return_scores`` a pair of it and of
            the scores [B, T], the class token's row of the attention matrix averaged over the heads, which carry no
            gradient.
        """
        if not return_scores and num_queries is None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal, **rotations)
        q, k, v = self.project(x, num_queries, **rotations)  # [B, H, T, d] each
        scores = None
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


class TokenKeepingAttention(TokenScoring, Attention):
    """timm's attention, able to attend from the first tokens alone, and to say what the class token attends to."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check_parts()

    def project(self, x: Tensor, num_queries: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, of the first tokens alone if so many are given, keys and values of tokens [B, T, D]."""
        # Unbound where they lie: the gradients of the three are then put together in one copy, without a transpose.
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q[:, :num_queries], k, v))
        return self.q_norm(q), self.k_norm(k), v


class TokenKeeping(BeforeTimm):
    """What a block of timm gains: it can drop patch tokens between attention and FFN.

    It stands before timm's class among the bases. The three short methods at its end are what differs between them.

    Attributes:
        num_prefix_tokens: Class and register tokens, which are never dropped.
    """

    num_prefix_tokens: int

    def forward(
            self,
            x: Tensor,
            attn_mask: Tensor | None = None,
            is_causal: bool = False,
            num_keep: int | None = None,
            rank: bool = False,
            prefix_only: bool = False,
            **rotations: Tensor,
    ) -> Any:
        """Run the block as timm's, or in one of three other ways.

        Args:
            x: Tokens [B, T, D].
            attn_mask: As in timm's block.
            is_causal: As in timm's block.
            num_keep: Drop all but this many patch tokens, at least 1 and at most all.
            rank: Say which are the best.
            prefix_only: Attend to all tokens and leave out what follows for the patch tokens.
            **rotations: ``rope`` of a block with rotary positions, see ``TokenScoring``.

        Returns:
            Tokens [B, T, D]; with ``num_keep`` those that are left [B, num_prefix_tokens + num_keep, D], best first;
            with ``prefix_only`` the prefix tokens [B, num_prefix_tokens, D]. With ``rank`` these, all tokens between
            attention and FFN [B, T, D], and their order [B, T], of which the first are what is kept.

        Raises:
            TypeError: If tokens are to be ranked and the attention was replaced by one that gives no scores.
        """
        if rank or num_keep is not None:
            attended, order = self._attend_and_rank(x, rotations)
            kept = attended
            if num_keep is not None:
                kept = select_tokens(attended, order[:, :self.num_prefix_tokens + num_keep])
            y = self.feed_forward(kept)
            return (y, attended, order) if rank else y
        if prefix_only:
            y, num_queries = self.before_attention(x), self.num_prefix_tokens
            try:
                y = self.attn(y, num_queries=num_queries, **rotations)
            except TypeError:  # what was put in its place knows no such argument
                y = self.attn(y, **rotations)[:, :num_queries]
            return self.feed_forward(x[:, :self.num_prefix_tokens] + self.after_attention(y))
        return super().forward(x, attn_mask=attn_mask, is_causal=is_causal, **rotations)

    def _attend_and_rank(self, x: Tensor, rotations: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        try:
            result = self.attn(self.before_attention(x), return_scores=True, **rotations)
        except TypeError as error:
            raise self._no_scores(error) from error
        if not isinstance(result, tuple):
            raise self._no_scores(f'it returned a {type(result).__name__}')
        y, scores = result
        return x + self.after_attention(y), rank_tokens(scores, self.num_prefix_tokens)

    def _no_scores(self, reason: object) -> TypeError:
        return TypeError(
            f'this block drops tokens, and its attn, {type(self.attn).__name__}, gives no scores to rank them by '
            f'({reason}); let what replaces it take return_scores=True and return (output, scores), '
            f'or use keep_rate=1.0')

    def before_attention(self, x: Tensor) -> Tensor:
        """Return what attention sees of tokens [B, T, D]."""
        raise NotImplementedError

    def after_attention(self, y: Tensor) -> Tensor:
        """Return what is added to the tokens for what attention says [B, T, D]."""
        raise NotImplementedError

    def feed_forward(self, x: Tensor) -> Tensor:
        """Return tokens [B, T, D] with what the FFN adds to them."""
        raise NotImplementedError


class TokenKeepingBlock(TokenKeeping, Block):
    """timm's transformer block, able to drop patch tokens between attention and FFN.

    Args:
        num_prefix_tokens: Class and register tokens, which are never dropped.
    """

    def __init__(self, *args: Any, num_prefix_tokens: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_prefix_tokens = num_prefix_tokens

    def before_attention(self, x: Tensor) -> Tensor:
        """Norm it."""
        return self.norm1(x)

    def after_attention(self, y: Tensor) -> Tensor:
        """Scale it."""
        return self.drop_path1(self.ls1(y))

    def feed_forward(self, x: Tensor) -> Tensor:
        """Norm, FFN, scale, and add."""
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
