"""Calibrating a cascade: which subnets are its stages, and how sure each must be of an image to let it stop.

All subnets answer all images once. Every choice rests on the answers to the calibration images alone, every reported
number on the other images. All combinations of subnets are tried, with many thresholds each. Small sets of images make
many of them look perfect, so

- of all cascades of so many stages that the most accurate one is not clearly ahead of, the one wins whose last stage,
  which decides the hard images, of which there are few, gives the true classes the highest mean probability;
- one more stage must clearly gain: by more than two standard errors of the difference on the calibration images.

Whether the one that was chosen is of use is tested on images that it was not chosen on, which makes up for the
thousands that were tried: it must be right more often than single subnets of the same mean cost. Some hundreds of
images seldom show that, so where the images are split, the same choice is made again without each part of the
calibration images and tested on that part: all images count once.

Cost is MACs, which are not time, or with a profile latency.
"""
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..cascade import NUM_STAGES, Cascade, cascade_text, probabilities
from ..images.datasets import DEFAULT_WORKERS, Images, count_common, create_evaluation_loader, open_images
from ..images.passes import bad_images, check_complete, check_finite, evaluation_mode, inference
from ..results.fingerprint import fingerprint, source_of
from ..results.rows import Results, Row, difference, is_int8, subnet_of
from ..runner import SubnetRunner, check_predicts, setting_of
from ..subnets import Subnet
from . import Progress, silent
from .choose import merge_results

SIGNIFICANCE = 0.05

_NUM_BUDGETS = 24
_NUM_SIGN_FLIPS = 10_000
_MAX_FOLDS = 2  # with more, whose choices rest on much the same images, chance alone passes the test too often
# How many thresholds are tried for each stage of a cascade of so many stages.
_NUM_THRESHOLDS = {2: 100, 3: 30, 4: 16}


class Answers(NamedTuple):
    """What subnets say of images.

    Attributes:
        subnets: The subnets, cheapest first.
        confidence: Probability of the most probable class [subnets, images].
        truth: Probability of the true class [subnets, images].
        correct: Whether the most probable class is the true one [subnets, images].
    """

    subnets: list[Subnet]
    confidence: np.ndarray
    truth: np.ndarray
    correct: np.ndarray

    @property
    def num_images(self) -> int:
        """How many images they are of."""
        return int(self.correct.shape[1])

    def select(self, images: np.ndarray) -> 'Answers':
        """Return those to the images of these indices."""
        return Answers(self.subnets, self.confidence[:, images], self.truth[:, images], self.correct[:, images])


class Costs(NamedTuple):
    """What subnets cost, of one kind.

    Attributes:
        key: The kind: ``macs`` or ``latency_ms``.
        own: Cost of each subnet for one image [subnets].
        saved: What a subnet (row) saves as a stage behind an earlier one (column), with which it shares its first
            blocks [subnets, subnets].
    """

    key: str
    own: np.ndarray
    saved: np.ndarray

    def totals(self, stages: Sequence[int]) -> np.ndarray:
        """Return what an image costs that stops at each stage, given as indices of subnets [stages]."""
        steps = [
            self.own[stage] - max((self.saved[stage, earlier] for earlier in stages[:i]), default=0)
            for i, stage in enumerate(stages)]
        return np.cumsum(steps)


class Point(NamedTuple):
    """A cascade, or as one stage without thresholds a single subnet, and what it reaches on the calibration images.

    Attributes:
        stages: Indices of the subnets among those of the answers.
        thresholds: One for each stage but the last.
        accuracy: Share of the images that it is right on.
        truth: Mean probability that it gives the true class.
        cost: Mean cost of an image.
        last: Share of the images that stop at the last stage.
    """

    stages: tuple[int, ...]
    thresholds: tuple[float, ...]
    accuracy: float
    truth: float
    cost: float
    last: float = 1.


class Goal(NamedTuple):
    """What is asked of a cascade or a single subnet: one of the two, or to be as good as the full network.

    Attributes:
        budget: At most this mean cost of an image.
        accuracy: At least this top-1 in percent.
    """

    budget: float | None = None
    accuracy: float | None = None

    def is_met(self, point: Point, full: Point) -> bool:
        """Return whether a point is what is asked for, on the calibration images."""
        if self.budget is not None:
            return point.cost <= self.budget * (1 + 1e-12)
        if self.accuracy is not None:
            return point.accuracy >= self.accuracy / 100 - 1e-9
        return point.accuracy >= full.accuracy and point.truth >= full.truth


