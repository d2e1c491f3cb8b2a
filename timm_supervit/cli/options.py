"""What the subcommands share: arguments and options as in timm's scripts, and exit codes that scripts can rely on.

0: done. 1: it failed; one line on stderr says why. 2: the command line could not be understood. 130: interrupted, by
Ctrl-C or SIGTERM; what was found out until then has been printed. 141: nobody read stdout to its end; what --output
names is complete.
"""
import argparse
import ast
import contextlib
import logging
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ..subnets import Subnet, check_img_size, check_keep_rate
from .stdout import JSON, QUIET, echo, note

__all__ = [
    'INTERRUPTED',
    'Command',
    'SubnetType',
    'amp_options',
    'cascade_option',
    'class_names_option',
    'create_model',
    'data_options',
    'device_option',
    'json_option',
    'load_network',
    'model_options',
    'output_option',
    'resolve_device',
    'setting_options',
    'show_weights',
    'subnet_option',
    'warnings_shown',
    'where_option',
    'workers_option',
]

INTERRUPTED = 130
_EXTRA = {'click', 'matplotlib', 'onnx', 'onnxruntime', 'onnxscript', 'rich', 'sklearn'}


class Command(click.Command):
    """A click command that takes ``--model-kwargs KEY=VALUE KEY=VALUE`` and whose failures are one clear line.

    All have ``--quiet`` and ``--verbose``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            _flag(QUIET, '-q', '--quiet', help='Print results and errors, no notes and no progress.'),
            click.Option(
                ['-v', '--verbose'], is_flag=True, expose_value=False, callback=_log_to_stderr,
                help='Print what timm and this package log, too.')]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the name of ``--model-kwargs`` before each of its values, as click wants it."""
        expanded: list[str] = []
        values = -1  # how many values of --model-kwargs stand before this place; -1 elsewhere
        for arg in args:
            if arg == '--model-kwargs':
                values = 0
            elif values == 0 or (values > 0 and '=' in arg and not arg.startswith('-')):
                expanded += ['--model-kwargs', arg]
                values += 1
            else:
                expanded.append(arg)
                values = -1
        return super().parse_args(ctx, expanded)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn what users can mend into a message."""
        try:
            with _interrupt_on_sigterm():
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort):  # RuntimeErrors too, but no failures
            raise
        except ModuleNotFoundError as error:
            package = (error.name or '').partition('.')[0]
            if package in ('', __name__.partition('.')[0]):
                raise
            remedy = f'it: pip install {package}'  # what timm reads some data sets with, above all
            if package in _EXTRA:
                remedy = 'the extra "tools": pip install "timm-supervit[tools]"'
            raise click.ClickException(f'{error.name} is missing; install {remedy}') from error
        except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            raise click.ClickException(str(error) or type(error).__name__) from error
        except KeyboardInterrupt:
            click.echo('Interrupted.', err=True)
            ctx.exit(INTERRUPTED)


def _flag(key: str, *names: str, help: str) -> click.Option:
    """Return a flag that is kept in the context, for what prints, and not handed to the command."""

    def keep(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        ctx.meta[key] = value

    return click.Option(names, is_flag=True, expose_value=False, callback=keep, help=help)


def _log_to_stderr(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        logging.basicConfig(format='%(name)s: %(message)s')
        for name in ('timm', __name__.partition('.')[0]):
            logging.getLogger(name).setLevel(logging.INFO)


def json_option(command: click.Command) -> click.Command:
    """Add ``--json`` to a command that prints results."""
    command.params.append(_flag(JSON, '--json', help='Print the results as JSON, and nothing else to stdout.'))
    return command


@contextlib.contextmanager
def warnings_shown() -> Iterator[None]:
    """Show the warnings of a block as a line each, without the place in the code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        yield
    for warning in caught:
        echo(f'Warning: {warning.message}', err=True)


