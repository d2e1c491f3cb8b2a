"""Writing results to stdout, as text or as JSON, and notes to stderr.

What is printed is saved by then, so what cannot be printed loses nothing, and is said or, in a closed pipe, expected.
"""
import codecs
import contextlib
import functools
import io
import json
import os
import sys
from typing import Any

import click

from ..results.text import visible

LAYOUT = '\n\t'  # control characters that messages may hold
# Keys of click's ``Context.meta``: whether stdout is to be JSON alone, and stderr to hold nothing but errors.
JSON, QUIET = f'{__name__}.json', f'{__name__}.quiet'
CLOSED_PIPE = 141  # 128 + SIGPIPE, what a shell says of a command whose reader has gone


def wants_json() -> bool:
    """Return whether stdout is to be JSON alone."""
    return _is_set(JSON)


def is_quiet() -> bool:
    """Return whether stderr is to hold nothing but errors."""
    return _is_set(QUIET)


def be_quiet() -> None:
    """Let stderr hold nothing but errors from now on, as for all but the first of several processes."""
    click.get_current_context().meta[QUIET] = True


def _is_set(key: str) -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and context.meta.get(key, False)


def echo(message: str, err: bool = False) -> None:
    """Print a message, with escape sequences in it shown and not run; see ``write``. JSON sends it to stderr."""
    write(f'{visible(message, keep=LAYOUT)}\n', err or wants_json())


def note(line: str) -> None:
    """Print a line to stderr that is no result and no error, unless it is to be quiet."""
    if not is_quiet():
        with contextlib.suppress(OSError):  # results matter more than this line to a reader who has gone
            click.echo(visible(line), err=True)


def print_json(content: Any) -> None:
    """Print results as JSON, if that was asked for; tables then print nothing."""
    if wants_json():
        write(json.dumps(content, indent=2) + '\n')


def write(text: str, err: bool = False, saved: str = 'the results are complete') -> None:
    """Write text to stdout, or to stderr, as it is; if that fails, say what is ``saved`` in --output."""
    stream = sys.stderr if err else sys.stdout
    try:
        click.echo(text, stream, nl=False)
    except OSError as error:
        # What is left in the buffer would fail once more when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            raise click.exceptions.Exit(CLOSED_PIPE) from error
        output = click.get_current_context().params.get('output')
        remains = f'; {saved} in {output}' if output else ''
        name = 'stderr' if err else 'stdout'
        raise click.ClickException(f'{name} could not be written ({error.strerror}){remains}') from error


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
