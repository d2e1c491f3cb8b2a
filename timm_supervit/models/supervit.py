"""Super Vision Transformer (SuperViT): one vision transformer that runs at many costs.

Paper: `Super Vision Transformer` - https://arxiv.org/abs/2205.11397 (IJCV 2023)
Official code: https://github.com/lmbxmu/SuperViT

The network takes the image at any of several sizes, each with its own positions, and keeps only a share of the
tokens in its dropping blocks. Every pair (image size, keep rate) is a subnet; all of them share all other weights.
"""
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    Attention,
    DropPath,
    register_notrace_function,
    resample_abs_pos_embed,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..sharing import Branch, plan_sharing
from ..subnets import (
    DISTILL_TEACHERS,
    TRAIN_SUBNETS,
    Size,
    Subnet,
    check_choice,
    check_drop_layers,
    check_img_size,
    check_img_sizes,
    check_keep_rates,
    check_patch_size,
    check_subnet,
    find_nearest_size,
    find_size,
    keep_schedule,
    size_2d,
    sort_sizes,
)
from .compiling import UncompiledDropPath, allow_recompilation_in_graph
from .hybrid_stem import count_positions
from .token_keeping import BeforeTimm, TokenKeepingAttention, TokenKeepingBlock, Tokens, select_tokens
from .weights import adapt_state_dict, check_names, checkpoint_filter_fn, plain_views


@torch.fx.wrap
@register_notrace_function
def resize_images(x: Tensor, img_size: Size, in_chans: int) -> Tensor:
    """Resize images bilinearly with aligned corners and no antialiasing, as the official code does.

    Args:
        x: Images [B, in_chans, H, W].
        img_size: Size of the result in pixels.
        in_chans: Channels that the network was built for.

    Returns:
        Images [B, in_chans, height, width]; ``x`` itself where it has that size.

    Raises:
        ValueError: If ``x`` has another number of dimensions or channels.
    """
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(
            f'input of shape {tuple(x.shape)} is no batch of images [B, {in_chans}, H, W]; '
            f'for another number of channels create the model with in_chans=')
    if x.shape[-2:] == size_2d(img_size):
        return x
    return F.interpolate(x, size=size_2d(img_size), mode='bilinear', align_corners=True)


class PositionEmbeddings(nn.ParameterList):
    """One learned position embedding [1, prefix + patches, D] for each image size, by area."""

    def reset_parameters(self) -> None:
        """Draw all embeddings anew, as timm's ViT does."""
        for pos_embed in self:
            trunc_normal_(pos_embed, std=.02)

    init_weights = reset_parameters  # the name by which timm's ViT initialization finds it

    def select(self, index: int) -> Tensor:
        """Return the embedding of one size.

        Where gradients are wanted it is cut out of all of them, so that the others get a gradient of zeros: distributed
        training then needs no search for unused parameters.
        """
        if not torch.is_grad_enabled() or torch.jit.is_tracing():
            return self[index]
        start = sum(self[i].shape[1] for i in range(index))
        return torch.cat(list(self), dim=1)[:, start:start + self[index].shape[1]]

