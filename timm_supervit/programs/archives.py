"""What exported files may hold. Whatever else is in one is refused by name, before torch or onnxruntime sees it.

``torch.export.load`` trusts its file (torch 2.14): it unpickles sample inputs, weights, constants and objects, loads
the libraries of compiled models, evaluates symbolic expressions, specifications of containers and guards as Python,
looks operators up by any name below ``torch``, such as ``torch.os.system``, and writes the names of values into the
source of a function. Here only what ``write_program`` writes passes. This can go when torch has a loader that is safe
with any file. onnxruntime runs no code of a file, but reads other files that it names.
"""
import ast
import io
import json
import math
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

_ENTRIES = re.compile(
    r'archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json|'
    r'data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)|'
    r'data/sample_inputs/model\.pt|extra/timm_supervit\.json')

# Of vision transformers, of their stems and of what chooses a subnet; each computes with tensors and does nothing else.
# All overloads, and in place too.
_OPERATORS = re.compile(
    'abs|add|addmm|alias|all|amax|amin|and|any|arange|argmax|argmin|argsort|assert_async|assert_scalar|'
    'assert_tensor_metadata|avg_pool2d|batch_norm|bmm|cat|ceil|celu|chunk|clamp|clone|constant_pad_nd|contiguous|'
    'conv2d|convolution|cos|cumsum|detach|div|dropout|elu|embedding|empty|eq|erf|exp|expand|expand_as|flatten|flip|'
    'floor|floor_divide|full|full_like|gather|ge|gelu|group_norm|gt|hardsigmoid|hardswish|hardtanh|index|'
    'index_select|item|layer_norm|le|leaky_relu|lift_fresh_copy|linear|linspace|log|log_softmax|logical_and|'
    'logical_not|logical_or|lt|masked_fill|matmul|max|max_pool2d|maximum|mean|meshgrid|min|minimum|mish|mm|mul|narrow|'
    'native_layer_norm|ne|neg|new_full|new_ones|new_zeros|norm|ones|ones_like|or|outer|pad|permute|pow|prelu|'
    'promote_types|reciprocal|relu|relu6|remainder|repeat|repeat_interleave|reshape|reshape_as|rms_norm|roll|round|'
    'rsqrt|rsub|scaled_dot_product_attention|select|selu|sigmoid|sign|silu|sin|slice|softmax|softplus|sort|split|'
    'split_with_sizes|sqrt|square|squeeze|stack|std|sub|sum|sym_size|t|tanh|tile|to|to_copy|topk|transpose|tril|triu|'
    'trunc|type_as|unbind|unflatten|unsqueeze|upsample_bicubic2d|upsample_bilinear2d|upsample_nearest2d|var|var_mean|'
    'view|view_as|where|zeros|zeros_like')
_FUNCTIONS = re.compile(
    r'torch\.ops\.higher_order\.cond|torch\.sym_(float|int|ite|max|min|not)|math\.(ceil|floor|trunc)|'
    r'_operator\.(add|and_|eq|floordiv|ge|getitem|gt|le|lt|mod|mul|ne|neg|not_|or_|sub|truediv)')
_SYMBOLS = re.compile(r'[suz][a-z]{0,2}\d{1,9}')
_SYMPY = re.compile(
    'Symbol|Integer|Add|Mul|Pow|Mod|Max|Min|Or|And|Not|Eq|Ne|Lt|Le|Gt|Ge|Equality|Unequality|LessThan|GreaterThan|'
    'StrictLessThan|StrictGreaterThan|FloorDiv|CeilDiv|CleanDiv|PythonMod|CeilToInt|FloorToInt|TruncToInt|IntTrueDiv|'
    'ToFloat|Where|Identity|PowByNatural')
_ASSUMPTIONS = frozenset({'integer', 'positive', 'negative', 'nonnegative', 'real', 'evaluate'})
_SYNTAX = (ast.Expression, ast.Load, ast.BinOp, ast.UnaryOp, ast.Compare, ast.cmpop, ast.Add, ast.Sub, ast.Mult,
           ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.UAdd, ast.USub)
_TREE = re.compile(
    r'(?:[\[\]{}:, \d]|null|"(?:type|context|children_spec|null|\[\]|builtins\.(?:tuple|list|dict))")*')

_NAME = re.compile(r'\w*|-Infinity')
_PATH = re.compile(r'(?!_)\w*(?:\.(?!_)\w+)*')  # none that begin with an underscore, by which Python's own go
_PATHS = frozenset({'parameter_name', 'buffer_name', 'tensor_constant_name', 'fqn', 'config'})
_TEXTS = frozenset({'metadata', 'as_string', 'torch_version'})  # of which torch keeps or prints what it does not know


class RefusedError(ValueError):
    """A file that holds what ``supervit export`` does not write."""


