"""Measuring: every network in every setting, by what is said of it, and whole rounds only."""
import functools
import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner

from timm_supervit import Subnet
from timm_supervit.cli import main, progress
from timm_supervit.programs.program import load_program
from timm_supervit.results.rows import load_results, subnet_of
from timm_supervit.tools import profile as profile_file
from timm_supervit.tools.profile import peak_allocation, profile

SETTINGS = dict(embed_dim=48, depth=2, drop_layers=(1,))
KWARGS = ['--model-kwargs', 'embed_dim=48', 'depth=2', 'drop_layers=(1,)']


@pytest.fixture
def model():
    return timm.create_model('supervit_digits', **SETTINGS).eval()


def test_every_network_is_measured_in_every_setting(model):
    subnets = [Subnet(12, 0.5), Subnet(24, 0.7)]
    results = profile(
        model, subnets, peers=['test_vit'], batch_sizes=(1, 3, 1), precisions=('float32', 'bfloat16', 'float32'),
        rounds=3)
    measured = [
        (row.get('model', (row.get('img_size'), row.get('keep_rate'))), row['batch_size'], row['precision'])
        for row in results.rows]
    assert measured == list(itertools.product([*subnets, 'test_vit'], (1, 3), ('float32', 'bfloat16')))
    for row in results.rows:
        assert 0 < row['latency_ms'] <= row['latency_p90_ms']
        assert row['throughput'] == pytest.approx(1e3 * row['batch_size'] / row['latency_ms'])
    assert [row['macs'] for row in results.rows[::4][:2]] == [model.macs(subnet) for subnet in subnets]


def test_each_round_measures_each_network_once_and_in_a_new_order(model):
    calls, rounds = [], []
    model.patch_embed.register_forward_pre_hook(lambda module, args: calls.append((args[0].shape[-1], len(args[0]))))

    def watch(steps, label):
        for step in steps:
            calls.clear()
            yield step
            rounds.append(list(calls))

    profile(model, [Subnet(size, 1.0) for size in model.img_sizes], batch_sizes=(1, 2), rounds=4, progress=watch)
    rounds = rounds[-4:]  # the steps before prepare the networks
    expected = sorted(itertools.product(model.img_sizes, (1, 2)))
    for order in rounds:
        assert sorted(set(order)) == expected
        runs = [(key, len(list(group))) for key, group in itertools.groupby(order)]
        assert len(runs) == len(expected)  # a network is warmed up and measured before the next one's turn
        assert {count for _, count in runs} == {3}  # two calls to warm up and the one that counts
    assert len({tuple(order) for order in rounds}) == 4


def replace_clock(monkeypatch, times):
    """Let each call take the next of these seconds; where it is None, the user presses Ctrl-C."""
    times = iter(times)

    def timeit(number):
        seconds = next(times)
        if seconds is None:
            raise KeyboardInterrupt
        return SimpleNamespace(times=[seconds])

    monkeypatch.setattr(profile_file, 'Timer', lambda *args, **kwargs: SimpleNamespace(timeit=timeit))


def test_latency_is_the_median_and_the_spread_of_the_single_calls(model, monkeypatch):
    replace_clock(monkeypatch, [0.001 * i for i in (9, 1, 5, 3, 7, 2, 8, 4, 6, 11, 10)])
    row = profile(model, [Subnet(12, 1.0)], batch_sizes=(3,), rounds=11).rows[0]
    assert row['latency_ms'] == pytest.approx(6)
    assert row['latency_p90_ms'] == pytest.approx(10)
    assert row['latency_iqr_ms'] == pytest.approx(5)
    assert row['throughput'] == pytest.approx(500)


class InterruptedRounds:
    """Progress that is interrupted when the networks are prepared and this many rounds are measured."""

    def __init__(self, rounds):
        self.rounds = rounds

    def __call__(self, steps, label):
        for i, step in enumerate(steps):
            if label == 'Measuring' and i == self.rounds:
                raise KeyboardInterrupt
            yield step