class SuperViT(BeforeTimm):
    """What a vision transformer of timm gains: it runs at any of several image sizes and keep rates.

    It stands before timm's class among the bases and puts a grid of subnets on top; ``model(x)`` runs the active one,
    and ``model(x, img_size=160, keep_rate=0.7)`` another for that call alone. A call changes nothing on the model, so
    any number of threads can run any subnets at once. Images of any size are resized inside.

    Attributes:
        task_class: The task that trains the model, as module:name. The settings are attributes, too, by their names.
    """

    task_class = 'timm_supervit.training.task:SuperViTTask'
    pretrained_cfg: Any  # timm's builder sets it
    class_tokens: tuple[str, ...] = ('cls_token',)  # parameters; with the register tokens they are the prefix tokens
    pos_embed_resampling: dict[str, Any] = {}  # how a plain one is, where not as ``resample_abs_pos_embed`` does
    pos_embed: Any
    _stem_positions: dict[str, int] = {}  # at how many each convolution of a stem is computed for one of its map

    def __init__(
            self,
            img_sizes: Sequence[int | Sequence[int]] = (128, 160, 192, 224),
            keep_rates: Sequence[float] = (0.5, 0.7, 1.0),
            drop_layers: Sequence[int] = (3, 6, 9),
            img_size: int | Sequence[int] | None = None,
            keep_rate: float = 1.0,
            train_subnets: str = 'sandwich',
            distill_teacher: str = 'own_size',
            share_prefix: bool = True,
            patch_size: int | Sequence[int] = 16,
            embed_dim: int = 768,
            depth: int = 12,
            device: Any = None,
            dtype: Any = None,
            **kwargs: Any,
    ) -> None:
        """Create the model; the arguments that are not listed are those of timm's class.

        Args:
            img_sizes: Image sizes of the grid in pixels, by area, all divisible by ``patch_size``: whole numbers for
                squares, pairs (height, width) for rectangles.
            keep_rates: Keep rates of the grid, in (0, 1].
            drop_layers: Blocks that drop tokens, counted from 0. Indices beyond a shallower network are an error.
            img_size: Size of the active subnet (default: the largest).
            keep_rate: Keep rate of the active subnet, in (0, 1]; it need not be in ``keep_rates``.
            train_subnets: ``sandwich`` (the official sampling), ``all`` or ``active``, see ``SuperViTTask``.
            distill_teacher: ``own_size`` or ``largest_size``: the network that keeps all tokens from which those that
                drop some learn in training, that of their own size or that of the largest.
            share_prefix: Compute what subnets of one size have in common once, in evaluation and in training.

        Raises:
            ValueError: If a setting does not fit; the message says what would.
        """
        for name, required in dict(class_token=True, dynamic_img_pad=False, patch_drop_rate=0.).items():
            if kwargs.pop(name, required) != required:
                raise ValueError(f'SuperViT needs {name}={required!r}: it ranks patches by the class token and has one '
                                 f'grid of patches for each of its img_sizes')
        patch_size = check_patch_size(patch_size)
        img_sizes = check_img_sizes(img_sizes, patch_size)
        keep_rates = check_keep_rates(keep_rates)
        drop_layers = check_drop_layers(drop_layers, depth)
        super().__init__(
            img_size=size_2d(img_sizes[-1]), patch_size=patch_size, embed_dim=embed_dim, depth=depth,
            device=device, dtype=dtype, **kwargs)
        self.patch_embed.strict_img_size = False
        if hasattr(self.patch_embed, 'backbone'):
            check_img_sizes(img_sizes, patch_size * self._stem_reduction)
            self._stem_positions = count_positions(self.patch_embed.backbone, self.patch_embed.feature_ratio)
        self.img_sizes = img_sizes
        self.keep_rates = keep_rates
        self.drop_layers = drop_layers
        self.train_subnets = check_choice('train_subnets', train_subnets, TRAIN_SUBNETS)
        self.distill_teacher = check_choice('distill_teacher', distill_teacher, DISTILL_TEACHERS)
        self.share_prefix = share_prefix
        self.subnet = Subnet(img_sizes[-1] if img_size is None else check_img_size(img_size), keep_rate)
        self.pos_embed_list = PositionEmbeddings()
        self.register_load_state_dict_pre_hook(adapt_state_dict)

    def learn_positions(self, device: Any = None, dtype: Any = None) -> None:
        """Give each image size a position embedding of its own, in the place of the one that timm's class has."""
        self.pos_embed = None
        for size in self.img_sizes:
            length = self.num_patches(size) + self.num_embed_prefix_tokens
            self.pos_embed_list.append(torch.empty(1, length, self.embed_dim, device=device, dtype=dtype))
        self.pos_embed_list.reset_parameters()
        # Behind the position embeddings again, as in timm, where code relies on the last parameters being the head's.
        for name, module in list(self.named_children()):
            if name not in ('patch_embed', 'pos_drop', 'patch_drop', 'rope', 'norm_pre', 'pos_embed_list'):
                delattr(self, name)
                setattr(self, name, module)

    @property
    def subnets(self) -> list[Subnet]:
        """All subnets of the grid, cheapest first."""
        return list(self.subnet_macs())

    @property
    def subnet(self) -> Subnet:
        """The active subnet, which ``model(x)`` runs; assignable.

        Raises:
            ValueError: On assignment, if the size is not in ``img_sizes`` or the rate not in (0, 1].
        """
        return self._subnet

    @subnet.setter
    def subnet(self, subnet: tuple[Size, float]) -> None:
        self._subnet = check_subnet(subnet, self.img_sizes)
        self.record_settings(img_size=self._subnet.img_size, keep_rate=self._subnet.keep_rate)

    @property
    def _stem_reduction(self) -> int:
        return getattr(self.patch_embed, 'feature_ratio', (1, 1))[0]  # of a convolutional stem, before the patches

    def grid_size(self, img_size: Size) -> tuple[int, int]:
        """Return the rows and columns of patches of an image."""
        return self.patch_embed.dynamic_feat_size(size_2d(img_size))

    def num_patches(self, img_size: Size) -> int:
        """Return the patches of an image."""
        return math.prod(self.grid_size(img_size))

    @property
    def num_embed_prefix_tokens(self) -> int:
        """Prefix tokens that have an entry in the position embeddings."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    @property
    def fixed_setting(self) -> dict[str, str]:
        """No precision or runtime is the only one."""
        return {}

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def schedule(self, subnet: Subnet) -> dict[int, int]:
        """Return how many patches each block keeps that drops some in a subnet of this model, see ``keep_schedule``."""
        return keep_schedule(self.num_patches(subnet.img_size), subnet.keep_rate, self.drop_layers, len(self.blocks))

    def parting_block(self, subnet: Subnet, other: Subnet) -> int | None:
        """Return the block in which two subnets part, of which all before is common to them; None if nothing is."""
        if subnet.img_size != other.img_size:
            return None
        one, two = self.schedule(subnet), self.schedule(other)
        return min((block for block in {**one, **two} if one.get(block) != two.get(block)), default=len(self.blocks))

    def subnet_macs(self, subnets: Iterable[tuple[Size, float]] | None = None) -> dict[Subnet, int]:
        """Return subnets (default: all of the grid, cheapest first) with their multiply-accumulates, see ``macs``."""
        if subnets is not None:
            return {subnet: self._macs(subnet) for subnet in (check_subnet(pair, self.img_sizes) for pair in subnets)}
        grid = itertools.starmap(Subnet, itertools.product(self.img_sizes, self.keep_rates))
        return dict(sorted(((subnet, self._macs(subnet)) for subnet in grid), key=lambda item: item[1]))

    def macs(self, subnet: tuple[Size, float], before: int | None = None) -> int:
        """Return the multiply-accumulates of a subnet for one image: patch embedding, blocks, pooling and head.

        They are those that torch's flop counter sees in ``forward``. With ``before``, only those of what runs before
        this block.
        """
        return self._macs(check_subnet(subnet, self.img_sizes), before)

    def _macs(self, subnet: Subnet, before: int | None = None) -> int:
        schedule, num_patches = self.schedule(subnet), self.num_patches(subnet.img_size)
        macs = self.embed_macs(num_patches)
        for i, block in enumerate(self.blocks):
            if i == before:
                return macs
            num_tokens = num_patches + self.num_prefix_tokens
            width = block.attn.num_heads * block.attn.head_dim
            macs += num_tokens * linear_macs(block.attn) + 2 * num_tokens ** 2 * width
            num_patches = schedule.get(i, num_patches)
            macs += (num_patches + self.num_prefix_tokens) * linear_macs(block.mlp)
        return macs + self.head_macs(num_patches)

    def embed_macs(self, num_patches: int) -> int:
        """Return the multiply-accumulates of the patch embedding, for ``macs``."""
        stem, macs = self.patch_embed, num_patches * linear_macs(self.patch_embed.proj)
        num_positions = num_patches * math.prod(stem.patch_size)  # of a convolutional stem's map
        return macs + num_positions * sum(
            count * linear_macs(stem.backbone.get_submodule(name)) for name, count in self._stem_positions.items())

    def head_macs(self, num_patches: int) -> int:
        """Return the multiply-accumulates of pooling and head, for ``macs``."""
        num_tokens, pool = num_patches + self.num_prefix_tokens, self.attn_pool
        heads: Any = self.get_classifier()  # a pair of them in timm's distilled networks
        macs = sum(map(linear_macs, heads if isinstance(heads, tuple) else (heads,)))
        macs *= 1 if self.global_pool else num_tokens
        if self.global_pool == 'map':
            num_keys = num_tokens if self.pool_include_prefix else num_patches
            rest = linear_macs(pool) - linear_macs(pool.kv) + 2 * num_keys * self.embed_dim
            return macs + num_keys * linear_macs(pool.kv) + pool.latent_len * rest
        return macs + 2 * num_tokens ** 2 * self.embed_dim * (self.global_pool == 'prr')

    @property
    def backbone_name(self) -> str | None:
        """Name of the ViT of timm that ``create_model('supervit', backbone=...)`` made it of."""
        return getattr(self, '_model_args', {}).get('backbone')

    def record_settings(self, **settings: Any) -> None:
        """Record arguments by which timm's export creates the model again, beside those of ``create_model``."""
        # timm has functions for it, but in a private module that not every version next to a train.py has.
        self._model_args = getattr(self, '_model_args', {}) | settings
        if 'img_size' in settings:
            self._traits = getattr(self, '_traits', {}) | {'img_size': size_2d(settings['img_size'])}

    def _read_call(
            self,
            x: Tensor,
            attn_mask: Tensor | None,
            is_causal: bool,
            img_size: Size | None,
            keep_rate: float | None,
    ) -> tuple[Subnet, dict[int, int], dict[str, Any]]:
        """Return the subnet that a call asks for, its schedule, and the arguments of blocks that drop nothing."""
        if not _is_given(img_size):
            self.warn_of_other_size(x)
        if _is_given(attn_mask) and not isinstance(attn_mask, Tensor):
            raise TypeError(
                f'attn_mask {attn_mask!r} is no tensor; a subnet is named, as in model(x, img_size=160, keep_rate=0.7)')
        subnet = check_subnet((
            img_size if _is_given(img_size) else self.subnet.img_size,
            keep_rate if _is_given(keep_rate) else self.subnet.keep_rate,
        ), self.img_sizes)
        schedule = self.schedule(subnet)
        masked = _is_given(attn_mask) or (_is_given(is_causal) and is_causal)
        if masked and schedule:
            raise ValueError(
                f'subnet {subnet} drops tokens, which attn_mask and is_causal cannot follow; use keep_rate=1.0')
        return subnet, schedule, dict(attn_mask=attn_mask, is_causal=is_causal) if masked else {}

    def warn_of_other_size(self, x: Tensor, runs: str | None = None) -> None:
        """Warn where images are of no size of the grid; ``runs`` says what resizes them (default: the active one)."""
        # Whoever asks timm's scripts for --img-size 256, or create_model for dynamic_img_size, may think that this is
        # the size that runs.
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy):
            return
        if any(x.shape[-2:] == size_2d(size) for size in self.img_sizes):
            return
        warnings.warn(
            f'images of {" x ".join(map(str, x.shape[-2:]))} pixels are of none of img_sizes {self.img_sizes}, and '
            f'{runs or f"the active subnet {self.subnet}"} resizes them; choose another subnet with --model-kwargs '
            f'img_size=, model.subnet, or in the call', stacklevel=3)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights as any module does, but all of them or, with an error, none; see ``models/weights.py``."""
        if strict:
            check_names(self, state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def __prepare_scriptable__(self) -> Any:  # noqa: D105, what torch.jit.script calls first
        raise NotImplementedError(
            f'{type(self).__name__} has no TorchScript; use torch.jit.trace, torch.export, torch.compile or ONNX')

    def compile(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Compile the blocks in place, each for any number of tokens: all subnets and blocks share their graphs.

        Args:
            **kwargs: Arguments of ``torch.compile``.
        """
        allow_recompilation_in_graph()
        if any(isinstance(module, DropPath) for module in self.modules()):
            for block in self.blocks:
                for name in ('drop_path1', 'drop_path2'):
                    rate = getattr(getattr(block, name), 'drop_prob', 0.)  # timm gives a block of rate 0 no DropPath
                    setattr(block, name, UncompiledDropPath(rate).train(block.training))
        for block in self.blocks:
            block.compile(**{'dynamic': True, **kwargs})

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone.

        The position embeddings are among them, as the official code intends; the timm version that it ships matches
        whole names only and so decays them.
        """
        return super().no_weight_decay() | {f'pos_embed_list.{i}' for i in range(len(self.pos_embed_list))}

    def set_input_size(
            self,
            img_size: int | Sequence[int] | None = None,
            patch_size: int | Sequence[int] | None = None,
    ) -> None:
        """Make an image size active, adding it to ``img_sizes`` if it is new, and change the patch size.

        Position embeddings are resampled bicubically: a new size's from the nearest one, all of them where the patch
        size changes.

        Args:
            img_size: Side of a square image in pixels, or (height, width).
            patch_size: Side of the new patches, or an equal pair.

        Raises:
            ValueError: If the size is not divisible by the patch size, or patches are not square.
        """
        new_size = self.subnet.img_size if img_size is None else check_img_size(img_size)
        new_patch = self.patch_embed.patch_size[0] if patch_size is None else check_patch_size(patch_size)
        img_sizes = check_img_sizes(sort_sizes({*self.img_sizes, new_size}), new_patch * self._stem_reduction)
        old_sizes, old_grids = self.img_sizes, [self.grid_size(size) for size in self.img_sizes]
        super().set_input_size(img_size=size_2d(img_sizes[-1]), patch_size=(new_patch,) * 2)
        pos_embeds = []
        for size in img_sizes if len(self.pos_embed_list) else ():
            nearest = find_nearest_size(size, old_sizes)
            old, requires_grad = self.pos_embed_list[nearest], self.pos_embed_list[nearest].requires_grad
            new = resample_abs_pos_embed(
                old.detach(), self.grid_size(size), old_grids[nearest], self.num_embed_prefix_tokens)
            pos_embeds.append(old if self.grid_size(size) == old_grids[nearest] else nn.Parameter(new, requires_grad))
        self.img_sizes = img_sizes
        self.record_settings(img_sizes=img_sizes)
        self.pos_embed_list = PositionEmbeddings(pos_embeds)
        self.subnet = Subnet(new_size, self.subnet.keep_rate)

    def embed_patches(self, x: Tensor) -> Tensor:
        """Turn images [B, C, H, W] into patch tokens [B, N, D]; a subclass may take more that belongs to the call."""
        return self.patch_embed(x)

    def rotations(self, img_size: Size) -> Tensor | None:
        """Return the rotations of all patches at an image size, see ``Tokens``, where positions are rotary."""
        return None

    def embed(self, x: Tensor, img_size: Size, **kwargs: Any) -> Tokens:
        """Turn images [B, C, H, W] into the tokens of one image size, positions added."""
        index = find_size(img_size, self.img_sizes)
        x = self.embed_patches(resize_images(x, img_size, self.in_chans), **kwargs)
        pos_embed = self.pos_embed_list.select(index) if len(self.pos_embed_list) else None
        return Tokens(self.add_positions(x, pos_embed), rotations=self.rotations(img_size))

    def add_positions(self, x: Tensor, pos_embed: Tensor | None) -> Tensor:
        """Put the prefix tokens before patch tokens [B, N, D] and add a position embedding; return tokens [B, T, D]."""
        tokens = [getattr(self, name) for name in (*self.class_tokens, 'reg_token')]
        prefix = [token.expand(x.shape[0], -1, -1) for token in tokens if token is not None]
        if pos_embed is None:
            x = torch.cat([*prefix, x], dim=1)
        elif self.no_embed_class:
            x = torch.cat([*prefix, x + pos_embed], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1) + pos_embed
        return self.norm_pre(self.pos_drop(x))

    def run_blocks(
            self,
            tokens: Tokens,
            schedule: Mapping[int, int],
            start: int = 0,
            stop: int | None = None,
            prefix_only: bool = False,
            **masks: Any,
    ) -> Tokens:
        """Run blocks on tokens.

        Args:
            tokens: Those that enter the first of the blocks, from ``embed`` or from another run.
            schedule: How many patches each block keeps that drops some, from ``schedule``.
            start: The first block.
            stop: The block before which to stop (default: behind the last).
            prefix_only: Leave out what the last of the blocks computes for the patches, unless it drops some.
            **masks: ``attn_mask`` and ``is_causal`` for the blocks, where none drops any.

        Returns:
            The tokens that are left; only the prefix tokens, if nothing else was computed.
        """
        stop = len(self.blocks) if stop is None else stop
        for i in range(start, stop):
            if i in schedule:
                x, order = self._run_block(i, tokens, num_keep=schedule[i], rank=True)[::2]
                tokens = tokens.keep(x, order[:, :x.shape[1]])
            else:
                how = dict(prefix_only=True) if prefix_only and i == stop - 1 else masks
                tokens = tokens._replace(x=self._run_block(i, tokens, **how))
        return tokens

    def _run_block(self, index: int, tokens: Tokens, **kwargs: Any) -> Any:
        kwargs |= tokens.rotations_in(index, self.num_prefix_tokens)
        block = partial(self.blocks[index], **kwargs)  # a reentrant checkpoint takes no keyword arguments
        return checkpoint(block, tokens.x) if self.grad_checkpointing else block(tokens.x)

    def forward_features(
            self,
            x: Tensor,
            attn_mask: Tensor | None = None,
            is_causal: bool = False,
            img_size: Size | None = None,
            keep_rate: float | None = None,
    ) -> Tensor:
        """Run a subnet up to the final norm.

        Args:
            x: Images [B, C, H, W] of any size.
            attn_mask: As in timm's ViT, for a subnet that drops nothing.
            is_causal: As in timm's ViT, for a subnet that drops nothing.
            img_size: Size of the subnet, one of ``img_sizes`` (default: the active one).
            keep_rate: Keep rate of the subnet, in (0, 1] (default: the active one).

        Returns:
            The tokens that were kept to the end [B, T, D], the class token first.

        Raises:
            ValueError: If there is no such subnet, the images have another number of channels, or a mask is given to a
                subnet that drops tokens.
        """
        subnet, schedule, masks = self._read_call(x, attn_mask, is_causal, img_size, keep_rate)
        return self.norm(self.run_blocks(self.embed(x, subnet.img_size), schedule, **masks).x)

    def forward(
            self,
            x: Tensor,
            attn_mask: Tensor | None = None,
            is_causal: bool = False,
            img_size: Size | None = None,
            keep_rate: float | None = None,
            subnets: Sequence[tuple[Size, float]] | None = None,
    ) -> Any:
        """Run the active subnet, or the given one, or several, for this call alone.

        The arguments are those of ``forward_features``; ``subnets`` runs these instead, see ``forward_subnets``.

        Returns:
            Logits [B, num_classes]; a list of them with ``subnets``.
        """
        if torch.compiler.is_compiling():
            allow_recompilation_in_graph()
        if subnets is not None and _is_given(subnets):
            with_patches = [self.head_reads_patches] * len(subnets)
            return [self.forward_head(tokens) for tokens in self.forward_features_subnets(x, subnets, with_patches)]
        return self.forward_head(self.forward_features(x, attn_mask, is_causal, img_size, keep_rate))

    def forward_subnets(self, x: Tensor, subnets: Sequence[tuple[Size, float]]) -> list[Tensor]:
        """Return the logits [B, num_classes] of several subnets on one batch, see ``forward_features_subnets``."""
        return self(x, subnets=subnets)  # a call of the model, which hooks and wrappers see

    @property
    def head_reads_patches(self) -> bool:
        """Whether the logits depend on the patch tokens behind the last block."""
        return self.global_pool != 'token'

    def forward_features_subnets(
            self,
            x: Tensor,
            subnets: Sequence[tuple[Size, float]],
            with_patches: Sequence[bool] | None = None,
            **kwargs: Any,
    ) -> list[Tensor]:
        """Run several subnets on one batch, up to the final norm.

        Subnets of one size share what they have in common, forward and backward, stochastic depth and dropout masks
        included: all up to the attention of the block in which they part, see ``plan_sharing``, and that block's FFN,
        which treats each token by itself. The results and gradients are those of separate calls.
        ``share_prefix=False`` turns it off.

        Args:
            x: Images [B, C, H, W] of any size.
            subnets: Pairs (img_size, keep_rate), in any order.
            with_patches: For each subnet, whether its patch tokens are of use (default: yes). Without them the last
                block computes the prefix tokens alone, about 6 % of a network of twelve blocks less.
            **kwargs: Further arguments of ``embed_patches``.

        Returns:
            The tokens that each subnet kept to the end [B, T, D], in the order of ``subnets``; T is the number of
            prefix tokens where the patch tokens are of no use.

        Raises:
            ValueError: If one of them is no subnet of this model, or the images have another number of channels.
        """
        self.warn_of_other_size(x, 'every subnet')
        checked = [pair if isinstance(pair, Subnet) else check_subnet(pair, self.img_sizes) for pair in subnets]
        with_patches = [True] * len(checked) if with_patches is None else with_patches
        passes = [subnet.img_size if self.share_prefix else i for i, subnet in enumerate(checked)]
        tokens: dict[int, Tensor] = {}
        for one in dict.fromkeys(passes):  # in the order of their first appearance
            members = [i for i in range(len(checked)) if passes[i] == one]
            img_size = checked[members[0]].img_size
            tree = plan_sharing(
                [self.schedule(checked[i]) for i in members], [with_patches[i] for i in members],
                self.num_patches(img_size), len(self.blocks))
            for leaf, y in self._run_branch(self.embed(x, img_size, **kwargs), tree):
                tokens.update(dict.fromkeys((members[i] for i in leaf.members), self.norm(y)))
        return [tokens[i] for i in range(len(checked))]

    def _run_branch(self, tokens: Tokens, branch: Branch) -> Iterator[tuple[Branch, Tensor]]:
        """Run a branch and all that it parts into; yield each leaf with its tokens [B, T, D]."""
        tokens = self.run_blocks(tokens, branch.drops, branch.blocks.start, branch.blocks.stop, branch.prefix_only)
        if not branch.parts:
            yield branch, tokens.x
            return
        x, order = self._run_block(branch.blocks.stop, tokens, rank=True)[::2]
        for part in branch.parts:
            kept = order[:, :self.num_prefix_tokens + part.num_patches]
            is_all = kept.shape == order.shape
            left = tokens._replace(x=x) if is_all else tokens.keep(select_tokens(x, kept), kept)
            yield from self._run_branch(left, part)

    def _trace_blocks(
            self,
            tokens: Tokens,
            schedule: Mapping[int, int],
            **masks: Any,
    ) -> Iterator[tuple[Tokens, Tensor]]:
        """Run the blocks one by one and keep the last value of every token.

        Yields:
            After each block, the tokens that are left, and the last values of all, the dropped ones included
            [B, T0, D].
        """
        dense = tokens.x
        for i in range(len(self.blocks)):
            if i in schedule:
                x, attended, order = self._run_block(i, tokens, num_keep=schedule[i], rank=True)
                dense = _fill_in(dense, tokens._replace(x=attended))  # what is dropped keeps the value that it has here
                tokens = tokens.keep(x, order[:, :x.shape[1]])
            else:
                tokens = tokens._replace(x=self._run_block(i, tokens, **masks))
            dense = _fill_in(dense, tokens)
            yield tokens, dense

    def forward_intermediates(
            self,
            x: Tensor,
            indices: int | list[int] | None = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            output_dict: bool = False,
            attn_mask: Tensor | None = None,
            is_causal: bool = False,
            img_size: Size | None = None,
            keep_rate: float | None = None,
    ) -> Any:
        """Return features after several blocks, as timm's ViT does, of the active or the given subnet.

        The intermediates are dense maps of the subnet's whole grid: where a patch was dropped, they hold the last value
        that its token had.

        The arguments are those of timm's ViT, and as in ``forward_features``.

        Returns:
            The final features as ``forward_features`` returns them and the intermediates, in the form asked for.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f'output_fmt {output_fmt!r} is unknown; use NCHW or NLC')
        subnet, schedule, masks = self._read_call(x, attn_mask, is_causal, img_size, keep_rate)
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        tokens = self.embed(x, subnet.img_size)
        num_prefix, grid_size = self.num_prefix_tokens, self.grid_size(subnet.img_size)
        maps, prefixes = [], []
        for i, (left, dense) in enumerate(self._trace_blocks(tokens, schedule, **masks)):
            tokens = left
            if i in take_indices:
                dense = self.norm(dense) if norm else dense
                prefixes.append(dense[:, :num_prefix])
                maps.append(dense[:, num_prefix:])
            if stop_early and i == max_index:
                break
        if output_fmt == 'NCHW':
            maps = [y.transpose(1, 2).unflatten(2, grid_size).contiguous() for y in maps]
        if output_dict:
            result: dict[str, Any] = {'image_intermediates': maps}
            if return_prefix_tokens:
                result['image_intermediates_prefix'] = prefixes
            return result if intermediates_only else result | {'image_features': self.norm(tokens.x)}
        intermediates = list(zip(maps, prefixes, strict=True)) if return_prefix_tokens else maps
        return intermediates if intermediates_only else (self.norm(tokens.x), intermediates)

    def kept_patches(
            self,
            x: Tensor,
            *,
            img_size: Size | None = None,
            keep_rate: float | None = None,
    ) -> dict[int, Tensor]:
        """Return which patches are left after each block that drops some; the arguments are as in ``forward_features``.

        Returns:
            For each dropping block, the indices of the kept patches in the subnet's grid, row-major, best first [B, K].
        """
        subnet, schedule, _ = self._read_call(x, None, False, img_size, keep_rate)
        num_prefix, kept = self.num_prefix_tokens, {}
        for i, (tokens, _) in enumerate(self._trace_blocks(self.embed(x, subnet.img_size), schedule)):
            if i in schedule:
                kept[i] = cast(Tensor, tokens.indices)[:, num_prefix:] - num_prefix
        return kept


