"""What every command is: its failures are one clear line, and its exit codes are those that scripts can rely on.

0: done. 1: it failed; one line on stderr says why. 2: the command line could not be understood. 3: done, and the
answer is no: "supervit cascade" found none that is better than single subnets. 130: interrupted, by Ctrl-C or SIGTERM;
what was found out until then has been printed. 141: nobody read stdout to its end; what was printed is saved where
--output says.
"""
import logging
import pickle
from typing import Any

import click

from ..interrupts import INTERRUPTED, interrupts_raised
from .stdout import JSON, QUIET

_EXTRA = {'click', 'matplotlib', 'onnx', 'onnxruntime', 'onnxscript', 'rich', 'sklearn'}


class Command(click.Command):
    """A click command that takes ``--model-kwargs KEY=VALUE KEY=VALUE`` and whose failures are one clear line.

    All have ``--quiet`` and ``--verbose``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            _flag(QUIET, '-q', '--quiet', help='Print only results and errors, no notes and no progress.'),
            click.Option(
                ['-v', '--verbose'], is_flag=True, expose_value=False, callback=_log_to_stderr,
                help='Also print what timm and this package log.')]

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
        came: list[int] = []
        try:
            with interrupts_raised() as came:
                result = self._invoke(ctx)
            if not came:
                return result
        except KeyboardInterrupt:
            pass
        except BaseException as error:
            if not came or isinstance(error, click.exceptions.Exit):
                raise
        click.echo('Interrupted.', err=True)
        ctx.exit(INTERRUPTED)

    def _invoke(self, ctx: click.Context) -> Any:
        try:
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