def check_archive(path: Path) -> None:
    """Raise a RefusedError if a pt2 file holds anything else than a program of ``write_program``.

    Args:
        path: The file.
    """
    try:
        from torch.export.pt2_archive import PT2ArchiveReader
    except ImportError as error:
        raise RuntimeError('pt2 files need torch 2.8 or later; update it, or use ONNX') from error

    reader = PT2ArchiveReader(os.fspath(path))  # sees what the loader sees, whatever other readers of archives see
    names = reader.get_file_names()
    for name in names:
        if not _ENTRIES.fullmatch(name):
            _refuse(path, f'its entry {name!r}')
    with zipfile.ZipFile(path) as archive:  # to which the loader turns where its own reader fails
        entries = {entry.filename.partition('/')[2]: entry for entry in archive.infolist()}
        size = sum(entry.file_size for entry in archive.infolist())
        if sorted(entries) != sorted(names) or size > path.stat().st_size:
            _refuse(path, 'entries that are compressed or that readers of archives see in different ways')
        if damaged := archive.testzip():
            raise RefusedError(f'{path} is damaged: {damaged} fails its checksum; fetch or export it again')
    inputs = reader.read_bytes('data/sample_inputs/model.pt')
    if inputs:  # torch falls back to running code where this fails
        try:
            torch.load(io.BytesIO(inputs), weights_only=True)
        except Exception as error:  # what a broken pickle raises can be of any kind
            raise RefusedError(
                f'{path} was refused: its sample inputs cannot be read without running code; '
                f'export it again') from error
    _check(json.loads(reader.read_bytes('models/model.json')), 'graph', path)
    for kind in ('weights', 'constants'):
        config = json.loads(reader.read_bytes(f'data/{kind}/model_{kind}_config.json'))
        _check(config, 'config', path)
        for name, tensor in config['config'].items():
            sizes = [size['as_int'] for size in tensor['tensor_meta']['sizes']]
            if tensor['use_pickle'] or math.prod(sizes) > entries[f'data/{kind}/{tensor["path_name"]}'].file_size:
                _refuse(path, f'{name!r}, which is no plain tensor or larger than what the file has of it')


def check_onnx(path: str | os.PathLike) -> None:
    """Raise a RefusedError if an ONNX file has weights in another file, which is under no checksum."""
    import onnx

    messages = [onnx.load(path, load_external_data=False)]
    for message in messages:  # which grows: wherever a tensor can be
        if isinstance(message, onnx.TensorProto) and message.data_location == onnx.TensorProto.EXTERNAL:
            raise RefusedError(
                f'{os.fspath(path)} was refused: the values of {message.name!r} are in another file, which is under no '
                f'checksum; export it again')
        for field, value in message.ListFields():
            if field.message_type is not None:
                messages += [value] if hasattr(value, 'ListFields') else value


def _check(value: Any, key: str, path: Path) -> None:
    """Refuse what torch would take for code in the value of a key, which holds for the values in it too."""
    if isinstance(value, dict):
        for inner_key, inner in value.items():
            _check_text(inner_key, key, path)
            if inner_key not in _TEXTS:
                _check(inner, key if key == 'config' else inner_key, path)
    elif isinstance(value, list):
        for inner in value:
            _check(inner, key, path)
    elif isinstance(value, str):
        _check_text(value, key, path)


def _check_text(text: str, key: str, path: Path) -> None:
    is_known: object
    if key in ('target', 'as_operator') and text.startswith(('torch', 'math', '_operator')):
        name = re.fullmatch(r'torch\.ops\.aten\.(\w+)\.\w+', text)
        is_known = _OPERATORS.fullmatch(name[1].strip('_')) if name else _FUNCTIONS.fullmatch(text)
    elif key == 'expr_str':
        is_known = _is_expression(text)
    elif key in ('in_spec', 'out_spec'):
        is_known = _TREE.fullmatch(text)
    elif key == 'guards_code':
        is_known = False
    else:
        is_known = (_PATH if key in _PATHS else _NAME).fullmatch(text)
    if not is_known:
        _refuse(path, f'{text[:100]!r} ({key})')


def _is_expression(text: str) -> bool:
    """Return whether a text is plain arithmetic on the sizes of tensors, in which no power is of another."""
    nodes = list(ast.walk(ast.parse(text, mode='eval')))
    powers = [node for node in nodes if isinstance(getattr(node, 'op', None), ast.Pow)
              or (isinstance(node, ast.Call) and ast.unparse(node.func).startswith('Pow'))]
    return all(map(_is_arithmetic, nodes)) and all(
        re.fullmatch(r'.*(\*\* ?|, (Integer\()?)-?\d\)*', ast.unparse(power), re.DOTALL)
        and not any(inner is not power and inner in powers for inner in ast.walk(power)) for power in powers)


def _is_arithmetic(node: Any) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name)
    if isinstance(node, ast.Name):
        return (_SYMPY.fullmatch(node.id) or _SYMBOLS.fullmatch(node.id)) is not None
    if isinstance(node, ast.keyword):
        return node.arg in _ASSUMPTIONS
    if isinstance(node, ast.Constant):
        value = node.value
        return _SYMBOLS.fullmatch(value) is not None if isinstance(value, str) else \
            isinstance(value, int) and abs(value) < 2 ** 63
    return isinstance(node, _SYNTAX)


def _refuse(path: Path, what: str) -> None:
    raise RefusedError(
        f'{path} was refused: it holds {what}, which no file of "supervit export" does, and loading it could run code; '
        f'export it again from its checkpoint')
