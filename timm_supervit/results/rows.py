"""Tables of operating points: what each subnet of a network reaches and costs, in memory, as JSON and as CSV."""
import csv
import io
import json
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..subnets import Subnet, check_img_size, check_keep_rate, format_size
from .files import check_regular, fill_folder
from .fingerprint import differing, fingerprint, source_of
from .text import spreadsheet, visible

Row = dict[str, Any]


class Column(NamedTuple):
    """What stands under a key of the rows. All that prints, merges, draws or converts results asks here.

    Attributes:
        title: Name in headings and on axes.
        unit: Unit of the values as they are shown.
        kind: ``setting`` (which subnet, and in what setting it was measured), ``cost``, ``outcome``, or ``''`` where
            that is unknown.
        digits: Decimals of a number; None for text, and for numbers that are shown as they are.
        scale: What a value is divided by to be in the unit.
        more_is_better: Whether a large value is a good one.
    """

    title: str
    unit: str = ''
    kind: str = ''
    digits: int | None = 2
    scale: float = 1.
    more_is_better: bool = False

    @property
    def heading(self) -> str:
        """The title, with the unit in brackets."""
        return f'{self.title} [{self.unit}]' if self.unit else self.title

    def text(self, value: Any) -> str:
        """Return a value as it is shown below the heading."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return f'{value:g}' if self.digits is None else f'{value / self.scale:.{self.digits}f}'
        if isinstance(value, tuple):
            return format_size(value)
        return '-' if value is None else visible(str(value))


# A key has one meaning everywhere.
COLUMNS = {
    'epoch': Column('epoch', '', 'setting', 0),
    'img_size': Column('size', 'px', 'setting', 0),
    'keep_rate': Column('keep rate', '', 'setting', None),
    'batch_size': Column('batch', 'images', 'setting', 0),
    'precision': Column('precision', '', 'setting', None),
    'runtime': Column('runtime', '', 'setting', None),
    'image': Column('image', '', 'setting', None),
    'cascade': Column('cascade (threshold)', '', 'setting', None),  # as ``cascade_text`` writes it
    'macs': Column('MACs per image', 'M', 'cost', 2, 1e6),
    'latency_ms': Column('latency, median', 'ms', 'cost'),  # of one forward of a batch
    'latency_p90_ms': Column('latency, p90', 'ms', 'cost'),
    'latency_iqr_ms': Column('latency, IQR', 'ms', 'cost'),
    'latency_mean_ms': Column('latency of an image, mean', 'ms', 'cost', 3),  # a batch's time shared by its images
    'throughput': Column('throughput', 'images/s', 'cost', 1, more_is_better=True),
    'memory_mib': Column('peak memory', 'MiB', 'cost', 1),
    'top1': Column('top-1', '%', 'outcome', more_is_better=True),
    'top5': Column('top-5', '%', 'outcome', more_is_better=True),
    'correct1': Column('top-1 correct', 'images', 'outcome', 0, more_is_better=True),
    'correct5': Column('top-5 correct', 'images', 'outcome', 0, more_is_better=True),
    'count': Column('evaluated', 'images', 'outcome', 0),
    'prediction': Column('prediction', '', 'outcome', None),
    'probability': Column('probability', '', 'outcome'),
    'shares': Column('images per stage', '%', 'outcome', None),
    'kept': Column('patches kept', '', 'outcome', None),
}


@dataclass
class Results:
    """What was measured of a network, one row for each subnet (and setting).

    A row is a plain dictionary that goes to JSON as it is, with keys of ``COLUMNS``. ``img_size`` and ``keep_rate``
    say which subnet; a row of a cascade has ``cascade`` instead, one of another network than ``model`` has ``model``.

    Attributes:
        model: Name of the network, as ``timm.create_model`` takes it.
        rows: The rows, cheapest subnet first.
        info: How they were measured; ``partial`` is True there if it was interrupted.
        network: What the network is, from ``fingerprint``.
    """

    model: str
    rows: list[Row]
    info: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)

    @property
    def partial(self) -> bool:
        """Whether they are of an interrupted run, or rest on one."""
        return bool(self.info.get('partial'))


def results_of(model: Any, rows: list[Row], info: dict[str, Any], weights: bool = True) -> Results:
    """Return results of a model, with its name and its fingerprint.

    Args:
        model: A SuperViT, an exported program or a cascade.
        rows: The rows.
        info: How they were measured.
        weights: Whether they depend on the weights.
    """
    source = source_of(model)
    kind = {'weights_kind': source.weights_kind} if weights and getattr(model, 'source', None) else {}
    return Results(source.name, rows, info, fingerprint(model, weights) | kind)


def column_of(rows: Iterable[Row], key: str) -> Column:
    """Return what stands under a key of these rows; MACs in the unit that suits them all."""
    column = COLUMNS.get(key, Column(key))
    macs = [row['macs'] for row in rows if row.get('macs') is not None] if key == 'macs' else []
    if max(macs, default=0) >= 1e8 and min(macs) >= 1e7:
        return column._replace(unit='G', scale=1e9)
    return column


def heading_of(rows: Iterable[Row], key: str) -> str:
    """Return the heading of a key of these rows, with the number of images that an accuracy rests on."""
    rows = list(rows)
    column = column_of(rows, key)
    counts = {row['count'] for row in rows if row.get(key) is not None and row.get('count')}
    if column.kind == 'outcome' and len(counts) == 1:
        count = counts.pop()
        column = column._replace(title=f'{column.title} of {count:,} image{"" if count == 1 else "s"}')
    return column.heading


def subnet_of(row: Row) -> Subnet | None:
    """Return the subnet that a row is about; None for a row of another network."""
    return Subnet(row['img_size'], row['keep_rate']) if row.get('keep_rate') is not None else None


def name_of(row: Row) -> str:
    """Return what a row is about, in words: a subnet such as 160:0.7, in int8 or not, a cascade, or another network."""
    subnet = subnet_of(row)
    name = str(subnet) if subnet else str(row.get('cascade') or row.get('model'))
    return f'{name} int8' if is_int8(row) else name


def is_int8(row: Row) -> bool:
    """Return whether a row is about a quantized network, which is another point than the one that it was made of."""
    return row.get('precision') == 'int8'


def difference(one: Results, other: Results) -> str:
    """Return in what the networks of two results differ, or ``''``. Weights count where both depend on them."""
    if bool(one.network) != bool(other.network):
        return 'one of them does not say what its network is'
    networks = [results.network or {'model': results.model} for results in (one, other)]
    for key in differing(*networks):
        values = [network.get(key, 'unknown') for network in networks]
        if key == 'weights':
            values = [f'{value[:12]} ({network.get("weights_kind") or "raw"})'
                      for value, network in zip(values, networks, strict=True)]
        return f'{key} {" and ".join(map(str, values))}'
    return ''


def pareto_front(items: Iterable[Any], cost: Callable[[Any], float], quality: Callable[[Any], float]) -> list[Any]:
    """Return the items that no other one beats in both cost and quality, cheapest first."""
    front: list[Any] = []
    for item in sorted(items, key=lambda item: (cost(item), -quality(item))):
        if not front or quality(item) > quality(front[-1]):
            front.append(item)
    return front


def save_results(results: Results, folder: str | os.PathLike, name: str, files: Mapping[str, Any] | None = None) -> str:
    """Write results to a folder as JSON and, for spreadsheets, as CSV, and more beside them; all of it or nothing.

    Partial results go to ``NAME-partial``, so that they never take the place of complete ones.

    Args:
        results: The results.
        folder: The folder; it is made if missing.
        name: Name of the files, without an ending.
        files: Figures of Matplotlib, written as PNG, and texts, by their names; of a name that begins with a dot or a
            hyphen the beginning is ``name``.

    Returns:
        Name of the JSON file.

    Raises:
        OSError: If they cannot be written; the files of these names are then as they were.
    """
    with fill_folder(folder) as new:
        return write_results(results, new, name, files)


def write_results(results: Results, folder: Path, name: str, files: Mapping[str, Any] | None = None) -> str:
    """Write results as ``save_results`` does, into a folder that is somebody else's to put in its place."""
    name += '-partial' if results.partial else ''
    table = {'.json': json.dumps(asdict(results), indent=2) + '\n', '.csv': _to_csv(results.rows)}
    for key, content in {**table, **(files or {})}.items():
        path = folder / (f'{name}{key}' if key.startswith(('.', '-')) else key)
        if isinstance(content, str):
            path.write_text(content, encoding='utf-8')
        else:
            content.savefig(path, dpi=200, format='png')
    return f'{name}.json'


