"""``supervit convert``: a checkpoint as a model folder for the Hugging Face Hub."""
from typing import Any

import click

from .options import Command, class_names_option, json_option, load_network, setting_options
from .stdout import echo, print_json

__all__ = ['command']


@json_option
@click.command(cls=Command)
@click.argument('file', type=click.Path(exists=True, dir_okay=False))
@click.option('--model', metavar='NAME', help='The model that the checkpoint is of, if it does not say so itself.')
@click.option('--output', required=True, type=click.Path(file_okay=False), metavar='DIR', help='Folder to write.')
@click.option('--push', metavar='REPO', help='Upload the folder to this repository, USER/NAME, as who is logged in.')
@click.option('--private', is_flag=True, help='Make the repository of --push private, if it is new.')
@click.option('--license', metavar='NAME', help='Licence of the weights, as in cc-by-nc-4.0 (default: none is named).')
@click.option(
    '--results', type=click.Path(exists=True, dir_okay=False), metavar='JSON',
    help='Results of "supervit evaluate" or "profile", for the model card.')
@setting_options
@class_names_option
def command(
        file: str,
        model: str | None,
        output: str,
        push: str | None,
        private: bool,
        license: str | None,
        results: str | None,
        use_ema: bool,
        **settings: Any,
) -> None:
    """Turn a checkpoint FILE into a model folder for the Hugging Face Hub.

    FILE is a checkpoint of timm's train.py, which knows its model, settings and classes, or of the official SuperViT
    code. The folder holds the weights in the safetensors format, the settings, the names of the classes and a model
    card; timm.create_model('local-dir:DIR', pretrained=True) reads it.
    A file that is more than weights, and so could run code, is refused. A folder that this command wrote is replaced,
    unless it was changed since.

    \b
    Example:
      supervit convert output/train/model_best.pth.tar --results results/evaluate.json \\
          --output supervit_small
    """
    from ..tools.convert import check_repo_id, convert_checkpoint, push_folder
    from ..tools.results import load_results

    if private and push is None:
        raise click.UsageError('--private is for --push; add it or leave it out.')
    if push is not None:
        check_repo_id(push)
    network = load_network(model, file, use_ema, **settings)
    convert_checkpoint(
        file,
        network.model,
        output,
        results=load_results(results) if results else None,
        use_ema=use_ema,
        repo_id=push,
        license=license,
    )
    address = None if push is None else push_folder(output, push, private)  # before the first line, which can fail
    print_json({'folder': output, 'address': address})
    echo(output)
    if address:
        echo(address)
