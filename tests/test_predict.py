"""Predictions: what the model says, for each image once, whatever stops the run."""
import copy
import errno
import fcntl
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from timm_supervit import Cascade
from timm_supervit.cli import main
from timm_supervit.images.datasets import Images
from timm_supervit.programs.program import load_program
from timm_supervit.results.fingerprint import fingerprint
from timm_supervit.tools.predict import Log, Share, find_images, predict
from timm_supervit.tools.visualize import read_image

NAMES = ['ant', 'bee', 'cow']


def supervit(*arguments: Any, **env: Any) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env={k: str(v) for k, v in env.items()})


@pytest.fixture(scope='module')
def model(tmp_path_factory: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model('supervit_digits', num_classes=3)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # as initialized, all images would get the same class
    return model.eval()


@pytest.fixture(scope='module')
def source(model: Any, tmp_path_factory: Any) -> str:
    folder = tmp_path_factory.mktemp('model')
    timm.models.save_for_hf(
        model, str(folder), model_config={'label_names': NAMES}, safe_serialization=True)
    return f'local-dir:{folder}'


@pytest.fixture(scope='module')
def folder(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp('photographs')
    generator = torch.Generator().manual_seed(1)
    for i in range(11):
        path = folder / ('inner' if i % 2 else '.') / f'{i:02d}.PNG'
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(torch.randint(256, (30, 40, 3), generator=generator, dtype=torch.uint8).numpy()).save(path)
    (folder / 'notes.txt').write_text('no image')
    return folder


@pytest.fixture(scope='module')
def cascade(model: Any, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp('cascade') / 'cascade.json'
    path.write_text(json.dumps(dict(
        stages=[[12, 0.5], [24, 1.0]], thresholds=[0.6], network=json.loads(json.dumps(fingerprint(model))))))
    return path


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def expect(model: Any, folder: Path, **subnet: Any) -> dict[str, list[float]]:
    """Return the probabilities of each image, prepared and run one by one."""
    with torch.no_grad():
        return {str(path): model(read_image(path, model)[None], **subnet).softmax(1)[0].tolist()
                for path in folder.rglob('*.PNG')}


def test_json_lines_hold_what_the_model_says_of_each_image_prepared_as_in_evaluation(
        model: Any, source: str, folder: Path) -> None:
    result = supervit('predict', source, folder, folder / '00.PNG', '--json', '--subnet', '16:0.6', '-b', 4)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    expected = expect(model, folder, img_size=16, keep_rate=0.6)
    assert sorted(row['image'] for row in rows) == sorted(expected)
    for row in rows:
        probabilities = expected[row['image']]
        assert row['subnet'] == '16:0.6'
        assert [p['probability'] for p in row['predictions']] == pytest.approx(sorted(probabilities)[::-1], abs=2e-6)
        assert [p['class'] for p in row['predictions']] == [
            NAMES[i] for i in sorted(range(3), key=lambda i: -probabilities[i])]


def test_the_table_names_each_image_once(source: str, folder: Path) -> None:
    result = supervit('predict', source, folder / '00.PNG', folder / '02.PNG', '--top', 2)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()][2:]
    assert [len(line) for line in lines] == [4, 2, 4, 2]
    assert [line[1] for line in lines[::2]] == ['24:1', '24:1']


def test_a_cascade_says_which_stage_answered(model: Any, source: str, folder: Path, cascade: Path) -> None:
    result = supervit('predict', source, folder, '--cascade', cascade, '--json')
    assert result.exit_code == 0, result.output
    stages = Cascade.load(model, cascade)
    answered = set()
    for row in map(json.loads, result.stdout.splitlines()):
        with torch.no_grad():
            logits, exits = stages(read_image(row['image'], model)[None], return_exits=True)
        assert row['subnet'] == str(stages.stages[exits])
        assert row['predictions'][0]['index'] == logits.argmax()
        answered.add(row['subnet'])
    assert answered == {'12:0.5', '24:1'}


@pytest.fixture(scope='module')
def python(model_to_export: Callable[..., Any], tmp_path_factory: Any) -> str:
    """The network that is exported, for Python."""
    model, folder = model_to_export(), tmp_path_factory.mktemp('python')
    timm.models.save_for_hf(
        model, str(folder), model_config={'label_names': model.pretrained_cfg['label_names']}, safe_serialization=True)
    return f'local-dir:{folder}'


@pytest.fixture(scope='module')
def cascades(model_to_export: Callable[..., Any], folder: Path, tmp_path_factory: Any) -> Path:
    """A cascade of the network that is exported, which half of the images go through, and one of another network."""
    model, path = model_to_export(), tmp_path_factory.mktemp('cascades')
    sure = torch.tensor([max(shares) for shares in expect(model, folder, img_size=8, keep_rate=0.5).values()])
    threshold = (sure.sort().values[4] + sure.sort().values[5]).item() / 2
    network = json.loads(json.dumps(fingerprint(model)))
    for name, known in {'own': network, 'other': {**network, 'num_classes': 4}}.items():
        (path / f'{name}.json').write_text(json.dumps(dict(
            stages=[[8, 0.5], [24, 1.0]], thresholds=[threshold], network=known)))
    return path


@pytest.mark.parametrize('format', ['onnx', 'pt2'])
@pytest.mark.parametrize('how', ['subnet', 'cascade'])
def test_an_exported_file_says_what_the_model_says(
        python: str, exported: Callable[..., Path], cascades: Path, folder: Path, format: str, how: str) -> None:
    options = ['--subnet', '16:0.6'] if how == 'subnet' else ['--cascade', cascades / 'own.json']
    rows = []
    for network in (python, exported(format)):
        result = supervit('predict', network, folder, '--json', *options)
        assert result.exit_code == 0, result.output
        rows.append([json.loads(line) for line in result.stdout.splitlines()])
    assert how == 'subnet' or {row['subnet'] for row in rows[0]} == {'8:0.5', '24:1'}
    for one, other in zip(*rows, strict=True):
        for prediction, expected in zip(other.pop('predictions'), one.pop('predictions'), strict=True):
            assert prediction.pop('probability') == pytest.approx(expected.pop('probability'), abs=1e-5)
            assert prediction == expected
        assert one == other


def test_an_exported_file_takes_no_settings_and_no_cascade_of_another_network(
        exported: Callable[..., Path], cascades: Path, folder: Path) -> None:
    result = supervit('predict', exported(), folder, '--num-classes', 3)
    assert result.exit_code == 2 and 'is complete; leave out' in result.stderr
    result = supervit('predict', exported(), folder, '--cascade', cascades / 'other.json')
    assert result.exit_code == 1 and 'another network: its num_classes is 4' in result.stderr


def test_an_unreadable_image_is_named_and_the_rest_done(source: str, folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / 'broken.png'
    broken.write_bytes((folder / '00.PNG').read_bytes()[:200])
    result = supervit('predict', source, folder / '00.PNG', broken, folder / '02.PNG', '--json')
    assert result.exit_code == 1
    assert f'{broken} cannot be read: ' in result.stderr
    assert '1 images could not be read' in result.stderr.splitlines()[-1]
    assert ['error' in json.loads(line) for line in result.stdout.splitlines()] == [False, True, False]
    for _ in range(2):  # also when all was done before
        result = supervit('predict', source, broken, folder, '--output', tmp_path / 'out.jsonl')
        assert result.exit_code == 1 and '1 images could not be read' in result.stderr
        assert len(read_lines(tmp_path / 'out.jsonl')) == 12


def test_an_image_that_was_mended_is_tried_again_and_its_line_replaced(
        source: str, folder: Path, tmp_path: Path) -> None:
    names = [f'{i:02d}.png' for i in range(8)]
    for name in names:
        (tmp_path / name).write_bytes((folder / '00.PNG').read_bytes())
    expected = tmp_path / 'expected.jsonl'
    path = tmp_path / 'out' / 'out.jsonl'
    arguments = ['predict', source, tmp_path, '-b', 2, '--json']
    assert supervit(*arguments, '--output', expected).exit_code == 0
    for name in (names[1], names[2], names[4], names[7]):
        (tmp_path / name).write_bytes(b'broken')
    assert supervit(*arguments, '--output', path).exit_code == 1
    before = path.read_bytes()
    result = supervit(*arguments, '--output', path)  # nothing is mended, so all are named again
    assert result.exit_code == 1 and path.read_bytes() == before
    assert [json.loads(line)['image'][-6:] for line in result.stdout.splitlines()] == [names[i] for i in (1, 2, 4, 7)]
    assert result.stderr.count('cannot be read: ') == 4 and '4 images could not be read' in result.stderr
    for name in (names[2], names[7]):
        (tmp_path / name).write_bytes((folder / '00.PNG').read_bytes())
    result = supervit(*arguments, '--output', path)
    assert result.exit_code == 1 and '2 images could not be read' in result.stderr
    assert [row['index'] for row in read_lines(path) if 'error' in row] == [1, 4]
    for name in (names[1], names[4]):
        (tmp_path / name).write_bytes((folder / '00.PNG').read_bytes())
    assert supervit(*arguments, '--output', path).exit_code == 0
    assert path.read_bytes() == expected.read_bytes()
    assert os.listdir(path.parent) == [path.name]


def test_images_of_a_share_that_was_unmounted_are_tried_again(model: Any, folder: Path, tmp_path: Path) -> None:
    link, path = tmp_path / 'link', tmp_path / 'out.jsonl'
    link.symlink_to(folder)
    images = find_images([link])

    def run(count: int = 100) -> list[Any]:
        return list(itertools.islice(predict(model, images, output=path, share=Share(1, 2), batch_size=2), count))

    assert len(run(2)) == 2
    link.unlink()
    assert ['error' in row for row in run()] == [True] * 3
    link.symlink_to(folder)
    assert [('error' in row, row['index']) for row in run()] == [(False, 5), (False, 7), (False, 9)]
    assert [row['index'] for row in read_lines(tmp_path / 'out-1-of-2.jsonl')] == [1, 3, 5, 7, 9]


def test_a_run_goes_on_where_it_was_and_drops_what_is_torn(source: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / 'out' / 'predictions.jsonl'
    arguments = ['predict', source, folder, '--output', path, '-b', 3]
    assert supervit(*arguments).exit_code == 0
    complete = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(complete) if byte == ord('\n')]
    for size in (0, 1, ends[0] - 1, ends[0], ends[5] + 7, ends[9] + 30, len(complete)):
        path.write_bytes(complete[:size])
        result = supervit(*arguments)
        assert result.exit_code == 0
        rows = read_lines(path)
        assert [row['index'] for row in rows] == list(range(11))
        assert [row['predictions'][0]['index'] for row in rows] == [
            row['predictions'][0]['index'] for row in map(json.loads, complete.splitlines())]


def test_a_killed_run_goes_on(source: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / 'predictions.jsonl'
    many = tmp_path / 'many'
    many.mkdir()
    for i in range(240):
        (many / f'{i:03d}.png').symlink_to(folder / f'{i % 5 * 2:02d}.PNG')
    arguments = ['predict', source, str(many), '--output', str(path), '-b', '1']
    process = multiprocessing.get_context('fork').Process(target=supervit, args=arguments)
    process.start()
    while process.is_alive() and not (path.exists() and path.read_bytes().count(b'\n') > 2):
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = path.read_bytes()
    assert 2 < before.count(b'\n') < 240
    assert supervit(*arguments).exit_code == 0
    assert path.read_bytes().startswith(before[:before.rindex(b'\n') + 1])
    assert [row['image'] for row in read_lines(path)] == [str(many / f'{i:03d}.png') for i in range(240)]


class Pairs:
    """A data set without names of files."""

    def __init__(self, *colors: Any) -> None:
        self.colors = colors

    def __len__(self) -> int:
        return len(self.colors)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new('RGB', (24, 24), self.colors[index]), 0


@pytest.mark.parametrize('change', [
    'nothing', 'workers', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode', 'names', 'precision', 'images',
    'number', 'data_dir', 'name', 'split', 'size'])
def test_all_that_a_line_depends_on_is_of_the_run(model: Any, tmp_path: Path, change: str) -> None:
    path = tmp_path / 'out.jsonl'
    images = Images(Pairs('red', 'green', 'blue'), str(tmp_path), 'kind/name', 'test')
    model = copy.deepcopy(model)
    assert len(list(predict(model, images, output=path))) == 3
    before = path.read_bytes()
    model.pretrained_cfg |= {
        'mean': {'mean': (0.1, 0.1, 0.1)}, 'std': {'std': (0.1, 0.1, 0.1)}, 'crop_pct': {'crop_pct': 0.5},
        'interpolation': {'interpolation': 'nearest'}, 'crop_mode': {'crop_mode': 'squash'},
        'names': {'label_names': ['a', 'b', 'c']}, 'size': {'test_input_size': (3, 32, 32)}}.get(change, {})
    others: dict[str, dict[str, Any]] = {
        'images': {'dataset': Pairs('red', 'green', 'black')},
        'number': {'dataset': Pairs('red', 'green', 'red', 'blue')},
        'data_dir': {'data_dir': '/other'}, 'name': {'name': 'kind/other'}, 'split': {'split': 'train'}}
    images = images._replace(**others.get(change, {}))
    settings: dict[str, Any] = {
        'precision': {'precision': 'bfloat16'}, 'workers': {'workers': 1, 'batch_size': 1}}.get(change, {})
    if change in ('nothing', 'workers'):
        assert list(predict(model, images, output=path, **settings)) == []
    else:
        with pytest.raises(ValueError, match='holds other predictions from line 1 on'):
            predict(model, images, output=path, **settings)
    assert path.read_bytes() == before


def test_the_same_names_in_another_folder_are_other_images(
        model: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'out.jsonl'
    for name in ('one', 'two'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'x.png').write_bytes((folder / '00.PNG').read_bytes())
        monkeypatch.chdir(tmp_path / name)
        if name == 'one':
            assert len(list(predict(model, ['x.png'], output=path))) == 1
        else:
            with pytest.raises(ValueError, match='holds other predictions'):
                predict(model, ['x.png'], output=path)


def test_another_file_of_the_same_network_is_another_run(
        exported: Callable[..., Path], folder: Path, tmp_path: Path) -> None:
    """Two calibrations differ in numbers alone, as any two weights of an ONNX file may."""
    import onnx
    from onnx import numpy_helper

    path = exported(subnet=(16, 1.0))
    proto = onnx.load(path)
    weights = next(tensor for tensor in proto.graph.initializer if tensor.data_type == 1 and len(tensor.dims) > 1)
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights) * 1.5, weights.name))
    onnx.save(proto, tmp_path / 'other.onnx')
    output = tmp_path / 'out.jsonl'
    assert supervit('predict', path, folder, '--output', output).exit_code == 0
    result = supervit('predict', tmp_path / 'other.onnx', folder, '--output', output)
    assert result.exit_code == 1 and 'holds other predictions' in result.stderr
    assert supervit('predict', path, folder, '--output', output, '-b', 1).exit_code == 0


def test_an_int8_file_of_ranges_found_in_each_batch_goes_on_with_whole_batches(
        exported: Callable[..., Path], folder: Path, tmp_path: Path) -> None:
    program = load_program(exported(subnet=(16, 1.0), quantize='int8'))
    path, whole = tmp_path / 'out', tmp_path / 'whole'
    images = find_images([folder])
    expected = list(predict(program, images, output=whole, batch_size=4))
    lines = whole.read_bytes().splitlines(keepends=True)
    path.write_bytes(b''.join(lines[:6]))
    with pytest.raises(ValueError, match='holds other predictions'):
        predict(program, images, output=path, batch_size=3)
    assert list(predict(program, images, output=path, batch_size=4)) == expected[4:]
    assert path.read_bytes() == whole.read_bytes()
    broken = json.dumps({'index': 5, 'image': expected[5]['image'], 'error': '', 'run': json.loads(lines[0])['run']})
    path.write_bytes(b''.join([*lines[:5], broken.encode() + b'\n', *lines[6:]]))
    assert list(predict(program, images, output=path, batch_size=4)) == expected[4:8]
    assert path.read_bytes() == whole.read_bytes()


def write_slowly(rank: int, source: str, folder: str, path: str, place: str) -> None:
    result = supervit('predict', source, folder, '--output', path, '-b', 1)
    Path(place, str(rank)).write_text(f'{result.exit_code} {result.stderr}')


def test_of_two_processes_on_one_file_the_second_is_refused(source: str, folder: Path, tmp_path: Path) -> None:
    many, path = tmp_path / 'many', tmp_path / 'out' / 'out.jsonl'
    many.mkdir()
    for i in range(100):
        (many / f'{i:03d}.png').symlink_to(folder / f'{i % 5 * 2:02d}.PNG')
    fork = multiprocessing.get_context('fork')
    for _ in range(3):
        processes = [fork.Process(
            target=write_slowly, args=(rank, source, str(many), str(path), str(tmp_path))) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        said = sorted((tmp_path / str(rank)).read_text() for rank in range(2))
        assert said[0].startswith('0 '), said
        # Where one is done before the other begins, that finds all images there.
        assert (said[1].startswith('1 ') and 'written to by another process' in said[1]) or '100 images' in said[1]
        assert [row['index'] for row in read_lines(path)] == list(range(100))
        assert os.listdir(path.parent) == [path.name]
        path.unlink()


def test_a_file_is_locked_as_long_as_it_is_written_to(model: Any, folder: Path, tmp_path: Path) -> None:
    path, link = tmp_path / 'out.jsonl', tmp_path / 'link.jsonl'
    link.symlink_to(path)
    first = predict(model, folder, output=path, batch_size=1)
    for name in (path, link):
        with pytest.raises(OSError, match='is being written to by another process'):
            predict(model, folder, output=name)
    rows = iter(first)
    next(rows)
    with pytest.raises(OSError, match='is being written to by another process'):
        predict(model, folder, output=path)
    rows.close()  # type: ignore[attr-defined]
    assert len(list(predict(model, folder, output=link))) == 10
    del first
    assert sorted(os.listdir(tmp_path)) == ['link.jsonl', 'out.jsonl']
    predict(model, folder, output=path)  # never iterated over
    assert sorted(os.listdir(tmp_path)) == ['link.jsonl', 'out.jsonl']


@pytest.mark.parametrize('code', [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_the_file_system_has_no_locks_predictions_are_written(
        model: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, 'flock', refuse)
    for count in (11, 0):
        assert len(list(predict(model, folder, output=tmp_path / 'out.jsonl'))) == count


@pytest.mark.parametrize('rank, size', [(1, 1), (-1, 2), (2, 2), (0, 0), (0, -1), ('0', 1), (0, 1.5), (False, 1)])
def test_a_share_is_one_of_those_there_are(rank: Any, size: Any) -> None:
    with pytest.raises(ValueError, match='the rank from 0 and below the size'):
        Share(rank, size)


@pytest.mark.parametrize('command', ['predict', 'evaluate'])
@pytest.mark.parametrize('env', [
    dict(RANK=1), dict(RANK=2, WORLD_SIZE=2), dict(RANK=-1, WORLD_SIZE=2), dict(WORLD_SIZE=0), dict(WORLD_SIZE=2),
    dict(RANK='x', WORLD_SIZE=2), dict(RANK=0, WORLD_SIZE='x'), dict(RANK=0, WORLD_SIZE=0), dict(RANK='', WORLD_SIZE=2),
])
def test_an_environment_of_no_process_is_refused(
        source: str, folder: Path, tmp_path: Path, command: str, env: dict[str, Any]) -> None:
    images = [folder, '--output', tmp_path / 'x.jsonl'] if command == 'predict' else ['--data-dir', folder]
    result = supervit(command, source, *images, **env)
    assert result.exit_code == 1 and result.stdout == ''
    assert all(f'{key}={value}' in result.stderr.splitlines()[-1] for key, value in env.items())
    assert 'start processes with torchrun' in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('env', [dict(RANK=0), dict(WORLD_SIZE=1), dict(RANK=0, WORLD_SIZE=1)])
def test_one_process_of_one_does_all(source: str, folder: Path, env: dict[str, Any]) -> None:
    assert len(supervit('predict', source, folder, '--json', **env).stdout.splitlines()) == 11


@pytest.mark.parametrize('change', ['subnet', 'top', 'images', 'weights', 'foreign'])
def test_a_file_of_another_run_is_not_gone_on_with(
        model: Any, source: str, folder: Path, tmp_path: Path, change: str) -> None:
    path = tmp_path / 'predictions.jsonl'
    arguments = ['predict', source, folder, '--output', path]
    assert supervit(*arguments).exit_code == 0
    if change == 'foreign':
        path.write_text('{"a": 1}\n[]\n')
    if change == 'images':
        arguments[2] = folder / 'inner'
    if change == 'weights':
        torch.save({key: value + 1 for key, value in model.state_dict().items()}, tmp_path / 'other.pth')
        arguments += ['--checkpoint', tmp_path / 'other.pth']
    arguments += {'subnet': ['--subnet', '12:1'], 'top': ['--top', 1]}.get(change, [])
    before = path.read_bytes()
    result = supervit(*arguments)
    assert result.exit_code == 1
    assert 'predictions.jsonl holds other predictions from line' in result.stderr
    assert path.read_bytes() == before


def test_processes_share_the_images_and_each_is_done_once(source: str, folder: Path, tmp_path: Path) -> None:
    for rank in range(3):
        result = supervit(
            'predict', source, folder, '--output', tmp_path / 'p.jsonl', '-b', 2, RANK=rank, WORLD_SIZE=3)
        assert result.exit_code == 0, result.output
        assert bool(result.stderr) is (rank == 0)  # which says what was passed over
    assert sorted(path.name for path in tmp_path.iterdir()) == [f'p-{rank}-of-3.jsonl' for rank in range(3)]
    rows = [row for path in tmp_path.iterdir() for row in read_lines(path)]
    assert sorted(row['index'] for row in rows) == list(range(11))
    assert len({row['image'] for row in rows}) == 11
    result = supervit('predict', source, folder, RANK=0, WORLD_SIZE=2)
    assert (result.exit_code, 'need --output' in result.stderr) == (2, True)


def test_a_stream_is_shared_and_gone_on_with_too(model: Any, folder: Path, tmp_path: Path) -> None:
    images = [Image.open(path).convert('RGB') for path in sorted(folder.rglob('*.PNG'))]

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter([(image, 0) for image in images])

    def run(**kwargs: Any) -> list[Any]:
        return list(predict(model, Images(Stream()), batch_size=2, **kwargs))

    rows = run()
    assert [row['image'] for row in rows] == [f'image {i}' for i in range(11)]
    shares = [run(share=Share(rank, 2)) for rank in range(2)]
    assert sorted((row for share in shares for row in share), key=lambda row: row['index']) == rows
    path = tmp_path / 'out-1-of-2.jsonl'
    assert run(share=Share(1, 2), output=tmp_path / 'out.jsonl') == shares[1]
    path.write_text(''.join(path.read_text().splitlines(keepends=True)[:3]))
    assert run(share=Share(1, 2), output=tmp_path / 'out.jsonl') == shares[1][3:]


def test_a_tar_of_images_is_a_collection(source: str, folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / 'images.tar', 'w') as tar:
        for path in sorted(folder.rglob('*.PNG')):
            content = path.read_bytes()
            info = tarfile.TarInfo(f'any/{path.stem}.png')
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    result = supervit('predict', source, '--data-dir', tmp_path / 'images.tar', '--json', '--top', 1)
    assert result.exit_code == 0, result.output
    assert [os.path.basename(json.loads(line)['image']) for line in result.stdout.splitlines()] == [
        f'{i:02d}.png' for i in range(11)]


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_a_full_disk_is_said_with_the_way_on() -> None:
    with open('/dev/full', 'wb', buffering=0) as file:
        log = Log(Path('predictions.jsonl'), file, 'run', 0, [])
        with pytest.raises(OSError, match=r'No space left on device: predictions.jsonl keeps .* call again to go on'):
            log.write([{'index': 0}])


@pytest.mark.parametrize(('arguments', 'code', 'message'), [
    ([], 2, 'Give either IMAGE|FOLDER...'),
    (['.', '--data-dir', '.'], 2, 'Give either IMAGE|FOLDER...'),
    (['/nowhere'], 2, "'/nowhere' does not exist"),
    (['EMPTY'], 1, 'holds no image'),
    (['IMAGE', '--subnet', '13:0.5'], 1, 'img_size 13 is none of img_sizes'),
    (['IMAGE', '--subnet', '12:0.5', '--cascade', 'CASCADE'], 2, 'exclude each other'),
    (['IMAGE', '--top', '0'], 2, '0 is not in the range'),
    (['IMAGE', '--output', '/dev/null/x.jsonl'], 1, "cannot write to the folder '/dev/null'"),
    (['IMAGE', '--cascade', 'IMAGE'], 1, 'holds no cascade'),
])
def test_what_is_wrong_is_one_line(
        source: str, folder: Path, cascade: Path, tmp_path: Path, arguments: list[str], code: int, message: str,
) -> None:
    places = {'EMPTY': tmp_path, 'IMAGE': folder / '00.PNG', 'CASCADE': cascade}
    result = supervit('predict', source, *[places.get(argument, argument) for argument in arguments])
    assert (result.exit_code, result.stdout) == (code, '')
    assert message in result.stderr.splitlines()[-1]


def test_files_are_found_once_and_in_order(folder: Path) -> None:
    images = find_images([folder / '04.PNG', folder, folder / 'inner']).dataset
    names = [images.filename(i) for i in range(len(images))]
    assert names == [str(folder / name) for name in (
        '04.PNG', '00.PNG', '02.PNG', '06.PNG', '08.PNG', '10.PNG',
        'inner/01.PNG', 'inner/03.PNG', 'inner/05.PNG', 'inner/07.PNG', 'inner/09.PNG')]


def test_links_to_folders_are_followed_once(folder: Path, tmp_path: Path) -> None:
    images = tmp_path / 'images'
    images.mkdir()
    (images / 'a.png').write_bytes((folder / '00.PNG').read_bytes())
    for name in ('one', 'two'):
        (images / name).symlink_to('.')
    (tmp_path / 'again').symlink_to(images)
    assert len(find_images([images, tmp_path / 'again', images / 'a.png']).dataset) == 1


def test_the_parent_of_a_link_is_where_it_leads(folder: Path, tmp_path: Path) -> None:
    (tmp_path / 'real' / 'sub').mkdir(parents=True)
    (tmp_path / 'real' / 'x.png').write_bytes((folder / '00.PNG').read_bytes())
    (tmp_path / 'link').symlink_to('real/sub')
    images = find_images([f'{tmp_path}/link/../x.png'])
    assert os.path.samefile(images.dataset.filename(0), tmp_path / 'real' / 'x.png')


def test_a_folder_that_may_not_be_read_is_named(folder: Path, tmp_path: Path, close: Callable[[Path], None]) -> None:
    close(tmp_path / 'closed')
    (tmp_path / 'x.png').write_bytes((folder / '00.PNG').read_bytes())
    with pytest.raises(PermissionError, match='closed'):
        find_images([tmp_path])


@pytest.mark.parametrize('content', [b'notes without an end of line', b'{"a": 1}', b'{"index": 1, "image"', b'\n'])
def test_a_file_of_something_else_stays_as_it_is(source: str, folder: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / 'precious.txt'
    path.write_bytes(content)
    result = supervit('predict', source, folder, '--output', path)
    assert result.exit_code == 1 and 'holds other predictions' in result.stderr
    assert path.read_bytes() == content


def test_json_and_a_file_get_the_same_lines(source: str, folder: Path, tmp_path: Path) -> None:
    result = supervit('predict', source, folder, '--output', tmp_path / 'out.jsonl', '--json')
    rows = [{key: value for key, value in row.items() if key != 'run'} for row in read_lines(tmp_path / 'out.jsonl')]
    assert rows == [json.loads(line) for line in result.stdout.splitlines()] and len(rows) == 11
    result = supervit('predict', source, folder, '--output', '/dev/null')
    assert result.exit_code == 1 and 'is no file that can be read again' in result.stderr


@pytest.mark.parametrize(('changes', 'message'), [
    ({'stages': 5}, 'stages 5 are not two to four subnets'),
    ({'stages': None}, 'stages None are not two to four subnets'),
    ({'stages': [[24, 1.0]], 'thresholds': []}, 'are not two to four subnets'),
    ({'stages': [[24, 1.0], [8, 0.5]]}, 'not in ascending cost'),
    ({'thresholds': [float('nan')]}, 'threshold nan is not in'),
])
def test_a_cascade_edited_by_hand_is_checked_for_exported_files_too(
        exported: Callable[..., Path], cascades: Path, folder: Path, tmp_path: Path, changes: Any, message: str,
) -> None:
    content = json.loads((cascades / 'own.json').read_text()) | changes
    (tmp_path / 'edited.json').write_text(json.dumps(content))
    result = supervit('predict', exported(), folder, '--cascade', tmp_path / 'edited.json')
    assert result.exit_code == 1 and re.search(f'edited.json: .*{message}', result.stderr), result.stderr


def test_images_of_another_shape_are_refused_by_exported_files(exported: Callable[..., Path]) -> None:
    program = load_program(exported())
    with pytest.raises(ValueError, match=r'images of shape \(2, 1, 24, 24\) are no batch \[B, 3,'):
        program(torch.zeros(2, 1, 24, 24))
    with pytest.raises(TypeError, match='images are a list'):
        program([])  # type: ignore[arg-type]
    assert torch.equal(program(torch.ones(1, 3, 24, 24).double()), program(torch.ones(1, 3, 24, 24)))


def test_a_model_of_one_channel_classifies_images(folder: Path, tmp_path: Path) -> None:
    model: Any = timm.create_model('supervit_digits', in_chans=1, num_classes=2)
    torch.save(model.state_dict(), tmp_path / 'one.pth')
    for name in ('0', '1'):
        (tmp_path / 'data' / name).mkdir(parents=True)
        (tmp_path / 'data' / name / 'x.png').write_bytes((folder / '00.PNG').read_bytes())
    given = ['supervit_digits', '--checkpoint', tmp_path / 'one.pth', '--num-classes', 2, '--model-kwargs',
             'in_chans=1']
    result = supervit('predict', *given, folder / '00.PNG', '--json')
    assert result.exit_code == 0, result.output
    result = supervit('evaluate', *given, '--data-dir', tmp_path / 'data', '-j', 0, '--json')
    assert result.exit_code == 0 and json.loads(result.stdout)['rows'][0]['count'] == 2, result.output
