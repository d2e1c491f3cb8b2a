"""``supervit recipe``: print a training recipe."""
import click

from ..tools.recipe import recipe, recipe_names
from .base import Command
from .stdout import write


@click.command(
    cls=Command,
    epilog=f'Names: {", ".join(recipe_names())}. '
           f'Example: supervit recipe deit_small_in1k > recipe.yaml; python train.py -c recipe.yaml --data-dir DIR')
@click.argument('name', type=click.Choice(recipe_names()), metavar='NAME')
def command(name: str) -> None:
    """Print the recipe NAME as the YAML that timm's train.py reads with -c."""
    write(recipe(name))