class SuperVisionTransformer(SuperViT, VisionTransformer):
    """SuperViT on timm's ``VisionTransformer``, with a learned position embedding for each image size."""

    def __init__(
            self,
            reg_tokens: int = 0,
            pos_embed: str = 'learn',
            block_fn: Any = TokenKeepingBlock,
            attn_layer: Any = TokenKeepingAttention,
            device: Any = None,
            dtype: Any = None,
            **kwargs: Any,
    ) -> None:
        """Create the model; the arguments that are not listed are those of ``SuperViT`` and timm's class.

        Raises:
            ValueError: If a setting does not fit; the message says what would.
        """
        if pos_embed != 'learn':
            raise ValueError(f'pos_embed {pos_embed!r}: SuperViT has a learned position embedding for each of its '
                             f'img_sizes; leave it out')
        kwargs.pop('dynamic_img_size', None)  # in timm the weights are the same with it, and here each size has its own
        super().__init__(
            reg_tokens=reg_tokens,
            pos_embed='none',  # see ``learn_positions``
            block_fn=partial(block_fn, num_prefix_tokens=len(self.class_tokens) + reg_tokens),
            attn_layer=_check_attn_layer(attn_layer),
            device=device,
            dtype=dtype,
            **kwargs,
        )
        if self.num_prefix_tokens != len(self.class_tokens) + reg_tokens:
            raise ValueError(f'reg_tokens {reg_tokens}: this network has none beside its class tokens; leave them out')
        self.learn_positions(device, dtype)

    def load_pretrained(self, checkpoint_path: str, prefix: str = '') -> None:
        """Load the weights in an original JAX file (``.npz``) of a ViT, as timm's ViT does.

        Args:
            checkpoint_path: The file.
            prefix: What its names begin with.
        """
        for plain in plain_views(self):  # each takes the position embedding of its size, and all take the rest
            VisionTransformer.load_pretrained(plain, checkpoint_path, prefix)  # type: ignore[arg-type]