@contextlib.contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """Let SIGTERM, of ``kill`` and batch systems, be what Ctrl-C is, so that commands clear up."""
    is_main = threading.current_thread() is threading.main_thread()  # the one that may set handlers
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class SubnetType(click.ParamType):
    """A subnet written as SIZE:RATE."""

    name = 'SIZE:RATE'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Subnet:
        """Return the subnet."""
        try:
            img_size, keep_rate = value.split(':')
            sides = [int(side) for side in img_size.split('x')]
            return Subnet(check_img_size(sides if len(sides) > 1 else sides[0]), check_keep_rate(float(keep_rate)))
        except ValueError as error:
            reason = f': {error}' if 'keep_rate' in str(error) else ''
            self.fail(f'{value!r} is no subnet SIZE:RATE, as in 160:0.7 or 256x128:0.7{reason}', param, ctx)


def _check_pairs(pairs: tuple[str, ...]) -> tuple[str, ...]:
    keys = [pair.partition('=')[0] for pair in pairs]
    for key, pair in zip(keys, pairs, strict=True):
        if '=' not in pair:
            raise click.BadParameter(f'{pair!r} is not KEY=VALUE, as in keep_rate=0.7')
        if keys.count(key) > 1:
            raise click.BadParameter(f'{key} is given more than once; give it once')
    return pairs


def _parse_where(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, object]:
    where: dict[str, object] = {}
    for value in values:
        key, equals, text = value.partition('=')
        if not equals:
            raise click.BadParameter(f'{value!r} is not KEY=VALUE, as in batch_size=1', ctx, param)
        try:
            where[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            where[key] = text
    return where


def _chain(*decorators: Any) -> Any:
    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


setting_options = _chain(
    click.option('--use-ema', is_flag=True, help='Take the averaged weights of the checkpoint, if it has them.'),
    click.option(
        '--num-classes', type=click.IntRange(0), metavar='N', help='Number of classes, if not the model\'s own.'),
    click.option(
        '--model-kwargs', multiple=True, metavar='KEY=VALUE ...', help='Settings of the model, as in timm\'s scripts.',
        callback=lambda ctx, param, pairs: _check_pairs(pairs)),
)
class_names_option = click.option(
    '--class-names', type=click.Path(exists=True), metavar='PATH',
    help='Where the names of the classes are: a folder for each, or a text file of one on each line (default: what a '
         'checkpoint was trained on).')
model_options = _chain(
    click.argument('model'),
    click.option(
        '--checkpoint', type=click.Path(exists=True, dir_okay=False), metavar='PATH',
        help='Weights to load, if MODEL is a name.'),
    setting_options,
)
device_option = click.option(
    '--device', metavar='NAME', help='Device to run on (default: cuda if there is one, or cpu).')
amp_options = _chain(
    click.option('--amp', is_flag=True, help='Run in mixed precision.'),
    click.option(
        '--amp-dtype', type=click.Choice(['float16', 'bfloat16']), default='float16', show_default=True,
        help='Lower precision of --amp.'),
)
workers_option = click.option(
    '-j', '--workers', default=min(4, os.cpu_count() or 1), show_default=True, type=click.IntRange(0),
    help='Processes reading images.')
data_options = _chain(
    click.option('--data-dir', metavar='DIR', help='Folder of the data set: a folder of images for each class.'),
    click.option(
        '--dataset', default='', metavar='NAME', help='Kind and name, as in timm\'s scripts (default: folders).'),
    click.option('--split', default='validation', show_default=True, metavar='NAME', help='Split of the data set.'),
    click.option(
        '-b', '--batch-size', default=256, show_default=True, type=click.IntRange(1), help='Images of a batch.'),
    workers_option,
    click.option('--skip-bad-images', is_flag=True, help='Name and count unreadable images and go on without them.'),
    device_option,
    amp_options,
)
where_option = click.option(
    '--where', multiple=True, metavar='KEY=VALUE', callback=_parse_where,
    help='Which of several settings of the profile counts, as in batch_size=1; may be repeated.')
subnet_option = click.option(
    '--subnet', 'subnets', multiple=True, type=SubnetType(), help='A subnet to run; may be repeated.')
cascade_option = click.option(
    '--cascade', type=click.Path(exists=True, dir_okay=False), metavar='JSON',
    help='A cascade of "supervit cascade", in the place of subnets.')
output_option = click.option(
    '--output', type=click.Path(file_okay=False), metavar='DIR', help='Folder to write JSON, CSV and picture to.')


def load_network(
        model: str | None,
        checkpoint: str | None = None,
        use_ema: bool = False,
        num_classes: int | None = None,
        model_kwargs: tuple[str, ...] = (),
        **kwargs: Any,
) -> Any:
    """Load the SuperViT that ``model_options`` describe, and say which weights it has; see ``tools/networks.py``.

    Args:
        model: Name, or the path of a checkpoint.
        checkpoint: Weights to load.
        use_ema: Take the averaged weights of the checkpoint.
        num_classes: Number of classes (default: the model's own).
        model_kwargs: Settings of the model, each ``KEY=VALUE``.
        **kwargs: Further arguments of ``tools.networks.load_network``.

    Raises:
        click.UsageError: If there is no such setting, or it is given twice.
    """
    from timm.utils import ParseKwargs

    from ..tools import networks

    if num_classes is not None:
        model_kwargs = _check_pairs((*model_kwargs, f'num_classes={num_classes}'))
    namespace = argparse.Namespace()
    try:
        ParseKwargs([], 'model_kwargs')(argparse.ArgumentParser(), namespace, model_kwargs)
    except Exception as error:  # a value that is nested too deeply, for instance
        raise ValueError(
            f'{model} cannot be created with {" ".join(model_kwargs)}: {type(error).__name__}: {error}') from error
    try:
        networks.check_settings(namespace.model_kwargs)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint='--model-kwargs') from error
    network = networks.load_network(model, checkpoint, use_ema, namespace.model_kwargs, **kwargs)
    if network.path and network.checkpoint:
        show_weights(network.path, network.checkpoint)
    elif kwargs.get('pretrained', True) and ':' not in network.name:
        note(f'Weights: plain ones that {network.name} starts from, not super-trained: '
             f'accuracy with few tokens or small images means nothing')
    if network.unnamed:
        note(f'Classes: without names, since {network.unnamed}; --class-names says where they are')
    return network