class Verdict(NamedTuple):
    """Whether the chosen cascade is of use, on images that it was not chosen on.

    These are the report images and, where the images were split, those that it was chosen on as well: the same choice
    is made once more without a part of them, and tested on that part.

    Attributes:
        is_better: Whether it is: significantly better than single subnets, and what was asked for.
        reason: Why it is not, as the end of a sentence; empty where it is.
        gain: By how many points of top-1 it is ahead of single subnets of the same mean cost.
        p_value: How probable such a lead or a greater one is where there is none.
        images: How many images these are.
        single: Row of the single subnet to use instead: the most accurate inside the budget, or the cheapest that
            reaches the accuracy, which without a goal is that of the full network; if none does, the full network.
    """

    is_better: bool
    reason: str
    gain: float
    p_value: float
    images: int
    single: Row


@dataclass
class Calibration:
    """What a search has found. Rows have what is reached on the report images.

    Attributes:
        cascade: The cascade that was chosen. Use it where ``verdict.is_better``, and ``verdict.single`` otherwise.
        row: Its row.
        full: The row of the most expensive subnet.
        results: Rows of the best cascades for a range of budgets, cheapest first, and which images they rest on.
        singles: Rows of all single subnets, cheapest first.
        verdict: Whether it is better than single subnets.
        only_one_right: On how many images only the chosen cascade is right, and on how many only the full network.
    """

    cascade: Cascade
    row: Row
    full: Row
    results: Results
    singles: list[Row]
    verdict: Verdict
    only_one_right: tuple[int, int]