def test_an_interrupt_keeps_the_rounds_measured_so_far_and_marks_them(model):
    subnets = model.subnets[:2]
    results = profile(model, subnets, rounds=20, progress=InterruptedRounds(3))
    assert (results.partial, results.info['rounds'], len(results.rows)) == (True, 3, 2)
    assert all(0 < row['latency_ms'] <= row['latency_p90_ms'] for row in results.rows)
    assert not profile(model, subnets, rounds=2).partial
    with pytest.raises(KeyboardInterrupt):
        profile(model, subnets, rounds=20, progress=InterruptedRounds(0))


def test_an_interrupt_within_a_round_drops_that_round_whole(model, monkeypatch):
    replace_clock(monkeypatch, [0.000, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, None])
    results = profile(model, model.subnets[:3], rounds=20)
    assert results.info['rounds'] == 2
    assert sum(row['latency_ms'] for row in results.rows) == pytest.approx((0 + 1 + 2 + 3 + 4 + 5) / 2)


def test_peak_allocation_is_what_is_alive_at_once():
    def run():
        first = torch.empty(1_000_000, dtype=torch.uint8)
        del first
        second = torch.empty(700_000, dtype=torch.uint8)
        third = torch.empty(500_000, dtype=torch.uint8)
        return len(second) + len(third)

    assert peak_allocation(run, 'cpu') == 1_200_000


def test_peak_memory_is_the_weights_and_what_a_call_needs(model):
    small, large = profile(model, [Subnet(24, 1.0)], batch_sizes=(1, 64), rounds=2).rows
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 2 ** 20
    hidden = 37 * 96 * 4 / 2 ** 20  # float32 activations of one image inside the FFN, the widest that there are
    assert small['memory_mib'] > weights + hidden
    assert large['memory_mib'] > weights + 64 * hidden
    assert large['memory_mib'] < weights + 64 * 10 * hidden  # far less than all layers' activations together


def test_as_many_subnets_are_compiled_as_are_asked_for(monkeypatch):
    model = timm.create_model(
        'supervit_digits', img_sizes=(24,), depth=1, drop_layers=(0,), embed_dim=8, num_heads=1).eval()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend=backend))
    with torch._dynamo.config.patch(cache_size_limit=2):  # after how many torch gives up; it is more in use
        results = profile(model, runtimes=['compile'], rounds=2)
    assert len(compiled) == len(results.rows) == 3


def test_onnxruntime_is_measured_beside_torch():
    model = timm.create_model('supervit_digits', depth=1, drop_layers=(0,)).eval()
    results = profile(model, [Subnet(16, 0.5)], peers=['test_efficientnet'], runtimes=['eager', 'onnx'], rounds=2)
    assert [row['runtime'] for row in results.rows] == ['eager', 'onnx', 'eager', 'onnx']
    assert [row['memory_mib'] is None for row in results.rows] == [False, True, False, True]
    assert all(np.isfinite(row['latency_ms']) for row in results.rows)


@pytest.mark.parametrize('format', ['onnx', 'pt2'])
def test_an_exported_file_is_measured_in_its_own_runtime(exported, format):
    program = load_program(exported(format))
    results = profile(program, program.subnets[:2], batch_sizes=(1, 3), rounds=2)
    assert [(subnet_of(row), row['batch_size']) for row in results.rows] == list(
        itertools.product(program.subnets[:2], (1, 3)))
    for row in results.rows:
        assert (row['precision'], row['runtime'], row['memory_mib']) == ('float32', format, None)
        assert row['macs'] == program.macs(subnet_of(row))
    with pytest.raises(ValueError, match='leave --precision and --runtime out'):
        profile(program, runtimes=['compile'])


