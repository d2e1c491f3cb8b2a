"""Tables of operating points: what each subnet of a network reaches and costs, in memory, as JSON and as CSV."""
import csv
import io
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..subnets import Subnet
from .files import write_text

__all__ = ['Quantity', 'Results', 'load_results', 'quantity_of', 'save_results', 'subnet_of']

Row = dict[str, Any]


@dataclass
class Results:
    """What was measured of a network, one row for each subnet (and setting).

    A row is a plain dictionary that goes to JSON and CSV as it is. ``img_size`` and ``keep_rate`` say which subnet; a
    row of another network than ``model`` has ``model`` instead. Further keys, each with one meaning everywhere:

    - ``macs``: multiply-accumulates for one image;
    - ``top1``, ``top5``: accuracy in percent, ``correct1``, ``correct5`` images of ``count``;
    - ``latency_ms``, ``latency_p90_ms``: median and 90th percentile of one forward of a batch, in milliseconds;
    - ``throughput``: images per second; ``memory_mib``: peak memory in MiB;
    - ``batch_size``, ``precision``, ...: the setting that the row was measured in.

    Attributes:
        model: Name of the network, as ``timm.create_model`` takes it.
        rows: The rows, cheapest subnet first.
        info: How they were measured; ``partial`` is True there if it was interrupted.
    """

    model: str
    rows: list[Row]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def partial(self) -> bool:
        """Whether they are of an interrupted run, or rest on one."""
        return bool(self.info.get('partial'))


class Quantity(NamedTuple):
    """How the values of a key are shown.

    Attributes:
        title: Name with the unit, for headings and axes.
        digits: Decimals.
        scale: What a value is divided by.
    """

    title: str
    digits: int = 2
    scale: float = 1.


_QUANTITIES = {
    'img_size': Quantity('size', 0),
    'keep_rate': Quantity('keep rate'),
    'batch_size': Quantity('batch', 0),
    'top1': Quantity('top-1 [%]'),
    'top5': Quantity('top-5 [%]'),
    'latency_ms': Quantity('latency, median [ms]'),
    'latency_p90_ms': Quantity('latency, p90 [ms]'),
    'throughput': Quantity('throughput [images/s]', 1),
    'memory_mib': Quantity('peak memory [MiB]', 1),
}


def quantity_of(rows: Iterable[Row], key: str) -> Quantity:
    """Return how to show a key of these rows; MACs in the unit that suits the largest."""
    if key != 'macs':
        return _QUANTITIES.get(key, Quantity(key))
    largest = max((row['macs'] for row in rows if row.get('macs') is not None), default=0)
    return Quantity('GMACs per image', 2, 1e9) if largest >= 1e8 else Quantity('MMACs per image', 2, 1e6)


def subnet_of(row: Row) -> Subnet | None:
    """Return the subnet that a row is about; None for a row of another network."""
    return Subnet(row['img_size'], row['keep_rate']) if row.get('keep_rate') is not None else None


def save_results(results: Results, folder: str | os.PathLike, name: str) -> list[Path]:
    """Write ``name.json`` and, for spreadsheets, the rows as ``name.csv`` to a folder; return their paths.

    Partial results go to ``name-partial.json`` and ``.csv``, so that they never take the place of complete ones.

    Raises:
        OSError: If they cannot be written; a file of that name is then as it was.
    """
    name += '-partial' if results.partial else ''
    paths = [Path(folder) / f'{name}.json', Path(folder) / f'{name}.csv']
    write_text(paths[0], json.dumps(asdict(results), indent=2) + '\n')
    write_text(paths[1], _to_csv(results.rows))
    return paths


def _to_csv(rows: Iterable[Row]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def load_results(path: str | os.PathLike) -> Results:
    """Read the JSON that ``save_results`` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
        results = Results(**content)
        for row in results.rows:
            subnet_of(row)
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f'{path} holds no table of operating points; '
            f'give a JSON file that "supervit evaluate" or "supervit profile" wrote') from error
    return results
