"""Conversion of a model to a folder in the layout of the Hugging Face Hub, which timm creates models from.

The folder holds ``model.safetensors``, ``config.json`` and a model card.
"""
import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError
from timm.models import save_for_hf

from ..models.supervit import SuperViT
from ..results.files import TEMPORARY, fill_folder
from ..results.fingerprint import fingerprint, source_of
from ..results.rows import Results, column_of, difference, load_results, subnet_of
from ..results.text import markdown
from ..subnets import Subnet, format_size

_LICENSE_LINKS = {  # of those that the Hub has no name for
    'dinov3-license': 'https://ai.meta.com/resources/models-and-libraries/dinov3-license/',
    'sapiens2-license': 'https://github.com/facebookresearch/sapiens2/blob/main/LICENSE.md',
}


def convert(
        model: SuperViT,
        output: str | os.PathLike,
        *,
        results: str | os.PathLike | None = None,
        license: str | None = None,
        overwrite: bool = False,
) -> Path:
    """Write a model as a folder for the Hub; ``timm.create_model('local-dir:FOLDER', pretrained=True)`` reads it.

    Args:
        model: The model, from ``load_supervit`` with a checkpoint.
        output: The folder.
        results: JSON file of its operating points, for the model card.
        license: Licence of the weights, as the Hub names it, such as ``cc-by-nc-4.0`` (default: that of the backbone
            whose name the model has, or none).
        overwrite: Replace files of these names; others in the folder stay.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder holds anything and ``overwrite`` is False.
        OSError: If the folder cannot be written.
        ValueError: If the results are those of another model or of an interrupted run.
    """
    output = Path(output)
    with fill_folder(output) as folder:
        names = sorted(path.name for path in output.iterdir() if not path.name.startswith(TEMPORARY))
        names = [name for name in names if name != 'lost+found']  # in the root of a mounted disk
        if names and not overwrite:
            raise FileExistsError(
                f'{output} holds {", ".join(names[:3])}{", ..." if len(names) > 3 else ""}; choose a new folder, or '
                f'replace what this writes there with --overwrite')
        table = None
        if results is not None:
            table = load_results(results)
            if found := difference(table, Results('', [], network=fingerprint(model))):
                raise ValueError(f'these results are of another network than {source_of(model).path or "this model"}: '
                                 f'{found}; evaluate the checkpoint itself')
        if license is None and model.backbone_name:
            license = model.pretrained_cfg.get('license')
        card = model_card(model, f'local-dir:{output.resolve().name}', table, license)
        try:
            # The tag and licence of the variant are those of its default weights, which are not these.
            config: Any = {'pretrained_cfg': {'tag': '', 'license': license}}
            label_names = model.pretrained_cfg.get('label_names')
            if label_names and len(label_names) == model.num_classes:
                config['label_names'] = label_names
            save_for_hf(model, str(folder), model_config=config, safe_serialization=True)
            card.save(folder / 'README.md')
        except SafetensorError as error:  # a full disk, above all
            raise OSError(f'{error}: {output} was not written and is as it was') from error
    return output


def model_card(
        model: SuperViT,
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
    terms: dict[str, Any] = dict(license=license)
    if license in _LICENSE_LINKS:
        terms = dict(license='other', license_name=license, license_link=_LICENSE_LINKS[license])
    data = ModelCardData(
        library_name='timm', pipeline_tag='image-classification', **terms,
        tags=['image-classification', 'timm', 'timm-supervit', 'vision-transformer', 'arxiv:2205.11397'])
    subnets = model.subnets
    example = subnets[len(subnets) // 2]
    backbone = f' of `{model.backbone_name}`' if model.backbone_name else ''
    plain = source_of(model).plain
    state = f' It is not super-trained: its weights are those of a plain `{plain}`, a start.' if plain else ''
    sizes, rates = ', '.join(map(format_size, model.img_sizes)), ', '.join(map(str, model.keep_rates))
    text = f"""
# {markdown(source.partition(':')[2].split('/')[-1])}

`{config['architecture']}`{backbone}, a Super Vision Transformer ([arXiv 2205.11397](https://arxiv.org/abs/2205.11397)):
one network that runs at many costs. Each call chooses an image size ({sizes} pixels) and a keep rate ({rates}), the
share of the tokens that the network goes on with in its dropping blocks. It has {model.num_classes} classes.{state}

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
        text += f"\n## Operating points\n\n{_operating_points(results, subnets, config['architecture'])}"
    return ModelCard(f'---\n{data.to_yaml()}\n---\n{text}')


def _operating_points(results: Results, subnets: list[Subnet], architecture: str) -> str:
    name = results.model.split('.')[0]
    rows = [row for row in results.rows if subnet_of(row)]
    if (':' not in name and name != architecture) or any(subnet_of(row) not in subnets for row in rows):
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
