"""pt2 files that would act when they are loaded, and files that would read others: none is, and each is named."""
import contextlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from timm_supervit import Subnet
from timm_supervit.cli import main
from timm_supervit.programs.program import load_program

GRAPH = 'models/model.json'


class Acting:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def pickled(value: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def rewrite(source: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Write an archive anew with its entries changed, as anybody can who has a zip library."""
    with zipfile.ZipFile(source) as archive:
        entries = {name.partition('/')[2]: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(target, 'w') as archive:
        for name, content in entries.items():
            archive.writestr(f'archive/{name}', content)


def edit(entries: dict[str, bytes], name: str, change: Callable[[Any], None]) -> None:
    content = json.loads(entries[name])
    change(content)
    entries[name] = json.dumps(content).encode()


def nodes(graph: Any) -> Any:
    return graph['graph_module']['graph']['nodes']


def pickle_inputs(entries: dict[str, bytes], mark: Path) -> None:
    entries['data/sample_inputs/model.pt'] = pickled(((Acting(mark),), {}))


def pickle_a_tensor(kind: str, prefix: str) -> Callable[[dict[str, bytes], Path], None]:
    def change(entries: dict[str, bytes], mark: Path) -> None:
        def point(content: Any) -> None:
            next(iter(content['config'].values())).update(use_pickle=True, path_name=f'{prefix}_0')

        edit(entries, f'data/{kind}/model_{kind}_config.json', point)
        entries[f'data/{kind}/{prefix}_0'] = \
            pickle.dumps(Acting(mark)) if 'opaque' in prefix else pickled(Acting(mark))

    return change


def put(name: str) -> Callable[[dict[str, bytes], Path], None]:
    def change(entries: dict[str, bytes], mark: Path) -> None:
        entries[name] = pickled({'weight': Acting(mark)})

    return change


def evaluate_a_size(entries: dict[str, bytes], mark: Path) -> None:
    text = f'__import__("os").mkdir("{mark}") or s0'
    entries[GRAPH] = entries[GRAPH].replace(
        json.dumps(next(iter(_expressions(json.loads(entries[GRAPH]))))).encode(), json.dumps(text).encode())


def _expressions(value: Any) -> Any:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if key == 'expr_str':
            yield inner
        yield from _expressions(inner)


def call(target: str) -> Callable[[dict[str, bytes], Path], None]:
    """Let the first operator be another one, of a text."""
    def change(entries: dict[str, bytes], mark: Path) -> None:
        def add(graph: Any) -> None:
            arguments = [{'name': 'filename', 'arg': {'as_string': str(mark)}, 'kind': 1}]
            if 'from_file' in target:
                arguments += [{'name': 'shared', 'arg': {'as_bool': True}, 'kind': 1},
                              {'name': 'size', 'arg': {'as_int': 4}, 'kind': 1}]
            nodes(graph).insert(0, {
                'target': target, 'inputs': arguments, 'outputs': [{'as_none': True}], 'metadata': {},
                'is_hop_single_tensor_return': None, 'name': 'first'})

        edit(entries, GRAPH, add)

    return change


def name_a_value(entries: dict[str, bytes], mark: Path) -> None:
    old = json.dumps(next(
        node['outputs'][0]['as_tensor']['name'] for node in nodes(json.loads(entries[GRAPH]))
        if 'as_tensor' in node['outputs'][0]))
    new = json.dumps(f'x = __import__("os").mkdir("{mark}"); y')
    entries[GRAPH] = entries[GRAPH].replace(old.encode(), new.encode())


def guard(entries: dict[str, bytes], mark: Path) -> None:
    edit(entries, GRAPH, lambda graph: graph.update(guards_code=[f'__import__("os").mkdir("{mark}") is None']))


def import_a_module(entries: dict[str, bytes], mark: Path) -> None:
    (mark.parent / 'acting.py').write_text(f'import os\nos.mkdir("{mark}")\nx = dict\n')
    context = {'default_factory_module': 'acting', 'default_factory_name': 'x', 'dict_context': []}

    def change(graph: Any) -> None:
        signature = graph['graph_module']['module_call_graph'][0]['signature']
        signature['out_spec'] = json.dumps(
            [1, {'type': 'collections.defaultdict', 'context': context, 'children_spec': []}])

    edit(entries, GRAPH, change)


ACTING = {
    'sample inputs': pickle_inputs,
    'a weight': pickle_a_tensor('weights', 'weight'),
    'a constant': pickle_a_tensor('constants', 'tensor'),
    'an object': pickle_a_tensor('constants', 'opaque_obj'),
    'weights of old': put('data/weights/model.pt'),
    'constants of old': put('data/constants/model.pt'),
    'a size': evaluate_a_size,
    'an operator': call('torch.ops.aten.from_file.default'),
    'a container': import_a_module,
}
# What torch 2.14 reads as code too, but refuses or never comes to.
IDLE = {
    'a function': call('torch.os.mkdir'),
    'the name of a value': name_a_value,
    'a guard': guard,
}


@pytest.fixture
def source(exported: Callable[..., Path]) -> Path:
    return exported('pt2')


@pytest.mark.parametrize('kind', [*ACTING, *IDLE])
def test_a_pt2_file_that_acts_is_refused_by_name_and_does_not(
        source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    mark, path = tmp_path / 'acted', tmp_path / 'acting.pt2'
    monkeypatch.syspath_prepend(str(tmp_path))
    rewrite(source, path, lambda entries: (ACTING | IDLE)[kind](entries, mark))
    with pytest.raises(ValueError, match=rf'{path.name} was refused: .*export it again'):
        load_program(path)
    result = CliRunner().invoke(main, ['profile', str(path)])
    assert result.exit_code == 1 and path.name in result.stderr.splitlines()[-1]
    assert not mark.exists()
    with contextlib.suppress(Exception):  # that it acts without us is what makes this a test
        torch.export.load(path).module()(
            torch.zeros(2, 3, 24, 24), torch.tensor(8), torch.tensor(0.5, dtype=torch.float64))
    assert mark.exists() == (kind in ACTING)


@pytest.mark.parametrize('name', [
    'data/aotinductor/model/model.so', 'data/constants/custom_obj_0', 'models/other.json', 'extra/other.txt', 'version',
    'data/executorch/model.pte', '../outside'])
def test_an_entry_that_export_does_not_write_is_refused_by_name(source: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / 'other.pt2'
    rewrite(source, path, lambda entries: entries.update({name: b'anything'}))
    with pytest.raises(ValueError, match=rf'other.pt2 was refused: .*{name}'):
        load_program(path)


def test_an_archive_that_readers_see_in_different_ways_is_refused(source: Path, tmp_path: Path) -> None:
    path = tmp_path / 'two.pt2'
    shutil.copy(source, path)
    with pytest.warns(UserWarning), zipfile.ZipFile(path, 'a') as archive:
        archive.writestr(f'archive/{GRAPH}', '{}')
    with pytest.raises(ValueError, match=r'two.pt2 was refused: .*different'):
        load_program(path)


@pytest.mark.parametrize('size', [10 ** 6, 10 ** 30])
def test_a_weight_that_is_larger_than_the_file_is_refused(source: Path, tmp_path: Path, size: int) -> None:
    def change(entries: dict[str, bytes]) -> None:
        def enlarge(content: Any) -> None:
            next(iter(content['config'].values()))['tensor_meta']['sizes'][0]['as_int'] = size

        edit(entries, 'data/weights/model_weights_config.json', enlarge)
        entries['data/weights/weight_0'] = b''

    rewrite(source, tmp_path / 'large.pt2', change)
    with pytest.raises(ValueError, match=r'large.pt2 was refused: .*larger'):
        load_program(tmp_path / 'large.pt2')


def test_a_file_is_written_without_sample_inputs_and_those_of_an_older_one_are_read_as_weights(
        source: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(source) as archive:
        assert archive.read('archive/data/sample_inputs/model.pt') == b''
    inputs = (torch.zeros(2, 3, 24, 24), torch.tensor(8), torch.tensor(0.7, dtype=torch.float64))
    rewrite(source, tmp_path / 'old.pt2', lambda entries: entries.update(
        {'data/sample_inputs/model.pt': pickled((inputs, {}))}))
    images = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(load_program(tmp_path / 'old.pt2')(images), load_program(source)(images))


def test_an_onnx_file_with_weights_in_another_file_is_refused(
        exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx
    import onnxruntime

    path = tmp_path / 'parted.onnx'
    onnx.save(onnx.load(exported('onnx', Subnet(24, 0.5))), path, save_as_external_data=True, location='weights')
    assert (tmp_path / 'weights').stat().st_size > 1000
    monkeypatch.chdir(tmp_path)  # where onnxruntime also looks
    onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])  # or it would be refused for something else
    with pytest.raises(ValueError, match=r'parted.onnx was refused: .*another file.*export it again'):
        load_program(path)
