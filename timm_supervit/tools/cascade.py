"""Calibrating a cascade: which subnets are its stages, and how sure each must be of an image to let it stop.

All subnets answer all images once. Every choice rests on the answers to the calibration images alone, every reported
number on the other images. All combinations of subnets are tried, with many thresholds each. Small sets of images make
many of them look perfect, so

- of cascades that are right equally often, the one wins whose last stage, which decides the hard images, of which there
  are few, gives the true classes of all images the highest mean probability; then the one that leaves it the most;
- one more stage must gain more than one standard error of the difference on the calibration images.
"""
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..cascade import NUM_STAGES, Cascade, parting_block, probabilities
from ..fingerprint import fingerprint
from ..models.supervit import SuperVisionTransformer
from ..subnets import Subnet
from .evaluate import bad_images, check_complete, check_finite
from .files import replace_file
from .progress import Progress, silent
from .results import Row, is_int8, subnet_of

__all__ = [
    'SIGNIFICANCE',
    'Answers',
    'Calibration',
    'Comparison',
    'Costs',
    'Point',
    'calibrate',
    'cascade_text',
    'collect_answers',
    'latency_costs',
    'mac_costs',
    'save_cascade',
    'split_answers',
]

SIGNIFICANCE = 0.05

_NUM_BUDGETS = 24
_NUM_SIGN_FLIPS = 10_000
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

    def of(self, places: np.ndarray) -> 'Answers':
        """Return those to some of the images."""
        return Answers(self.subnets, self.confidence[:, places], self.truth[:, places], self.correct[:, places])


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
        """Return what an image costs that stops at each stage, given as places among the subnets [stages]."""
        steps = [
            self.own[stage] - max((self.saved[stage, earlier] for earlier in stages[:i]), default=0)
            for i, stage in enumerate(stages)]
        return np.cumsum(steps)


class Point(NamedTuple):
    """A cascade, or as one stage without thresholds a single subnet, and what it reaches on the calibration images.

    Attributes:
        stages: Places of the subnets among those of the answers.
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


class Comparison(NamedTuple):
    """Cascades against single subnets of the same mean cost, on images that neither was chosen on.

    Attributes:
        gain: By how many points of top-1 the cascades of the front are ahead on average.
        p_value: How probable such a lead or a greater one is where there is none.
    """

    gain: float
    p_value: float

    @property
    def is_significant(self) -> bool:
        """Whether the cascades are better than single subnets beyond what chance explains."""
        return self.gain > 0 and self.p_value < SIGNIFICANCE


@dataclass
class Calibration:
    """What a search has found. Rows have what is reached on the report images.

    Attributes:
        chosen: The cascade that was asked for.
        row: Its row.
        full: The row of the most expensive subnet.
        front: Rows of the best cascades for a range of budgets, cheapest first.
        singles: Rows of all single subnets, cheapest first.
        comparison: The front against the single subnets.
        only_one_right: On how many images only the chosen cascade is right, and on how many only the full network.
    """

    chosen: Point
    row: Row
    full: Row
    front: list[Row]
    singles: list[Row]
    comparison: Comparison
    only_one_right: tuple[int, int]


def collect_answers(
        model: SuperVisionTransformer,
        loader: Any,
        *,
        amp_dtype: torch.dtype | None = None,
        skip_bad_images: bool = False,
        progress: Progress = silent,
) -> Answers:
    """Let all subnets of a model answer all images, in one pass.

    Args:
        model: A SuperViT.
        loader: Batches of images and classes, from ``create_evaluation_loader``.
        amp_dtype: Run in mixed precision with this dtype.
        skip_bad_images: Pass over unreadable images.
        progress: Follows the batches, such as ``tqdm.tqdm``.

    Raises:
        OSError: If an image cannot be read and ``skip_bad_images`` is False; the message names it.
        RuntimeError: If a subnet's logits are not finite; the message names it.
        ValueError: If a class is none of the model's.
    """
    subnets, parts, seen = model.subnets, [], 0
    device = next(model.parameters()).device
    model.eval()
    for images, target in progress(loader, 'Calibrating'):
        bad_images(target, model.num_classes, loader.dataset, skip_bad_images)
        seen += len(target)
        with torch.inference_mode(), torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model.forward_subnets(images, subnets)
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
    return answers.of(order[:first]), answers.of(order[first:])


def mac_costs(model: SuperVisionTransformer) -> Costs:
    """Return the multiply-accumulates of the model's subnets, and what they save by going on from each other."""
    subnets = model.subnets
    saved = np.zeros((len(subnets),) * 2)
    for i, j in itertools.permutations(range(len(subnets)), 2):
        block = parting_block(model, subnets[i], subnets[j])
        if block is not None:
            saved[i, j] = model.macs(subnets[i], before=block)
    return Costs('macs', np.array([model.macs(subnet) for subnet in subnets], dtype=np.float64), saved)


