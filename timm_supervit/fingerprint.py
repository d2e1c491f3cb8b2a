"""Which network results are of: what its costs depend on, and for its accuracy the weights too."""
import hashlib
import re
from typing import Any

import torch
from torch import nn

from .models.supervit import SuperVisionTransformer

__all__ = ['fingerprint']


def fingerprint(model: SuperVisionTransformer, weights: bool = True) -> dict[str, Any]:
    """Return what tells the network from others, for ``Results.network``; ``difference`` compares two.

    Settings that act only in training are no part of it, nor are the keep rates of the grid, since any rate runs.

    Args:
        model: The network.
        weights: Whether the results depend on the weights, as accuracy does and costs do not.
    """
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


def _digest_modules(model: nn.Module) -> str:
    # Without what does nothing in evaluation, such as the drop paths of a network that was saved in training.
    lines = [f'{name} {tuple(parameter.shape)}' for name, parameter in model.named_parameters()]
    lines += [
        f'{name} {type(module).__name__}({module.extra_repr()})' for name, module in model.named_modules()
        if not any(module.children()) and not isinstance(module, nn.ParameterList)  # which names its device
        and not re.search('Drop|Identity', type(module).__name__)]
    return hashlib.sha256('\n'.join(sorted(lines)).encode()).hexdigest()


def _digest_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
