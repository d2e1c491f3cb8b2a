"""Calibrating a cascade: against brute force, on images that it has not seen, and honest where there is no gain."""
import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

from timm_supervit import Cascade
from timm_supervit.cli import main
from timm_supervit.images.datasets import Images, create_evaluation_loader, open_dataset
from timm_supervit.programs.program import load_program
from timm_supervit.results.fingerprint import fingerprint
from timm_supervit.results.rows import Results, load_results, save_results
from timm_supervit.tools import cascade as tool
from timm_supervit.tools.cascade import (
    Answers,
    Costs,
    calibrate,
    collect_answers,
    latency_costs,
    mac_costs,
    search,
    split_answers,
)
from timm_supervit.tools.evaluate import evaluate_cascade

SETTINGS: dict[str, Any] = dict(img_sizes=(12, 24), keep_rates=(0.5, 1.0), drop_layers=(1,), depth=3, num_classes=3)


@pytest.fixture(scope='module')
def model() -> Any:
    """A network whose subnets say different things of an image."""
    torch.manual_seed(0)
    model: Any = timm.create_model('supervit_digits', **SETTINGS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape))
    return model


def make_answers(model: Any, num_images: int = 400, seed: int = 0, informed: bool = True) -> Answers:
    """Let dearer subnets be right more often, and subnets be less sure where they are wrong, if ``informed``."""
    generator = np.random.default_rng(seed)
    hardness = generator.random(num_images)
    skill = np.linspace(0.7, 0.95, len(model.subnets))[:, None]
    correct = hardness + generator.normal(0, 0.02, (len(skill), num_images)) < skill
    doubt = 0.6 * hardness if informed else 0.6 * generator.random((len(skill), num_images))
    confidence = np.clip(1 - doubt + generator.normal(0, 0.01, correct.shape), 0.34, 0.999)
    return Answers(model.subnets, confidence, np.where(correct, confidence, 0.3), correct)


def simulate(answers: Answers, costs: Costs, stages: Any, thresholds: Any) -> tuple[np.ndarray, float]:
    """Send the images through one by one; return whether it is right on each, and the mean cost."""
    right, spent = [], 0.
    for image in range(answers.num_images):
        for i, stage in enumerate(stages):
            spent += costs.own[stage] - max([costs.saved[stage, earlier] for earlier in stages[:i]], default=0)
            if i == len(stages) - 1 or answers.confidence[stage, image] >= thresholds[i]:
                right.append(answers.correct[stage, image])
                break
    return np.array(right, dtype=float), spent / answers.num_images


@pytest.mark.parametrize('seed', range(3))
def test_the_search_knows_what_its_cascades_reach(model: Any, seed: int) -> None:
    answers, costs = make_answers(model, 60, seed), mac_costs(model)
    points = set()
    for share in (0.25, 0.4, 0.6, 0.8):
        chosen, front = search(answers, 60, costs, costs, budget=share * costs.own[-1])
        points |= {chosen, *front}
    assert len({point.stages for point in points}) > 2
    for point in points:
        right, cost = simulate(answers, costs, point.stages, point.thresholds)
        assert (point.accuracy, point.cost) == (pytest.approx(right.mean()), pytest.approx(cost))


@pytest.mark.parametrize('share', [0.35, 0.7])
def test_no_cascade_inside_the_budget_is_clearly_better_than_the_one_that_is_found(model: Any, share: float) -> None:
    answers, costs = make_answers(model), mac_costs(model)
    found, _ = search(answers, 400, costs, costs, budget=share * costs.own[-1])
    best, cost = simulate(answers, costs, found.stages, found.thresholds)
    assert cost <= share * costs.own[-1]
    num_tried = 0
    for stages in [stages for number in (2, 3, 4) for stages in itertools.combinations(range(4), number)]:
        quantiles = (0.1, 0.3, 0.5, 0.7, 0.9) if len(stages) < 4 else (0.2, 0.5, 0.8)
        for shares in itertools.product(quantiles, repeat=len(stages) - 1):
            thresholds = [np.quantile(answers.confidence[stage], q) for stage, q in zip(stages, shares, strict=False)]
            right, cost = simulate(answers, costs, stages, thresholds)
            if cost <= share * costs.own[-1]:
                difference = right - best
                assert difference.mean() <= 2 * difference.std() / len(right) ** 0.5, (stages, thresholds)
                num_tried += 1
    assert num_tried > 20