def create_model(*args: Any, **kwargs: Any) -> Any:
    """Return the model of ``load_network``."""
    return load_network(*args, **kwargs).model


def show_weights(path: str, checkpoint: Any) -> None:
    """Say on stderr which weights of a file were read, since a file may hold raw and averaged ones.

    Args:
        path: The file.
        checkpoint: What was read of it.
    """
    averaged = checkpoint.entry.endswith('_ema')
    others = [entry for entry in checkpoint.others if entry.endswith('_ema') != averaged]
    also = f' (it also has {others[0]}; {"leaving out " * averaged}--use-ema reads that)' if others else ''
    note(f'Weights: {checkpoint.entry}{" of " * bool(checkpoint.entry)}{Path(path).name}{also}')


def resolve_device(device: str | None) -> str:
    """Return the device to run on: the given one, or a CUDA device if there is one, or the CPU.

    Raises:
        ValueError: If torch knows no such device, or it is a CUDA device and there is none.
    """
    import torch

    try:
        wanted = torch.device(device or 'cpu')
    except RuntimeError as error:
        raise ValueError(f'--device {device}: torch knows no such device; use cpu, cuda, cuda:0, ...') from error
    if not torch.cuda.is_available() and wanted.type == 'cuda':
        raise ValueError(f'--device {device}: torch finds no CUDA device; leave it out or use cpu')
    return device or ('cuda' if torch.cuda.is_available() else 'cpu')
