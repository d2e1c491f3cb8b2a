"""Which network results and files are of, and where it is from.

A network is known by its fingerprint: what its costs depend on, and for its accuracy the weights too.
"""
import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # torch takes seconds to import, and whoever only reads results needs none
    from torch import nn


class Source(NamedTuple):
    """Where a model is from.

    Attributes:
        name: Its name, as for ``timm.create_model``.
        path: The checkpoint or exported file that its weights are from; None for a model's own.
        entry: The entry of the checkpoint that they are: ``model``, ``state_dict_ema``, ...
        other_entries: The checkpoint's other entries of weights.
        unnamed: Why the names of its classes are not known, where they could be.
        data: What ``train.py`` was told of its data: ``dataset``, ``class_map``, ``input_key``, ``target_key``.
        plain: The plain ViT of timm that it was made of when it was loaded; empty for a SuperViT.
    """

    name: str
    path: str | None = None
    entry: str = ''
    other_entries: tuple[str, ...] = ()
    unnamed: str = ''
    data: Mapping[str, str] | None = None
    plain: str = ''

    @property
    def weights_kind(self) -> str:
        """Which weights it has: ``pretrained``, or the ``raw`` or ``averaged`` ones of a file."""
        if self.path is None:
            return 'pretrained'
        return 'averaged' if self.entry.endswith('_ema') else 'raw'


def source_of(model: Any) -> Source:
    """Return where a SuperViT, exported program or cascade is from; ``load_model`` notes it as ``source``."""
    return getattr(model, 'source', None) or Source(model.pretrained_cfg['architecture'])


def fingerprint(model: Any, weights: bool = True) -> dict[str, Any]:
    """Return what tells the network of a model from others, for ``Results.network``.

    Settings that act only in training are no part of it, nor are the keep rates of the grid, since any rate runs.

    Args:
        model: A SuperViT; or an exported program or a cascade, which has it as ``network``.
        weights: Whether the results depend on the weights, as accuracy does and costs do not.
    """
    if hasattr(model, 'network'):
        return model.network if weights else {**model.network, 'weights': None}
    model = getattr(model, '_orig_mod', model)  # what torch.compile wraps
    config: Any = model.pretrained_cfg
    block: Any = model.blocks[0]
    return {
        'architecture': config['architecture'],
        'img_sizes': [size if isinstance(size, int) else list(size) for size in model.img_sizes],  # as in JSON
        'drop_layers': list(model.drop_layers),
        'patch_size': model.patch_embed.patch_size[0],
        'embed_dim': model.embed_dim,
        'depth': len(model.blocks),
        'num_heads': block.attn.num_heads,
        'in_chans': model.in_chans,
        'num_classes': model.num_classes,
        'global_pool': model.global_pool,
        'modules': _digest_modules(model),
        'weights': _digest_weights(model) if weights else None,
    }


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the entries in which two fingerprints differ; that of the weights counts where both have it."""
    return [
        key for key in dict.fromkeys([*one, *other])
        if key != 'weights_kind' and one.get(key) != other.get(key)
        and not (key == 'weights' and None in (one.get(key), other.get(key)))]


def _digest_modules(model: 'nn.Module') -> str:
    from torch import nn

    # Without what does nothing in evaluation, such as the drop paths of a network that was saved in training, and
    # without the part of quantize_dynamic's layers that shows its weights.
    lines = [f'{name} {tuple(parameter.shape)}' for name, parameter in model.named_parameters()]
    lines += [
        f'{name} {type(module).__name__}({module.extra_repr()})' for name, module in model.named_modules()
        if all('PackedParams' in type(child).__name__ for child in module.children())
        and not isinstance(module, nn.ParameterList)  # which names its device
        and not re.search('Drop|Identity|PackedParams', type(module).__name__)]
    return hashlib.sha256('\n'.join(sorted(lines)).encode()).hexdigest()


def _digest_weights(model: 'nn.Module') -> str:
    import torch

    digest = hashlib.sha256()
    tensor: Any
    for name, value in sorted(model.state_dict().items()):
        for tensor in value if isinstance(value, tuple) else (value,):  # quantize_dynamic packs weight and bias in one
            if not isinstance(tensor, torch.Tensor):
                digest.update(f'{name} {tensor}\n'.encode())
                continue
            if tensor.is_quantized or type(tensor) is not torch.Tensor:  # as of torchao, which shows no bytes
                tensor = tensor.dequantize()
            digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