def test_costs_are_those_of_the_cascade(model: Any) -> None:
    costs = mac_costs(model)
    for stages in itertools.combinations(range(4), 3):
        cascade = Cascade(model, [model.subnets[i] for i in stages], [0.5, 0.5])
        assert costs.totals(stages).tolist() == cascade.macs


@pytest.fixture
def _given_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``calibrate`` take answers in the place of images."""
    monkeypatch.setattr(tool, 'collect_answers', lambda model, images, *_: images.dataset)


@pytest.mark.usefixtures('_given_answers')
def test_a_gain_is_found_inside_the_budget_and_reported_on_other_images(model: Any) -> None:
    costs = mac_costs(model)
    calibration, report = split_answers(make_answers(model), 0.5, seed=1)
    budget = 0.5 * costs.own[-1]
    found = calibrate(model, report, calibration_images=calibration, macs=budget)
    stages = [model.subnets.index(stage) for stage in found.cascade.stages]
    right, cost = simulate(calibration, costs, stages, found.cascade.thresholds)
    assert cost <= budget
    assert (found.results.info['top1'], found.results.info['macs']) == (
        pytest.approx(100 * right.mean()), pytest.approx(cost))
    affordable = [accuracy for accuracy, cost in zip(report.correct.mean(1), costs.own, strict=True) if cost <= budget]
    assert found.row['top1'] > 100 * max(affordable) + 5
    assert found.verdict.is_better
    right, cost = simulate(report, costs, stages, found.cascade.thresholds)
    assert (found.row['top1'], found.row['macs']) == (pytest.approx(100 * right.mean()), pytest.approx(cost))
    full = report.correct[-1]
    assert (found.full['correct1'], found.only_one_right) == (full.sum(), ((right > full).sum(), (right < full).sum()))
    # What the report images are has no say in what is chosen.
    other = calibrate(
        model, report._replace(correct=~report.correct), calibration_images=calibration, macs=budget).cascade
    assert (other.stages, other.thresholds) == (found.cascade.stages, found.cascade.thresholds)


@pytest.mark.usefixtures('_given_answers')
def test_no_gain_is_called_so_where_confidence_says_nothing(model: Any) -> None:
    for seed in range(6):
        verdict = calibrate(model, make_answers(model, seed=seed, informed=False), seed=seed).verdict
        assert not verdict.is_better and verdict.reason and verdict.images == 400


@pytest.mark.usefixtures('_given_answers')
@pytest.mark.parametrize('share', [None, 0.4])
def test_chance_alone_seldom_makes_a_cascade(model: Any, share: float | None) -> None:
    """All subnets are equally accurate, and none is surer where it is right: one in twenty may pass, and no more."""
    budget = share and share * mac_costs(model).own[-1]
    passed = 0
    for seed in range(120):
        generator = np.random.default_rng(seed)
        correct = generator.random(100) + generator.normal(0, 0.15, (4, 100)) < 0.9
        confidence = generator.uniform(0.3, 1, correct.shape)
        answers = Answers(model.subnets, confidence, np.where(correct, confidence, 0.3), correct)
        passed += calibrate(model, answers, seed=seed, macs=budget).verdict.is_better
    assert passed <= 10  # of 120, more than 5 % of which by chance 1 % of the time


@pytest.mark.usefixtures('_given_answers')
@pytest.mark.parametrize('seed', range(4))
def test_the_verdict_is_that_of_all_sign_flips_against_the_best_mixture(model: Any, seed: int) -> None:
    costs = mac_costs(model)
    calibration, report = split_answers(make_answers(model, 180, seed), 140 / 180)
    found = calibrate(model, report, calibration_images=calibration, macs=0.5 * costs.own[-1])
    stages = [model.subnets.index(stage) for stage in found.cascade.stages]
    right, cost = simulate(report, costs, stages, found.cascade.thresholds)
    mixtures = []  # of a cheaper and a dearer subnet: how accurate they are where all is chosen, and on each image
    for low, high in itertools.product(range(4), repeat=2):
        if costs.own[low] <= cost < costs.own[high]:
            share = (cost - costs.own[low]) / (costs.own[high] - costs.own[low])
            seen, others = ((1 - share) * of.correct[low] + share * of.correct[high] for of in (calibration, report))
            mixtures.append((seen.mean(), others))
    differences = right - max(mixtures, key=lambda mixture: mixture[0])[1]
    differing = differences[differences != 0]
    assert 2 < len(differing) <= 16
    sums = np.array(list(itertools.product((-1, 1), repeat=len(differing)))) @ differing
    assert found.verdict.gain == pytest.approx(100 * differences.mean())
    assert found.verdict.p_value == pytest.approx((sums >= differing.sum() - 1e-9).mean(), abs=0.02)  # 10,000 flips
    assert found.verdict.images == 40


@pytest.mark.usefixtures('_given_answers')
def test_without_a_goal_a_cascade_behind_the_full_network_is_not_advised(model: Any) -> None:
    answers = make_answers(model, 2000)
    answers.correct[:-1, ::50], answers.confidence[:-1, ::50], answers.correct[-1, ::50] = False, 0.9999, True
    found = calibrate(model, answers, macs=0.5 * mac_costs(model).own[-1])
    assert found.verdict.is_better and found.row['top1'] < found.full['top1'] - 1  # than what costs the same
    found = calibrate(model, answers)
    assert not found.verdict.is_better
    assert (found.verdict.single['img_size'], found.verdict.single['keep_rate']) == model.subnets[-1]


@pytest.mark.usefixtures('_given_answers')
def test_the_single_subnet_to_use_instead_is_what_was_asked_for(model: Any) -> None:
    calibration, report = split_answers(make_answers(model, informed=False))
    costs, accuracy = mac_costs(model).own, 100 * calibration.correct.mean(axis=1)

    def single(**goal: Any) -> tuple[Any, Any]:
        row = calibrate(model, report, calibration_images=calibration, **goal).verdict.single
        assert row['top1'] == 100 * report.correct[model.subnets.index((row['img_size'], row['keep_rate']))].mean()
        return row['img_size'], row['keep_rate']

    assert (accuracy[:-1] < accuracy[1:]).all()
    assert single(macs=costs[2] * 1.01) == model.subnets[2]
    assert single(accuracy=(accuracy[1] + accuracy[2]) / 2) == model.subnets[2]
    assert single(accuracy=accuracy[-1]) == single() == model.subnets[-1]
    cheapest = calibrate(model, report, calibration_images=calibration, macs=costs[0]).verdict  # too little for any
    assert not cheapest.is_better and 'inside the budget' in cheapest.reason
    assert (cheapest.single['img_size'], cheapest.single['keep_rate']) == model.subnets[0]
    answers = calibration._replace(correct=calibration.correct[[0, 3, 2, 3]])
    row = calibrate(model, report, calibration_images=answers).verdict.single
    assert (row['img_size'], row['keep_rate']) == model.subnets[1]  # the cheapest that is as accurate


def test_a_goal_chooses_the_cheapest_that_reaches_it(model: Any) -> None:
    costs = mac_costs(model)
    calibration, report = split_answers(make_answers(model), 0.5)

    def chosen(**goal: Any) -> Any:
        return search(calibration, report.num_images, costs, costs, **goal)[0]

    low, high = chosen(accuracy=80), chosen(accuracy=90)
    assert low.accuracy >= 0.8 and high.accuracy >= 0.9 and low.cost < high.cost
    assert chosen().accuracy >= calibration.correct[-1].mean()
    with pytest.raises(ValueError, match=r'right on 99.9 % of the calibration images; the best is on'):
        chosen(accuracy=99.9)
    with pytest.raises(ValueError, match='a mean macs of at most 1; the cheapest has'):
        chosen(budget=1)


def test_the_parts_of_a_split_share_no_image_and_repeat_with_the_seed() -> None:
    numbers = np.arange(101.)[None]
    answers = Answers([], numbers, numbers, numbers)
    first, second = split_answers(answers, 0.4, seed=3)
    assert (first.num_images, second.num_images) == (40, 61)
    assert sorted([*first.truth[0], *second.truth[0]]) == numbers[0].tolist()
    assert (split_answers(answers, 0.4, seed=3)[0].truth == first.truth).all()
    assert (split_answers(answers, 0.4, seed=4)[0].truth != first.truth).any()


def test_a_stage_that_goes_on_saves_as_much_of_its_time_as_of_its_macs(model: Any) -> None:
    macs = mac_costs(model)
    rows = [dict(subnet._asdict(), latency_ms=10. * i + 10) for i, subnet in enumerate(model.subnets)]
    costs = latency_costs(macs, model.subnets, rows)
    assert costs.own.tolist() == [10, 20, 30, 40]
    share = (macs.totals([2, 3])[1] - macs.own[2]) / macs.own[3]
    assert costs.totals([2, 3]).tolist() == [30, pytest.approx(30 + 40 * share)] and 0.3 < share < 0.9
    with pytest.raises(ValueError, match='the profile has no latency of subnet 24:1'):
        latency_costs(macs, model.subnets, rows[:-1])


# The commands


def supervit(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: Any, model: Any) -> Path:
    path = tmp_path_factory.mktemp('weights') / 'model.pth'
    torch.save(model.state_dict(), path)
    return path


def save_what_confidence_tells_apart(model: Any, folder: Path, subnet: int = 0) -> None:
    """Save 75 images that a subnet (by its index) is right on and sure of, and 15 that it is not.

    The full network is right on all of them, since what it says is their class, but for one of each class that it does
    not say of any and that has no name.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (600, 24, 24, 3), np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    names = model.pretrained_cfg.get('label_names') or [f'class{i}' for i in range(model.num_classes)]
    for name in names:
        (folder / name).mkdir(parents=True)
    loader = create_evaluation_loader([(image, 0) for image in images], model, num_workers=0)
    with torch.no_grad():
        logits = torch.cat([torch.stack(model.forward_subnets(batch, model.subnets)) for batch, _ in loader], dim=1)
    (confidence, said), classes = logits[subnet].softmax(dim=1).max(dim=1), logits[-1].argmax(dim=1)
    is_sure = confidence > confidence.median()
    easy, hard = ((is_sure & (said == classes)).nonzero()[:75], (~is_sure & (said != classes)).nonzero()[:15])
    assert (len(easy), len(hard)) == (75, 15)
    present = {*classes[torch.cat([easy, hard])].flatten().tolist()}
    missing = [] if 'label_names' in model.pretrained_cfg else sorted({*range(model.num_classes)} - present)
    classes[easy.flatten()[:len(missing)]] = torch.tensor(missing, dtype=torch.long)  # which all subnets are wrong on
    for i in torch.cat([easy, hard]).flatten().tolist():
        images[i].save(folder / names[classes[i]] / f'{i}.png')