def find_supervit(model: Any) -> SuperViT | None:
    """Return the SuperViT that a model is, or that it wraps: for distribution, averaging, compiling, or by PEFT."""
    model = unwrap_model(model)
    if get_base_model := getattr(model, 'get_base_model', None):
        model = get_base_model()
    return model if isinstance(model, SuperViT) else None


def _is_given(argument: Any) -> bool:
    # FX tracing hands over proxies for optional arguments; a traced graph is one of the active subnet, without a mask.
    return argument is not None and not isinstance(argument, torch.fx.Proxy)


def _check_attn_layer(attn_layer: Any) -> Any:
    if attn_layer in ('', 'attn', Attention):  # timm's names and class of the attention that ours extends
        return TokenKeepingAttention
    if not (isinstance(attn_layer, type) and issubclass(attn_layer, TokenKeepingAttention)):
        raise ValueError(f'attn_layer {attn_layer!r} gives no scores to rank tokens by; leave it out')
    return attn_layer


def linear_macs(module: nn.Module) -> int:
    """Return the multiply-accumulates of a module's linear layers and convolutions for one token, adapters included."""
    # PEFT keeps the original of a layer that it trains as a whole, and does not run it. What quantize_dynamic makes of
    # a linear layer is none, and its weight a method.
    layers = [m for name, m in module.named_modules() if 'original_module' not in name.split('.')]
    return (
        sum(m.weight.numel() for m in layers if isinstance(m, (nn.Linear, nn.Conv2d)))
        + sum(m.in_features * m.out_features for m in layers if callable(getattr(m, 'weight', None))))


