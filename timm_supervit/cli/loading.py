"""What the options of a command ask for: the model, with its weights, and where and in what precision it runs."""
import argparse
import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from ..subnets import format_size
from .options import check_pairs
from .stdout import be_quiet, note


def parse_settings(num_classes: int | None, model_kwargs: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings of ``--num-classes`` and ``--model-kwargs``, each of which is ``KEY=VALUE``."""
    from timm.utils import ParseKwargs

    from ..loading.load import check_settings

    if num_classes is not None:
        model_kwargs = check_pairs((*model_kwargs, f'num_classes={num_classes}'))
    namespace = argparse.Namespace()
    try:
        ParseKwargs([], 'model_kwargs')(argparse.ArgumentParser(), namespace, model_kwargs)
    except Exception as error:  # a value that is nested too deeply, for instance
        raise ValueError(
            f'no model can be created with {" ".join(model_kwargs)}: {type(error).__name__}: {error}') from error
    try:
        check_settings(namespace.model_kwargs)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint='--model-kwargs') from error
    return namespace.model_kwargs


def load(
        model: str | None,
        checkpoint: str | None = None,
        use_ema: bool = False,
        num_classes: int | None = None,
        model_kwargs: tuple[str, ...] = (),
        takes_files: bool = True,
        **kwargs: Any,
) -> Any:
    """Load the model that ``model_options`` describe, and say on stderr which weights it has.

    Args:
        model: Name, or the path of a checkpoint or an exported file.
        checkpoint: Weights to load.
        use_ema: Take the averaged weights of the checkpoint.
        num_classes: Number of classes (default: the model's own).
        model_kwargs: Settings of the model, each ``KEY=VALUE``.
        takes_files: Whether it may be an exported file.
        **kwargs: Further arguments of ``load_supervit``.
    """
    from ..loading.load import check_complete, load_model, load_supervit
    from ..programs.program import Program
    from ..results.fingerprint import source_of

    read = load_model if takes_files else load_supervit
    settings = parse_settings(num_classes, model_kwargs)
    if takes_files:
        try:
            check_complete(model, checkpoint, use_ema=use_ema, settings=settings)
        except ValueError as error:
            raise click.UsageError(f'{error}.') from error
    loaded = read(model, checkpoint, use_ema=use_ema, settings=settings, **kwargs)
    source = source_of(loaded)
    if isinstance(loaded, Program):
        return loaded
    if source.path:
        show_weights(source.path, source.entry, source.other_entries)
    elif kwargs.get('pretrained', True) and ':' not in source.name and not source.plain:
        note(f'Weights: plain ones that {source.name} starts from, not super-trained: '
             f'accuracy with few tokens or small images means nothing')
    show_plain(source.plain, loaded.img_sizes, loaded.drop_layers)
    if source.unnamed:
        remedy = '--class-names says where they are' if 'class_names' in kwargs else \
            'as many as the data set has, in its order; --class-map says another'
        note(f'Classes: without names, since {source.unnamed}; {remedy}')
    return loaded


def show_weights(path: str, entry: str, other_entries: Sequence[str]) -> None:
    """Say on stderr which entry of a file was read, since it may hold raw and averaged weights."""
    is_averaged = entry.endswith('_ema')
    others = [other for other in other_entries if other.endswith('_ema') != is_averaged]
    remedy = 'leaving out --use-ema' if is_averaged else '--use-ema'
    also = f' (it also has {others[0]}; {remedy} reads that)' if others else ''
    note(f'Weights: {f"{entry} of " if entry else ""}{Path(path).name}{also}')


def show_plain(name: str, img_sizes: Sequence[Any], drop_layers: Sequence[int]) -> None:
    """Say on stderr what was made of a plain ViT, if it is of one."""
    if name:
        note(f'Model: {name}, a plain ViT, as a SuperViT of img_sizes {", ".join(map(format_size, img_sizes))} that '
             f'drops tokens in blocks {", ".join(map(str, drop_layers))}; --model-kwargs img_sizes= and drop_layers= '
             f'choose others. It was not super-trained, so small images and few tokens cost it more accuracy')


def show_passed_over(paths: Sequence[str]) -> None:
    """Say on stderr what was passed over in folders of images."""
    named = ', '.join(paths[:5]) + (f' and {len(paths) - 5} more' if len(paths) > 5 else '')
    note(f'Passed over, since they are no images by their endings, or no files: {named}')


def precision_of(amp: bool, amp_dtype: str) -> str:
    """Return the precision that ``amp_options`` ask for."""
    return amp_dtype if amp else 'float32'


def read_share() -> Any:
    """Return which of several processes this is, as torchrun says in the environment, see ``Share``.

    All but the first say no more than errors.
    """
    from ..tools.predict import Share

    rank, size = os.environ.get('RANK'), os.environ.get('WORLD_SIZE', '1')
    if rank is None and size == '1':
        return Share()
    try:
        share = Share(int(rank or ''), int(size))
    except ValueError as error:
        said = ' and '.join(f'{key}={os.environ[key]}' for key in ('RANK', 'WORLD_SIZE') if key in os.environ)
        raise ValueError(
            f'{said} in the environment: RANK is to be a whole number from 0 and below WORLD_SIZE; start processes '
            f'with torchrun, which sets both, or unset both') from error
    if share.rank:
        be_quiet()
    return share


@contextlib.contextmanager
def processes(device: str | None) -> Iterator[tuple[str, bool]]:
    """Join the processes that torchrun has started, if any; yield this one's device, and whether it is the first."""
    import torch.distributed as dist
    from timm.utils import init_distributed_device, is_primary

    read_share()
    setup = argparse.Namespace(device=resolve_device(device))
    init_distributed_device(setup)
    if not is_primary(setup):
        be_quiet()
    try:
        yield setup.device, is_primary(setup)
    finally:
        if setup.distributed:
            dist.destroy_process_group()


def resolve_device(device: str | None) -> str:
    """Return the device to run on: the given one, or a CUDA device if there is one, or the CPU."""
    import torch

    try:
        parsed = torch.device(device or 'cpu')
    except RuntimeError as error:
        raise ValueError(f'--device {device}: torch knows no such device; use cpu, cuda, cuda:0, ...') from error
    if not torch.cuda.is_available() and parsed.type == 'cuda':
        raise ValueError(f'--device {device}: torch finds no CUDA device; leave it out or use cpu')
    return device or ('cuda' if torch.cuda.is_available() else 'cpu')


@contextlib.contextmanager
def warnings_shown() -> Iterator[None]:
    """Show the warnings of a block as a line each, without the place in the code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        yield
    for warning in caught:
        note(f'Warning: {warning.message}')
