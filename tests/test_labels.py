"""Labels follow the names that a network knows, and images are read as its checkpoint says that it was trained."""
import argparse
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from timm.data import ImageNetInfo
from torch.utils.data import Dataset, Subset

from timm_supervit import load_model
from timm_supervit.cli import main
from timm_supervit.images.datasets import open_dataset
from timm_supervit.tools.evaluate import evaluate

TIMM_SCRIPTS = os.environ.get('TIMM_SCRIPTS')
needs_scripts = pytest.mark.skipif(not TIMM_SCRIPTS, reason='TIMM_SCRIPTS does not name the folder of train.py')
NAMES = ('apple', 'banana', 'cherry', 'date', 'elder')
ORDER = ('elder', 'banana', 'apple', 'date', 'cherry')  # of the class map
NETWORK = dict(img_sizes=(16, 24), patch_size=8, embed_dim=24, depth=2, num_heads=2, drop_layers=(1,))


def supervit(*arguments: Any, code: int = 0) -> str:
    """Return what a command prints, on stdout where it succeeds and last on stderr where it fails."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stderr.strip().splitlines()[-1] if code else result.stdout


def count_right(*arguments: Any) -> dict[str, int]:
    rows = json.loads(supervit('evaluate', *arguments, '-j', 0, '--json'))['rows']
    return {f'{row.get("epoch", "")}:{row["img_size"]}:{row["keep_rate"]}': row['correct1'] for row in rows}


SETTINGS = ['='.join([key, str(value).strip('(),').replace(' ', '')]) for key, value in NETWORK.items()]


def run_script(name: str, *options: Any) -> None:
    result = subprocess.run(
        [sys.executable, '-P', str(Path(str(TIMM_SCRIPTS), name)), '--device', 'cpu', '-b', '10', *map(str, options),
         '--model-kwargs', *SETTINGS],
        capture_output=True, text=True, timeout=240, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert result.returncode == 0, result.stderr[-2000:]


def train(folder: Path, *options: Any) -> Path:
    """Train a few steps with timm's train.py; return the folder of the run."""
    run_script(
        'train.py', '--model', 'supervit_tiny', '--output', folder, '--experiment', 'run', '--epochs', '4',
        '--warmup-epochs', '0', '--opt', 'adamw', '--lr', '1e-2', '--workers', '0', '--color-jitter', '0', *options)
    return folder / 'run'


def validate(*options: Any) -> float:
    """Return the top-1 accuracy of the active subnet by timm's validate.py."""
    spec: Any = importlib.util.spec_from_file_location('validate', Path(str(TIMM_SCRIPTS), 'validate.py'))
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    given = ['--model', 'supervit_tiny', '--workers', '0', '--device', 'cpu', *map(str, options)]
    return script.validate(script.parser.parse_args([*given, '--model-kwargs', *SETTINGS]))['top1']


def make_images(folder: Path, names: Any = NAMES, splits: Any = ('train', 'validation'), mode: str = 'RGB') -> Path:
    """Write eight images of each class, in a color of its own."""
    for split in splits:
        for name in names:
            noise = np.random.default_rng(list(name.encode()))
            color = noise.choice([20, 120, 220], size=4)
            (folder / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = np.clip(color + noise.normal(0, 60, (24, 24, 4)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels, 'RGBA').convert(mode).save(folder / split / name / f'{i}.png')
    return folder


@pytest.fixture(scope='module')
def fruit(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('data') / 'fruit')


@pytest.fixture(scope='module')
def run(tmp_path_factory, fruit):
    """A run of train.py by a class map that is not in the order of the alphabet."""
    folder = tmp_path_factory.mktemp('mapped')
    (folder / 'map.txt').write_text('\n'.join(ORDER) + '\n')
    return train(folder, '--data-dir', fruit, '--class-map', folder / 'map.txt', '--num-classes', 5)


@pytest.fixture
def knowing():
    """Build a network that knows the names of its classes."""

    def create(names: Any, num_classes: int | None = None, **settings: Any) -> Any:
        model: Any = timm.create_model('supervit_tiny', num_classes=num_classes or len(names), **NETWORK, **settings)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        if names:
            model.pretrained_cfg['label_names'] = names
        return model.eval()

    return create


def count_by_name(model: Any, folder: Path, names: Any) -> int:
    """Count what the active subnet gets right, one image after the other, by the names of its classes."""
    transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model, use_test_size=True))
    right = 0
    for path in sorted(folder.glob('*/*.png')):
        with torch.no_grad():
            best = model(transform(Image.open(path).convert('RGB'))[None]).argmax().item()
        right += names[best] == path.parent.name
    return right