def _fill_in(dense: Tensor, tokens: Tokens) -> Tensor:
    """Write tokens over those among the dense tokens [B, T0, D] that they come from."""
    indices = tokens.indices
    return tokens.x if indices is None else dense.scatter(1, indices.unsqueeze(-1).expand_as(tokens.x), tokens.x)


def supervit_cfg(**kwargs: Any) -> dict[str, Any]:
    """Return timm's pretrained configuration of a variant."""
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': None, 'fixed_input_size': True,
        'crop_pct': 0.875, 'interpolation': 'bicubic', 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed.proj', 'classifier': 'head', 'license': 'apache-2.0',
        'paper_ids': 'arXiv:2205.11397', 'paper_name': 'Super Vision Transformer',
        'origin_url': 'https://github.com/lmbxmu/SuperViT',
        **kwargs,
    }


def _deit_cfg(size: str) -> dict[str, Any]:
    # Plain DeiT weights, a start for super-training; they are not SuperViT-trained.
    return supervit_cfg(hf_hub_id=f'timm/deit_{size}_patch16_224.fb_in1k')

default_cfgs = generate_default_cfgs({
    'supervit_tiny.deit_in1k': _deit_cfg('tiny'),
    'supervit_small.deit_in1k': _deit_cfg('small'),
    'supervit_base.deit_in1k': _deit_cfg('base'),
    'supervit_digits.untrained': supervit_cfg(num_classes=10, input_size=(3, 24, 24), crop_pct=1.0),
})


