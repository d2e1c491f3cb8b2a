"""Reading checkpoints: the one way by which all commands get weights from a file, each once.

A file is the official SuperViT code's, that of timm's ``train.py``, a bare state dict, or safetensors. It is read with
``weights_only``, so it cannot run code, and whatever is wrong with it is an error that names it.
"""
import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from timm.models import clean_state_dict
from torch import Tensor

from ..results.fingerprint import Source

# Where timm and the official code keep weights in a file.
_RAW, _AVERAGED = ['state_dict', 'model'], ['state_dict_ema', 'model_ema']
_REMEDY = 'Give a file that holds a state dict, or one under "model" or "state_dict"'


class CheckpointError(RuntimeError):
    """A file that holds no weights which can be read without running code, or none that fit the model."""


class Checkpoint(NamedTuple):
    """Weights that were read from a file.

    Attributes:
        path: The file.
        state_dict: The weights.
        entry: The entry of the file that they are: ``model``, ``model_ema``, ...; empty for a bare state dict.
        other_entries: The file's other entries of weights.
        args: The arguments of the script that trained it; empty where the file holds none.
        epoch: The epoch after which it was written, counted from 0; None where the file does not say.
    """

    path: str
    state_dict: dict[str, Tensor]
    entry: str
    other_entries: tuple[str, ...]
    args: dict[str, Any]
    epoch: int | None

    def source(self, name: str, unnamed: str = '', data: Mapping[str, str] | None = None) -> Source:
        """Return where a model with these weights is from; the arguments are as in ``Source``."""
        return Source(name, self.path, self.entry, self.other_entries, unnamed, data)


def read_checkpoint(path: str | os.PathLike, use_ema: bool = False) -> Checkpoint:
    """Read the weights of a checkpoint, and never run code that the file brings.

    Args:
        path: File of the official code (``model``, ``model_ema``), of timm (``state_dict``, ``state_dict_ema``), a bare
            state dict, or safetensors.
        use_ema: Take the averaged weights where the file has them, not the raw ones.

    Raises:
        CheckpointError: If the file asks for code to be run, is damaged, or holds no state dict.
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    content = _read(path)
    entries = [key for key in _RAW + _AVERAGED if isinstance(content, dict) and content.get(key) is not None]
    preferred = _AVERAGED if use_ema else _RAW
    entry = min(entries, key=lambda key: key not in preferred, default='')
    weights = content[entry] if entry else content
    if isinstance(weights, dict):
        odd = [f'{key!r}: {type(value).__name__}' for key, value in weights.items()
               if not (isinstance(key, str) and isinstance(value, Tensor))]
    else:
        odd = [type(weights).__name__]
    if odd:
        raise CheckpointError(
            f'{path} was refused: {f"its entry {entry!r}" if entry else "it"} should be a state dict, which maps names '
            f'to tensors, and holds {odd[0]}. {_REMEDY}')
    args, epoch = (content.get('args'), content.get('epoch')) if entry else (None, None)
    return Checkpoint(
        str(path), clean_state_dict(weights), entry, tuple(key for key in entries if key != entry),
        vars(args) if isinstance(args, argparse.Namespace) else {},
        epoch if isinstance(epoch, int) and 0 <= epoch < 2 ** 31 else None)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f'{path} is no file; give the checkpoint itself, as in output/train/model_best.pth.tar')
    with path.open('rb') as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(f'{path} is damaged: it is empty; fetch or save the file again')
    if start.startswith(b'version https://git-lfs'):
        raise CheckpointError(f'{path} is no checkpoint but a pointer of Git LFS to one; fetch it with "git lfs pull"')
    try:
        if path.suffix == '.safetensors':
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path):  # as torch.save writes; torch.load does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise CheckpointError(f'{path} is damaged: {damaged} fails its checksum; fetch or save the file again')
        with torch.serialization.safe_globals([argparse.Namespace]):  # of timm's and the official code's arguments
            return torch.load(path, map_location='cpu', weights_only=True)
    except (CheckpointError, PermissionError):
        raise
    except Exception as error:  # what a broken file raises can be of any kind
        if wanted := re.search(r'GLOBAL ([\w.]+)', str(error)):
            raise CheckpointError(
                f'{path} was refused: beside weights it loads {wanted[1]}, and reading it could run code. '
                f'Save the state dict alone where the file comes from: torch.save(model.state_dict(), ...)') from error
        if isinstance(error, pickle.UnpicklingError):
            reason = 'it cannot be read as weights alone, and in any other way reading it could run code'
        else:
            reason = f'{type(error).__name__}: {" ".join(str(error).split())[:120]}'
        raise CheckpointError(
            f'{path} was refused: it is damaged or no checkpoint ({reason}). {_REMEDY}') from error