def active(results: Any) -> int:
    return next(row['correct1'] for row in results.rows if (row['img_size'], row['keep_rate']) == (24, 1.0))


@needs_scripts
def test_a_class_map_numbers_the_labels_as_in_train_py_and_validate_py(run, fruit, tmp_path):
    last = run / 'last.pth.tar'
    epochs = [line.split(',') for line in (run / 'summary.csv').read_text().splitlines()]
    by_script = {
        f'{row[0]}:24:1.0': round(float(row[epochs[0].index('eval_top1')]) * 40 / 100) for row in epochs[1:]}
    by_epoch = count_right(run, '--data-dir', fruit)
    assert {key: by_epoch[key] for key in by_script} == by_script
    counts = count_right(last, '--data-dir', fruit)
    assert counts == {key[1:]: count for key, count in by_epoch.items() if key[0] == '3'}
    given = ['--data-dir', fruit, '--num-classes', 5]
    top1 = validate(*given, '--class-map', run.parent / 'map.txt', '--checkpoint', last)
    assert counts[':24:1.0'] == round(top1 * 40 / 100)
    by_alphabet = validate(*given, '--checkpoint', last)
    assert by_alphabet != top1  # or this test could not fail

    supervit('convert', last, '--output', tmp_path / 'net')
    assert count_right(f'local-dir:{tmp_path / "net"}', '--data-dir', fruit) == counts
    supervit('export', last, '--format', 'onnx', '--output', tmp_path / 'exported')
    assert count_right(tmp_path / 'exported' / 'supervit_tiny.onnx', '--data-dir', fruit) == counts
    by_names = (['--data-dir', fruit], ['--data-dir', fruit, '--class-map', run.parent / 'map.txt'])
    found = [supervit('cascade', last, *options, '-j', 0, '--json', '--macs', '1e9', code=3) for options in by_names]
    assert found[0] == found[1]
    weights = tmp_path / 'weights.pth'  # which knows no names
    torch.save(load_model(str(last)).state_dict(), weights)
    by_hand = ['supervit_tiny', '--checkpoint', weights, *given, '--model-kwargs', *SETTINGS]
    assert count_right(*by_hand)[':24:1.0'] == round(by_alphabet * 40 / 100)
    assert count_right(*by_hand, '--class-map', run.parent / 'map.txt') == counts


@needs_scripts
def test_a_class_map_that_is_gone_is_asked_for(run, fruit, tmp_path):
    checkpoint = torch.load(run / 'last.pth.tar', weights_only=False)
    checkpoint['args'].class_map = '/nowhere/map.txt'
    torch.save(checkpoint, tmp_path / 'last.pth.tar')
    message = supervit('evaluate', tmp_path / 'last.pth.tar', '--data-dir', fruit, code=1)
    assert '/nowhere/map.txt' in message and '--class-map' in message
    given = ['--class-map', run.parent / 'map.txt']
    assert count_right(tmp_path / 'last.pth.tar', '--data-dir', fruit, *given) \
        == count_right(run / 'last.pth.tar', '--data-dir', fruit)


@needs_scripts
def test_a_class_map_that_contradicts_the_network_is_refused(run, fruit, tmp_path):
    (tmp_path / 'map.txt').write_text('\n'.join(NAMES) + '\n')
    message = supervit(
        'evaluate', run / 'last.pth.tar', '--data-dir', fruit, '--class-map', tmp_path / 'map.txt', code=1)
    assert "'apple'" in message and '--class-map' in message


def test_a_data_set_of_some_of_the_classes_is_evaluated(knowing, tmp_path):
    for names in (NAMES, ORDER):
        model = knowing(names)
        folder = make_images(tmp_path / names[0], ('date', 'banana'), ('validation',))
        results = evaluate(model, folder, workers=0)
        assert results.rows[0]['count'] == 16
        assert active(results) == count_by_name(model, folder / 'validation', names)


