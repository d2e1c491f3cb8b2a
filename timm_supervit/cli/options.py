"""What the subcommands share: arguments and options as in timm's scripts, and exit codes that scripts can rely on.

0: done. 1: it failed; one line on stderr says why. 2: the command line could not be understood. 130: interrupted, by
Ctrl-C or SIGTERM; what was found out until then has been printed. 141: nobody read stdout to its end; what --output
names is complete.
"""
import argparse
import contextlib
import difflib
import inspect
import pickle
import signal
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ..subnets import Subnet, check_img_size, check_keep_rate
from ..tools.text import visible

__all__ = [
    'INTERRUPTED',
    'Command',
    'amp_options',
    'create_model',
    'device_option',
    'model_options',
    'output_option',
    'resolve_device',
    'setting_options',
    'show_weights',
    'subnet_option',
    'weights_kind',
]

INTERRUPTED = 130
_WORDS = {bool: 'True or False', int: 'a whole number', float: 'a number'}
_EXTRA = {'click', 'matplotlib', 'onnx', 'onnxruntime', 'onnxscript', 'rich', 'sklearn'}


class Command(click.Command):
    """A click command that takes ``--model-kwargs KEY=VALUE KEY=VALUE`` and whose failures are one clear line."""

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
model_options = _chain(
    click.argument('model'),
    click.option(
        '--checkpoint', type=click.Path(exists=True, dir_okay=False), metavar='PATH',
        help='Weights to load (default: the pretrained ones, if there are).'),
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
subnet_option = click.option(
    '--subnet', 'subnets', multiple=True, type=SubnetType(), help='A subnet; may be repeated (default: all).')
output_option = click.option(
    '--output', type=click.Path(file_okay=False), metavar='DIR', help='Folder to write JSON, CSV and picture to.')


def create_model(
        model: str,
        checkpoint: str | None = None,
        use_ema: bool = False,
        num_classes: int | None = None,
        model_kwargs: tuple[str, ...] = (),
        pretrained: bool = True,
) -> Any:
    """Create the SuperViT that ``model_options`` describe, in evaluation mode on the CPU; say which weights it has.

    Args:
        model: Name, as for ``timm.create_model``.
        checkpoint: Weights to load.
        use_ema: Take the averaged weights of the checkpoint.
        num_classes: Number of classes (default: the model's own).
        model_kwargs: Settings of the model, each ``KEY=VALUE``.
        pretrained: Without a checkpoint, load the model's pretrained weights.

    Raises:
        click.UsageError: If there is no such setting, or it is given twice.
        ModuleNotFoundError: If the model needs a package that is missing.
        RuntimeError: If the weights cannot be read or do not fit.
        ValueError: If it is no SuperViT, or cannot be created with these settings.
    """
    import timm
    from timm.utils import ParseKwargs

    from ..models.supervit import SuperVisionTransformer
    from ..tools.checkpoints import load_checkpoint

    if pretrained and not checkpoint and timm.is_model(model) and not timm.models.is_model_pretrained(model):
        raise ValueError(f'{model} has no pretrained weights; give trained ones with --checkpoint')
    if num_classes is not None:
        model_kwargs = _check_pairs((*model_kwargs, f'num_classes={num_classes}'))
    given = ' '.join(model_kwargs)
    try:
        namespace = argparse.Namespace()
        ParseKwargs([], 'model_kwargs')(argparse.ArgumentParser(), namespace, model_kwargs)
        _check_settings(namespace.model_kwargs)
        network = timm.create_model(model, pretrained=pretrained and not checkpoint, **namespace.model_kwargs)
    except (click.UsageError, ImportError):
        raise
    except Exception as error:  # what settings and files of any content raise can be of any kind
        raise ValueError(f'{model} cannot be created{" with " * bool(given)}{given}: {_reason(error)}') from error
    if not isinstance(network, SuperVisionTransformer):
        raise ValueError(f'{model} is no SuperViT; timm.list_models("supervit*") lists those that are')
    if checkpoint:
        show_weights(checkpoint, load_checkpoint(network, checkpoint, use_ema))
    return network.eval()


def _check_settings(settings: dict[str, Any]) -> None:
    """Refuse settings that no SuperViT has, and words where numbers, True or False belong; "false" would be true."""
    from ..models.lvvit import SuperLVViT

    known: dict[str, inspect.Parameter] = {}
    for cls in reversed(SuperLVViT.__mro__[:-1]):  # it, the other SuperViTs and timm's ViT; not ``object``
        known |= inspect.signature(cls).parameters
    names = known.keys() - {'args', 'kwargs'}
    for name, value in settings.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            remedy = f'did you mean {near[0]}?' if near else f'it has {", ".join(sorted(names))}'
            raise click.BadParameter(f'SuperViT has no setting {name!r}; {remedy}', param_hint='--model-kwargs')
        wanted = _WORDS.get(type(known[name].default))
        if wanted and isinstance(value, str):
            raise click.BadParameter(f'{name}={value} should be {wanted}', param_hint='--model-kwargs')


def _reason(error: Exception) -> str:
    if isinstance(error, AssertionError) and not str(error):  # the condition says what would have been right
        return str(traceback.extract_tb(error.__traceback__)[-1].line)
    text = ' '.join(str(error).split())[:300]
    clear = isinstance(error, (AssertionError, OSError, RuntimeError)) or type(error) is ValueError
    return text if clear and text else f'{type(error).__name__}: {text}'


def show_weights(path: str, checkpoint: Any) -> None:
    """Say on stderr which weights of a file were read, since a file may hold raw and averaged ones.

    Args:
        path: The file.
        checkpoint: What was read of it.
    """
    averaged = checkpoint.entry.endswith('_ema')
    others = [entry for entry in checkpoint.others if entry.endswith('_ema') != averaged]
    also = f' (it also has {others[0]}; {"leaving out " * averaged}--use-ema reads that)' if others else ''
    line = f'Weights: {checkpoint.entry}{" of " * bool(checkpoint.entry)}{Path(path).name}{also}'
    with contextlib.suppress(OSError):  # results matter more than this line to a reader who has gone
        click.echo(visible(line), err=True)


def resolve_device(device: str | None) -> str:
    """Return the device to run on: the given one, or a CUDA device if there is one, or the CPU.

    Raises:
        RuntimeError: If torch knows no such device.
        ValueError: If it is a CUDA device and there is none.
    """
    import torch

    if not torch.cuda.is_available() and torch.device(device or 'cpu').type == 'cuda':
        raise ValueError(f'--device {device}: torch finds no CUDA device; leave it out or use cpu')
    return device or ('cuda' if torch.cuda.is_available() else 'cpu')


def weights_kind(checkpoint: str | None, use_ema: bool, **settings: Any) -> str:
    """Return which weights ``create_model`` takes: ``pretrained``, or the ``raw`` or ``averaged`` ones of a file."""
    return 'averaged' if checkpoint and use_ema else 'raw' if checkpoint else 'pretrained'
