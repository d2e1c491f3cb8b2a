"""How timm learns of this package without being told: post-import hooks on ``timm.models`` and ``timm.task``.

timm looks up no entry points. torch does: at the end of ``import torch`` it calls those of the group ``torch.backends``
("Autoload Mechanism" in its documentation), and timm imports torch before its models. ``install_hooks`` is that entry
point; ``import timm_supervit`` calls it too, for where autoload is off. It imports neither torch nor timm.
"""
import functools
import sys
import warnings
from importlib.metadata import distribution
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

__all__ = ['install_hooks']


@functools.cache
def install_hooks() -> None:
    """Install the hooks, once. Never raises: what fails becomes a warning when timm is used."""
    try:
        from wrapt import register_post_import_hook

        register_post_import_hook(_register_models, 'timm.models')
        register_post_import_hook(_extend_tasks, 'timm.task')
    except Exception as error:
        if 'timm.models' in sys.modules:
            _warn(error)
        else:
            sys.meta_path.insert(0, _WarnWhenTimmIsImported(error))


def _register_models(models: ModuleType) -> None:
    """Load this distribution's entry points of the group ``timm.models``, which registers the model factories."""
    try:
        for entry_point in distribution('timm-supervit').entry_points.select(group='timm.models'):
            entry_point.load()
    except Exception as error:
        _warn(error)


def _extend_tasks(tasks: Any) -> None:
    """Let ``ClassificationTask(model, ...)`` create a ``SuperViTTask`` where the model is a SuperViT.

    And let resuming such a task from a file that cannot be read say which file it is.
    """

    def new(cls: type, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Where the models are not loaded, there is no SuperViT; and what fails here must not stop other models' tasks.
        if cls is tasks.ClassificationTask and model is not None and f'{__package__}.models.supervit' in sys.modules:
            try:
                from timm.utils import unwrap_model

                from .task import is_supervit

                cls = resolve_name(unwrap_model(model).task_class) if is_supervit(model) else cls
            except Exception as error:
                _warn(error)
        return object.__new__(cls)

    tasks.ClassificationTask.__new__ = staticmethod(new)

    resume_task_checkpoint = tasks.resume_task_checkpoint

    @functools.wraps(resume_task_checkpoint)
    def resume(task: Any, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return resume_task_checkpoint(task, checkpoint_path, *args, **kwargs)
        except Exception as error:
            ours = sys.modules.get(f'{__package__}.task')
            if ours is None or not isinstance(task, ours.SuperViTTask) or isinstance(error, FileNotFoundError):
                raise
            raise RuntimeError(
                f'cannot resume from {checkpoint_path}: {error} '
                f'If the file was cut short, resume from the checkpoint before it.') from error

    tasks.resume_task_checkpoint = resume


class _WarnWhenTimmIsImported:
    """Import finder that finds nothing; it warns when timm is imported, since a hook could not be installed."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == 'timm':
            sys.meta_path.remove(self)  # type: ignore[arg-type]
            _warn(self.error)


def _warn(error: Exception) -> None:
    warnings.warn(
        f'timm-supervit is installed but could not register its models: {type(error).__name__}: {error}. '
        f'Reinstall it with "pip install --force-reinstall --no-deps timm-supervit".',
        stacklevel=2)
