"""Printing operating points: one small table of image sizes x keep rates for each quantity, side by side."""
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..tools.results import Results, Row, column_of
from .stdout import echo

__all__ = ['grid_table', 'list_table', 'print_grids', 'print_table']


def grid_table(rows: Sequence[Row], key: str) -> Table:
    """Return one column of the rows as a table of image sizes (down) x keep rates (across)."""
    column = column_of(rows, key)
    values = {(row['img_size'], row['keep_rate']): row.get(key) for row in rows}
    rates = sorted({rate for _, rate in values})
    table = Table(title=escape(column.heading), box=SIMPLE_HEAD, padding=(0, 1), title_style='bold', pad_edge=False)
    table.add_column('size', justify='right')
    for rate in rates:
        table.add_column(f'{rate:g}', justify='right')
    for size in sorted({size for size, _ in values}):
        table.add_row(str(size), *(column.text(values.get((size, rate))) for rate in rates))
    return table


def list_table(rows: Sequence[Row], columns: Sequence[str], title: str | None = None) -> Table:
    """Return rows as they are, one line each, with these columns."""
    shown = [column_of(rows, key) for key in columns]
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    for column in shown:
        table.add_column(escape(column.heading), justify='right', no_wrap=True)  # a unit in brackets is no markup
    for row in rows:
        table.add_row(*(column.text(row.get(key)) for key, column in zip(columns, shown, strict=True)))
    return table


def print_table(*tables: Table) -> None:
    """Print tables to stdout, side by side where they fit, never cut off in a pipe."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    with console.capture() as captured:  # rich itself would end the process where stdout is closed
        console.print(Columns(tables, padding=(0, 4)) if len(tables) > 1 else tables[0])
    echo(captured.get(), nl=False)


def print_grids(results: Results, keys: Sequence[str]) -> None:
    """Print columns of the results as tables of image sizes x keep rates."""
    print_table(*(grid_table(results.rows, key) for key in keys))