def _to_csv(rows: Iterable[Row]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    # Text in quotes, since some spreadsheets part cells at semicolons too.
    writer = csv.writer(text, lineterminator='\n', quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(map(spreadsheet, columns))
    for row in rows:
        values = (row.get(key) for key in columns)
        writer.writerow([
            value if isinstance(value, (int, float)) else '' if value is None else
            spreadsheet(format_size(value) if isinstance(value, tuple) else str(value)) for value in values])
    return text.getvalue()


def load_results(path: str | os.PathLike) -> Results:
    """Read the JSON that ``save_results`` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    check_regular(path)
    try:
        return _check(json.loads(Path(path).read_text(encoding='utf-8')))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f'{path} holds no table of operating points ({error}); '
            f'give a JSON file that "supervit evaluate" or "supervit profile" wrote') from error


def _check(content: Any) -> Results:
    if not (isinstance(content, dict) and {'model', 'rows'} <= content.keys() <= Results.__annotations__.keys()):
        raise ValueError('there is no model with rows')
    for key, kind in {'model': str, 'rows': list, 'info': dict, 'network': dict}.items():
        if not isinstance(content.get(key, kind()), kind):
            raise ValueError(f'{key} is {reprlib.repr(content[key])}')
    for i, row in enumerate(content['rows']):
        if not isinstance(row, dict):
            raise ValueError(f'row {i} is {reprlib.repr(row)}')
        if row.get('keep_rate') is not None:
            row['img_size'] = check_img_size(row.get('img_size'))
            check_keep_rate(row['keep_rate'])
        elif not isinstance(row.get('model', row.get('cascade')), str):
            raise ValueError(f'row {i} names neither a subnet nor a cascade nor a model')
        elif row.get('img_size') is not None:
            row['img_size'] = check_img_size(row['img_size'])
        for key, value in row.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e300
            if isinstance(value, tuple):  # a size, checked above
                continue
            if key in COLUMNS and COLUMNS[key].digits is not None and value is not None and not is_number:
                raise ValueError(f'row {i}: {key} is {reprlib.repr(value)} and no number from 0')
    return Results(**content)