def calibrate(
        model: SubnetRunner,
        images: Any,
        *,
        calibration_images: Any = None,
        calibration_share: float = 0.5,
        seed: int = 0,
        macs: float | None = None,
        latency_ms: float | None = None,
        profile: str | os.PathLike | None = None,
        where: Mapping[str, Any] | None = None,
        accuracy: float | None = None,
        batch_size: int = 256,
        workers: int = DEFAULT_WORKERS,
        precision: str = 'float32',
        skip_bad_images: bool = False,
        progress: Progress = silent,
) -> Calibration:
    """Find a cascade: let all subnets answer all images, search on one part of them, report on the other.

    ``macs``, ``latency_ms`` or ``accuracy`` say what is chosen. Without one it is the cheapest cascade that is as
    accurate and as sure as the full network, or if there is none the most accurate. Whether to use it, or which single
    subnet, is the ``verdict``.

    Args:
        model: A SuperViT or an exported file.
        images: The images, see ``open_images``.
        calibration_images: Calibrate on these and report on all of ``images``, which are split otherwise.
        calibration_share: Share of the images to calibrate on, in (0, 1).
        seed: Which images are of which share.
        macs: Choose the most accurate cascade of at most so many mean multiply-accumulates for an image.
        latency_ms: Or of at most so many mean milliseconds, as estimated from ``profile``.
        profile: JSON file of "supervit profile"; costs are then latencies, see ``latency_costs``.
        where: Which rows of the profile count, as in ``{'batch_size': 1}``.
        accuracy: Or choose the cheapest cascade of at least this top-1 in percent on the calibration images.
        batch_size: Images of a batch.
        workers: Processes that read images.
        precision: ``float32``, or ``bfloat16`` or ``float16`` by autocast.
        skip_bad_images: Pass over unreadable images.
        progress: Follows the batches, such as ``tqdm.tqdm``.

    Raises:
        OSError: If an image cannot be read and ``skip_bad_images`` is False; the message names it.
        RuntimeError: If a subnet's logits are not finite; the message names it.
        ValueError: If a class is none of the model's, the budget is none, the profile is of another network, there are
            too few images or subnets, or neither a cascade nor a subnet fits.
    """
    check_goal(macs, latency_ms, accuracy, profile, where)
    check_predicts(model)
    report_images = open_images(images, model)
    others = None if calibration_images is None else open_images(calibration_images, model)
    if others and (common := count_common(report_images.dataset, others.dataset)):
        raise ValueError(f'{common} images of --calibration-dir are in --data-dir too; leave --calibration-dir out, so '
                         f'that the images are split, or give other images')
    network = fingerprint(model)
    source = source_of(model)
    costs = model_costs = mac_costs(model)
    if profile:
        measured = merge_results([profile], where)
        other = difference(Results(source.name, [], {}, network), measured)
        if measured.network and other:
            raise ValueError(f'{os.fspath(profile)} is of another network: {other}; profile this one')
        runs_int8 = setting_of(model)['precision'] == 'int8'
        costs = latency_costs(model_costs, model.subnets, [row for row in measured.rows if is_int8(row) == runs_int8])
    answers = [
        collect_answers(model, part, batch_size, workers, precision, skip_bad_images, progress)
        for part in (report_images, others) if part]
    calibration, report = answers[::-1] if others else split_answers(answers[0], calibration_share, seed)
    goal = Goal(macs or latency_ms, accuracy)
    chosen, front = search(calibration, report.num_images, costs, model_costs, *goal)
    singles = _singles(calibration, costs)
    rows = {point: _row(point, report, costs, model_costs) for point in {*front, *singles, chosen}}
    trials = [(chosen, calibration, report)]
    if not others:
        trials += [
            (_choose(rest, costs, model_costs, goal)[0], rest, part) for rest, part in _folds(calibration, report)]
    verdict = _judge(trials, costs, goal, rows[_best_single(singles, goal)])
    hits, full_hits = (_hits(point, report)[0] for point in (chosen, singles[-1]))
    info = {
        **report_images.info, 'calibration_dir': others.data_dir if others else None,
        'calibration_share': None if others else calibration_share, 'seed': seed,
        'calibration_images': calibration.num_images, 'report_images': report.num_images,
        'top1': 100 * chosen.accuracy, costs.key: chosen.cost, 'verdict': verdict._asdict()}
    return Calibration(
        Cascade(model, [calibration.subnets[i] for i in chosen.stages], chosen.thresholds, info),
        rows[chosen],
        rows[singles[-1]],
        Results(source.name, [rows[point] for point in front], info, network | {'weights_kind': source.weights_kind}),
        [rows[point] for point in singles],
        verdict,
        (int((hits & ~full_hits).sum()), int((full_hits & ~hits).sum())),
    )


def check_goal(
        macs: float | None = None,
        latency_ms: float | None = None,
        accuracy: float | None = None,
        profile: Any = None,
        where: Any = None,
) -> None:
    """Check what ``calibrate`` is asked for."""
    if sum(value is not None for value in (macs, latency_ms, accuracy)) > 1:
        raise ValueError('--macs, --latency-ms and --accuracy exclude each other; give one')
    for option, value in (('--macs', macs), ('--latency-ms', latency_ms)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f'{option} {value:g} is no budget; give a number above 0')
    if accuracy is not None and not 1 <= accuracy <= 100:
        raise ValueError(f'--accuracy {accuracy:g} is no percentage from 1 to 100, as in 95')
    if latency_ms is not None and profile is None:
        raise ValueError('--latency-ms and --profile belong together; give both')
    if macs is not None and profile is not None:
        raise ValueError('--macs is a budget of MACs and --profile of time; give --latency-ms, or leave one out')
    if where and not profile:
        raise ValueError('--where says which rows of --profile count; give that too, or leave it out')