def test_files_of_the_network_are_measured_in_the_same_rounds(exported, model_to_export, tmp_path):
    model, paths = model_to_export(), [str(exported('onnx')), str(exported('onnx', quantize='int8'))]
    rows = profile(model, [Subnet(16, 0.5)], peers=paths, batch_sizes=(1, 3), rounds=2).rows
    assert [(subnet_of(row), row['batch_size'], row['precision'], row['runtime']) for row in rows] == [
        (Subnet(16, 0.5), batch_size, *setting)
        for setting in (('float32', 'eager'), ('float32', 'onnx'), ('int8', 'onnx')) for batch_size in (1, 3)]
    assert len({row['macs'] for row in rows}) == 1
    with pytest.raises(ValueError, match='twice in float32 by onnx'):
        profile(load_program(paths[0]), peers=paths[:1], rounds=2)
    with pytest.raises(ValueError, match='twice in float32 by onnx'):
        profile(model, [Subnet(16, 0.5)], peers=paths[:1], runtimes=['onnx'], rounds=2)
    other = model_to_export(depth=3)
    with pytest.raises(ValueError, match=r'another network.*depth'):
        profile(other, peers=paths[:1], rounds=2)
    result = CliRunner().invoke(main, [
        'profile', paths[0], '--vs', paths[1], '--rounds', '2', '--device', 'cpu', '--output', str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert [row['precision'] for row in load_results(tmp_path / 'profile.json').rows] == ['float32'] * 6 + ['int8'] * 6


def test_a_file_of_one_subnet_is_measured_beside_others(exported, model_to_export):
    program = load_program(exported('onnx', Subnet(16, 0.5)))
    row, = profile(program, rounds=2).rows
    assert subnet_of(row) == Subnet(16, 0.5)
    rows = profile(model_to_export(), peers=[str(program.path)], rounds=2).rows
    assert [subnet_of(row) for row in rows if row['runtime'] == 'onnx'] == [Subnet(16, 0.5)]


@pytest.mark.parametrize(('name', 'size'), [
    ('vit_tiny_patch16_224', 64),  # by img_size
    ('test_efficientnet', 64),  # takes any
    ('efficientformer_l1', 224),  # neither
    ('supervit_digits', 24),  # its grid has no such size, to which it would resize
])
def test_other_networks_are_measured_at_the_largest_size_of_the_grid_where_they_can_be(name, size, tmp_path):
    kwargs = ['--model-kwargs', 'img_sizes=32,64', 'embed_dim=48', 'depth=2', 'drop_layers=(1,)']
    result = CliRunner().invoke(main, [
        'profile', 'supervit_tiny', '--subnet', '32:1', '--vs', name, '--rounds', '2', '--device', 'cpu', '--output',
        str(tmp_path), *kwargs])
    assert result.exit_code == 0, result.output
    row = load_results(tmp_path / 'profile.json').rows[-1]
    assert (row['model'], row['img_size']) == (name, size)
    peer = timm.create_model(name, **({'img_size': 64} if name.startswith('vit') else {}))
    assert row['macs'] == profile_file.count_macs(peer, (3, size, size))
    assert f'{name} at {size}' in result.stdout


def test_where_fewer_macs_save_no_time_it_is_said_with_the_remedy(model, monkeypatch):
    rows = [
        dict(img_size=24, keep_rate=rate, batch_size=batch_size, precision='float32', runtime='eager', macs=macs,
             latency_ms=latency)
        for batch_size, latencies in ((1, (0.95, 0.9, 0.84)), (64, (8., 10., 14.)))
        for rate, macs, latency in zip((0.5, 0.7, 1.0), (4e6, 5.9e6, 8e6), latencies, strict=True)]
    found, = profile_file.find_overhead(rows)
    assert [(row['batch_size'], row['keep_rate']) for row in found] == [(1, 0.5), (1, 1.0)]
    rows[0]['latency_ms'] = 0.8
    assert profile_file.find_overhead(rows) == []  # 0.7 and 1 do not differ clearly in MACs
    replace_clock(monkeypatch, [0.002, 0.001] * 30)
    monkeypatch.setattr(profile_file.random.Random, 'shuffle', lambda self, order: None)
    result = CliRunner().invoke(main, [
        'profile', 'supervit_digits', '--subnet', '12:0.5', '--subnet', '24:1', '--device', 'cpu', *KWARGS])
    line, = [line for line in result.stdout.splitlines() if 'overhead' in line]
    assert all(word in line for word in ('batch 1', '12:0.5', '24:1', '-b 64'))


@pytest.mark.parametrize(('settings', 'message'), [
    (dict(runtimes=['onnx'], precisions=['bfloat16']), 'onnx runs in float32 only, not in bfloat16'),
    (dict(runtimes=['jit']), "runtime 'jit' is unknown"),
    (dict(precisions=['int8']), "precision 'int8' is unknown"),
    (dict(batch_sizes=[0]), 'batch size 0'),
    (dict(rounds=1), 'rounds 1 shows no spread'),
    (dict(subnets=[(17, 0.5)]), 'img_size 17'),
])
def test_settings_that_cannot_be_measured_are_refused(model, settings, message):
    settings['subnets'] = [Subnet(*subnet) for subnet in settings.get('subnets', [(12, 0.5)])]
    with pytest.raises(ValueError, match=message):
        profile(model, **settings)


def test_the_command_writes_tables_and_one_picture_for_each_setting(tmp_path):
    arguments = ['--subnet', '12:0.5', '--vs', 'test_vit', '-b', '1', '-b', '2', '--rounds', '2', '--device', 'cpu']
    result = CliRunner().invoke(main, [
        'profile', 'supervit_digits', *arguments, '--output', str(tmp_path), *KWARGS])
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {
        'profile.json', 'profile.csv', 'profile-batch-1-float32-eager.png', 'profile-batch-2-float32-eager.png'}
    rows = load_results(tmp_path / 'profile.json').rows
    assert [row['batch_size'] for row in rows] == [1, 2, 1, 2]
    assert f'{rows[0]["latency_ms"]:.2f}' in result.stdout
    assert 'test_vit' in result.stdout


def test_a_cuda_home_without_a_gpu_is_not_warned_of():
    def errors(*arguments):
        env = {**os.environ, 'CUDA_HOME': '/usr/local', 'CUDA_VISIBLE_DEVICES': ''}
        return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=True).stderr

    assert 'CUDA_HOME' in errors('-c', 'import torch.utils.benchmark')  # or there would be nothing to show
    command = ['-m', 'timm_supervit', 'profile', 'supervit_digits', '--subnet', '12:0.5', '--rounds', '2', *KWARGS]
    assert errors(*command) == ''


def test_an_interrupted_command_leaves_complete_results_as_they_were(tmp_path, monkeypatch):
    (tmp_path / 'profile.json').write_text('complete')
    monkeypatch.setattr(progress, 'track', InterruptedRounds(2))
    result = CliRunner().invoke(main, [
        'profile', 'supervit_digits', '--subnet', '12:0.5', '--device', 'cpu', '--output', str(tmp_path), *KWARGS])
    assert result.exit_code == 130
    path = tmp_path / 'profile-partial.json'
    assert f'PARTIAL: interrupted after 2 of 30 rounds; saved as {path}.' in result.stdout
    assert load_results(path).partial
    assert (tmp_path / 'profile.json').read_text() == 'complete'
    assert {path.name for path in tmp_path.iterdir()} == {
        'profile.json', 'profile-partial.json', 'profile-partial.csv', 'profile-partial.png'}


@pytest.mark.parametrize(('arguments', 'exit_code', 'message'), [
    (['--vs', 'no_such_model'], 1, 'timm has no model no_such_model to measure beside it'),
    (['--vs', 'swin_tiny_patch4_window7_22'], 1, 'did you mean swin_tiny_patch4_window7_224?'),
    (['--device', 'foo'], 1, '--device foo: torch knows no such device'),
    (['--runtime', 'jit'], 2, 'jit'),
    (['-b', '0'], 2, '0'),
    (['--subnet', '17:0.5'], 1, 'img_size 17'),
])
def test_the_command_explains_what_it_cannot_measure(arguments, exit_code, message):
    result = CliRunner().invoke(main, ['profile', 'supervit_digits', *arguments, *KWARGS])
    assert result.exit_code == exit_code
    assert message in result.stderr
