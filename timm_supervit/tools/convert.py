"""Conversion of a checkpoint to a folder in the layout of the Hugging Face Hub, which timm creates models from.

The folder holds ``model.safetensors``, ``config.json`` and a model card.
"""
import hashlib
import os
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from timm.models import save_for_hf

from ..fingerprint import fingerprint
from ..models.supervit import SuperVisionTransformer
from ..subnets import format_size
from .checkpoints import Checkpoint, load_checkpoint
from .files import TEMPORARY, fill_folder
from .results import Results, column_of, difference, subnet_of
from .text import markdown

__all__ = ['check_repo_id', 'convert_checkpoint', 'model_card', 'push_folder']

FILES = {'README.md', 'config.json', 'model.safetensors'}  # what a converted folder holds

_SEAL = b'\n<!-- Written by supervit convert. SHA-256 of this folder: %s -->\n'  # ends the card of a converted folder


def convert_checkpoint(
        path: str | os.PathLike,
        model: SuperVisionTransformer,
        output_dir: str | os.PathLike,
        results: Results | None = None,
        use_ema: bool = False,
        repo_id: str | None = None,
        license: str | None = None,
) -> Checkpoint:
    """Write a checkpoint as a folder for the Hub; ``timm.create_model('local-dir:FOLDER', pretrained=True)`` reads it.

    An older folder of this kind is replaced when the new one is complete, unless it was changed since.

    Args:
        path: The checkpoint, see ``read_checkpoint``.
        model: A model with the settings of the checkpoint; it gets the weights.
        output_dir: The folder.
        results: Operating points for the model card.
        use_ema: Take the averaged weights where the file has them.
        repo_id: Repository that the model card tells readers to load, ``user/name`` (default: the folder).
        license: Licence of the weights, as the Hub names it, such as ``cc-by-nc-4.0`` (default: none is named).

    Returns:
        What was read of the checkpoint.

    Raises:
        CheckpointError: If the weights cannot be read or do not fit the model.
        FileExistsError: If the folder holds anything else than an older conversion as it was written.
        FileNotFoundError: If there is no such checkpoint.
        OSError: If the folder cannot be written.
        ValueError: If the results are those of another model or of an interrupted run, or the repository is none.
    """
    if repo_id is not None:
        check_repo_id(repo_id)
    output_dir = Path(output_dir)
    with fill_folder(output_dir) as folder:
        _check_replaceable(output_dir)
        source = f'hf-hub:{repo_id}' if repo_id else f'local-dir:{output_dir.resolve().name}'
        card = model_card(model, source, results, license)
        checkpoint = load_checkpoint(model, path, use_ema)
        if results is not None and (found := difference(results, Results('', [], network=fingerprint(model)))):
            raise ValueError(
                f'these results are of another network than {path}: {found}; evaluate the checkpoint itself')
        try:
            # The tag and licence of the variant are those of its default weights, which are not these.
            config: Any = {'pretrained_cfg': {'tag': '', 'license': license}}
            names = cast(dict[str, Any], model.pretrained_cfg).get('label_names')
            if names and len(names) == model.num_classes:
                config['label_names'] = names
            save_for_hf(model, str(folder), model_config=config, safe_serialization=True)
            card.save(folder / 'README.md')
            content = (folder / 'README.md').read_bytes()
            (folder / 'README.md').write_bytes(content + _SEAL % _checksum(folder, content))
        except (OSError, SafetensorError) as error:  # a full disk, above all
            raise OSError(f'{error}: {output_dir} was not written and is as it was') from error
    return checkpoint


def check_repo_id(repo_id: str) -> None:
    """Raise a ValueError if this is no name of a repository, ``user/name``."""
    try:
        validate_repo_id(repo_id)
        if '/' not in repo_id:
            raise ValueError('a name without a user')
    except ValueError as error:
        raise ValueError(f'{repo_id!r} is no repository USER/NAME to push to ({error})') from error


def _check_replaceable(folder: Path) -> None:
    """Refuse a folder whose files are not all as ``convert_checkpoint`` wrote them."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(TEMPORARY)}
    names -= {'lost+found'}  # in the root of a mounted disk
    if names and not (names == FILES and _is_sealed(folder)):
        shown = sorted(names - FILES) or sorted(names)
        raise FileExistsError(
            f'{folder} holds {", ".join(shown[:3])}{", ..." if len(shown) > 3 else ""}, which would be lost; '
            f'choose a folder that is new or holds an older conversion that was not changed since')


def _is_sealed(folder: Path) -> bool:
    try:
        written = (folder / 'README.md').read_bytes()
        content = written.rpartition(_SEAL.partition(b'%s')[0])[0]
        return written == content + _SEAL % _checksum(folder, content)
    except OSError:
        return False


def _checksum(folder: Path, card: bytes) -> bytes:
    """Return the SHA-256 of a folder's files, with this content of the model card."""
    digest = hashlib.sha256(card)
    for name in sorted(FILES - {'README.md'}):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest().encode()