@pytest.mark.parametrize('names', [('apple', 'banana', 'cherry', 'date', 'fig'), ('a', 'b', 'c', 'd', 'e'), ('fig',)])
def test_a_folder_of_no_class_is_refused_by_name(knowing, exported, names, tmp_path):
    folder = make_images(tmp_path / 'foreign', names, ('validation',))
    foreign = sorted(set(names) - set(NAMES))
    for known in (NAMES, ORDER, dict(enumerate(NAMES))):
        with pytest.raises(ValueError, match=f"'{foreign[0]}'.* none of the 5 classes of the model"):
            evaluate(knowing(known), folder, workers=0)
    with pytest.raises(ValueError, match="none of the 10 classes of the model, name 0, name 1"):
        evaluate(load_model(str(exported('onnx'))), folder, workers=0)


def test_folders_of_numbers_are_classes_like_any(knowing, tmp_path):
    model = knowing([str(i) for i in (3, 1, 4, 0, 2)])
    folder = make_images(tmp_path / 'numbers', '1234', ('validation',))
    assert active(evaluate(model, folder, workers=0)) == count_by_name(model, folder / 'validation', '31402')
    foreign = make_images(tmp_path / 'foreign', NAMES, ('validation',))
    with pytest.raises(ValueError, match="'apple' and 4 more"):
        evaluate(model, foreign, workers=0)


def test_folders_that_are_the_numbers_of_the_classes_are_numbers(knowing, tmp_path):
    folder = make_images(tmp_path / 'numbers', '01234', ('validation',))
    model = knowing(ORDER)
    assert active(evaluate(model, folder, workers=0)) == count_by_name(model, folder / 'validation', '01234')
    with pytest.raises(ValueError, match='4 classes and the model 5'):
        evaluate(model, make_images(tmp_path / 'fewer', '0123', ('validation',)), workers=0)


def test_without_names_they_are_numbered_in_order_and_as_many(knowing, tmp_path):
    folder = make_images(tmp_path / 'fruit', NAMES, ('validation',))
    model = knowing((), 5)
    assert active(evaluate(model, folder, workers=0)) == count_by_name(model, folder / 'validation', NAMES)
    with pytest.raises(ValueError, match='5 classes and the model 4'):
        evaluate(knowing((), 4), folder, workers=0)


def test_imagenet_is_known_by_identifiers_and_by_words(knowing, tmp_path):
    synsets = ImageNetInfo().label_names()
    words = [name.split(',')[0] for name in ImageNetInfo().label_descriptions()]
    some = [synsets[i] for i in (7, 134, 517, 999)]  # of which two are cranes
    folder = make_images(tmp_path / 'some', some, ('validation',))
    model = knowing((), 1000)
    expected = count_by_name(model, folder / 'validation', synsets)
    assert active(evaluate(model, folder, workers=0)) == expected
    model.pretrained_cfg['label_names'] = synsets
    assert active(evaluate(model, folder, workers=0)) == expected
    model.pretrained_cfg['label_names'] = words
    with pytest.raises(ValueError, match='n02012849'):  # which of two cranes, the name does not say
        evaluate(model, folder, workers=0)
    whole = Words([words[i] for i in (0, 7, 999)], 5)
    model.pretrained_cfg['label_names'] = synsets
    assert active(evaluate(model, whole, workers=0)) == count_pairs(model, whole, (0, 7, 999))


def test_a_class_map_that_is_given_numbers_leaves_out_and_joins_folders_as_in_timm(knowing, tmp_path):
    folder = make_images(tmp_path / 'fruit', (*NAMES, 'fig'), ('validation',))
    (tmp_path / 'some.txt').write_text('fig\ndate\n')
    (tmp_path / 'joined.pkl').write_bytes(pickle.dumps({'apple': 1, 'cherry': 1, 'elder': 0}))
    for file in ('some.txt', 'joined.pkl'):
        for model in (knowing((), 2), knowing((), 5), knowing(('one', 'other'))):
            pairs = timm.data.create_dataset('', folder, class_map=str(tmp_path / file))
            found = evaluate(model, open_dataset(str(folder), class_map=str(tmp_path / file)), workers=0)
            assert found.rows[0]['count'] == len(pairs) < 48
            assert active(found) == count_pairs(model, pairs, range(5))
    (tmp_path / 'beyond.pkl').write_bytes(pickle.dumps({'apple': 2}))
    with pytest.raises(ValueError, match='the number 2, and the model has 2 classes'):
        evaluate(knowing((), 2), open_dataset(str(folder), class_map=str(tmp_path / 'beyond.pkl')), workers=0)
    foreign = make_images(tmp_path / 'foreign', ('x', 'y'), ('validation',))
    with pytest.raises(ValueError, match='--class-map'):
        open_dataset(str(foreign), class_map=str(tmp_path / 'some.txt'))