def create_supervit(
        variant: str,
        pretrained: bool = False,
        model_cls: Callable[..., SuperViT] = SuperVisionTransformer,
        filter_fn: Callable[..., dict[str, Any]] = checkpoint_filter_fn,
        **kwargs: Any,
) -> Any:
    """Build a registered variant by timm's builder, which loads weights and wraps features."""
    if 'backbone' in kwargs:
        raise ValueError(
            f'{variant} has a backbone of its own; timm.create_model("supervit", backbone={kwargs["backbone"]!r}) '
            f'takes any ViT of timm')
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    if cfg.file and not cfg.source and not pretrained:
        warnings.warn(
            f'{cfg.file} is not read, since pretrained is False; beside --pretrained-path, train.py wants --pretrained',
            stacklevel=3)
    out_indices = kwargs.pop('out_indices', 3)
    largest = None
    if 'img_sizes' in kwargs:
        sizes = check_img_sizes(kwargs['img_sizes'], check_patch_size(kwargs.get('patch_size', 16)))
        largest, active = sizes[-1], kwargs.get('img_size')
        # timm's default for img_size is the input size of the variant, or what a saved folder says, which need not be
        # in another grid.
        saved = kwargs.get('pretrained_model_args', {}).get('img_size')
        if active is None or (active == saved and check_img_size(active) not in sizes):
            kwargs['img_size'] = largest
    try:
        model: Any = build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
            pretrained_filter_fn=filter_fn,
            **kwargs,
        )
    except (EOFError, RuntimeError, SafetensorError) as error:
        # The readers of timm and torch don't name what they read.
        source = cfg.file or cfg.hf_hub_id or cfg.url
        if not pretrained or not source:
            raise
        raise RuntimeError(
            f'Could not load weights from {source}: {str(error) or "nothing in it"}. '
            f'If the file is truncated or corrupt, download or save it again.') from error
    if largest:
        # What a loader should deliver: the largest size, from which the others are resized inside.
        model.pretrained_cfg['input_size'] = (model.pretrained_cfg['input_size'][0], *size_2d(largest))
    return model


