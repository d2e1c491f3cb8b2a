"""How timm learns of this package without being told: post-import hooks on its modules.

timm looks up no entry points. torch does: at the end of ``import torch`` it calls those of the group ``torch.backends``
("Autoload Mechanism" in its documentation), and timm imports torch before its models. ``install_hooks`` is that entry
point; ``import timm_supervit`` calls it too, for where autoload is off. It imports neither torch nor timm.

The hook on ``timm.models`` registers the models; the others make the few changes of ``timm_patches``.
"""
import functools
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import distribution
from types import ModuleType
from typing import Any


@functools.cache
def install_hooks() -> None:
    """Install the hooks, once. Never raises: what fails becomes a warning when timm is used."""
    try:
        from wrapt import __version__, register_post_import_hook  # type: ignore[attr-defined]

        # Older ones never call a hook under Python 3.12, and say nothing.
        if tuple(map(int, __version__.split('.')[:2])) < (1, 14):
            raise ImportError(f'wrapt {__version__} is older than 1.14')

        from .timm_patches import PATCHES

        register_post_import_hook(_guard(_register_models, 'could not register its models'), 'timm.models')
        for patch in PATCHES:
            consequence = f'could not extend {patch.module}, so that {patch.without}'
            register_post_import_hook(_guard(patch.apply, consequence), patch.module)
    except Exception as error:
        if 'timm' in sys.modules:  # maybe it is what imports torch
            _warn('could not register its models', error)
        else:
            sys.meta_path.insert(0, _WarnWhenTimmIsImported(error))


def _guard(hook: Callable[[ModuleType], None], consequence: str) -> Callable[[ModuleType], None]:
    """Let what fails in a hook be a warning and not an error of the import that called it."""

    def guarded(module: ModuleType) -> None:
        try:
            hook(module)
        except Exception as error:
            _warn(consequence, error)

    return guarded


def _register_models(models: ModuleType) -> None:
    """Load this distribution's entry points of the group ``timm.models``, which registers the model factories."""
    for entry_point in distribution('timm-supervit').entry_points.select(group='timm.models'):
        entry_point.load()


class _WarnWhenTimmIsImported:
    """Import finder that finds nothing; it warns when timm is imported, since the hooks could not be installed."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == 'timm':
            sys.meta_path.remove(self)  # type: ignore[arg-type]
            _warn('could not register its models', self.error)


def _warn(consequence: str, error: Exception) -> None:
    version = getattr(sys.modules.get('timm'), '__version__', 'of unknown version')
    warnings.warn(
        f'timm-supervit is installed but {consequence}: {type(error).__name__}: {error} (timm {version}). '
        f'Run "pip install --upgrade timm-supervit", which also brings the versions that it needs.',
        stacklevel=3)