def latency_costs(macs: Costs, subnets: Sequence[Subnet], rows: Sequence[Row]) -> Costs:
    """Return measured latencies of an image as costs; of a batch each image has its part of the time.

    A stage that goes on is taken to save as large a share of time as of MACs.

    Args:
        macs: Multiply-accumulates of the subnets.
        subnets: The subnets.
        rows: Rows of ``supervit profile``, one for each subnet.

    Raises:
        ValueError: If a subnet was not measured.
    """
    known = {
        subnet_of(row): row['latency_ms'] / row.get('batch_size', 1)
        for row in rows if row.get('latency_ms') is not None and not is_int8(row)}
    missing = [subnet for subnet in subnets if known.get(subnet) is None]
    if missing:
        raise ValueError(
            f'the profile has no latency of subnet {missing[0]}; measure all subnets with '
            f'"supervit profile"')
    own = np.array([known[subnet] for subnet in subnets])
    return Costs('latency_ms', own, macs.saved / macs.own[:, None] * own[:, None])


def calibrate(
        calibration: Answers,
        report: Answers,
        costs: Costs,
        macs: Costs,
        *,
        budget: float | None = None,
        accuracy: float | None = None,
) -> Calibration:
    """Search the best cascades on some images, choose one, and see what they reach on others.

    Args:
        calibration: Answers to the images that decide.
        report: Answers to the images that the rows are about.
        costs: What the front and the budget are about.
        macs: Multiply-accumulates, for the rows.
        budget: Choose the most accurate cascade of at most this mean cost.
        accuracy: Choose the cheapest cascade of at least this top-1 in percent. Without both, it is the cheapest that
            is as accurate and as sure as the full network, or if there is none the most accurate.

    Raises:
        ValueError: If there are too few images or subnets, or no cascade fits.
    """
    if min(calibration.num_images, report.num_images) < 2:
        raise ValueError(
            f'{calibration.num_images} images to calibrate on and {report.num_images} others to report are too few; '
            f'give some hundreds of images')
    if len(calibration.subnets) < min(NUM_STAGES):
        raise ValueError('the model has one subnet, and a cascade needs two; give it more img_sizes or keep_rates')
    tables = list(_tabulate(calibration, costs, macs))
    cheapest = min(float(table.cost.min()) for table in tables)
    budgets = np.geomspace(cheapest, costs.own.max(), _NUM_BUDGETS).tolist()
    front = [point for limit in budgets if (point := _best(tables, calibration, limit))]
    front = list(dict.fromkeys(front))
    singles = [_single(calibration, costs, i) for i in range(len(calibration.subnets))]
    if budget is not None:
        chosen = _best(tables, calibration, budget)
        if chosen is None:
            raise ValueError(
                f'no cascade has a mean {costs.key} of at most {budget:g}; the cheapest has {cheapest:g}')
    elif accuracy is not None:
        reaching = [point for point in front if point.accuracy >= accuracy / 100 - 1e-9]
        if not reaching:
            best = max(point.accuracy for point in front)
            raise ValueError(
                f'no cascade is right on {accuracy:g} % of the calibration images; the best is on {100 * best:.2f} %')
        chosen = reaching[0]
    else:
        full = singles[-1]
        level = [point for point in front if point.accuracy >= full.accuracy and point.truth >= full.truth]
        chosen = level[0] if level else max(front, key=lambda point: (point.accuracy, point.truth))
    hits = {point: _run(point, report, costs) for point in {*front, *singles, chosen}}
    return Calibration(
        chosen,
        _row(chosen, report, costs, macs),
        _row(singles[-1], report, costs, macs),
        [_row(point, report, costs, macs) for point in front],
        [_row(point, report, costs, macs) for point in singles],
        _compare([hits[point] for point in front], [hits[point] for point in _pareto(singles)]),
        (int((hits[chosen][0] & ~hits[singles[-1]][0]).sum()), int((hits[singles[-1]][0] & ~hits[chosen][0]).sum())),
    )


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
    places = np.clip(np.round(shares * len(ordered)).astype(int), 1, len(ordered) - 1)
    return np.unique(((ordered[places - 1] + ordered[places]) / 2).clip(1e-6, 1 - 1e-6))


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
    places = {int(np.where(accuracy == accuracy.max(), table.last, -1).argmax()),
              int(np.where(fits, table.last, -1).argmax())}
    points = []
    for place in sorted(places):
        index = np.unravel_index(place, table.cost.shape)
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