@register_model
def supervit_tiny(pretrained: bool = False, **kwargs: Any) -> SuperVisionTransformer:
    """SuperViT of DeiT-Ti's size. Tag deit_in1k: plain DeiT weights, a start and not SuperViT-trained."""
    model_args = dict(patch_size=16, embed_dim=192, depth=12, num_heads=3)
    return create_supervit('supervit_tiny', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def supervit_small(pretrained: bool = False, **kwargs: Any) -> SuperVisionTransformer:
    """SuperViT of DeiT-S's size, the paper's. Tag deit_in1k: plain DeiT weights, a start and not SuperViT-trained."""
    model_args = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6)
    return create_supervit('supervit_small', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def supervit_base(pretrained: bool = False, **kwargs: Any) -> SuperVisionTransformer:
    """SuperViT of DeiT-B's size. Tag deit_in1k: plain DeiT weights, a start and not SuperViT-trained."""
    model_args = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12)
    return create_supervit('supervit_base', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def supervit_digits(pretrained: bool = False, **kwargs: Any) -> SuperVisionTransformer:
    """SuperViT small enough to train on handwritten digits in minutes, on a CPU."""
    model_args = dict(
        img_sizes=(12, 16, 20, 24), drop_layers=(1, 3, 4),
        patch_size=4, embed_dim=64, depth=6, num_heads=2, mlp_ratio=2.)
    return create_supervit('supervit_digits', pretrained=pretrained, **dict(model_args, **kwargs))