def model_card(
        model: SuperVisionTransformer,
        source: str,
        results: Results | None = None,
        license: str | None = None,
) -> ModelCard:
    """Return a model card that says what the model is, how to run it and, given results, what its subnets reach.

    Args:
        model: The model.
        source: What ``timm.create_model`` takes to load it, such as ``hf-hub:user/name``.
        results: Operating points.
        license: Licence of the weights.

    Raises:
        ValueError: If the results are those of another model or of an interrupted run.
    """
    config: Any = model.pretrained_cfg
    data = ModelCardData(
        library_name='timm', pipeline_tag='image-classification', license=license,
        tags=['image-classification', 'timm', 'timm-supervit', 'vision-transformer', 'arxiv:2205.11397'])
    example = model.subnets[len(model.subnets) // 2]
    own = getattr(model, '_model_args', {}).get('backbone')  # where timm keeps what it creates the model from
    backbone = f' of `{own}`' if own else ''
    sizes, rates = ', '.join(map(format_size, model.img_sizes)), ', '.join(map(str, model.keep_rates))
    text = f"""
# {markdown(source.partition(':')[2].split('/')[-1])}

`{config['architecture']}`{backbone}, a Super Vision Transformer ([arXiv 2205.11397](https://arxiv.org/abs/2205.11397)):
one network that runs at many costs. Each call chooses an image size ({sizes} pixels) and a keep rate ({rates}), the
share of the tokens that the network goes on with in its dropping blocks. It has {model.num_classes} classes.

## Use

With the package timm-supervit installed it is a model of [timm](https://github.com/huggingface/pytorch-image-models):

```python
import timm

model = timm.create_model({source!r}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image).unsqueeze(0), img_size={example.img_size}, keep_rate={example.keep_rate})
```
"""
    if results is not None:
        text += f"\n## Operating points\n\n{_operating_points(results, model, config['architecture'])}"
    return ModelCard(f'---\n{data.to_yaml()}\n---\n{text}')


def _operating_points(results: Results, model: SuperVisionTransformer, architecture: str) -> str:
    name = results.model.split('.')[0]
    rows = [row for row in results.rows if subnet_of(row)]
    if (':' not in name and name != architecture) or any(subnet_of(row) not in model.subnets for row in rows):
        raise ValueError(
            f'these results are of {results.model} with other settings than this {architecture}; give its own')
    if any('epoch' in row for row in rows):
        raise ValueError('these results are of several epochs; give those of the checkpoint itself')
    if results.info.get('partial'):
        raise ValueError('these results are of an interrupted run, marked partial; let it run to the end')
    keys = ('batch_size', 'precision', 'runtime', 'macs', 'top1', 'top5', 'latency_ms', 'throughput')
    columns = ['img_size', 'keep_rate', *(key for key in keys if any(row.get(key) is not None for row in rows))]
    shown = [column_of(rows, key) for key in columns]
    lines = [[column.heading for column in shown], ['---:'] * len(columns)]
    for row in rows:
        lines.append([markdown(column.text(row.get(key))) for key, column in zip(columns, shown, strict=True)])
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def push_folder(folder: str | os.PathLike, repo_id: str, private: bool = False) -> str:
    """Upload a converted folder to the Hub, as who is logged in there; the repository is made where it is missing.

    Args:
        folder: The folder.
        repo_id: Name of the repository, ``user/name``.
        private: Make a new repository private.

    Returns:
        The address of the commit.

    Raises:
        RuntimeError: If it could not be uploaded; the folder is complete all the same.
    """
    api = HfApi(library_name='timm-supervit')
    try:
        repo = api.create_repo(repo_id, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo.repo_id, folder_path=str(folder), allow_patterns=sorted(FILES), commit_message='Add model')
        return commit.commit_url
    except Exception as error:  # the kinds differ between versions of huggingface_hub and the HTTP clients under it
        raise RuntimeError(
            f'{folder} is complete but was not uploaded to {repo_id} ({type(error).__name__}: {error}); '
            f'log in with "hf auth login", then: hf upload {repo_id} {folder}') from error