def _single(answers: Answers, costs: Costs, subnet: int) -> Point:
    return Point((subnet,), (), float(answers.correct[subnet].mean()), float(answers.truth[subnet].mean()),
                 float(costs.own[subnet]))


def _pareto(points: Sequence[Point]) -> list[Point]:
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def _hits(point: Point, answers: Answers) -> tuple[np.ndarray, np.ndarray]:
    """Return whether a cascade is right on each image, and the stage at which it stops."""
    stages = list(point.stages)
    sure = answers.confidence[stages] >= np.array([*point.thresholds, -np.inf])[:, None]
    exits = sure.argmax(axis=0)
    return answers.correct[np.array(stages)[exits], np.arange(answers.num_images)], exits


def _run(point: Point, answers: Answers, costs: Costs) -> tuple[np.ndarray, float]:
    """Return whether a cascade is right on each image, and its mean cost."""
    hits, exits = _hits(point, answers)
    return hits, float(costs.totals(point.stages)[exits].mean())


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


def _compare(front: Sequence[tuple[np.ndarray, float]], singles: Sequence[tuple[np.ndarray, float]]) -> Comparison:
    """Test the front against mixtures of single subnets that cost the same, by flipping the signs of the differences.

    Whoever draws at random which of two subnets an image gets has every cost between theirs, without looking at the
    image; so a cascade must be better than that. The differences of an image are averaged over the front, so that there
    is one test. Where cascades are no better, an image's difference is as likely of the other sign.
    """
    single_costs = [cost for _, cost in singles]
    single_hits = np.array([hits for hits, _ in singles], dtype=float)  # [singles, images]
    differences = np.zeros(single_hits.shape[1])
    for hits, cost in front:
        place = np.interp(cost, single_costs, np.arange(len(singles)))
        low, high = int(np.floor(place)), int(np.ceil(place))
        mixture = single_hits[low] + (place - low) * (single_hits[high] - single_hits[low])
        differences += (hits - mixture) / len(front)
    differing = differences[differences != 0]
    generator, count = np.random.default_rng(0), 1
    for _ in range(_NUM_SIGN_FLIPS):
        signs = generator.integers(0, 2, len(differing)) * 2 - 1
        count += bool((signs * differing).sum() >= differing.sum() - 1e-9)
    return Comparison(100 * float(differences.mean()), count / (_NUM_SIGN_FLIPS + 1))


def cascade_text(stages: Sequence[Subnet], thresholds: Sequence[float]) -> str:
    """Return a cascade as it is printed: its stages, with the thresholds between them, as in 12:0.5 (0.9) 24:0.7."""
    parts = [str(stage) for stage in stages]
    for i, threshold in enumerate(thresholds):
        parts[i] += f' ({threshold:.4g})'
    return ' '.join(parts)


def save_cascade(
        path: str | os.PathLike,
        model: SuperVisionTransformer,
        name: str,
        answers: Answers,
        found: Calibration,
        info: dict[str, Any],
) -> None:
    """Write the chosen cascade as JSON, for ``Cascade.load``.

    Args:
        path: The file.
        model: The network.
        name: Its name, as ``timm.create_model`` takes it.
        answers: Answers of the subnets that the places of ``found`` are among.
        found: What the search has found.
        info: Which images it rests on.

    Raises:
        OSError: If it cannot be written; a file of that name is then as it was.
    """
    cascade = Cascade(model, [answers.subnets[i] for i in found.chosen.stages], found.chosen.thresholds)
    content = {
        'model': name,
        'img_sizes': list(model.img_sizes),
        'stages': [list(stage) for stage in cascade.stages],
        'thresholds': list(cascade.thresholds),
        'calibration': info,
        'expected': {**found.row, 'macs_of_stages': cascade.macs},
        'network': fingerprint(model),
    }
    with replace_file(Path(path)) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
