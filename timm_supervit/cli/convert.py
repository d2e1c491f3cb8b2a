"""``supervit convert``: a checkpoint as a model folder for the Hugging Face Hub."""
from typing import Any

import click

from . import base, loading, options
from .stdout import echo, print_json


@base.json_option
@click.command(cls=base.Command)
@click.argument('file', type=click.Path(exists=True, dir_okay=False))
@click.option('--model', metavar='NAME', help='The model that the checkpoint is of, if it does not say so itself.')
@click.option('--output', required=True, type=click.Path(file_okay=False), metavar='DIR', help='Folder to write.')
@click.option('--overwrite', is_flag=True, help='Replace the files of an earlier conversion.')
@click.option('--license', metavar='NAME', help='Licence of the weights, as in cc-by-nc-4.0 (default: none is named).')
@click.option(
    '--results', type=click.Path(exists=True, dir_okay=False), metavar='JSON',
    help='Results of "supervit evaluate" or "profile", for the model card.')
@options.setting_options
@options.class_names_option
def command(
        file: str,
        model: str | None,
        output: str,
        overwrite: bool,
        license: str | None,
        results: str | None,
        **settings: Any,
) -> None:
    """Turn a checkpoint FILE into a model folder for the Hugging Face Hub.

    FILE is a checkpoint of timm's train.py, which knows its model, settings and classes, or of the official SuperViT
    code. A file that holds more than weights, and so could run code, is refused.

    The folder holds the weights in the safetensors format, the settings, the names of the classes and a model card;
    timm.create_model('local-dir:DIR', pretrained=True) reads it. The last line says how to upload it.

    \b
    Example:
      supervit convert output/train/model_best.pth.tar --results results/evaluate.json \\
          --output supervit_small
    """
    from ..tools.convert import convert

    convert(
        loading.load(model, file, takes_files=False, **settings), output, results=results, license=license,
        overwrite=overwrite)
    print_json({'folder': output})
    echo(output)
    echo(f'To upload it: hf upload USER/NAME {output}')