class Words(Dataset):
    """A data set that has names of classes as torchvision's have."""

    def __init__(self, classes: Any, count: int) -> None:
        self.classes, noise = classes, np.random.default_rng(0)
        self.images = [Image.fromarray(noise.integers(256, size=(24, 24, 3), dtype=np.uint8)) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], index % len(self.classes)


def count_pairs(model: Any, pairs: Any, numbers: Any) -> int:
    transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model, use_test_size=True))
    with torch.no_grad():
        return sum(
            model(transform(pairs[i][0])[None]).argmax().item() == numbers[pairs[i][1]] for i in range(len(pairs)))


def test_the_names_of_any_data_set_count_parts_of_it_too(knowing):
    model, pairs = knowing(ORDER), Words(NAMES, 30)
    numbers = [ORDER.index(name) for name in NAMES]
    assert active(evaluate(model, pairs, workers=0)) == count_pairs(model, pairs, numbers)
    part = Subset(Subset(pairs, range(1, 20)), range(3, 15))
    assert active(evaluate(model, part, workers=0)) == count_pairs(model, part, numbers)
    numbered = Words([str(i) for i in range(5)], 30)  # as a collection without names has them
    assert active(evaluate(model, numbered, workers=0)) == count_pairs(model, numbered, range(5))


def test_the_names_are_those_of_the_first_folders_and_no_image_is_looked_for(tmp_path, monkeypatch):
    from timm_supervit.loading.class_names import read_class_names

    folder = make_images(tmp_path / 'fruit', ('b10', 'b9', 'a'))
    (folder / 'train' / 'empty').mkdir()
    (folder / 'train' / 'read.me').touch()
    monkeypatch.setattr(os, 'walk', lambda *args, **kwargs: pytest.fail('it walks the whole folder'))
    assert read_class_names(folder, 3) == ['a', 'b9', 'b10']
    os.mkfifo(tmp_path / 'map.txt')
    with pytest.raises(ValueError, match='neither a folder nor a file'):
        read_class_names(tmp_path / 'map.txt', 3)


@pytest.fixture
def columns(tmp_path):
    """A data set of the Hub's kind in a folder, with columns of other names and its classes in another order."""
    datasets = pytest.importorskip('datasets')
    names = ['cherry', 'apple', 'elder', 'date', 'banana']
    source = make_images(tmp_path / 'source', names)
    for split in ('train', 'validation'):
        paths = sorted((source / split).glob('*/*.png'))
        features = datasets.Features({'picture': datasets.Image(), 'kind': datasets.ClassLabel(names=names)})
        table = datasets.Dataset.from_dict(
            {'picture': [str(path) for path in paths], 'kind': [path.parent.name for path in paths]}, features)
        (tmp_path / 'hub').mkdir(exist_ok=True)
        table.to_parquet(str(tmp_path / 'hub' / f'{split}.parquet'))
    return tmp_path / 'hub', source


@needs_scripts
def test_a_checkpoint_knows_the_kind_and_the_columns_of_its_data(columns, run, tmp_path):
    hub, source = columns
    options = ['--dataset', f'hfds/{hub}', '--data-dir', tmp_path / 'cache', '--input-key', 'picture',
               '--target-key', 'kind', '--num-classes', 5]
    last = train(tmp_path, *options) / 'last.pth.tar'
    expected = round(validate(*options, '--checkpoint', last) * 40 / 100)
    counts = count_right(last, '--data-dir', tmp_path / 'cache')
    assert counts[':24:1.0'] == expected
    assert counts == count_right(last, *options[:8])
    assert len(supervit('predict', last, '--data-dir', tmp_path / 'cache', '--json').splitlines()) == 40
    # Another network, which knows the classes by name, in another order.
    assert count_right(run / 'last.pth.tar', *options[:8]) == count_right(run / 'last.pth.tar', '--data-dir', source)
    message = supervit('evaluate', run / 'last.pth.tar', *options[:6], '--target-key', 'missing', code=1)
    assert 'missing' in message or '--target-key' in message


@needs_scripts
def test_a_checkpoint_fetches_nothing_unasked(run, tmp_path):
    checkpoint = torch.load(run / 'last.pth.tar', weights_only=False)
    checkpoint['args'].dataset = 'hfds/someone/something'
    torch.save(checkpoint, tmp_path / 'last.pth.tar')
    message = supervit('evaluate', tmp_path / 'last.pth.tar', '--data-dir', tmp_path, code=1)
    assert '--dataset hfds/someone/something' in message


