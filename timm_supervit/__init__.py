"""Super Vision Transformer (SuperViT, arXiv 2205.11397) as a plugin of timm."""
import importlib
import importlib.metadata
from typing import Any

from .registration import install_hooks

__all__ = [
    'Cascade', 'LabelMapDataset', 'Subnet', 'SubnetScheduler', 'SuperLVViT', 'SuperViT', 'SuperViTTask',
    'SuperVisionTransformer', 'TokenLabelTask', 'load_model']

# Where each public name lives. They are imported on first use (PEP 562), since this package is imported with torch.
_NAMES = {
    'Cascade': '.cascade',
    'LabelMapDataset': '.training.label_maps',
    'Subnet': '.subnets',
    'SubnetScheduler': '.scheduler',
    'SuperLVViT': '.models.lvvit',
    'SuperViTTask': '.training.task',
    'SuperViT': '.models.supervit',
    'SuperVisionTransformer': '.models.supervit',
    'TokenLabelTask': '.training.token_labels',
    'load_model': '.loading.load',
}

install_hooks()


def __getattr__(name: str) -> Any:
    if name == '__version__':
        return importlib.metadata.version('timm-supervit')
    if name not in _NAMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(_NAMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
