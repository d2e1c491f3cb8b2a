"""What dropping tokens by class attention is worth, beside other ways of spending fewer multiply-accumulates.

    python tests/token_reduction.py PHOTOGRAPHS FILE.jsonl [NETWORK ...] [--rates 0.5 0.7]
    python tests/token_reduction.py --train WAY TRAIN_PY [its arguments]

NETWORK is a checkpoint of ``train.py`` with averaged weights, of a plain ViT or a SuperViT, and runs in bfloat16;
PHOTOGRAPHS has validation/CLASS. At the largest image size, each way gets the MACs of the subnets of these keep rates:

- attention: patches that the class token attends to most are kept, which is SuperViT;
- random: as many, drawn for each image;
- fused: one patch fewer, and one token that is the sum of the dropped, weighted by that attention (EViT, arXiv
  2202.07800);
- merged: in every block similar tokens are merged and attended to by their number (ToMe, arXiv 2210.09461);
- smaller: all tokens of smaller images, interpolated between the two sizes whose MACs are next.

Each network is added as a line of FILE.jsonl, and the table of all is printed, networks that differ in what follows the
last dash of their names put together: what class attention reaches, and by how much the others differ, with standard
errors. The second form runs ``train.py`` so that super-training reduces tokens in that way.
"""
import argparse
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_dataset, create_loader
from torch import Tensor
from torch.nn import functional as F

from timm_supervit import Subnet, load_model
from timm_supervit.models.supervit import SuperViT

WAYS = ('attention', 'random', 'fused', 'merged')