@needs_scripts
def test_four_channels_train_in_timm_and_are_read_alike_by_all_commands(tmp_path):
    folder = make_images(tmp_path / 'data', NAMES[:3], mode='RGBA')
    options = ['--data-dir', folder, '--num-classes', 3, '--input-size', 4, 24, 24, '--input-img-mode', 'RGBA']
    last = train(tmp_path, *options) / 'last.pth.tar'
    counts = count_right(last, '--data-dir', folder)
    assert counts[':24:1.0'] == round(validate(*options, '--checkpoint', last) * 24 / 100)
    supervit('cascade', last, '--data-dir', folder, '-j', 0, code=3)  # it runs, and finds none better than subnets
    supervit('profile', last, '--rounds', 2)


@pytest.mark.parametrize(('mode', 'channels'), [('RGBA', 4), ('CMYK', 4), ('LA', 2), ('L', 1), ('HSV', 3)])
def test_images_of_any_mode_are_read_as_in_training(mode, channels, knowing, tmp_path):
    folder = make_images(tmp_path / 'data', NAMES[:3], ('validation',), mode='RGBA')
    model = knowing(NAMES[:3], in_chans=channels)
    args = argparse.Namespace(
        model='supervit_tiny', model_kwargs=NETWORK, num_classes=3, in_chans=channels, input_img_mode=mode,
        crop_pct=1.0)
    last, net, image = tmp_path / 'last.pth.tar', f'local-dir:{tmp_path / "net"}', folder / 'validation/cherry/3.png'
    torch.save({'state_dict': model.state_dict(), 'args': args}, last)
    read = np.array(Image.open(image).convert(mode)).reshape(24, 24, channels)
    pixels = torch.from_numpy(read).permute(2, 0, 1) / 255
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if channels == 3 else ((0.449,), (0.226,))
    with torch.no_grad():
        expected = model(((pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1))[None])

    supervit('convert', last, '--output', tmp_path / 'net')
    files = [last, net]
    if mode == 'CMYK':  # which is not what four channels are without a word
        supervit('export', last, '--format', 'onnx', '--quantize', 'int8', '--calibration-data', folder, '-j', 0,
                 '--output', tmp_path)
        supervit('export', last, '--format', 'onnx', '--output', tmp_path)
        files.append(tmp_path / 'supervit_tiny.onnx')
    counts = count_right(last, '--data-dir', folder)
    for file in files:
        row = json.loads(supervit('predict', file, image, '--json'))
        assert [found['probability'] for found in sorted(row['predictions'], key=lambda found: found['index'])] \
            == pytest.approx(expected.softmax(dim=1)[0].tolist(), abs=1e-4)
        assert count_right(file, '--data-dir', folder) == counts
    drawn = json.loads(supervit('visualize', last, image, '--subnet', '24:1', '--output', tmp_path, '--json'))
    assert drawn['rows'][0]['probability'] == pytest.approx(expected.softmax(dim=1).max().item(), abs=1e-4)


def test_channels_that_no_image_has_are_named(knowing, tmp_path):
    model: Any = timm.create_model('supervit_tiny', num_classes=5, in_chans=5, **NETWORK)
    folder = make_images(tmp_path / 'fruit', NAMES, ('validation',))
    with pytest.raises(ValueError, match=r'5 channels .* have 1 to 4'):
        evaluate(model, folder, workers=0)
    with pytest.raises(ValueError, match='RGBA has 4 channels, and the model 3'):
        open_dataset(str(folder), model=knowing(NAMES), input_img_mode='RGBA')
    with pytest.raises(ValueError, match='NONE has no channels'):
        open_dataset(str(folder), model=knowing(NAMES), input_img_mode='NONE')


def test_names_of_a_head_that_was_replaced_are_none(knowing, tmp_path):
    folder = make_images(tmp_path / 'data', NAMES[:2], ('validation',))
    model = knowing((), 2)
    expected = active(evaluate(model, folder, workers=0))
    model.pretrained_cfg['label_names'] = dict(enumerate(['x', 'y', NAMES[0], NAMES[1]]))
    assert active(evaluate(model, folder, workers=0)) == expected
    with pytest.raises(ValueError, match='--class-map'):
        evaluate(knowing((), 5), folder, workers=0)
