"""``supervit quickstart``: one command that shows the whole way."""
import shlex

import click

from . import base


@base.json_option
@click.command(cls=base.Command)
@click.option(
    '--output', type=click.Path(file_okay=False), default='output/digits', show_default=True, metavar='DIR',
    help='Folder to save the model, the table and the picture in.')
@click.option('--seed', type=int, default=42, show_default=True, help='The same seed gives the same numbers.')
def command(output: str, seed: int) -> None:
    """Train a small SuperViT on handwritten digits and show what each of its subnets can do.

    Takes minutes on a CPU and downloads nothing. The folder then holds the model, which
    timm.create_model("local-dir:DIR", pretrained=True) loads; evaluate.json, evaluate.csv and evaluate.png; and the 360
    held-out digits as images, which the other commands take as --data-dir DIR.

    \b
    supervit quickstart --output output/digits
    """
    from ..tools.quickstart import quickstart
    from .progress import track
    from .report import report
    from .tables import grid_table

    results = quickstart(output, seed, progress=track)
    report(
        results, None, '', tables=[[grid_table(results.rows, key) for key in ('top1', 'macs')]],
        lines=[
            f'Saved to {output}. Next, what it costs: one image is mostly overhead, and 64 show what subnets save.',
            f'  supervit profile {shlex.quote(f"local-dir:{output}")} -b 1 -b 64 --output results',
            f'  supervit choose {shlex.quote(f"{output}/evaluate.json")} results/profile.json --where batch_size=64 '
            f'--latency-ms 10'])
