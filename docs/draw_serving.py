"""Draw docs/serving.png from docs/serving.json, which ``tests/serving_benchmark.py`` measured.

Run it as ``python docs/draw_serving.py``; it needs the extra ``tools``.
"""
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
MARKERS = {1: 'o', 4: 's', 8: '^'}  # by the squared coefficient of variation of the times between arrivals


def draw_day(load: Any, chosen: Any, content: dict[str, Any]) -> None:
    """Draw the load over time, and below it which subnet answered each request, and who was late or refused."""
    trace, width = content['trace'], content['seconds'] / 20
    edges = np.arange(0, content['seconds'] + width / 2, width)
    counts, _ = np.histogram([row['at'] for row in trace], edges)
    load.stairs(counts / width / content['capacity_of_full'], edges, fill=True, color='#56B4E9')
    load.set_ylabel('load, of what the\nfull subnet serves')
    load.set_title('A day of bursty load (squared CV 4)', fontsize=12)
    names = list(content['latency_ms'])
    shown = {
        'in time': ('#009E73', 'o', [row for row in trace if row['in_time']]),
        'late': ('#D55E00', 'x', [row for row in trace if row['status'] == 200 and not row['in_time']]),
        'refused': ('black', 'x', [row for row in trace if row['status'] != 200])}
    for label, (color, marker, rows) in shown.items():
        heights = [names.index(row['subnet']) if row.get('subnet') else -1 for row in rows]
        chosen.plot([row['at'] for row in rows], heights, color=color, marker=marker, linestyle='', markersize=4,
                    label=f'{label} ({len(rows)})')
    chosen.set_yticks(range(-1, len(names)), ['refused', *names], fontsize=8)
    chosen.set(xlabel='time [s]', ylabel='subnet')
    chosen.set_ylim(-1.6, len(names) + 1)
    chosen.legend(fontsize=8, loc='upper right', ncols=3)


def draw_contestants(axes: Any, content: dict[str, Any]) -> None:
    """Draw timeliness against the accuracy of what was in time."""
    rows = [row for row in content['results'] if row['load'] == 'day']
    for cv2, marker in MARKERS.items():
        for is_scheduler, color in ((False, '#777777'), (True, '#0072B2')):
            points = sorted((row['top1'], row['timeliness']) for row in rows
                            if row['cv2'] == cv2 and (row['contestant'] == 'scheduler') == is_scheduler)
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=':',
                      markersize=10 if is_scheduler else 6,
                      label=f'{"the scheduler" if is_scheduler else "each subnet alone"}, squared CV {cv2}')
    axes.set(xlabel='published top-1 of what was in time [%]', ylabel='answered in time [%]')
    axes.set_title('The same requests, several servers', fontsize=12)
    axes.legend(fontsize=8)


def main() -> None:
    """Draw and write the figure."""
    content = json.loads((FOLDER / 'serving.json').read_text())
    figure = Figure(figsize=(11, 5), layout='constrained')
    axes = figure.subplot_mosaic([['load', 'all'], ['chosen', 'all']], height_ratios=[1, 2.2])
    axes['chosen'].sharex(axes['load'])
    draw_day(axes['load'], axes['chosen'], content)
    draw_contestants(axes['all'], content)
    for one in axes.values():
        one.grid(color='#dddddd')
        one.set_axisbelow(True)
        one.spines[['top', 'right']].set_visible(False)
    figure.savefig(FOLDER / 'serving.png', dpi=150)


if __name__ == '__main__':
    main()
