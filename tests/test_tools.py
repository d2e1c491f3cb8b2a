"""Results on disk, choosing from them, and evaluation against independent counts."""
import csv
import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from timm_supervit.tools.choose import best_subnet, merge_results, pareto_front
from timm_supervit.tools.data import create_evaluation_loader, open_dataset
from timm_supervit.tools.evaluate import evaluate
from timm_supervit.tools.files import check_output_folder, fill_folder, replace_file, write_text
from timm_supervit.tools.macs import count_macs
from timm_supervit.tools.pictures import draw_operating_points
from timm_supervit.tools.results import Results, load_results, save_results

CLASSES = 3


def make_model(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model('supervit_digits', num_classes=CLASSES, **kwargs)
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
    message = r'No space left on device: .*table\.json was not written'
    with pytest.raises(OSError, match=message), replace_file(path) as temporary:
        temporary.write_text('ha')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == 'good'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_a_really_full_disk_is_reported(tmp_path):
    path = tmp_path / 'table.json'
    write_text(path, 'good')
    with pytest.raises(OSError, match='No space left on device'), replace_file(path) as temporary:
        temporary.symlink_to('/dev/full')
        temporary.write_text('half of it')
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
    json_path, csv_path = save_results(results, tmp_path, 'evaluate')
    assert load_results(json_path) == results
    with csv_path.open() as file:
        table = list(csv.DictReader(file))
    assert [row['top1'] for row in table] == ['80.0', '90.0', '94.0', '93.0', '97.0', '']
    assert table[-1]['model'] == 'deit_tiny'


@pytest.mark.parametrize('content', ['', '[1]', '{"model": "x"}', '{"model": "x", "rows": [{"keep_rate": 1}]}', '\x00'])
def test_a_file_that_holds_no_results_is_refused(tmp_path, content):
    path = tmp_path / 'evaluate.json'
    path.write_text(content)
    with pytest.raises(ValueError, match='holds no table of operating points'):
        load_results(path)


def test_the_picture_has_the_size_for_a_readme(tmp_path):
    rows = [*make_rows(), dict(model='deit_tiny', macs=int(5e6), top1=70.0), dict(img_size=12, keep_rate=0.7, macs=1)]
    draw_operating_points(rows, tmp_path / 'a.png', title='digits')
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
    with pytest.raises(ValueError, match=r'no subnet has at most 5\.00 lat.*nearest is 12:0\.5 with 10\.00 latency'):
        best_subnet(make_rows(), latency_ms=5)
    with pytest.raises(ValueError, match=r'nearest is 12:0\.5 with 100\.0 throughput'):
        best_subnet(make_rows(), throughput=101)


def test_a_budget_that_was_not_measured_is_refused():
    rows = [{key: value for key, value in row.items() if key != 'latency_ms'} for row in make_rows()]
    with pytest.raises(ValueError, match='nothing about latency_ms; add the file that "supervit profile" wrote'):
        best_subnet(rows, latency_ms=5)
    with pytest.raises(ValueError, match='macs 0 is no budget'):
        best_subnet(rows, macs=0)


def test_the_pareto_front_leaves_out_what_is_beaten():
    assert [row['img_size'] for row in pareto_front(make_rows())] == [12, 12, 16, 24]


def test_a_high_throughput_is_a_low_cost():
    rows = make_rows()
    assert len(pareto_front(rows, 'throughput')) == 4
    rows[-1]['throughput'] = 1000
    assert pareto_front(rows, 'throughput') == [rows[-1]]


def save_rows(folder, name, rows):
    return save_results(Results('m', rows), folder, name)[0]


def test_results_of_evaluate_and_profile_are_joined_by_subnet(tmp_path):
    point = dict(img_size=12, keep_rate=0.5, macs=7)
    evaluated = save_rows(tmp_path, 'evaluate', [dict(point, top1=80.0)])
    profiled = save_rows(tmp_path, 'profile', [
        dict(point, batch_size=1, latency_ms=3.0),
        dict(point, batch_size=8, latency_ms=9.0),
        dict(model='deit', macs=1),
    ])
    assert merge_results([evaluated, profiled], {'batch_size': 8}) == [
        dict(point, top1=80.0, batch_size=8, latency_ms=9.0)]
    with pytest.raises(ValueError, match=r'subnet 12:0\.5 in several settings; choose: batch_size=1 or 8'):
        merge_results([evaluated, profiled])
    other = save_rows(tmp_path, 'other', [dict(point, macs=8)])
    with pytest.raises(ValueError, match=r'other\.json is of another network'):
        merge_results([evaluated, other])


# Evaluation


@pytest.mark.parametrize('name', ['supervit_digits', 'supervit_tiny'])
def test_macs_of_the_flop_counter_are_those_of_the_formula(name):
    model = timm.create_model(name)
    before = {key: value.device for key, value in model.state_dict().items()}
    for subnet in (model.subnets[0], model.subnets[-1]):
        assert count_macs(model, **subnet._asdict()) == model.macs(subnet)
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


def test_evaluation_counts_what_one_image_at_a_time_counts(tmp_path):
    model, folder = make_model(), make_images(tmp_path)
    loader = create_evaluation_loader(open_dataset(str(folder)), model, batch_size=4, num_workers=0)
    results = evaluate(model, loader)
    expected = count_one_by_one(model, folder)
    assert {(row['img_size'], row['keep_rate']): [row['correct1'], row['correct5']] for row in results.rows} == expected
    assert len({tuple(count) for count in expected.values()}) > 1
    assert all(row['count'] == 11 and row['top1'] == 100 * row['correct1'] / 11 for row in results.rows)
    assert results.info == {'partial': False, 'skipped': []}


def test_evaluation_leaves_the_mode_of_the_model_and_takes_the_subnets_asked_for(tmp_path):
    model = make_model().train()
    loader = create_evaluation_loader(open_dataset(str(make_images(tmp_path))), model, num_workers=0)
    results = evaluate(model, loader, [(16, 0.7), (12, 0.3)], amp_dtype=torch.bfloat16)
    assert [(row['img_size'], row['keep_rate']) for row in results.rows] == [(16, 0.7), (12, 0.3)]
    assert model.training
    with pytest.raises(ValueError, match='img_size 17 is none of img_sizes'):
        evaluate(model, loader, [(17, 0.7)])


def break_image(folder):
    path = folder / 'validation' / 'class1' / '4.png'
    path.write_bytes(path.read_bytes()[:200])
    return path


@pytest.mark.parametrize('workers', [0, 1])
def test_an_unreadable_image_stops_the_run_and_is_named(tmp_path, workers):
    model, folder = make_model(), make_images(tmp_path)
    path = break_image(folder)
    loader = create_evaluation_loader(open_dataset(str(folder)), model, batch_size=4, num_workers=workers)
    with pytest.raises(OSError, match=rf'image {path} cannot be read \(.*truncated.*--skip-bad-images'):
        evaluate(model, loader)


def test_unreadable_images_are_skipped_named_and_not_counted(tmp_path):
    model, folder = make_model(), make_images(tmp_path)
    path = break_image(folder)
    loader = create_evaluation_loader(open_dataset(str(folder)), model, batch_size=4, num_workers=0)
    results = evaluate(model, loader, skip_bad_images=True)
    path.unlink()
    assert results.info['skipped'] == [str(path)]
    assert {(row['img_size'], row['keep_rate']): [row['correct1'], row['correct5']] for row in results.rows} \
        == count_one_by_one(model, folder)
    assert results.rows[0]['count'] == 10


def test_data_that_does_not_fit_is_refused_before_any_work(tmp_path):
    model = make_model()
    with pytest.raises(FileNotFoundError, match=r"the folder of images '/nowhere' does not exist"):
        open_dataset('/nowhere')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(RuntimeError, match='Found 0 images'):
        open_dataset(str(tmp_path / 'empty'))
    folder = make_images(tmp_path / 'four', classes=4)
    with pytest.raises(ValueError, match='the data set has 4 classes and the model 3'):
        create_evaluation_loader(open_dataset(str(folder)), model)
    strange = [(Image.new('RGB', (24, 24)), 3)]
    with pytest.raises(ValueError, match='class 3 of an image is none of the 3 classes'):
        evaluate(model, create_evaluation_loader(strange, model, num_workers=0))


class InterruptedLoader:
    def __init__(self, loader, after):
        self.loader, self.after = loader, after
        self.dataset, self.sampler = loader.dataset, loader.sampler

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for i, batch in enumerate(self.loader):
            if i == self.after:
                raise KeyboardInterrupt
            yield batch


def test_an_interrupted_evaluation_returns_what_was_counted(tmp_path):
    model = make_model()
    loader = create_evaluation_loader(open_dataset(str(make_images(tmp_path))), model, batch_size=4, num_workers=0)
    results = evaluate(model, InterruptedLoader(loader, after=2))
    assert results.info['partial']
    assert results.rows[0]['count'] == 8


DISTRIBUTED = '''
import json, sys
sys.path.insert(0, {tests!r})
import torch.distributed as dist
from test_tools import *
dist.init_process_group('gloo')
model = make_model()
loader = create_evaluation_loader(
    open_dataset({folder!r}), model, batch_size=2, num_workers=0, distributed=True)
results = evaluate(model, loader, skip_bad_images=True)
if dist.get_rank() == 0:
    write_text({output!r}, json.dumps([results.rows, results.info]))
dist.destroy_process_group()
'''


def test_two_processes_count_eleven_images_exactly(tmp_path):
    model, folder, output = make_model(), make_images(tmp_path / 'images'), tmp_path / 'results.json'
    break_image(folder)
    single = evaluate(
        model, create_evaluation_loader(open_dataset(str(folder)), model, num_workers=0), skip_bad_images=True)
    script = tmp_path / 'script.py'
    script.write_text(DISTRIBUTED.format(tests=str(Path(__file__).parent), folder=str(folder), output=str(output)))
    subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(script)],
        check=True, capture_output=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert json.loads(output.read_text()) == [single.rows, single.info]
    assert single.rows[0]['count'] == 10


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
    loader = create_evaluation_loader(open_dataset(str(folder)), model, batch_size=16, num_workers=0)
    for row in evaluate(model, loader, amp_dtype=torch.bfloat16 if amp else None).rows:
        published = script.validate(script.parser.parse_args([
            str(folder), '--model', 'supervit_digits', '--num-classes', str(CLASSES), '--checkpoint', str(checkpoint),
            '--device', 'cpu', '--batch-size', '16', '--workers', '0', *amp,
            '--model-kwargs', f'img_size={row["img_size"]}', f'keep_rate={row["keep_rate"]}',
        ]))
        assert (published['top1'], published['top5']) == (round(row['top1'], 4), round(row['top5'], 4))
        assert row['correct1'] == round(published['top1'] * 41 / 100)
