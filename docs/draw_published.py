"""Draw docs/published.png: ImageNet top-1 against GMACs of the systems in docs/published.json, as published.

Run it as ``python docs/draw_published.py``; it needs the extra ``tools``.
"""
import json
from pathlib import Path

from matplotlib.figure import Figure

FOLDER = Path(__file__).parent
# Okabe and Ito's palette, which the colour-blind can tell apart. One network's points are joined by a line; a network
# for each point, by dots.
STYLES = {
    'SuperViT (DeiT-S), one network': dict(color='#0072B2', marker='o', linestyle='-', linewidth=2.4, markersize=7),
    'SuperViT (LV-ViT-S), one network': dict(color='#D55E00', marker='o', linestyle='-', linewidth=2.4, markersize=7),
    'ThinkingViT 3H-6H, one network, per-image exits': dict(color='#009E73', marker='s', linestyle='-'),
    'EViT (DeiT-S), a network for each point': dict(color='#56B4E9', marker='^', linestyle=':'),
    'DynamicViT (DeiT-S, DeiT-256), a network for each point': dict(color='#777777', marker='v', linestyle=':'),
    'DynamicViT (LV-ViT-S), a network for each point': dict(color='#E69F00', marker='v', linestyle=':'),
    'DeiT-S': dict(color='black', marker='*', linestyle='', markersize=12),
}


def pareto_front(points: list[list[float]]) -> list[list[float]]:
    """Return the points that no cheaper one equals in accuracy."""
    front: list[list[float]] = []
    for point in sorted(points):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front


def main() -> None:
    """Draw and write the figure, 1600 x 1000 pixels."""
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.add_subplot(xlabel='GMACs per image', ylabel='ImageNet-1k top-1 [%]')
    for system in json.loads((FOLDER / 'published.json').read_text())['systems']:
        style = STYLES[system['name']]
        is_ours = system['name'].startswith('SuperViT')
        if is_ours:  # all operating points, the front joined
            axes.plot(*zip(*system['points'], strict=True), linestyle='', **{
                key: style[key] for key in ('color', 'marker')}, markersize=5, alpha=0.4)
        points = pareto_front(system['points']) if is_ours else sorted(system['points'])
        axes.plot(*zip(*points, strict=True), label=system['name'], zorder=3 if is_ours else 2, **style)
    axes.set_title('As published by each project', fontsize=13)
    axes.grid(color='#dddddd')
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(loc='lower right', fontsize=9, frameon=True)
    figure.savefig(FOLDER / 'published.png', dpi=200)


if __name__ == '__main__':
    main()