def collect_answers(
        model: SubnetRunner,
        images: Images,
        batch_size: int = 256,
        workers: int = DEFAULT_WORKERS,
        precision: str = 'float32',
        skip_bad_images: bool = False,
        progress: Progress = silent,
) -> Answers:
    """Let all subnets of a model answer all images, in one pass; the arguments are as in ``calibrate``."""
    subnets, parts, seen = model.subnets, [], 0
    loader = create_evaluation_loader(images, model, batch_size, workers)
    with evaluation_mode(model):
        for batch, target in progress(loader, 'Calibrating'):
            bad_images(target, model.num_classes, loader.dataset, skip_bad_images)
            seen += len(target)
            with inference(model, precision):
                logits = model.forward_subnets(batch, subnets)
            check_finite(logits, subnets)
            readable = target >= 0
            target = target[readable]
            stacked = torch.stack([output[readable] for output in logits])  # [S, B, classes]
            shares = probabilities(stacked)
            confidence, best = shares.max(dim=2)
            truth = shares.gather(2, target.expand(len(subnets), -1).unsqueeze(2)).squeeze(2)
            parts.append([part.cpu().numpy() for part in (confidence, truth, best == target)])
    check_complete(loader.dataset, seen, skip_bad_images)
    if not parts:
        raise ValueError('there are no images to calibrate on; check --data-dir, --dataset and --split')
    joined = [np.concatenate(part, axis=1) for part in zip(*parts, strict=True)]
    return Answers(subnets, joined[0].astype(np.float64), joined[1].astype(np.float64), joined[2])


def split_answers(answers: Answers, share: float = 0.5, seed: int = 0) -> tuple[Answers, Answers]:
    """Return the answers to calibrate on and those to report, of different images drawn at random.

    Args:
        answers: All answers.
        share: Share of the images to calibrate on, in (0, 1).
        seed: Start of the random numbers; the same seed parts the same images in the same way.
    """
    order = np.random.default_rng(seed).permutation(answers.num_images)
    first = round(share * answers.num_images)
    return answers.select(order[:first]), answers.select(order[first:])


def mac_costs(model: Any) -> Costs:
    """Return the multiply-accumulates of a model's subnets, and what they save by going on from each other."""
    macs = model.subnet_macs()
    subnets = list(macs)
    saved = np.zeros((len(subnets),) * 2)
    for i, j in itertools.permutations(range(len(subnets)), 2):
        block = model.parting_block(subnets[i], subnets[j])
        if block is not None:
            saved[i, j] = model.macs(subnets[i], before=block)
    return Costs('macs', np.array(list(macs.values()), dtype=np.float64), saved)


def latency_costs(macs: Costs, subnets: Sequence[Subnet], rows: Sequence[Row]) -> Costs:
    """Return measured latencies of an image as costs; of a batch each image has its part of the time.

    A stage that goes on is taken to save as large a share of time as of MACs. Images that come to a later stage are a
    smaller batch, and taken to need as long each as in a whole one: of batches of one that is so, of large ones nearly,
    and in between later stages take longer than this.

    Args:
        macs: Multiply-accumulates of the subnets.
        subnets: The subnets.
        rows: Rows of ``supervit profile``, one for each subnet.
    """
    latencies = {
        subnet_of(row): row['latency_ms'] / row.get('batch_size', 1)
        for row in rows if row.get('latency_ms') is not None}
    missing = [subnet for subnet in subnets if latencies.get(subnet) is None]
    if missing:
        raise ValueError(
            f'the profile has no latency of subnet {missing[0]}; measure all subnets with '
            f'"supervit profile"')
    own = np.array([latencies[subnet] for subnet in subnets])
    return Costs('latency_ms', own, macs.saved / macs.own[:, None] * own[:, None])


def search(
        answers: Answers,
        num_report_images: int,
        costs: Costs,
        macs: Costs,
        budget: float | None = None,
        accuracy: float | None = None,
) -> tuple[Point, list[Point]]:
    """Search the best cascades for a range of budgets, and choose one.

    Args:
        answers: Answers to the images that decide.
        num_report_images: How many others there are to report.
        costs: What the front and the budget are about.
        macs: Multiply-accumulates.
        budget: The most accurate cascade of at most this mean cost is chosen.
        accuracy: The cheapest one of at least this top-1 in percent is chosen.

    Returns:
        What was chosen, and the front, cheapest first. Where only single subnets are what is asked for, what was chosen
        is the cascade that comes closest.

    Raises:
        ValueError: If single subnets are not either, or there are too few images or subnets.
    """
    if min(answers.num_images, num_report_images) < 2:
        raise ValueError(
            f'{answers.num_images} images to calibrate on and {num_report_images} others to report are too few; '
            f'give some hundreds of images')
    if len(answers.subnets) < min(NUM_STAGES):
        raise ValueError('the model has one subnet, and a cascade needs two; give it more img_sizes or keep_rates')
    goal = Goal(budget, accuracy)
    chosen, front = _choose(answers, costs, macs, goal)
    singles = _singles(answers, costs)
    if not any(goal.is_met(point, singles[-1]) for point in (chosen, *singles)):
        if budget is not None:
            raise ValueError(
                f'no cascade has a mean {costs.key} of at most {budget:g}; the cheapest has {chosen.cost:g}')
        raise ValueError(
            f'no cascade is right on {accuracy:g} % of the calibration images; the best is on '
            f'{100 * chosen.accuracy:.2f} %')
    return chosen, front


