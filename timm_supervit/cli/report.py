"""Saving and showing results, the end of every command that has some."""
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..interrupts import INTERRUPTED
from ..results.rows import Results, save_results
from .stdout import echo, print_json
from .tables import UncutTable, print_table


def report(
        results: Results,
        output: str | None,
        name: str,
        files: Callable[[], Mapping[str, Any]] = dict,
        tables: Iterable[Sequence[UncutTable]] = (),
        lines: Iterable[str] = (),
        notes: Iterable[str] = (),
        done: str = '',
        warnings: Iterable[str] = (),
        obsolete: Iterable[str] = (),
        **more: Any,
) -> None:
    """Save results, all or nothing, and show them as tables and lines, or as JSON; exit with 130 if they are partial.

    Args:
        results: The results.
        output: Folder to save them in; None saves nothing.
        name: Name of their files.
        files: Returns what else is saved, see ``save_results``.
        tables: Tables to print, those of a group side by side.
        lines: Lines of text behind them.
        notes: Such lines for stderr.
        done: What was complete when results that are partial were interrupted; empty if they only rest on such.
        warnings: Lines of text before all tables.
        obsolete: Names of files of earlier runs that these results take back; they are removed.
        **more: What JSON has beside the results.
    """
    saved = ''
    if output:
        for file in obsolete:
            (Path(output) / file).unlink(missing_ok=True)
        saved = f'; saved as {Path(output) / save_results(results, output, name, files())}'
    if results.partial and done:
        echo(f'PARTIAL: interrupted after {done}{saved}.')
    for line in warnings:
        echo(line)
    print_json(asdict(results) | more)
    for group in tables:
        print_table(*group)
    for line in lines:
        echo(line)
    for line in notes:
        echo(line, err=True)
    if passed_over := results.info.get('passed_over'):
        echo(f'{passed_over} images, or folders that cannot be read, were passed over, as by timm\'s scripts: their '
             f'endings are none of timm\'s.', err=True)
    if results.partial and done:
        click.get_current_context().exit(INTERRUPTED)
