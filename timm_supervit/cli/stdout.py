"""Writing to stdout. Results are saved by then, so what cannot be printed loses nothing, and is said or, in a closed
pipe, expected.
"""
import codecs
import functools
import io
import os
import sys

import click

from ..tools.text import visible

__all__ = ['LAYOUT', 'echo', 'escape_unencodable', 'write']

LAYOUT = '\n\t'  # control characters that messages may hold
CLOSED_PIPE = 141  # 128 + SIGPIPE, what a shell says of a command whose reader has gone


def echo(message: str, err: bool = False) -> None:
    """Print a message, with escape sequences in it shown and not run; see ``write``."""
    write(f'{visible(message, keep=LAYOUT)}\n', err)


def write(text: str, err: bool = False) -> None:
    """Write text to stdout, or to stderr, as it is.

    Raises:
        click.ClickException: If it takes no more, such as a full disk; the message says where the results are.
        click.exceptions.Exit: With 141, if nobody reads any more, as in ``supervit ... | head -1``.
    """
    stream = sys.stderr if err else sys.stdout
    try:
        click.echo(text, stream, nl=False)
    except OSError as error:
        # What is left in the buffer would fail once more when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            raise click.exceptions.Exit(CLOSED_PIPE) from error
        output = click.get_current_context().params.get('output')
        saved = f'; the results are complete in {output}' if output else ''
        name = 'stderr' if err else 'stdout'
        raise click.ClickException(f'{name} could not be written ({error.strerror}){saved}') from error


def escape_unencodable() -> None:
    """Let stdout show as an escape sequence what its encoding lacks, and say so on stderr, instead of failing."""
    codecs.register_error('supervit_escape', _escape)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='supervit_escape')


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    _say_that_characters_are_escaped(sys.stdout.encoding)
    return codecs.backslashreplace_errors(error)


@functools.cache
def _say_that_characters_are_escaped(encoding: str) -> None:
    click.echo(f'stdout is {encoding}, which lacks some characters: they are printed as \\x.., \\u.... or '
               f'\\U........; set PYTHONIOENCODING=utf-8 if the terminal shows more', err=True)