def _choose(answers: Answers, costs: Costs, macs: Costs, goal: Goal) -> tuple[Point, list[Point]]:
    """Return what ``search`` does; where no cascade meets the goal, the one that comes closest to it."""
    tables = list(_tabulate(answers, costs, macs))
    budgets = np.geomspace(min(float(table.cost.min()) for table in tables), costs.own.max(), _NUM_BUDGETS).tolist()
    front = list(dict.fromkeys(point for limit in budgets if (point := _best(tables, answers, limit))))
    if goal.budget is not None:
        return _best(tables, answers, goal.budget) or front[0], front
    full = _singles(answers, costs)[-1]
    reaching = [point for point in front if goal.is_met(point, full)]
    return reaching[0] if reaching else max(front, key=lambda point: (point.accuracy, point.truth)), front


class _Table(NamedTuple):
    """All cascades of certain stages: their thresholds, and what each combination of them reaches."""

    stages: tuple[int, ...]
    thresholds: list[np.ndarray]
    accuracy: np.ndarray  # [thresholds of the first stage, of the second, ...], as those that follow
    truth: np.ndarray
    cost: np.ndarray
    last: np.ndarray


def _tabulate(answers: Answers, costs: Costs, macs: Costs) -> Iterator[_Table]:
    for num_stages in NUM_STAGES:
        candidates = [_thresholds(confidence, _NUM_THRESHOLDS[num_stages]) for confidence in answers.confidence]
        # How many of a subnet's thresholds an image reaches: it stops at the first so many of them.
        reached = [
            np.searchsorted(thresholds, confidence, side='right')
            for thresholds, confidence in zip(candidates, answers.confidence, strict=True)]
        for stages in itertools.combinations(range(len(answers.subnets)), num_stages):
            if not (np.diff(macs.own[list(stages)]) > 0).all():  # sizes of equal area
                continue
            thresholds = [candidates[stage] for stage in stages[:-1]]
            shape = tuple(len(values) + 1 for values in thresholds)
            cells = np.ravel_multi_index([reached[stage] for stage in stages[:-1]], shape)
            accuracy = truth = cost = last = np.zeros([len(values) for values in thresholds])
            for i, (stage, total) in enumerate(zip(stages, costs.totals(stages), strict=True)):
                right, sure, last = (
                    _sum_stopping(np.bincount(cells, weights, math.prod(shape)).reshape(shape), i) / answers.num_images
                    for weights in (answers.correct[stage], answers.truth[stage], None))
                accuracy, truth, cost = accuracy + right, truth + sure, cost + total * last
            yield _Table(stages, thresholds, accuracy, truth, cost, last)


def _thresholds(confidence: np.ndarray, number: int) -> np.ndarray:
    """Return thresholds, each midway between the confidences of two images.

    They are closer together where few images lie below, since a later stage sees only those few.
    """
    ordered = np.sort(confidence)
    shares = (np.arange(1, number + 1) / (number + 1)) ** 2
    ranks = np.clip(np.round(shares * len(ordered)).astype(int), 1, len(ordered) - 1)
    return np.unique(((ordered[ranks - 1] + ordered[ranks]) / 2).clip(1e-6, 1 - 1e-6))


