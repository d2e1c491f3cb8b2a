"""Results on disk, choosing from them, and evaluation against independent counts."""
import ast
import csv
import errno
import importlib.util
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from processes import run_ranks

import timm_supervit
from timm_supervit import Cascade, Subnet
from timm_supervit.cli import main
from timm_supervit.images.datasets import open_dataset
from timm_supervit.results.files import check_output_folder, fill_folder
from timm_supervit.results.fingerprint import fingerprint
from timm_supervit.results.pictures import draw_operating_points
from timm_supervit.results.rows import COLUMNS, Results, load_results, save_results
from timm_supervit.tools import export as export_tool
from timm_supervit.tools.cascade import calibrate
from timm_supervit.tools.choose import best_subnet, front_of, merge_results
from timm_supervit.tools.convert import convert
from timm_supervit.tools.evaluate import evaluate
from timm_supervit.tools.export import export
from timm_supervit.tools.predict import predict
from timm_supervit.tools.profile import count_macs, profile
from timm_supervit.tools.visualize import visualize

CLASSES = 3


def write_text(path, text):
    with fill_folder(path.parent) as folder:
        (folder / path.name).write_text(text)


def make_model(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model('supervit_digits', **{'num_classes': CLASSES, **kwargs})
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # as initialized, all images would get the same class
    return model.eval()


def make_images(folder: Path, count: int = 11, classes: int = CLASSES) -> Path:
    generator = torch.Generator().manual_seed(1)
    for i in range(count):
        path = folder / 'validation' / f'class{i % classes}' / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (30, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    return folder


@pytest.fixture(scope='module')
def eleven(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp('eleven'))


@pytest.fixture
def damaged(eleven, tmp_path):
    """Eleven images of which one is cut off, and that one's path."""
    folder = shutil.copytree(eleven, tmp_path / 'images')
    path = folder / 'validation' / 'class1' / '4.png'
    path.write_bytes(path.read_bytes()[:200])
    return folder, path


def black_images(count, target=0):
    return [(Image.new('RGB', (24, 24)), target)] * count


def make_rows():
    # 20:0.5 is worse than the cheaper 16:1.0.
    values = [(12, 0.5, 1, 80.0), (12, 1.0, 2, 90.0), (16, 1.0, 3, 94.0), (20, 0.5, 4, 93.0), (24, 1.0, 8, 97.0)]
    return [
        dict(img_size=size, keep_rate=rate, macs=cost * 10**6, top1=top1, latency_ms=10. * cost, throughput=100 / cost)
        for size, rate, cost, top1 in values
    ]


# Files


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / 'table.json'
    write_text(path, 'good')
    message = 'No space left on device: .* as it was'
    with pytest.raises(OSError, match=message), fill_folder(tmp_path) as folder:
        (folder / path.name).write_text('ha')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == 'good'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_a_really_full_disk_is_reported(tmp_path):
    path = tmp_path / 'table.json'
    write_text(path, 'good')
    with pytest.raises(OSError, match=r'No space left on device: .* as it was'), fill_folder(tmp_path) as folder:
        (folder / path.name).symlink_to('/dev/full')
        (folder / path.name).write_text('half of it')
    assert path.read_text() == 'good'
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_folder_stays_as_it_was(tmp_path):
    (tmp_path / 'config.json').write_text('old')
    with pytest.raises(KeyboardInterrupt), fill_folder(tmp_path) as folder:
        (folder / 'config.json').write_text('new')
        raise KeyboardInterrupt
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [('config.json', 'old')]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match=r"cannot write to the folder '.*file/x'"):
        check_output_folder(tmp_path / 'file' / 'x')


# Results


def test_results_survive_json_and_csv(tmp_path):
    results = Results('supervit_digits', [*make_rows(), dict(model='deit_tiny', macs=5)], {'partial': False})
    assert save_results(results, tmp_path, 'evaluate') == 'evaluate.json'
    assert load_results(tmp_path / 'evaluate.json') == results
    with (tmp_path / 'evaluate.csv').open() as file:
        table = list(csv.DictReader(file))
    assert [row['top1'] for row in table] == ['80.0', '90.0', '94.0', '93.0', '97.0', '']
    assert table[-1]['model'] == 'deit_tiny'


def test_partial_results_never_take_the_place_of_complete_ones(tmp_path):
    complete, partial = Results('m', make_rows()), Results('m', make_rows()[:1], {'partial': True})
    for results in (complete, partial, complete, partial):
        save_results(results, tmp_path, 'evaluate')
    assert load_results(tmp_path / 'evaluate.json') == complete
    assert load_results(tmp_path / 'evaluate-partial.json') == partial


@pytest.mark.parametrize('content', [
    '', '[1]', '{"model": "x"}', '{"model": null, "rows": []}', '{"model": "x", "rows": {}}', '\x00', '[' * 100_000,
    '{"model": "x", "rows": [], "info": 3}', '{"model": "x", "rows": [], "network": []}', '1' * 5000,
    '{"model": "x", "rows": [], "more": 1}', '{"model": "x", "rows": [null]}'])
def test_a_file_that_holds_no_results_is_refused(tmp_path, content):
    path = tmp_path / 'evaluate.json'
    path.write_text(content)
    with pytest.raises(ValueError, match=r'evaluate\.json holds no table of operating points'):
        load_results(path)


@pytest.mark.parametrize(('row', 'message'), [
    ('{"keep_rate": 1}', 'img_size None'),
    ('{"img_size": "12", "keep_rate": 1}', "img_size '12'"),
    ('{"img_size": 12, "keep_rate": "all"}', "keep_rate 'all'"),
    ('{"img_size": 12, "keep_rate": NaN}', 'keep_rate nan'),
    ('{"img_size": 12}', 'row 0 names neither'),
    ('{"img_size": 12, "keep_rate": 1, "top1": NaN}', 'row 0: top1 is nan'),
    ('{"img_size": 12, "keep_rate": 1, "macs": 1e999}', 'row 0: macs is inf'),
    ('{"img_size": 12, "keep_rate": 1, "macs": "many"}', "row 0: macs is 'many'"),
    ('{"img_size": 12, "keep_rate": 1, "latency_ms": -1}', 'row 0: latency_ms is -1'),
    ('{"img_size": 12, "keep_rate": 1, "count": [1]}', r'row 0: count is \[1\]'),
    ('{"model": "x", "throughput": true}', 'row 0: throughput is True'),
])
def test_a_row_with_a_value_that_cannot_be_is_named(tmp_path, row, message):
    path = tmp_path / 'evaluate.json'
    path.write_text(f'{{"model": "x", "rows": [{row}]}}')
    with pytest.raises(ValueError, match=rf'evaluate\.json holds no table of operating points \(.*{message}'):
        load_results(path)


def test_the_picture_has_the_size_for_a_readme(tmp_path):
    rows = [*make_rows(), dict(model='deit_tiny', macs=int(5e6), top1=70.0), dict(img_size=12, keep_rate=0.7, macs=1)]
    save_results(Results('m', rows), tmp_path, 'a', {'.png': draw_operating_points(rows, title='digits')})
    with Image.open(tmp_path / 'a.png') as picture:
        assert picture.size == (1600, 1000)


# Choosing


def test_the_most_accurate_subnet_inside_the_budget_is_chosen():
    rows = make_rows()
    assert best_subnet(rows)['img_size'] == 24
    assert best_subnet(rows, macs=5e6)['img_size'] == 16
    assert best_subnet(rows, latency_ms=29.9)['img_size'] == 12
    assert best_subnet(rows, throughput=100 / 3)['img_size'] == 16
    assert best_subnet(rows, macs=8e6, throughput=60)['keep_rate'] == 0.5


def test_of_equally_accurate_subnets_the_cheapest_is_chosen():
    rows = make_rows()
    rows[-1]['top1'] = 94.0
    assert best_subnet(rows)['img_size'] == 16


def test_the_nearest_miss_is_named_when_nothing_fits():
    message = r'at most 5\.00 ms; the nearest is 12:0\.5 with latency, median 10\.00 ms'
    with pytest.raises(ValueError, match=message):
        best_subnet(make_rows(), latency_ms=5)
    message = r'throughput at least 101\.0.*nearest is 12:0\.5 with throughput 100\.0 images/s'
    with pytest.raises(ValueError, match=message):
        best_subnet(make_rows(), throughput=101)


def test_a_budget_that_was_not_measured_is_refused():
    rows = [{key: value for key, value in row.items() if key != 'latency_ms'} for row in make_rows()]
    with pytest.raises(ValueError, match=r'latency_ms; add .*"supervit profile"'):
        best_subnet(rows, latency_ms=5)
    with pytest.raises(ValueError, match='macs 0 is no budget'):
        best_subnet(rows, macs=0)


def test_the_pareto_front_leaves_out_what_is_beaten():
    assert [row['img_size'] for row in front_of(make_rows())] == [12, 12, 16, 24]


def test_a_high_throughput_is_a_low_cost():
    rows = make_rows()
    assert len(front_of(rows, 'throughput')) == 4
    rows[-1]['throughput'] = 1000
    assert front_of(rows, 'throughput') == [rows[-1]]


def save_rows(folder, name, rows):
    return folder / save_results(Results('m', rows), folder, name)


def test_results_of_evaluate_and_profile_are_joined_by_subnet(tmp_path):
    point = dict(img_size=12, keep_rate=0.5, macs=7)
    evaluated = save_rows(tmp_path, 'evaluate', [dict(point, top1=80.0)])
    profiled = save_rows(tmp_path, 'profile', [
        dict(point, batch_size=1, latency_ms=3.0),
        dict(point, batch_size=8, latency_ms=9.0),
        dict(model='deit', macs=1),
    ])
    assert merge_results([evaluated, profiled], {'batch_size': 8}).rows == [
        dict(point, top1=80.0, batch_size=8, latency_ms=9.0)]
    with pytest.raises(ValueError, match=r'subnet 12:0\.5 in several settings; choose: batch_size=1 or 8$'):
        merge_results([evaluated, profiled])
    with pytest.raises(ValueError, match=r'batchsize is no setting .*; use epoch, img_size, keep_rate, '):
        merge_results([profiled], {'batchsize': 8})


@pytest.mark.parametrize(('first', 'second', 'message'), [
    (dict(top1=80.0), dict(top1=81.0), 'measured twice, top1 80.0 and 81.0; give one of the two'),
    (dict(macs=7), dict(macs=8), 'macs 7 and 8'),
    (dict(runtime='eager', latency_ms=1., latency_iqr_ms=.1), dict(runtime='onnx', latency_ms=2., latency_iqr_ms=.3),
     'in several settings; choose: runtime=eager or onnx$'),
])
def test_nothing_measured_replaces_another_measurement(tmp_path, first, second, message):
    point = dict(img_size=12, keep_rate=0.5)
    paths = [save_rows(tmp_path, name, [point | row]) for name, row in [('first', first), ('second', second)]]
    with pytest.raises(ValueError, match=rf'first\.json and .*second\.json: subnet 12:0\.5.*{message}'):
        merge_results(paths)
    both = save_rows(tmp_path, 'both', [point | first, point | second])
    with pytest.raises(ValueError, match=rf'both\.json: subnet 12:0\.5.*{message}'):
        merge_results([both])
    assert merge_results([paths[0], save_rows(tmp_path, 'same', [point | first])]).rows == [point | first]


def small_digits(**settings):
    torch.manual_seed(0)
    return timm.create_model('supervit_digits', **dict(embed_dim=48, depth=2, drop_layers=(1,)) | settings).eval()


def measure(model, folder, name):
    """Evaluate, or profile, one subnet and save it."""
    if name.startswith('profile'):
        results = profile(model, [Subnet(12, 0.5)], rounds=2)
    else:
        results = evaluate(model, black_images(1), [Subnet(12, 0.5)], workers=0)
    return folder / save_results(results, folder, name)


def test_costs_and_accuracy_of_one_network_are_joined_whatever_its_weights_cost(tmp_path):
    trained = small_digits(drop_path_rate=0.1, keep_rates=(0.5,), train_subnets='all')  # acts in training alone
    torch.nn.init.normal_(trained.head.weight)
    row, = merge_results([measure(trained, tmp_path, 'evaluate'), measure(small_digits(), tmp_path, 'profile')]).rows
    assert {'top1', 'latency_ms'} <= row.keys()


@pytest.mark.parametrize('setting', [
    dict(drop_layers=(0,)), dict(img_sizes=(12, 24)), dict(depth=3), dict(embed_dim=96), dict(num_heads=4),
    dict(num_classes=5), dict(patch_size=2), dict(mlp_ratio=3.0), dict(qkv_bias=False), dict(act_layer='relu'),
    dict(norm_layer=torch.nn.RMSNorm), dict(reg_tokens=1), dict(init_values=0.1), dict(global_pool='avg'),
])
def test_results_of_networks_with_another_setting_are_not_joined(tmp_path, setting):
    named = next(iter(setting)) if fingerprint(small_digits()).keys() & setting else 'modules'
    paths = [measure(small_digits(), tmp_path, 'evaluate'), measure(small_digits(**setting), tmp_path, 'profile')]
    with pytest.raises(ValueError, match=rf'evaluate\.json and .*profile\.json are of different networks: {named} '):
        merge_results(paths)


def test_accuracies_of_other_weights_are_not_joined(tmp_path):
    model = small_digits()
    first = measure(model, tmp_path, 'first')
    with torch.no_grad():
        model.head.bias[3] += 1e-3
    second = measure(model, tmp_path, 'second')
    message = r'different networks: weights [0-9a-f]{12} \(raw\) and [0-9a-f]{12} \(averaged\)'
    content = json.loads(second.read_text())
    content['network']['weights_kind'] = 'averaged'
    second.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        merge_results([first, measure(model, tmp_path, 'profile'), second])


def test_a_model_card_takes_only_results_of_its_own_weights(tmp_path):
    model = small_digits()
    results = measure(model, tmp_path, 'evaluate')
    convert(model, tmp_path / 'same', results=results)
    assert 'top-1 [%]' in (tmp_path / 'same' / 'README.md').read_text()
    with torch.no_grad():
        model.head.bias[3] += 1e-3
    with pytest.raises(ValueError, match=r'of another network than .*: weights'):
        convert(model, tmp_path / 'other', results=results)
    assert not (tmp_path / 'other').exists()


def test_a_network_stays_the_same_when_it_is_saved_and_loaded(tmp_path):
    model = small_digits()
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert fingerprint(timm.create_model(f'local-dir:{tmp_path}', pretrained=True)) == fingerprint(model)


def test_results_that_name_no_network_are_not_joined_with_some_that_do(tmp_path):
    unknown = save_rows(tmp_path, 'unknown', [dict(img_size=12, keep_rate=0.5, top1=80.0)])
    with pytest.raises(ValueError, match='does not say what its network is'):
        merge_results([unknown, measure(small_digits(), tmp_path, 'profile')])
    other = tmp_path / save_results(Results('other', load_results(unknown).rows), tmp_path, 'other')
    with pytest.raises(ValueError, match='different networks: model m and other'):
        merge_results([unknown, other])


def test_every_key_of_results_has_a_title_and_is_a_setting_a_cost_or_an_outcome(tmp_path):
    model = small_digits()
    rows = [*load_results(measure(model, tmp_path, 'profile')).rows, *load_results(measure(model, tmp_path, 'a')).rows]
    for key in {key for row in rows for key in row}:
        assert COLUMNS[key].kind in ('setting', 'cost', 'outcome')
        assert COLUMNS[key].title


@pytest.mark.parametrize('interrupted', [0, 1])
def test_what_rests_on_partial_results_is_partial_too(tmp_path, interrupted):
    point = dict(img_size=12, keep_rate=0.5)
    paths = [
        tmp_path / save_results(Results('m', [dict(point, **row)], {'partial': i == interrupted}), tmp_path, name)
        for i, (name, row) in enumerate([('evaluate', dict(top1=80.0)), ('profile', dict(latency_ms=3.0))])]
    assert merge_results(paths).partial
    assert not merge_results([paths[1 - interrupted]]).partial


# What tools have in common


PACKAGE = Path(timm_supervit.__file__).parent
ROOMS = ('images', 'loading', 'models', 'programs', 'results', 'tools', 'training')


@pytest.mark.parametrize(
    'path', [path for room in ROOMS for path in sorted((PACKAGE / room).glob('*.py'))],
    ids=lambda path: f'{path.parent.name}/{path.name}')
def test_all_but_the_command_line_returns_what_it_found_and_prints_nothing(path):
    tree = ast.parse(path.read_text())
    imported = {
        name.partition('.')[0] for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in [getattr(node, 'module', None) or '', *(alias.name for alias in node.names)]}
    assert not imported & {'rich', 'click', 'tqdm', 'cli'}
    assert not any(isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'print' for node in ast.walk(tree))


def test_every_tool_takes_the_macs_that_the_model_gives(tmp_path, monkeypatch):
    model, subnet, written = make_model(), Subnet(16, 0.7), []
    monkeypatch.setattr(type(model), 'subnet_macs', lambda self, subnets=None: {subnet: 1016})
    monkeypatch.setattr(
        export_tool, 'write_program', lambda module, images, path, *_: [written.append(module), path.touch()])
    monkeypatch.setattr(export_tool, 'load_program', lambda path: lambda images, *subnet: written[0](images))
    Image.new('RGB', (24, 24)).save(tmp_path / 'image.png')
    counted = [
        evaluate(model, black_images(1), [subnet], workers=0).rows[0]['macs'],
        profile(model, [subnet], rounds=2).rows[0]['macs'],
        visualize(model, [tmp_path / 'image.png'], [subnet]).results.rows[0]['macs'],
        export(model, tmp_path / 'exported', 'pt2', [subnet])[0]['subnets'][0]['macs'],
    ]
    assert counted == [1016] * 4


def test_progress_is_told_what_is_done_and_how_many_steps_there_are():
    model, told = make_model(), []

    def follow(steps, label):
        told.append((label, len(steps)))
        return steps

    evaluate(model, black_images(5), batch_size=2, workers=0, progress=follow)
    profile(model, model.subnets[:2], rounds=3, progress=follow)
    assert told == [('Evaluating', 3), ('Preparing', 2), ('Measuring', 3)]


# Evaluation


@pytest.mark.parametrize('name', ['supervit_digits', 'supervit_tiny', 'test_vit'])
def test_other_networks_are_counted_alike_and_left_alone(name):
    model = timm.create_model(name)
    before = {key: value.device for key, value in model.state_dict().items()}
    count = count_macs(model)
    assert count > 0
    if name != 'test_vit':
        assert count == model.macs(model.subnet)
    assert {key: value.device for key, value in model.state_dict().items()} == before


def count_one_by_one(model, folder):
    """Count with one image and one subnet at a time, without the loader of the package."""
    dataset = timm.data.create_dataset('', root=str(folder), split='validation')
    dataset.transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    counts = {subnet: [0, 0] for subnet in model.subnets}
    for image, target in dataset:
        for subnet, count in counts.items():
            with torch.no_grad():
                scores = model(image[None], **subnet._asdict())[0]
            place = int((scores > scores[target]).sum())
            count[0] += place < 1
            count[1] += place < 5
    return counts


def test_evaluation_counts_what_one_image_at_a_time_counts(eleven):
    model = make_model()
    results = evaluate(model, eleven, batch_size=4, workers=0)
    expected = count_one_by_one(model, eleven)
    assert {(row['img_size'], row['keep_rate']): [row['correct1'], row['correct5']] for row in results.rows} == expected
    assert len({tuple(count) for count in expected.values()}) > 1
    assert all(row['count'] == 11 and row['top1'] == 100 * row['correct1'] / 11 for row in results.rows)
    assert (results.info['partial'], results.info['skipped']) == (False, [])
    assert results.info['data_dir'] == str(eleven)


def test_evaluation_leaves_the_mode_of_the_model_and_takes_the_subnets_asked_for(eleven):
    model = make_model().train()
    results = evaluate(model, eleven, [(16, 0.7), (12, 0.3)], workers=0, precision='bfloat16')
    assert [(row['img_size'], row['keep_rate']) for row in results.rows] == [(16, 0.7), (12, 0.3)]
    assert model.training
    with pytest.raises(ValueError, match='img_size 17 is none of img_sizes'):
        evaluate(model, eleven, [(17, 0.7)], workers=0)


@pytest.mark.parametrize('settings', [dict(num_classes=0), dict(num_classes=1), dict(global_pool='')])
def test_a_network_without_classes_has_no_accuracy_and_predicts_nothing(eleven, tmp_path, settings):
    model = make_model(**settings)
    for run in (lambda: evaluate(model, eleven, workers=0), lambda: calibrate(model, eleven, workers=0),
                lambda: predict(model, eleven, output=tmp_path / 'predictions.jsonl'),
                lambda: Cascade(model, [(12, 0.3), (16, 0.7)], [0.9])):
        with pytest.raises(ValueError, match=r'(num_classes [01]|global_pool).*2 or more'):
            run()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('workers', [0, 1])
def test_an_unreadable_image_stops_the_run_and_is_named(damaged, workers):
    folder, path = damaged
    with pytest.raises(OSError, match=rf'image {path} cannot be read \(.*truncated.*--skip-bad-images'):
        evaluate(make_model(), folder, [(12, 0.3)], batch_size=4, workers=workers)


def test_unreadable_images_are_skipped_named_and_not_counted(damaged):
    model, (folder, path) = make_model(), damaged
    results = evaluate(model, folder, batch_size=4, workers=0, skip_bad_images=True)
    path.unlink()
    assert results.info['skipped'] == [str(path)]
    assert {(row['img_size'], row['keep_rate']): [row['correct1'], row['correct5']] for row in results.rows} \
        == count_one_by_one(model, folder)
    assert results.rows[0]['count'] == 10


def test_data_that_does_not_fit_is_refused_before_any_work(tmp_path):
    model = make_model()
    with pytest.raises(FileNotFoundError, match="'/nowhere' does not exist"):
        open_dataset('/nowhere')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(RuntimeError, match='Found 0 images'):
        open_dataset(str(tmp_path / 'empty'))
    folder = make_images(tmp_path / 'four', classes=4)
    with pytest.raises(ValueError, match='the data set has 4 classes and the model 3'):
        evaluate(model, folder)
    with pytest.raises(ValueError, match='class 3 of an image is none of the 3 classes'):
        evaluate(model, black_images(1, target=3), workers=0)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_logits_that_are_not_finite_are_named_and_not_counted_as_class_0(value, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.pos_embed_list[2][0, 5] = value  # one patch of 20 x 20 pixels
    assert evaluate(model, black_images(3), [(16, 0.5), (24, 1.0)], workers=0).rows[0]['count'] == 3
    message = r'subnet 20:1 gives logits that are not finite; check the weights'
    with pytest.raises(RuntimeError, match=message):
        evaluate(model, black_images(3), [(16, 0.5), (20, 1.0), (24, 1.0)], workers=0)
    Image.new('RGB', (24, 24)).save(tmp_path / 'image.png')
    with pytest.raises(RuntimeError, match=message):
        visualize(model, [tmp_path / 'image.png'], [(24, 1.0), (20, 1.0)])


def interrupt_after(count):
    def follow(steps, label):
        for i, step in enumerate(steps):
            if i == count:
                raise KeyboardInterrupt
            yield step

    return follow


def test_an_interrupted_evaluation_returns_what_was_counted(eleven):
    model = make_model()
    results = evaluate(model, eleven, batch_size=4, workers=0, progress=interrupt_after(2))
    assert results.partial
    assert results.rows[0]['count'] == 8
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, eleven, batch_size=4, workers=0, progress=interrupt_after(0))


def evaluate_on_a_rank(rank, port, arguments, folder):
    """Run the command as torchrun does; write down what it printed."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT=str(port))
    result = CliRunner().invoke(main, ['evaluate', *arguments, '--json'])
    assert result.exit_code == 0, result.output
    (folder / f'{rank}.json').write_text(result.stdout)
    (folder / f'{rank}.txt').write_text(result.stderr)


def test_two_processes_count_eleven_images_exactly_and_the_first_prints_it(damaged, tmp_path):
    model, (folder, _) = make_model(), damaged
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    arguments = [
        'supervit_digits', '--checkpoint', str(tmp_path / 'model.pth'), '--num-classes', str(CLASSES), '--device',
        'cpu', '--data-dir', str(folder), '-b', '2', '--workers', '0', '--skip-bad-images']
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        port = probe.getsockname()[1]
    run_ranks(evaluate_on_a_rank, port, arguments, tmp_path)
    single = json.loads(CliRunner().invoke(main, ['evaluate', *arguments, '--json']).stdout)
    assert json.loads((tmp_path / '0.json').read_text()) == single
    assert 'Weights: model.pth' in (tmp_path / '0.txt').read_text()
    assert (tmp_path / '1.json').read_text() == (tmp_path / '1.txt').read_text() == ''
    assert single['rows'][0]['count'] == 10


def load_validate_py():
    spec = importlib.util.spec_from_file_location('validate', Path(os.environ['TIMM_SCRIPTS']) / 'validate.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif('TIMM_SCRIPTS' not in os.environ, reason='TIMM_SCRIPTS names no folder with timm\'s validate.py')
@pytest.mark.parametrize('amp', [(), ('--amp', '--amp-dtype', 'bfloat16')])
def test_evaluation_equals_validate_py_for_each_subnet(tmp_path, amp):
    model, folder = make_model(), make_images(tmp_path / 'images', count=41)
    checkpoint, script = tmp_path / 'model.pth', load_validate_py()
    torch.save(model.state_dict(), checkpoint)
    for row in evaluate(model, folder, batch_size=16, workers=0, precision='bfloat16' if amp else 'float32').rows:
        published = script.validate(script.parser.parse_args([
            str(folder), '--model', 'supervit_digits', '--num-classes', str(CLASSES), '--checkpoint', str(checkpoint),
            '--device', 'cpu', '--batch-size', '16', '--workers', '0', *amp,
            '--model-kwargs', f'img_size={row["img_size"]}', f'keep_rate={row["keep_rate"]}',
        ]))
        assert (published['top1'], published['top5']) == (round(row['top1'], 4), round(row['top5'], 4))
        assert row['correct1'] == round(published['top1'] * 41 / 100)