def attend(block: Any, x: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens behind attention [B, T, D], the class token's attention [B, T], and the tokens' keys [B, T, d]."""
    q, k, v = block.attn.project(block.before_attention(x), None)
    attention = (q @ k.transpose(-2, -1) * block.attn.scale + number.log()[:, None, None]).softmax(dim=-1)
    y = block.attn.proj(block.attn.norm((attention @ v).transpose(1, 2).flatten(2)))
    return x + block.after_attention(y), attention[:, :, 0].mean(dim=1).detach(), k.mean(dim=1).detach()


def pick(x: Tensor, indices: Tensor) -> Tensor:
    return x.gather(1, indices.unsqueeze(2).expand(-1, -1, x.shape[2]))


def keep(x: Tensor, scores: Tensor, number: int) -> Tensor:
    """Return the class token and the patches of the highest scores."""
    return torch.cat([x[:, :1], pick(x[:, 1:], scores[:, 1:].topk(number, dim=1).indices)], dim=1)


def fuse(x: Tensor, scores: Tensor, number: int) -> Tensor:
    """Return the class token, one patch fewer, and the weighted sum of the others."""
    order = 1 + scores[:, 1:].argsort(dim=1, descending=True)
    dropped = order[:, number - 1:]
    fused = (pick(x, dropped) * scores.gather(1, dropped).unsqueeze(2)).sum(dim=1, keepdim=True)
    return torch.cat([x[:, :1], pick(x, order[:, :number - 1]), fused], dim=1)


def merge(x: Tensor, keys: Tensor, number: Tensor, merged: int) -> tuple[Tensor, Tensor]:
    """Merge so many of the even tokens, each into the odd one most similar to it; the class token is even and stays."""
    keys = F.normalize(keys, dim=-1)
    similarity = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    similarity[:, 0] = -torch.inf
    most, partner = similarity.max(dim=2)
    order = most.argsort(dim=1, descending=True)
    goes, stays = order[:, :merged], order[:, merged:].sort(dim=1).values
    weighted = torch.cat([x, torch.ones_like(x[..., :1])], dim=2) * number.unsqueeze(2)  # sums, and how many of
    even, odd = weighted[:, ::2], weighted[:, 1::2]
    into = partner.gather(1, goes).unsqueeze(2).expand(-1, -1, weighted.shape[2])
    weighted = torch.cat([pick(even, stays), odd.scatter_add(1, into, pick(even, goes))], dim=1)
    return weighted[..., :-1] / weighted[..., -1:], weighted[..., -1]


def count(model: Any, before: Sequence[int], after: Sequence[int]) -> float:
    """Return the MACs of the blocks, of so many tokens in the attention and in the FFN of each."""
    d = model.embed_dim
    return sum(4 * t * d * d + 2 * t * t * d + 8 * left * d * d for t, left in zip(before, after, strict=True))


def tokens_of(model: Any, subnet: Subnet) -> tuple[list[int], list[int]]:
    """Return how many tokens a subnet has in the attention and in the FFN of each block."""
    schedule, after = model.schedule(subnet), []
    number = 1 + model.num_patches(subnet.img_size)
    for i in range(len(model.blocks)):
        after.append(number := 1 + schedule[i] if i in schedule else number)
    return [1 + model.num_patches(subnet.img_size), *after[:-1]], after


def plan_merging(model: Any, subnet: Subnet) -> list[int]:
    """Return how many tokens to merge in each block for the MACs of a subnet, as equally as can be."""
    limit, depth = count(model, *tokens_of(model, subnet)), len(model.blocks)
    number = 1 + model.num_patches(subnet.img_size)
    for total in range(number):
        left, plan = number, []
        for i in range(depth):
            plan.append(min(total // depth + (i < total % depth), (left - 1) // 2))
            left -= plan[-1]
        after = [number - sum(plan[:i + 1]) for i in range(depth)]
        if count(model, [number, *after[:-1]], after) <= limit:
            return plan
    raise ValueError(f'merging cannot reach the MACs of {subnet}')


def run(model: Any, images: Tensor, subnet: Subnet, way: str) -> Tensor:
    """Return the tokens behind the final norm [B, T, D]."""
    x, schedule = model.embed(images, subnet.img_size).x, model.schedule(subnet)
    number = torch.ones_like(x[..., 0])  # how many tokens each one is
    plan = plan_merging(model, subnet) if way == 'merged' and schedule else None
    for i, block in enumerate(model.blocks):
        x, scores, keys = attend(block, x, number)
        if plan:
            x, number = merge(x, keys, number, plan[i])
        elif i in schedule:
            scores = torch.rand_like(scores) if way == 'random' else scores
            x = (fuse if way == 'fused' else keep)(x, scores, schedule[i])
            number = number[:, :x.shape[1]]
        x = block.feed_forward(x)
    return model.norm(x)


@torch.inference_mode()
def evaluate(model: Any, loader: Any, rates: Sequence[float]) -> dict[str, float]:
    """Return top-1 in % of each way at each rate, of all tokens, and of smaller images."""
    largest = model.img_sizes[-1]
    patch = model.patch_embed.patch_size[0]
    for size in range(3 * patch, largest, patch):
        model.set_input_size(size)
    full = {size: count(model, *tokens_of(model, Subnet(size, 1.))) for size in model.img_sizes}
    points = [('attention', Subnet(size, 1.)) for size in model.img_sizes]
    points += [(way, Subnet(largest, rate)) for rate in rates for way in WAYS]
    right, seen = np.zeros(len(points)), 0
    torch.manual_seed(0)
    for images, target in loader:
        with torch.autocast('cpu', torch.bfloat16):
            right += [int((model.forward_head(run(model, images, subnet, way)).argmax(dim=1) == target).sum())
                      for way, subnet in points]
        seen += len(target)
    top1 = dict(zip(points, (100 * right / seen).tolist(), strict=True))
    sizes = [top1['attention', Subnet(size, 1.)] for size in model.img_sizes]
    result = {f'{largest}:1': sizes[-1]}
    for rate in rates:
        macs = count(model, *tokens_of(model, Subnet(largest, rate)))
        result |= {f'{way} {largest}:{rate:g}': top1[way, Subnet(largest, rate)] for way in WAYS}
        result[f'smaller {largest}:{rate:g}'] = float(np.interp(macs, list(full.values()), sizes))
    return result


def print_table(results: Sequence[dict[str, Any]]) -> None:
    """Print one row for each way and rate."""
    groups: dict[str, list[dict[str, float]]] = {}
    for result in results:
        groups.setdefault(result['network'].rpartition('-')[0], []).append(result['top1'])
    print('| |', ' | '.join(f'{name} ({len(group)})' for name, group in groups.items()), '|')
    print('|---' * (1 + len(groups)) + '|')
    for key in results[0]['top1']:
        way, _, subnet = key.rpartition(' ')
        others = way not in ('', 'attention')
        cells = []
        for group in groups.values():
            values = np.array([one[key] - others * one[f'attention {subnet}' if others else key] for one in group])
            error = f' ± {values.std(ddof=1) / len(values) ** 0.5:.1f}' if len(values) > 1 else ''
            cells.append(f'{values.mean():{"+" if others else ""}.1f}{error}')
        print(f'| {key} |', ' | '.join(cells), '|')


def train(way: str, script: str, arguments: Sequence[str]) -> None:
    """Run ``train.py`` with another way of reducing tokens in super-training."""

    def forward_features_subnets(self: Any, x: Tensor, subnets: Any, with_patches: Any = None) -> list[Tensor]:
        return [run(self, x, Subnet(*subnet), way) for subnet in subnets]

    SuperViT.forward_features_subnets = forward_features_subnets  # type: ignore[method-assign]
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name='__main__')


def main() -> None:
    if sys.argv[1:2] == ['--train']:
        train(sys.argv[2], sys.argv[3], sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path)
    parser.add_argument('output', type=Path)
    parser.add_argument('networks', type=Path, nargs='*')
    parser.add_argument('--rates', type=float, nargs='+', default=[0.5, 0.7])
    options = parser.parse_args()
    for path in options.networks:
        model: Any = load_model(str(path), use_ema=True).eval()
        dataset = create_dataset('', root=options.data, split='validation')
        config = model.pretrained_cfg
        loader = create_loader(
            dataset, (3, model.img_sizes[-1], model.img_sizes[-1]), 100, use_prefetcher=False, num_workers=1,
            **{key: config[key] for key in ('mean', 'std', 'interpolation', 'crop_pct')})
        result = {'network': path.name, 'top1': evaluate(model, loader, options.rates)}
        with options.output.open('a') as file:
            file.write(json.dumps(result) + '\n')
        print(result, flush=True)
    print_table([json.loads(line) for line in options.output.read_text().splitlines()])


if __name__ == '__main__':
    main()