def _sum_stopping(counts: np.ndarray, stage: int) -> np.ndarray:
    """Return the sum over the images that stop at a stage for each combination of thresholds.

    Args:
        counts: Sums over images that reach so many thresholds of each stage.
        stage: The stage; the last where it is none of the axes.
    """
    for axis in range(counts.ndim):
        summed = counts.cumsum(axis=axis)
        below = np.delete(summed, -1, axis=axis)  # threshold number t is missed by those that reach t or fewer
        every = summed.take([-1], axis=axis)
        if axis < stage:
            counts = below
        elif axis == stage:
            counts = every - below
        else:
            counts = np.broadcast_to(every, below.shape)
    return counts


def _best(tables: Sequence[_Table], answers: Answers, budget: float) -> Point | None:
    """Return the best cascade inside a budget; None if there is none.

    The most accurate of thousands of cascades on some hundreds of images is so by luck. So of all that it is not
    clearly ahead of, the one whose last stage is the surest of the true classes is taken, and a further stage only
    where it clearly gains.
    """
    best: Point | None = None
    quality = answers.truth.mean(axis=1)
    for num_stages in NUM_STAGES:
        candidates = [
            point for table in tables if len(table.stages) == num_stages
            for point in _best_of(table, budget, answers.num_images)]
        if not candidates:
            continue
        top = max(candidates, key=lambda point: (point.accuracy, quality[point.stages[-1]], point.last))
        surest = sorted(candidates, key=lambda point: (quality[point.stages[-1]], point.truth), reverse=True)
        point = next(point for point in surest if not _gains(top, point, answers))  # the top itself, if no other
        if best is None or _gains(point, best, answers):
            best = point
    return best


def _best_of(table: _Table, budget: float, num_images: int) -> list[Point]:
    """Return the most accurate cascade inside a budget, and the one that lets most images come to the last stage."""
    fits = table.cost <= budget * (1 + 1e-12)
    if not fits.any():
        return []
    # Whole numbers of images: the sums are off in the last digits.
    accuracy = np.where(fits, np.round(table.accuracy * num_images) / num_images, -1)
    cells = {int(np.where(accuracy == accuracy.max(), table.last, -1).argmax()),
             int(np.where(fits, table.last, -1).argmax())}
    points = []
    for cell in sorted(cells):
        index = np.unravel_index(cell, table.cost.shape)
        points.append(Point(
            table.stages, tuple(float(values[i]) for values, i in zip(table.thresholds, index, strict=True)),
            float(accuracy[index]), float(table.truth[index]), float(table.cost[index]), float(table.last[index])))
    return points


def _gains(point: Point, other: Point, answers: Answers) -> bool:
    """Return whether a cascade is ahead of another by more than two standard errors of the difference."""
    if point.accuracy <= other.accuracy:
        return False
    difference = _hits(point, answers)[0].astype(float) - _hits(other, answers)[0]
    return bool(difference.mean() > 2 * difference.std() / math.sqrt(len(difference)))


def _singles(answers: Answers, costs: Costs) -> list[Point]:
    return [
        Point((i,), (), float(right.mean()), float(truth.mean()), float(cost))
        for i, (right, truth, cost) in enumerate(zip(answers.correct, answers.truth, costs.own, strict=True))]


def _best_single(singles: Sequence[Point], goal: Goal) -> Point:
    """Return the most accurate single subnet inside the budget, or the cheapest that is as accurate as was asked."""
    full = singles[-1]
    if goal == Goal():  # how sure a single subnet is of the true class changes nothing
        goal = Goal(accuracy=100 * full.accuracy)
    meeting = [point for point in singles if goal.is_met(point, full)] or [full]
    if goal.budget is not None:
        return max(meeting, key=lambda point: (point.accuracy, -point.cost))
    return min(meeting, key=lambda point: point.cost)


def _hits(point: Point, answers: Answers) -> tuple[np.ndarray, np.ndarray]:
    """Return whether a cascade is right on each image, and the stage at which it stops."""
    stages = list(point.stages)
    sure = answers.confidence[stages] >= np.array([*point.thresholds, -np.inf])[:, None]
    exits = sure.argmax(axis=0)
    return answers.correct[np.array(stages)[exits], np.arange(answers.num_images)], exits