@pytest.fixture(scope='module')
def folder(model: Any, checkpoint: Path, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp('images')
    save_what_confidence_tells_apart(model, folder / 'validation')
    return folder


@pytest.fixture(scope='module')
def given(checkpoint: Path, folder: Path) -> list[Any]:
    return ['supervit_digits', '--checkpoint', checkpoint,
            '--model-kwargs', *(f'{key}={value}' for key, value in SETTINGS.items()),
            '--data-dir', folder, '-j', 0, '--device', 'cpu']


@pytest.fixture(scope='module')
def output(given: list[Any], model: Any, tmp_path_factory: Any) -> tuple[Path, Any]:
    output = tmp_path_factory.mktemp('cascade')
    return output, supervit('cascade', *given, '--macs', 0.7 * model.macs((24, 1.0)), '--output', output)


def test_the_command_writes_a_cascade_that_evaluates_to_what_it_expects(
        given: list[Any], output: tuple[Path, Any], model: Any) -> None:
    path, result = output
    assert result.exit_code == 0, result.output
    assert 'On 90 images' in result.stdout and 'NOT' not in result.stdout
    assert 'MACs are not time' in result.stderr
    assert {file.name for file in path.iterdir()} == {
        'cascade.json', 'cascade-front.json', 'cascade-front.csv', 'cascade-front.png'}
    content = json.loads((path / 'cascade.json').read_text())
    verdict = content['calibration']['verdict']
    assert verdict == load_results(path / 'cascade-front.json').info['verdict']
    assert verdict['is_better'] and verdict['p_value'] < 0.05 < verdict['gain'] and verdict['images'] == 90
    assert content['model'] == 'supervit_digits' and content['img_sizes'] == [12, 24]
    assert (content['calibration']['calibration_images'], content['calibration']['report_images']) == (45, 45)
    assert all('cascade' in row for row in load_results(path / 'cascade-front.json').rows)

    result = supervit('evaluate', *given, '--cascade', path / 'cascade.json', '--output', path, '-b', 30)
    assert result.exit_code == 0, result.output
    assert 'Images that stop at each stage' in result.stdout
    assert '45 of these images' in result.stderr
    row = load_results(path / 'evaluate-cascade.json').rows[0]
    cascade = Cascade.load(model, path / 'cascade.json')
    assert row['cascade'] == content['expected']['cascade']
    assert row['count'] == 90 and sum(row['shares']) == pytest.approx(100, abs=0.1)
    assert row['macs'] == pytest.approx(
        sum(share * macs for share, macs in zip(row['shares'], cascade.macs, strict=True)) / 100, rel=1e-3)
    assert row['latency_mean_ms'] == pytest.approx(row['latency_ms'] / 30, rel=2)
    # The expected numbers are of half of the images, the others of all: the two halves make the whole.
    seen = content['calibration']['top1'] / 100 * 45
    assert row['correct1'] == pytest.approx(seen + content['expected']['correct1'])


def test_two_folders_take_the_place_of_a_split(given: list[Any], folder: Path, tmp_path: Path) -> None:
    other = tmp_path / 'other'
    other.symlink_to(folder)
    result = supervit('cascade', *given, '--calibration-dir', other)
    assert result.exit_code == 2 and '--calibration-dir is --data-dir' in result.stderr
    of_classes = [sorted(path.iterdir()) for path in (folder / 'validation').iterdir()]
    for path in [path for paths in of_classes for path in paths[::2]]:
        copy = tmp_path / 'half' / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    result = supervit('cascade', *given, '--calibration-dir', tmp_path / 'half')
    assert result.exit_code == 0, result.output
    assert 'On 90 images' in result.stdout and 'Chosen on 46 images' in result.stdout


def test_images_in_both_folders_are_refused(given: list[Any], folder: Path) -> None:
    inside = next(path for path in folder.rglob('*') if path.is_dir())
    result = supervit('cascade', *given, '--calibration-dir', inside)
    assert result.exit_code == 1 and 'images of --calibration-dir are in --data-dir too' in result.stderr


def test_a_profile_of_another_network_int8_or_larger_batches_gives_no_other_budget(
        given: list[Any], model: Any, tmp_path: Path) -> None:
    rows = [dict(subnet._asdict(), macs=model.macs(subnet), latency_ms=10. * i + 10, batch_size=1)
            for i, subnet in enumerate(model.subnets)]

    def run(rows: list[Any], **network: Any) -> Any:
        results = Results('x', rows, {}, fingerprint(model, weights=False) | network)
        path = tmp_path / save_results(results, tmp_path, 'other')
        return supervit('cascade', *given, '--latency-ms', 25, '--profile', path, '--json')

    expected = run(rows)
    assert expected.exit_code == 0, expected.output
    batches = [row | dict(latency_ms=8 * row['latency_ms'], batch_size=8) for row in rows]
    int8 = [row | dict(latency_ms=1., precision='int8') for row in rows]
    for other in (batches, [*rows, *int8]):
        assert json.loads(run(other).stdout)['chosen'] == json.loads(expected.stdout)['chosen']
    assert 'is of another network: embed_dim' in run(rows, embed_dim=384).stderr


def test_where_stages_do_not_pay_in_time_the_answer_is_a_single_subnet(
        given: list[Any], model: Any, tmp_path: Path) -> None:
    def run(latencies: Any) -> Any:
        rows = [dict(subnet._asdict(), latency_ms=latency, batch_size=1)
                for subnet, latency in zip(model.subnets, latencies, strict=True)]
        path = tmp_path / save_results(Results('x', rows, {}, fingerprint(model, weights=False)), tmp_path, 'profile')
        result = supervit('cascade', *given, '--profile', path, '--json')
        assert 'MACs are not time' not in result.stderr
        return result

    as_macs = run([1e-6 * cost for cost in mac_costs(model).own])
    assert as_macs.exit_code == 0 and json.loads(as_macs.stdout)['verdict']['is_better'], as_macs.output
    alike = run([10, 10.1, 10.2, 10.3])  # as of a network so small that starting each layer takes longest
    verdict = json.loads(alike.stdout)['verdict']
    assert (alike.exit_code, verdict['is_better']) == (3, False)
    assert verdict['single']['img_size'] == 24  # of which one is as accurate as the full network


def test_where_no_cascade_is_better_none_is_written_and_the_subnet_is_named(
        given: list[Any], model: Any, tmp_path: Path) -> None:
    weights = timm.create_model('supervit_digits', **SETTINGS).state_dict()  # that know nothing of these classes
    torch.save(weights, tmp_path / 'untrained.pth')
    untrained = [tmp_path / 'untrained.pth' if argument == given[2] else argument for argument in given]
    (tmp_path / 'cascade.json').write_text('of an earlier run')
    result = supervit('cascade', *untrained, '--macs', 0.7 * model.macs((24, 1.0)), '--output', tmp_path)
    assert result.exit_code == 3, result.output
    assert {file.name for file in tmp_path.iterdir()} == {
        'untrained.pth', 'cascade-front.json', 'cascade-front.csv', 'cascade-front.png'}
    verdict = load_results(tmp_path / 'cascade-front.json').info['verdict']
    single = verdict['single']
    answer = result.stdout.splitlines()[-1]
    assert f'Use the single subnet {single["img_size"]}:{single["keep_rate"]:g}' in answer
    assert single['macs'] <= 0.7 * model.macs((24, 1.0))
    again = supervit('cascade', *untrained, '--macs', 0.7 * model.macs((24, 1.0)), '--json')
    assert (again.exit_code, json.loads(again.stdout)['verdict']) == (3, verdict)
    assert not verdict['is_better'] and verdict['p_value'] >= 0.05 and verdict['images'] == 90


def test_where_without_a_profile_is_refused(given: list[Any]) -> None:
    assert supervit('cascade', *given, '--where', 'batchsize=1').exit_code == 2


@pytest.mark.parametrize('calibration', [None, 'x', {'data_dir': 'here'}, {}])
def test_what_a_cascade_was_calibrated_on_may_be_unknown(model: Any, tmp_path: Path, calibration: Any) -> None:
    path, images = tmp_path / 'cascade.json', Images([(Image.new('RGB', (24, 24)), 0)], 'here', '', 'validation')
    path.write_text(json.dumps({
        'stages': [[12, 0.5], [24, 1.0]], 'thresholds': [0.5], 'network': fingerprint(model),
        'calibration': calibration}))
    results = evaluate_cascade(Cascade.load(model, path), images, workers=0)
    assert (results.info['calibration_images'], results.rows[0]['count']) == (0, 1)


def test_a_profile_gives_the_budget_in_time(given: list[Any], model: Any, tmp_path: Path) -> None:
    rows = [dict(subnet._asdict(), macs=model.macs(subnet), latency_ms=10. * i + 10, batch_size=1)
            for i, subnet in enumerate(model.subnets)]
    path = tmp_path / save_results(Results('supervit_digits', rows), tmp_path, 'profile')
    result = supervit('cascade', *given, '--latency-ms', 25, '--profile', path)
    assert result.exit_code == 0, result.output
    assert 'latency, median [ms]' in result.stdout
    result = supervit('cascade', *given, '--latency-ms', 5, '--profile', path)
    assert result.exit_code == 1 and 'no cascade has a mean latency_ms of at most 5' in result.stderr


@pytest.mark.parametrize(('arguments', 'code', 'message'), [
    (['--macs', 1e6, '--accuracy', 90], 2, 'exclude each other'),
    (['--latency-ms', 5], 2, 'belong together'),
    (['--macs', 1e6, '--profile', __file__], 2, 'give --latency-ms'),
    (['--macs', 'nan'], 2, '--macs nan is no budget'),
    (['--macs', -1], 2, '--macs -1 is no budget'),
    (['--accuracy', 0.99], 2, '--accuracy 0.99 is no percentage'),
    (['--accuracy', 101], 2, '--accuracy 101 is no percentage'),
    (['--calibration-share', 1], 2, '1.0 is not in the range 0<x<1'),
    (['--calibration-share', 0.01], 1, '1 images to calibrate on and 89 others to report are too few'),
    (['--output', '/dev/null/x'], 1, "cannot write to the folder '/dev/null/x'"),
])
def test_what_is_wrong_is_one_line(given: list[Any], arguments: list[Any], code: int, message: str) -> None:
    result = supervit('cascade', *given, *arguments)
    assert (result.exit_code, result.stdout) == (code, '')
    assert message in result.stderr.splitlines()[-1]


def test_a_folder_of_no_or_one_image_calibrates_nothing(given: list[Any], folder: Path, tmp_path: Path) -> None:
    where = [tmp_path if item == folder else item for item in given]
    (tmp_path / 'validation' / 'class0').mkdir(parents=True)
    result = supervit('cascade', *where)
    assert result.exit_code == 1 and 'Found 0 images' in result.stderr
    for name in ('class0', 'class1', 'class2'):
        (tmp_path / 'validation' / name).mkdir(exist_ok=True)
    Image.new('RGB', (24, 24)).save(tmp_path / 'validation' / 'class0' / '0.png')
    result = supervit('cascade', *where)
    assert result.exit_code == 1 and 'class' in result.stderr


def test_a_cascade_of_another_network_is_refused(given: list[Any], output: tuple[Path, Any], tmp_path: Path) -> None:
    model: Any = timm.create_model('supervit_digits', **{**SETTINGS, 'img_sizes': (12, 16)})
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    network = [f'local-dir:{tmp_path}', *given[given.index('--data-dir'):]]
    result = supervit('evaluate', *network, '--cascade', output[0] / 'cascade.json')
    assert result.exit_code == 1 and 'another network: its img_sizes is [12, 24]' in result.stderr
    result = supervit('evaluate', *given, '--cascade', output[0] / 'cascade.json', '--subnet', '12:0.5')
    assert result.exit_code == 2 and 'exclude each other' in result.stderr


# Exported files


@pytest.fixture(scope='module')
def photographs(model_to_export: Callable[..., Any], tmp_path_factory: Any) -> Path:
    model, folder = model_to_export(), tmp_path_factory.mktemp('photographs')
    save_what_confidence_tells_apart(model, folder, subnet=-2)  # of the size that the full network runs at
    return folder


@pytest.mark.parametrize('format', ['onnx', 'pt2'])
def test_an_exported_file_gets_the_cascade_of_its_model_but_that_no_stage_goes_on(
        exported: Callable[..., Path],
        model_to_export: Callable[..., Any],
        photographs: Path,
        tmp_path: Path,
        format: str,
) -> None:
    model, path = model_to_export(), exported(format)
    own = mac_costs(model).own
    budget = 0.85 * own[-1]
    result = supervit('cascade', path, '--data-dir', photographs, '-j', 0, '--macs', budget, '--output', tmp_path)
    assert result.exit_code == 0, result.output
    calibration, report = split_answers(collect_answers(model, open_dataset(str(photographs)), workers=0), 0.5, 0)
    costs = Costs('macs', own, np.zeros((len(own), len(own))))
    chosen, front = search(calibration, report.num_images, costs, costs, budget=budget)
    content = json.loads((tmp_path / 'cascade.json').read_text())
    assert content['stages'] == [list(model.subnets[i]) for i in chosen.stages]
    assert content['thresholds'] == pytest.approx(list(chosen.thresholds), abs=1e-5)
    assert content['expected']['macs_of_stages'] == np.cumsum(own[list(chosen.stages)]).tolist()
    right, cost = simulate(report, costs, chosen.stages, chosen.thresholds)
    assert (content['expected']['correct1'], content['expected']['macs']) == (right.sum(), pytest.approx(cost))
    rows = load_results(tmp_path / 'cascade-front.json').rows
    assert [row['cascade'].count('(') for row in rows] == [len(point.thresholds) for point in front]
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # it is of the weights of both
        cascades = [Cascade.load(network, tmp_path / 'cascade.json') for network in (model, load_program(path))]
    assert cascades[0].macs[-1] < cascades[1].macs[-1] == content['expected']['macs_of_stages'][-1]
