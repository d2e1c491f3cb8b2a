"""A straightforward SuperViT to compare with: explicit attention matrices, a full sort, one pass for each subnet.

It is written from the description of the method, shares no code with the package, and takes the same state dict.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


def sides(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image size, one number where it is square."""
    return (img_size, img_size) if isinstance(img_size, int) else img_size


class ReferenceAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads = [part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2)]
        query, key, value = heads
        attention = (query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])).softmax(dim=-1)
        return self.proj((attention @ value).transpose(1, 2).flatten(2)), attention


class ReferenceMlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ReferenceBlock(nn.Module):
    drop_path = 0.  # how often training leaves out a residual branch of an image

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ReferenceAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ReferenceMlp(dim, int(dim * mlp_ratio))

    def scale(self, y: torch.Tensor) -> torch.Tensor:
        if self.drop_path and self.training:
            y = y * torch.empty(len(y), 1, 1, dtype=y.dtype).bernoulli_(1 - self.drop_path) / (1 - self.drop_path)
        return y

    def forward(self, x: torch.Tensor, keep_rate: float, by_score: bool = True, first: int = 1) -> torch.Tensor:
        """``first`` is the place of the first patch token; all tokens before it are kept."""
        y, attention = self.attn(self.norm1(x))
        x = x + self.scale(y)
        if keep_rate < 1:
            count = math.ceil(keep_rate * (x.shape[1] - first + 1))
            if by_score:
                order = attention.mean(dim=1)[:, 0, first:].sort(dim=1, descending=True).indices[:, :count]
                patches = torch.stack([tokens[first:][chosen] for tokens, chosen in zip(x, order, strict=True)])
            else:
                patches = x[:, first:first + count]
            x = torch.cat([x[:, :first], patches], dim=1)
        return x + self.scale(self.mlp(self.norm2(x)))


class ReferenceSuperViT(nn.Module):
    def __init__(
            self,
            img_sizes: tuple = (128, 160, 192, 224),
            drop_layers: tuple[int, ...] = (3, 6, 9),
            patch_size: int = 16,
            embed_dim: int = 384,
            depth: int = 12,
            num_heads: int = 6,
            mlp_ratio: float = 4.,
            num_classes: int = 1000,
            reg_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.img_sizes, self.drop_layers = img_sizes, drop_layers
        self.patch_embed = nn.ModuleDict({'proj': nn.Conv2d(3, embed_dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.pos_embed_list = nn.ParameterList(
            torch.zeros(1, (height // patch_size) * (width // patch_size) + 1 + reg_tokens, embed_dim)
            for height, width in map(sides, img_sizes))
        self.blocks = nn.ModuleList(ReferenceBlock(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)

    def set_drop_path(self, rate: float) -> None:
        """Let branches be left out more often the deeper they are, at ``rate`` in the last block."""
        for block, own in zip(self.blocks, torch.linspace(0, rate, len(self.blocks)).tolist(), strict=True):
            block.drop_path = own

    def forward(self, x: torch.Tensor, img_size: int | tuple[int, int], keep_rate: float) -> torch.Tensor:
        if tuple(x.shape[-2:]) != sides(img_size):
            x = F.interpolate(x, sides(img_size), mode='bilinear', align_corners=True)
        x = self.patch_embed['proj'](x).flatten(2).transpose(1, 2)
        prefix = self.cls_token if self.reg_token is None else torch.cat([self.cls_token, self.reg_token], dim=1)
        x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
        x = x + self.pos_embed_list[self.img_sizes.index(img_size)]
        for i, block in enumerate(self.blocks):
            x = block(x, keep_rate if i in self.drop_layers else 1., first=prefix.shape[1])
        return self.head(self.norm(x)[:, 0])


def soft_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return -(target * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


def training_step(
        model: nn.Module,
        x: torch.Tensor,
        target: torch.Tensor,
        subnets: list,
        own_size_teacher: bool = True,
) -> list[torch.Tensor]:
    """Four passes, four backward calls, as the paper's training loop does; gradients add up in the parameters."""
    losses, teacher = [], torch.empty(0)
    for i, (img_size, keep_rate) in enumerate(subnets):
        logits = model(x, img_size=img_size, keep_rate=keep_rate)
        if i % 2 == 0:
            if i == 0 or own_size_teacher:
                teacher = logits.detach().softmax(dim=1)
            loss = soft_cross_entropy(logits, target)
        else:
            log_ratio = teacher.log() - logits.log_softmax(dim=1)
            loss = (teacher * log_ratio).sum() / len(x)
        loss.backward()
        losses.append(loss.detach())
    return losses
