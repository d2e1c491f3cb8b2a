"""Predictions: what the model says, for each image once, whatever stops the run."""
import io
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


def test_a_folder_that_may_not_be_read_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'closed').mkdir()
    (tmp_path / 'x.png').write_bytes((folder / '00.PNG').read_bytes())
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith('closed'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scan(path)

    monkeypatch.setattr(os, 'scandir', refuse)
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