def _row(point: Point, answers: Answers, costs: Costs, macs: Costs) -> Row:
    hits, exits = _hits(point, answers)
    stages = [answers.subnets[i] for i in point.stages]
    name: Row = {'cascade': cascade_text(stages, point.thresholds)} if point.thresholds else stages[0]._asdict()
    row = {
        **name,
        'macs': float(macs.totals(point.stages)[exits].mean()),
        'top1': 100 * float(hits.mean()),
        'correct1': int(hits.sum()),
        'count': len(hits),
    }
    if point.thresholds:
        row['shares'] = [round(100 * float((exits == i).mean()), 2) for i in range(len(stages))]
    if costs.key != 'macs':
        row[costs.key] = float(costs.totals(point.stages)[exits].mean())
    return row


def _folds(calibration: Answers, report: Answers) -> Iterator[tuple[Answers, Answers]]:
    """Yield the calibration images in one or two parts, each behind all other images, which are to choose for it."""
    answers = Answers(calibration.subnets, *(
        np.concatenate(both, axis=1) for both in zip(calibration[1:], report[1:], strict=True)))
    number = min(max(round(calibration.num_images / report.num_images), 1), _MAX_FOLDS)
    for part in np.array_split(np.arange(calibration.num_images), number):
        yield answers.select(np.setdiff1d(np.arange(answers.num_images), part)), answers.select(part)


def _judge(trials: Sequence[tuple[Point, Answers, Answers]], costs: Costs, goal: Goal, single: Row) -> Verdict:
    """Test cascades against single subnets that cost the same.

    Args:
        trials: A cascade, the answers that it was chosen by, and those to other images, which no other trial has; first
            the cascade to use.
        costs: What costs the same.
        goal: What the cascades were chosen for.
        single: What to use instead.
    """
    ahead, behind = [], []
    for point, answers, others in trials:
        hits, exits = _hits(point, others)
        ahead.append(hits - _mixture(answers, others, costs, float(costs.totals(point.stages)[exits].mean())))
        behind.append(others.correct[-1].astype(float) - hits)
    differences = np.concatenate(ahead)
    p_value, reason = _p_value(differences), ''
    is_met = goal.is_met(trials[0][0], _singles(trials[0][1], costs)[-1])
    if not is_met and goal != Goal():
        reason = f'none is {"inside the budget" if goal.budget else "as accurate as was asked"}'
    elif p_value >= SIGNIFICANCE:
        reason = 'the best one is not significantly better than single subnets of the same mean cost'
    elif ahead[0].mean() <= 0:  # the first is the one to use
        reason = 'the best one is behind single subnets on the images that it was not chosen on'
    elif not is_met or (goal == Goal() and _p_value(np.concatenate(behind)) < SIGNIFICANCE):
        reason = 'the best one is not as accurate as the full network'
    return Verdict(not reason, reason, 100 * float(differences.mean()), p_value, len(differences), single)


def _mixture(answers: Answers, others: Answers, costs: Costs, cost: float) -> np.ndarray:
    """Return how probably the best mixture of two single subnets of this mean cost is right on each of other images.

    Whoever draws at random which of two subnets an image gets has every cost between theirs, without looking at the
    image; so a cascade must be better than that. ``answers`` say which two are the best.
    """
    accuracy, own = answers.correct.mean(axis=1), costs.own
    # Of a cheaper subnet (row) and a dearer one (column), the share of the images that get the dearer one.
    dearer = np.clip((cost - own[:, None]) / np.maximum(own - own[:, None], 1e-12 * cost), 0, 1)
    mixed = np.where(own[:, None] <= cost * (1 + 1e-9), accuracy[:, None] * (1 - dearer) + accuracy * dearer, -1)
    i, j = np.unravel_index(mixed.argmax(), mixed.shape)
    return others.correct[i] * (1 - dearer[i, j]) + others.correct[j] * dearer[i, j]


def _p_value(differences: np.ndarray) -> float:
    """Return how probable such a sum or a greater one is where each image's difference is as likely of the other sign.

    The signs are flipped at random.
    """
    differing = differences[differences != 0]
    generator, count = np.random.default_rng(0), 1
    for _ in range(_NUM_SIGN_FLIPS // 100):
        signs = generator.integers(0, 2, (100, len(differing))) * 2 - 1
        count += int((signs @ differing >= differing.sum() - 1e-9).sum())
    return count / (_NUM_SIGN_FLIPS + 1)
