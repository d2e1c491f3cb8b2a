"""Printing results: lists of rows, and small tables of image sizes x keep rates side by side.

No width cuts a table. Where it is too narrow, headings break at words, then long names break, then columns follow
below, after those that say what a row is about.
"""
import io
from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ..results.rows import Row, column_of, heading_of
from ..results.text import visible
from ..subnets import format_size, sort_sizes
from .stdout import wants_json, write

_GAP = 2  # between columns
_NAME_WIDTH = 16  # down to which names in a column may be broken
_PIPE_WIDTH = 10_000  # one line for each row, for other programs


class UncutTable:
    """A table that rich shows in as many parts, one below the other, as the width asks for."""

    def __init__(
            self,
            title: str,
            headings: Sequence[str],
            rows: Sequence[Sequence[str]],
            names: Sequence[bool],
            num_keys: int = 1,
    ) -> None:
        """Make a table of text.

        Args:
            title: Title of the table; may be empty.
            headings: Heading of each column.
            rows: Cells of each row.
            names: For each column whether it holds names, which may be broken, or numbers, which never are.
            num_keys: How many of the first columns say what a row is about; they are in each part.
        """
        self.title = visible(title)
        self.headings = [visible(heading) for heading in headings]
        self.rows = rows
        self.names = names
        self.keys = list(range(num_keys))
        self.widest, self.narrowest = [], []
        for i, heading in enumerate(self.headings):
            longest = max((cell_len(row[i]) for row in rows), default=0)
            self.widest.append(max(longest, cell_len(heading)))
            self.narrowest.append(max(
                min(longest, _NAME_WIDTH) if names[i] else longest, *(cell_len(word) for word in heading.split(' '))))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Return how wide it may be."""
        return Measurement(1, max(_total(self.widest), cell_len(self.title))).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Text]:
        """Return the parts, with an empty line after each."""
        parts = [self.keys.copy()]
        for i in range(len(self.keys), len(self.headings)):
            width = _total([self.narrowest[k] for k in [*parts[-1], i]])
            if width > options.max_width and parts[-1] != self.keys:
                parts.append(self.keys.copy())
            parts[-1].append(i)
        if self.title:
            yield Text(self.title, 'bold')
        for part in parts:
            yield self._part(part, options.max_width)
            yield Text('')

    def _part(self, part: Sequence[int], max_width: int) -> Table:
        table = Table(box=SIMPLE_HEAD, padding=(0, _GAP - 1, 0, 0), pad_edge=False, show_edge=False)
        spare = max(0, max_width - _total([self.narrowest[i] for i in part]))
        for i in part:
            width = self.narrowest[i] + min(spare, self.widest[i] - self.narrowest[i])
            spare -= width - self.narrowest[i]
            table.add_column(
                Text(self.headings[i]), justify='left' if self.names[i] else 'right', width=width, overflow='fold')
        for row in self.rows:
            table.add_row(*(Text(row[i]) for i in part))
        return table


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def grid_table(rows: Sequence[Row], key: str) -> UncutTable:
    """Return one column of the rows as a table of image sizes (down) x keep rates (across)."""
    column = column_of(rows, key)
    values = {(row['img_size'], row['keep_rate']): row.get(key) for row in rows}
    rates = sorted({rate for _, rate in values})
    cells = [
        [format_size(size), *(column.text(values.get((size, rate))) for rate in rates)]
        for size in sort_sizes({size for size, _ in values})]
    headings = ['size', *(f'{rate:g}' for rate in rates)]
    return UncutTable(heading_of(rows, key), headings, cells, [False] * len(headings))


def list_table(rows: Sequence[Row], columns: Sequence[str], title: str = '') -> UncutTable:
    """Return rows as they are, one line each, with these columns; settings first, or the name of the row."""
    shown = [column_of(rows, key) for key in columns]
    cells = [[column.text(row.get(key)) for key, column in zip(columns, shown, strict=True)] for row in rows]
    names = [any(isinstance(row.get(key), str) for row in rows) for key in columns]
    num_keys = sum(column.kind == 'setting' for column in shown) or 1
    return UncutTable(title, [column.heading for column in shown], cells, names, num_keys)


def print_table(*tables: UncutTable) -> None:
    """Print tables to stdout, side by side where they fit; nothing where stdout is JSON."""
    if wants_json():
        return
    stdout = Console()
    # Rich would end the process where stdout is closed, so it writes to memory.
    memory = _Memory(stdout.encoding)
    console = Console(
        file=memory, width=stdout.width if stdout.is_terminal else _PIPE_WIDTH, force_terminal=stdout.is_terminal,
        color_system=stdout.color_system, markup=False, emoji=False, highlight=False)  # type: ignore[arg-type]
    console.print(Columns(tables, padding=(0, 4)) if len(tables) > 1 else tables[0])
    write(memory.getvalue())


class _Memory(io.StringIO):
    """Text that rich takes to be in an encoding, which tells it what lines can be drawn with."""

    encoding = ''

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self.encoding = encoding
