"""A second computation of SuperViTs with rotary positions, to compare with: one image at a time, nothing fused.

A pair of channels is a complex number, and a patch's place turns it by an angle. Kept tokens stay in the order of the
grid, which the package does not care for. Layers that have nothing to do with positions are the model's own.
"""
import math

import torch
import torch.nn.functional as F


def angles(model, rows, columns, block):
    """Return the angle of every pair of channels [1 or H, rows * columns, d / 2] in float64."""
    rope = model.rope
    kind = type(rope).__name__
    result = []
    for row in range(rows):
        for column in range(columns):
            if kind == 'RotaryEmbeddingMixed':
                across, down = rope.freqs[:, block].double()  # [H, d / 2] each
                result.append(column * across + row * down)
                continue
            if kind == 'RotaryEmbeddingDinoV3':
                places = [2 * (row + .5) / rows - 1, 2 * (column + .5) / columns - 1]
                speeds = [2 * math.pi / rope.temperature ** (4 * k / rope.dim) for k in range(rope.dim // 4)]
            else:
                offset = rope.grid_offset
                places = [row + offset, column + offset]
                if rope.ref_feat_shape is not None:
                    places = [(row + offset) / rows * rope.ref_feat_shape[0],
                              (column + offset) / columns * rope.ref_feat_shape[1]]
                if rope.grid_indexing == 'xy':
                    places.reverse()
                speeds = [rope.temperature ** (-4 * k / rope.dim) for k in range(rope.dim // 4)]
            result.append(torch.tensor([[place * speed for place in places for speed in speeds]], dtype=torch.float64))
    return torch.stack(result, dim=1)


def rotate(x, turns, half):
    """Rotate queries or keys [H, K, d] by angles [1 or H, K, d / 2]."""
    d = x.shape[-1]
    real, imaginary = (x[..., :d // 2], x[..., d // 2:]) if half else (x[..., ::2], x[..., 1::2])
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(turns), turns)
    parts = [turned.real, turned.imag]
    return torch.cat(parts, dim=-1) if half else torch.stack(parts, dim=-1).flatten(-2)


def attend(attn, x, turns):
    """Return what attention says of one image's tokens [T, D], and the class token's row [T], averaged over heads."""
    if attn.qkv is None:
        q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    else:
        q, k, v = (x @ attn.qkv.weight.T).chunk(3, dim=-1)
        if attn.qkv.bias is not None:
            q, k, v = (part + bias for part, bias in zip((q, k, v), attn.qkv.bias.chunk(3), strict=True))
        if getattr(attn, 'q_bias', None) is not None:
            q, v = q + attn.q_bias, v + attn.v_bias
    q, k, v = (part.view(len(x), -1, attn.head_dim).transpose(0, 1) for part in (q, k, v))
    q, k = attn.q_norm(q), attn.k_norm(k)
    if turns is not None:
        n, half = attn.num_prefix_tokens, attn.rotate_half
        q, k = (torch.cat([part[:, :n], rotate(part[:, n:], turns, half)], dim=1)
                for part in (q, k))
    share = attn.num_heads // len(k)
    outputs, row = [], 0
    for head in range(attn.num_heads):
        scores = q[head] @ k[head // share].T / math.sqrt(attn.head_dim)
        weights = (scores - scores.amax(dim=1, keepdim=True)).exp()
        weights = weights / weights.sum(dim=1, keepdim=True)
        outputs.append(weights @ v[head // share])
        row = row + weights[0] / attn.num_heads
    return attn.proj(attn.norm(torch.cat(outputs, dim=-1))), row


def logits(model, image, img_size, keep_rate, by_first_rows=False):
    """Return the logits of one subnet for one image [C, H, W].

    With ``by_first_rows`` the tokens that are left are rotated as if they were the first patches of the grid.
    """
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    x = F.interpolate(image[None], size=(height, width), mode='bilinear', align_corners=True)
    x = model.patch_embed.proj(x)[0]
    _, rows, columns = x.shape
    x = x.flatten(1).T
    n = model.num_prefix_tokens
    prefix = torch.cat([token[0] for token in (model.cls_token, model.reg_token) if token is not None])
    if len(model.pos_embed_list):
        positions = model.pos_embed_list[model.img_sizes.index(img_size)][0]
        x = torch.cat([prefix, x + positions]) if model.no_embed_class else torch.cat([prefix, x]) + positions
    else:
        x = torch.cat([prefix, x])
    x = model.norm_pre(x)
    patches = torch.arange(rows * columns)
    for i, block in enumerate(model.blocks):
        turns = None
        if model.rope is not None:
            turns = angles(model, rows, columns, i)[:, :len(patches) if by_first_rows else None]
            turns = turns if by_first_rows else turns[:, patches]
        is_post_norm = 'PostNorm' in type(block).__name__
        y, row = attend(block.attn, x if is_post_norm else block.norm1(x), turns)
        x = x + (block.norm1(y) if is_post_norm else y if block.gamma_1 is None else block.gamma_1 * y)
        if i in model.drop_layers:
            num_keep = min(len(patches), math.ceil(keep_rate * (1 + len(patches))))
            best = row[n:].argsort(descending=True, stable=True)[:num_keep].sort().values
            x, patches = torch.cat([x[:n], x[n:][best]]), patches[best]
        if is_post_norm:
            x = x + block.norm2(block.mlp(x))
        else:
            y = block.mlp(block.norm2(x))
            x = x + (y if block.gamma_2 is None else block.gamma_2 * y)
    return model.forward_head(model.norm(x)[None])[0]
