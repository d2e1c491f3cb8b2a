"""Draw docs/finetuning.png from docs/finetuning.jsonl, which ``tests/finetuning_benchmark.py`` measured.

Run it as ``python docs/draw_finetuning.py``; it needs the extra ``tools``.
"""
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
COLORS = {'super': '#0072B2', 'plain': '#777777', 'both': '#D55E00'}  # of what kind_of says
LABELS = {'super': 'super-trained', 'plain': 'plain', 'both': 'plain, then super'}
SUBNETS = {'84:1': 'full size, all tokens', '84:0.5': 'full size, keep rate 0.5'}
COSTS = {'updates': 'updates', 'cpu_minutes': 'CPU minutes'}


def kind_of(name: str) -> str:
    """Return what a run is: super-trained, plain, or both."""
    return 'both' if ',' in name else name.partition(':')[0]


def main() -> None:
    """Draw and write the figure."""
    lines = [json.loads(line) for line in (FOLDER / 'finetuning.jsonl').read_text().splitlines()]
    sizes = sorted({line['photographs'] for line in lines})
    figure = Figure(figsize=(10, 3.4 * len(sizes)), layout='constrained')
    panels = [(cost, subnet) for cost in COSTS for subnet in SUBNETS]
    for row, size in zip(figure.subplots(len(sizes), len(panels), squeeze=False, sharey='row'), sizes, strict=True):
        for axes, (cost, subnet) in zip(row, panels, strict=True):
            for kind, color in COLORS.items():
                runs: dict[str, list[tuple[float, float]]] = {}
                for line in lines:
                    if line['photographs'] == size and kind_of(line['run']) == kind and '@' not in line['run']:
                        runs.setdefault(line['run'], []).append((line[cost], line['top1'][subnet]))
                points = np.array(sorted(np.mean(seeds, axis=0).tolist() for seeds in runs.values())).reshape(-1, 2)
                axes.plot(*points.T, color=color, marker='o', label=LABELS[kind])
                for seeds in runs.values():  # each seed, and the mean joined by a line
                    axes.plot(*zip(*seeds, strict=True), color=color, marker='.', linestyle='', alpha=0.5)
            axes.set(xlabel=COSTS[cost], title=SUBNETS[subnet])
            axes.title.set_fontsize(10)
            axes.grid(color='#dddddd')
            axes.spines[['top', 'right']].set_visible(False)
        row[0].set_ylabel(f'top-1 in %, {size:,} photographs')
    row[-1].legend(fontsize=9)
    figure.savefig(FOLDER / 'finetuning.png', dpi=110)


if __name__ == '__main__':
    main()
