"""Choosing among subnets, int8 subnets and cascades, by any cost, beside another network."""
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from timm_supervit.cli import main
from timm_supervit.results.rows import Results, name_of, save_results
from timm_supervit.tools.choose import best_subnet, front_of, merge_results

NETWORK = {'architecture': 'supervit_small', 'img_sizes': [128, 224]}


def supervit(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def save(folder: Path, name: str, rows: list[Any], model: str = 'small', **network: Any) -> Path:
    return folder / save_results(Results(model, rows, {}, NETWORK | network), folder, name)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    subnets = [dict(img_size=128, keep_rate=0.5), dict(img_size=224, keep_rate=0.5), dict(img_size=224, keep_rate=1.0)]
    macs = [10 ** 9, 2 * 10 ** 9, 4 * 10 ** 9]
    accuracy = [dict(subnet, macs=m, top1=t) for subnet, m, t in zip(subnets, macs, [70., 78., 80.], strict=True)]
    # The second is the faster one in the median, and the slower one in one of ten calls.
    speed = [dict(subnet, macs=m, latency_ms=a, latency_p90_ms=b)
             for subnet, m, a, b in zip(subnets, macs, [10., 20., 40.], [12., 50., 45.], strict=True)]
    int8 = [dict(row, precision='int8', top1=row['top1'] - 0.5, latency_ms=a, latency_p90_ms=a + 1)
            for row, a in zip(accuracy, [6., 12., 24.], strict=True)]
    cascades = [{'cascade': '128:0.5 (0.9) 224:1', 'macs': 1.8e9, 'top1': 79.8, 'latency_ms': 15., 'count': 9}]
    return [save(tmp_path, 'evaluate', accuracy), save(tmp_path, 'profile', speed), save(tmp_path, 'int8', int8),
            save(tmp_path, 'cascade', cascades)]


def test_cascades_and_int8_subnets_are_points_of_their_own(files: list[Path]) -> None:
    rows = merge_results(files).rows
    assert {name_of(row) for row in rows} == {
        '128:0.5', '224:0.5', '224:1', '128:0.5 int8', '224:0.5 int8', '224:1 int8', '128:0.5 (0.9) 224:1'}
    assert name_of(best_subnet(rows, latency_ms=16)) == '128:0.5 (0.9) 224:1'
    assert name_of(best_subnet(rows, latency_ms=14)) == '224:0.5 int8'
    assert name_of(best_subnet(rows, macs=3e9)) == '128:0.5 (0.9) 224:1'
    assert [name_of(row) for row in front_of(rows, 'latency_ms')] == [
        '128:0.5 int8', '128:0.5', '224:0.5 int8', '128:0.5 (0.9) 224:1', '224:1']


def test_a_budget_of_the_slowest_tenth_is_another_than_of_the_median(files: list[Path]) -> None:
    rows = merge_results(files[:2]).rows
    assert name_of(best_subnet(rows, latency_ms=30)) == '224:0.5'
    assert name_of(best_subnet(rows, latency_p90_ms=46)) == '224:1'
    with pytest.raises(ValueError, match=r'latency, p90 at most 5.00 ms; the nearest is 128:0.5 with'):
        best_subnet(rows, latency_p90_ms=5)


def test_no_budget_is_shown_as_zero(files: list[Path]) -> None:
    with pytest.raises(ValueError, match=r'latency, median at most 0.0001 ms; the nearest is'):
        best_subnet(merge_results(files[:2]).rows, latency_ms=1e-4)


def test_a_setting_is_found_by_its_text(tmp_path: Path) -> None:
    row = dict(img_size=128, keep_rate=0.5, macs=1, top1=70.)
    path = save(tmp_path, 'pictures', [row | {'image': name} for name in ('270', '050')])
    with pytest.raises(ValueError, match=r'choose: image=270 or 050'):
        merge_results([path])
    for value in (270, '050'):
        assert [row['image'] for row in merge_results([path], {'image': value}).rows] == [str(value)]
    with pytest.raises(ValueError, match=r'image=7; .* another setting'):
        merge_results([path], {'image': 7})


def test_a_cascade_measured_twice_is_named(files: list[Path], tmp_path: Path) -> None:
    other = save(tmp_path, 'again', [{'cascade': '128:0.5 (0.9) 224:1', 'top1': 79.0}])
    with pytest.raises(ValueError, match=r'128:0.5 \(0.9\) 224:1 is measured twice, top1 79.8 and 79.0'):
        merge_results([files[3], other])


def test_the_command_draws_the_choice_and_prints_what_it_chose(files: list[Path], tmp_path: Path) -> None:
    result = supervit('choose', *files, '--latency-ms', 16, '--output', tmp_path / 'out')
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == '128:0.5 (0.9) 224:1'
    assert json.loads((tmp_path / 'out' / 'choose.json').read_text())['info']['best']['top1'] == 79.8
    with Image.open(tmp_path / 'out' / 'choose.png') as picture:
        assert picture.size == (1600, 1000)
        picture.verify()
    result = supervit('choose', *files[:2], '--latency-p90-ms', 46)
    assert result.stdout.splitlines()[-1] == '224:1'
    assert 'latency, p90 [ms]' in result.stdout


def test_another_network_is_printed_and_drawn_beside_the_first(files: list[Path], tmp_path: Path) -> None:
    rows = [dict(img_size=96, keep_rate=1.0, macs=10 ** 9, top1=99.)]
    other = save(tmp_path, 'other', rows, model='tiny', architecture='supervit_tiny')
    alone = supervit('choose', files[0], '--output', tmp_path / 'alone')
    result = supervit('choose', files[0], '--compare', other, '--output', tmp_path / 'both')
    assert result.exit_code == 0, result.output
    assert 'Pareto front of tiny' in result.stdout
    assert result.stdout.splitlines()[-1] == alone.stdout.splitlines()[-1] == '224:1'  # of the first network
    pictures = [(tmp_path / name / 'choose.png').read_bytes() for name in ('alone', 'both')]
    assert pictures[0] != pictures[1]
    result = supervit('choose', files[0], other)
    assert result.exit_code == 1 and 'different networks' in result.stderr


def test_costs_of_other_settings_do_not_compare(files: list[Path], tmp_path: Path) -> None:
    batch = [{'cascade': '128:0.5 (0.9) 224:1', 'top1': 79.8, 'latency_ms': 115., 'batch_size': 256}]
    rows = merge_results([*files[:2], save(tmp_path, 'batch', batch)]).rows
    for row in rows:
        row.setdefault('batch_size', 1)
    for call in (lambda: best_subnet(rows, latency_ms=20), lambda: front_of(rows, 'latency_ms')):
        with pytest.raises(ValueError, match=r'batch_size=1 and batch_size=256.*--where'):
            call()
    assert best_subnet(rows, macs=5e9) and front_of(rows, 'macs')


def test_of_a_profile_of_several_batch_sizes_one_is_chosen(files: list[Path], tmp_path: Path) -> None:
    rows = [dict(img_size=side, keep_rate=rate, batch_size=size, latency_ms=size * ms)
            for size in (1, 8) for side, rate, ms in ((128, 0.5, 10.), (224, 1.0, 40.))]
    profile = save(tmp_path, 'batches', rows)
    for size, budget, chosen in ((1, 50, '224:1'), (8, 100, '128:0.5')):
        result = supervit('choose', files[0], profile, '--latency-ms', budget, '--where', f'batch_size={size}')
        assert result.stdout.splitlines()[-1] == chosen
    result = supervit('choose', files[0], profile, '--latency-ms', 50)
    assert result.exit_code == 1 and 'choose: batch_size=1 or 8' in result.stderr
