"""What the commands share of arguments and options, named as in timm's scripts."""
import ast
import functools
import os
from typing import Any

import click

from ..subnets import Subnet, check_img_size, check_keep_rate


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


def check_pairs(pairs: tuple[str, ...]) -> tuple[str, ...]:
    """Return settings as they are, each of which must be ``KEY=VALUE`` and named once."""
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
        except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):  # of a depth too
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
        callback=lambda ctx, param, pairs: check_pairs(pairs)),
)
class_names_option = click.option(
    '--class-names', type=click.Path(exists=True), metavar='PATH',
    help='Names of the classes: a folder with one folder for each, or a text file with one on each line (default: '
         'those that a checkpoint was trained on).')
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
        help='Lower precision of --amp; on a CPU bfloat16 is the fast one.'),
)
workers_option = click.option(
    '-j', '--workers', default=min(4, os.cpu_count() or 1), show_default=True, type=click.IntRange(0),
    help='Processes that read images.')


def _as_data(function: Any) -> Any:
    """Hand the options of a data set to a command as one, ``data``, which ``open_dataset`` takes."""
    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> Any:
        names = ('dataset', 'split', 'class_map', 'input_key', 'target_key', 'input_img_mode')
        return function(*args, data={name: kwargs.pop(name) for name in names}, **kwargs)

    return command


dataset_options = _chain(
    click.option(
        '--dataset', metavar='NAME',
        help='Kind and name, as in timm\'s scripts (default: the checkpoint\'s kind, or folders).'),
    click.option('--split', default='validation', show_default=True, metavar='NAME', help='Split of the data set.'),
    click.option(
        '--class-map', metavar='FILE', help='Names of the classes in order (default: those that the model knows).'),
    click.option('--input-key', metavar='NAME', help='Column of the images (default: the checkpoint\'s or timm\'s).'),
    click.option('--target-key', metavar='NAME', help='Column of the classes (default: the checkpoint\'s or timm\'s).'),
    click.option(
        '--input-img-mode', metavar='MODE', help='Pillow\'s mode to read images in (default: by their channels).'),
    _as_data,
)
data_options = _chain(
    click.option('--data-dir', metavar='DIR', help='Folder of the data set: a folder of images for each class.'),
    dataset_options,
    click.option(
        '-b', '--batch-size', default=256, show_default=True, type=click.IntRange(1), help='Images in a batch.'),
    workers_option,
    click.option('--skip-bad-images', is_flag=True, help='Name and count unreadable images, and go on without them.'),
    device_option,
    amp_options,
)
where_option = click.option(
    '--where', multiple=True, metavar='KEY=VALUE', callback=_parse_where,
    help='Which of several measured settings to use, as in batch_size=1; may be repeated.')
subnet_option = click.option(
    '--subnet', 'subnets', multiple=True, type=SubnetType(), help='A subnet to run; may be repeated.')
cascade_option = click.option(
    '--cascade', type=click.Path(exists=True, dir_okay=False), metavar='JSON',
    help='A cascade of "supervit cascade", instead of subnets.')
output_option = click.option(
    '--output', type=click.Path(file_okay=False), metavar='DIR', help='Folder to write JSON, CSV and picture to.')
