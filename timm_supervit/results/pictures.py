"""Pictures of operating points: one quantity against another, by image size (lines) and keep rate (markers)."""
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from ..subnets import Subnet, format_size, sort_sizes
from .rows import Results, Row, column_of, heading_of, is_int8, subnet_of
from .text import visible

# Okabe and Ito's palette, which the colour-blind can tell apart, without its yellow and black.
_COLORS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#D55E00', '#56B4E9')
_MARKERS = ('v', 's', 'o', '^', 'D', 'P', 'X')
_CASCADES: dict[str, Any] = dict(color='#333333', linestyle='--', linewidth=1.2, marker='.', markersize=8)
_KINDS = {'subnet': 'o', 'int8 subnet': 's', 'cascade': '*'}
_PEER_COLOR = '#333333'
_PEER_MARKERS = ('*', 'p', 'h', 'd', '<', '>')


def draw_operating_points(rows: Sequence[Row], x: str = 'macs', y: str = 'top1', title: str = '') -> Figure:
    """Draw two keys of the rows against each other; as PNG the picture has 1600 x 1000 pixels.

    Args:
        rows: Rows of ``Results``, one for each subnet; those of cascades are joined by a dark line, and rows of other
            networks are drawn as single dark markers. Rows that lack one of the keys are left out.
        x: Key for the horizontal axis; ``epoch`` gives every subnet a line of its own, a cost every image size.
        y: Key for the vertical axis.
        title: Heading of the picture.
    """
    rows = [row for row in rows if row.get(x) is not None and row.get(y) is not None]
    across, up = column_of(rows, x), column_of(rows, y)
    subnets = [subnet for row in rows if (subnet := subnet_of(row))]
    sizes = sort_sizes({subnet.img_size for subnet in subnets})[::-1]
    rates = sorted({subnet.keep_rate for subnet in subnets})
    colors = {size: _COLORS[i % len(_COLORS)] for i, size in enumerate(sizes)}
    markers = {rate: _MARKERS[i % len(_MARKERS)] for i, rate in enumerate(rates)}

    figure, axes = _create_axes(heading_of(rows, x), heading_of(rows, y), title)
    over_epochs = across.kind == 'setting'
    lines: dict[Any, list[tuple[float, float, Subnet]]] = {}
    for row in rows:
        if subnet := subnet_of(row):
            points = lines.setdefault(subnet if over_epochs else subnet.img_size, [])
            points.append((row[x] / across.scale, row[y] / up.scale, subnet))
    for points in lines.values():
        color = colors[points[0][2].img_size]
        points.sort(key=lambda point: point[:2])
        axes.plot([p[0] for p in points], [p[1] for p in points], color=color, linewidth=0.9 if over_epochs else 1.8)
        for right, high, subnet in points:
            axes.plot(
                right, high, markers[subnet.keep_rate], color=color, markersize=6 if over_epochs else 9,
                markeredgecolor='white', markeredgewidth=0.6 if over_epochs else 1, zorder=3)
    if over_epochs:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    cascades = sorted((row[x] / across.scale, row[y] / up.scale) for row in rows if 'cascade' in row)
    if cascades:
        axes.plot(*zip(*cascades, strict=True), **_CASCADES)
    peers = [row for row in rows if row.get('model')]
    peer_markers = {row['model']: _PEER_MARKERS[i % len(_PEER_MARKERS)] for i, row in enumerate(peers)}
    for row in peers:
        axes.plot(
            row[x] / across.scale, row[y] / up.scale, peer_markers[row['model']], color=_PEER_COLOR, markersize=11,
            markeredgecolor='white', markeredgewidth=1, zorder=4)

    entries = {
        'Image size [px]': [Line2D([], [], color=colors[size], linewidth=3, label=format_size(size)) for size in sizes],
        'Keep rate': [_marker(markers[rate], f'{rate:g}', '#777777') for rate in rates],
        'Cascades': [Line2D([], [], label='several subnets', **_CASCADES)] if cascades else [],
        'Other networks': [_marker(marker, name, _PEER_COLOR) for name, marker in peer_markers.items()],
    }
    return _finish(figure, entries)


def draw_choice(
        networks: Sequence[Results],
        fronts: Sequence[Sequence[Row]],
        x: str,
        y: str = 'top1',
) -> Figure:
    """Draw the points of one or more networks, with the Pareto front of each as a line.

    Args:
        networks: Results, one for each network. Rows that lack one of the keys are left out.
        fronts: The rows of the front of each network.
        x: Key of a cost, for the horizontal axis.
        y: Key for the vertical axis.
    """
    rows = [row for results in networks for row in results.rows]
    across, up = column_of(rows, x), column_of(rows, y)
    figure, axes = _create_axes(heading_of(rows, x), heading_of(rows, y), '')
    used: dict[str, str] = {}
    for color, results, front in zip(itertools.cycle(_COLORS), networks, fronts, strict=False):
        for row in results.rows:
            if row.get(x) is None or row.get(y) is None:
                continue
            kind = 'cascade' if 'cascade' in row else 'int8 subnet' if is_int8(row) else 'subnet'
            used[kind] = _KINDS[kind]
            axes.plot(
                row[x] / across.scale, row[y] / up.scale, _KINDS[kind], color=color, markersize=8,
                markeredgecolor='white', markeredgewidth=0.8, zorder=3)
        axes.plot(
            [row[x] / across.scale for row in front], [row[y] / up.scale for row in front], color=color, linewidth=1.8)
    return _finish(figure, {
        'Pareto front': [
            Line2D([], [], color=color, linewidth=3, label=results.model[-30:])
            for color, results in zip(itertools.cycle(_COLORS), networks, strict=False)],
        'Points': [_marker(marker, kind, '#777777') for kind, marker in used.items()],
    })


def _create_axes(across: str, up: str, title: str) -> tuple[Figure, Any]:
    # Figure without pyplot: no display, no global state.
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.add_subplot(xlabel=across, ylabel=up)
    axes.set_title(title, fontsize=13)
    axes.xaxis.label.set_fontsize(12)
    axes.yaxis.label.set_fontsize(12)
    axes.tick_params(labelsize=11)
    axes.grid(color='#dddddd')
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    return figure, axes


def _finish(figure: Figure, entries: Mapping[str, Sequence[Line2D]]) -> Figure:
    # One column beside the axes, so that no legend covers a point.
    handles: list[Line2D] = []
    for heading, keys in entries.items():
        if keys:
            handles += [Line2D([], [], linestyle='', label=heading), *keys, Line2D([], [], linestyle='', label='')]
    figure.legend(handles=handles[:-1], loc='outside right center', frameon=False, fontsize=11)
    return plain_text(figure)


def plain_text(figure: Figure) -> Figure:
    """Let the text of a figure be shown as it is, dollar signs included, which else enclose mathematics."""
    for text in figure.findobj(Text):
        text.set_text(visible(text.get_text()))
        text.set_parse_math(False)
    return figure


def _marker(marker: str, label: str, color: str) -> Line2D:
    return Line2D([], [], linestyle='', marker=marker, color=color, markersize=9, label=label)
