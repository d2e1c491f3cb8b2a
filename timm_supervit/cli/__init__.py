"""The command ``supervit``: one subcommand for each tool, each in a file of its own, imported when it is called."""
import difflib
import importlib
import sys
from typing import Any

try:
    import click
except ImportError:
    sys.exit('supervit needs the extra "tools": pip install "timm-supervit[tools]"')

from ..results.text import visible
from .stdout import LAYOUT, escape_unencodable

# Each is the click command ``command`` in the file of its name. The help stands here so that listing imports nothing.
_COMMANDS = {
    'quickstart': 'Train a small SuperViT on handwritten digits and show what each of its subnets can do.',
    'evaluate': 'Measure the accuracy of every subnet in one pass over a data set.',
    'profile': 'Measure what each subnet costs: MACs, latency, throughput and memory.',
    'choose': 'Choose the most accurate subnet that fits a budget.',
    'cascade': 'Let easy images stop at a cheap subnet: find the stages and when to stop.',
    'predict': 'Say what images show, and which subnet says so.',
    'visualize': 'Draw which patches of an image each subnet keeps.',
    'export': 'Write subnets as ONNX files or torch.export programs, checked against the model.',
    'convert': 'Turn a checkpoint into a model folder for the Hugging Face Hub.',
    'recipe': 'Print a training recipe as the YAML that timm\'s train.py reads.',
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return importlib.import_module(f'{__name__}.{name}').command if name in _COMMANDS else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        near = difflib.get_close_matches(args[0], _COMMANDS, 1)
        if near and args[0] not in _COMMANDS:
            ctx.fail(f'No such command {args[0]!r}. Did you mean {near[0]!r}?')
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            error.message = visible(error.message, keep=LAYOUT)  # type: ignore[misc]  # it may quote a file
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section('Commands'):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(
    cls=_Commands, invoke_without_command=True,
    context_settings={'help_option_names': ['-h', '--help'], 'max_content_width': 100})
@click.version_option(package_name='timm-supervit')
@click.pass_context
def main(ctx: click.Context) -> None:
    """Super vision transformers: one network, many costs."""
    escape_unencodable()
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
