"""A cascade: each image gets what its stage says, whatever batch it comes in, and what stages share runs once."""
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from timm_supervit import Cascade, Subnet
from timm_supervit.results.fingerprint import fingerprint
from timm_supervit.subnets import sort_sizes

BACKBONES = ['supervit_tiny', 'supervit_lvvit_small']
# Stages of one size, of several, and of one that go on past another.
STAGES: dict[str, list[Any]] = {
    'one size': [(64, 0.3), (64, 0.6), (64, 1.0)],
    'several sizes': [(32, 0.6), (48, 0.6), (64, 1.0)],
    'past another size': [(48, 0.3), (32, 1.0), (48, 0.6), (64, 1.0)],
    'rectangles': [((32, 64), 0.3), ((64, 32), 0.6), ((64, 48), 0.6), ((64, 48), 1.0)],
    'two stages': [(48, 0.3), (48, 1.0)],
}


@pytest.fixture
def batch() -> Tensor:
    return torch.randn(24, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def sizes_of(kind: str) -> tuple[Any, ...]:
    return sort_sizes({size for size, _ in STAGES[kind]} | {64})


def make_cascade(model: Any, stages: list[tuple[int, float]], images: Tensor) -> Cascade:
    """Let about a third of the images stop at each stage, by thresholds between their confidences."""
    stages = sorted(stages, key=model.macs)
    thresholds = []
    for img_size, keep_rate in stages[:-1]:
        logits = model(images.detach(), img_size=img_size, keep_rate=keep_rate)
        confidence = logits.softmax(1).amax(1).sort().values.tolist()
        thresholds.append(sum(confidence[len(images) * 2 // 3 - 1:][:2]) / 2)
    return Cascade(model, stages, thresholds)


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('kind', STAGES)
@torch.no_grad()
def test_each_image_has_the_logits_of_the_first_stage_that_is_sure(
        small_model: Any, batch: Tensor, name: str, kind: str) -> None:
    model = small_model(name, img_sizes=sizes_of(kind))
    cascade = make_cascade(model, STAGES[kind], batch)
    logits, exits = cascade(batch, return_exits=True)
    each = [model(batch, img_size=img_size, keep_rate=keep_rate) for img_size, keep_rate in cascade.stages]
    for i in range(len(batch)):
        sure = [stage for stage, threshold in enumerate(cascade.thresholds)
                if each[stage][i].softmax(0).max() >= threshold]
        assert exits[i] == min([*sure, len(each) - 1])
    torch.testing.assert_close(logits, torch.stack(each)[exits, range(len(batch))], atol=1e-6, rtol=1e-6)
    assert len(set(exits.tolist())) > 1
    assert torch.equal(cascade(batch), logits)


@pytest.mark.parametrize('name', BACKBONES)
@torch.no_grad()
def test_an_image_fares_in_a_batch_as_it_does_alone(small_model: Any, batch: Tensor, name: str) -> None:
    # In double precision the order of sums, which depends on the number of rows, is far below what is compared.
    model, batch = small_model(name).double(), batch.double()
    cascade = make_cascade(model, STAGES['past another size'], batch)
    logits, exits = cascade(batch, return_exits=True)
    for i in range(len(batch)):
        alone, stage = cascade(batch[i:i + 1], return_exits=True)
        assert stage == exits[i]
        torch.testing.assert_close(alone[0], logits[i], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize('kind', STAGES)
@torch.no_grad()
def test_what_stages_share_is_computed_and_counted_once(small_model: Any, images: Tensor, kind: str) -> None:
    model = small_model(img_sizes=sizes_of(kind))
    stages = sorted(STAGES[kind], key=model.macs)
    for stop in range(len(stages)):
        # Nobody is sure of anything before this stage, and everybody in it.
        thresholds = [1 - 1e-7 if stage < stop else 1e-7 for stage in range(len(stages) - 1)]
        cascade = Cascade(model, stages, thresholds)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            _, exits = cascade(images[:1], return_exits=True)
        assert exits.tolist() == [stop]
        assert counter.get_total_flops() // 2 == cascade.macs[stop]
    starting_over = sum(map(model.macs, stages))
    assert (cascade.macs[-1] < starting_over) == (len({size for size, _ in stages}) < len(stages))


@torch.no_grad()
def test_stages_that_keep_as_many_for_a_while_part_where_they_differ(small_model: Any, batch: Tensor) -> None:
    model = small_model(img_sizes=(96,))
    stages = [(96, 0.52), (96, 0.54), (96, 0.6)]  # of 36 patches they keep 20, 20, 23, then 11, 12, 15
    assert [model.schedule(Subnet(*stage)) for stage in stages] == [
        {1: 20, 2: 11}, {1: 20, 2: 12}, {1: 23, 2: 15}]
    cascade = make_cascade(model, stages, batch)
    logits, exits = cascade(batch, return_exits=True)
    each = torch.stack([model(batch, img_size=size, keep_rate=rate) for size, rate in stages])
    torch.testing.assert_close(logits, each[exits, range(len(batch))], atol=1e-6, rtol=1e-6)
    assert cascade.macs[1] == model.macs(stages[0]) + model.macs(stages[1]) - model.macs(stages[0], before=2)
    assert cascade.macs[2] == cascade.macs[1] + model.macs(stages[2]) - model.macs(stages[0], before=1)


@torch.no_grad()
def test_logits_that_are_no_numbers_are_never_sure_and_come_back(small_model: Any, batch: Tensor) -> None:
    cascade = Cascade(small_model(), STAGES['several sizes'], [1e-9, 1e-9])
    assert cascade(batch, return_exits=True)[1].tolist() == [0] * len(batch)
    cascade.model.head.bias.fill_(torch.nan)
    logits, exits = cascade(batch, return_exits=True)
    assert logits.isnan().all() and exits.tolist() == [2] * len(batch)


@pytest.mark.parametrize('kind', STAGES)
@torch.no_grad()
def test_as_a_runner_of_subnets_it_gives_all_images_the_logits_of_one_stage(
        small_model: Any, batch: Tensor, kind: str) -> None:
    model = small_model(img_sizes=sizes_of(kind))
    cascade = make_cascade(model, STAGES[kind], batch)
    assert (cascade.subnets, cascade.subnet) == (list(cascade.stages), cascade.stages[-1])
    expected = [model(batch, img_size=img_size, keep_rate=keep_rate) for img_size, keep_rate in cascade.stages]
    for i, ((img_size, keep_rate), logits) in enumerate(zip(cascade.stages, expected, strict=True)):
        at_stage, exits = cascade(batch, return_exits=True, img_size=img_size, keep_rate=keep_rate)
        torch.testing.assert_close(at_stage, logits, atol=1e-6, rtol=1e-6)
        assert exits.tolist() == [i] * len(batch)
    for logits, other in zip(cascade.forward_subnets(batch, cascade.subnets), expected, strict=True):
        torch.testing.assert_close(logits, other, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match=f'is no stage .* it has {cascade.stages[0]}, '):
        cascade(batch, img_size=64, keep_rate=0.9)


@torch.no_grad()
def test_its_subnets_cost_all_stages_up_to_them(small_model: Any, images: Tensor) -> None:
    model = small_model()
    cascade = Cascade(model, sorted(STAGES['past another size'], key=model.macs), [0.5] * 3)
    assert list(cascade.subnet_macs().values()) == cascade.macs
    for stage, macs in cascade.subnet_macs().items():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            cascade(images[:1], img_size=stage.img_size, keep_rate=stage.keep_rate)
        assert counter.get_total_flops() // 2 == macs
    last = cascade.stages[-1]
    assert cascade.subnet_macs([tuple(last)]) == {last: cascade.macs[-1]}
    with pytest.raises(ValueError, match=r'is no stage .* it has 32:1, 48:0.3,'):
        cascade.subnet_macs([(64, 0.5)])


@torch.no_grad()
def test_threads_can_share_a_cascade(small_model: Any, batch: Tensor) -> None:
    cascade = make_cascade(small_model(), STAGES['past another size'], batch)
    parts = [batch[i:i + 1 + i % 5] for i in range(16)]
    expected = [cascade(part, return_exits=True) for part in parts]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(3):
            results = list(threads.map(lambda part: cascade(part, return_exits=True), parts))
            for (logits, exits), (expected_logits, expected_exits) in zip(results, expected, strict=True):
                assert torch.equal(logits, expected_logits) and torch.equal(exits, expected_exits)


def test_an_empty_batch_and_gradients_pass(small_model: Any, batch: Tensor) -> None:
    cascade = make_cascade(small_model(), STAGES['several sizes'], batch)
    logits, exits = cascade(batch[:0], return_exits=True)
    assert (logits.shape, exits.shape) == ((0, 10), (0,))
    images = batch.clone().requires_grad_()
    cascade(images).sum().backward()
    assert (images.grad.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize(('stages', 'thresholds', 'message'), [
    ([(64, 1.0)], [], 'are not two to four subnets'),
    ([(32, 0.3), (32, 0.6), (48, 0.3), (48, 0.6), (64, 1.0)], [0.9] * 4, 'are not two to four subnets'),
    ([(64, 1.0), (32, 1.0)], [0.9], r'not in ascending cost.*use 32:1, 64:1'),
    ([(64, 1.0), (64, 1.0)], [0.9], 'not in ascending cost'),
    ([(32, 1.0), (40, 1.0)], [0.9], 'img_size 40 is none of img_sizes'),
    ([(32, 1.0), (64, 1.5)], [0.9], 'keep_rate 1.5 is not in'),
    ([(32, 1.0), (64, 1.0)], [0.9, 0.9], 'not one for each of 2 stages but the last'),
    ([(32, 1.0), (64, 1.0)], [1.0], 'threshold 1.0 is not in'),
    ([(32, 1.0), (64, 1.0)], [0], 'threshold 0 is not in'),
    ([(32, 1.0), (64, 1.0)], [float('nan')], 'threshold nan is not in'),
    ([(32, 1.0), (64, 1.0)], ['0.9'], "threshold '0.9' is not in"),
])
def test_what_is_no_cascade_is_refused(small_model: Any, stages: Any, thresholds: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cascade(small_model(), stages, thresholds)


def test_stages_and_thresholds_may_be_arrays(small_model: Any) -> None:
    cascade = Cascade(small_model(), [(32, np.float64(0.6)), (64, 1)], np.array([0.6]))  # type: ignore[arg-type]
    assert (cascade.stages, cascade.thresholds) == (((32, 0.6), (64, 1.0)), (0.6,))


def test_a_model_that_is_no_classifier_is_refused(small_model: Any) -> None:
    with pytest.raises(TypeError, match='not of a Linear'):
        Cascade(torch.nn.Linear(2, 2), [(32, 1.0), (64, 1.0)], [0.9])  # type: ignore[arg-type]
    for num_classes in (0, 1):
        with pytest.raises(ValueError, match=f'num_classes {num_classes}.*2 or more'):
            Cascade(small_model(num_classes=num_classes), [(32, 1.0), (64, 1.0)], [0.9])


def write(path: Any, model: Any, **changes: Any) -> Any:
    content = dict(stages=[[32, 1.0], [64, 1.0]], thresholds=[0.75], network=fingerprint(model))
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_a_cascade_is_loaded_for_the_network_that_it_is_of(small_model: Any, tmp_path: Any) -> None:
    model = small_model()
    path = write(tmp_path / 'cascade.json', model)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        cascade = Cascade.load(model, path)
    assert (cascade.stages, cascade.thresholds) == (((32, 1.0), (64, 1.0)), (0.75,))
    with pytest.warns(UserWarning, match='calibrated on other weights'):
        Cascade.load(small_model().half(), path)
    for other, difference in [
        (small_model(num_classes=3), 'num_classes is 10 and here 3'),
        (small_model(img_sizes=(32, 48)), r'img_sizes is \[32, 48, 64\] and here \[32, 48\]'),
        (small_model('supervit_small'), 'architecture is supervit_tiny and here supervit_small'),
    ]:
        with pytest.raises(ValueError, match=f'cascade of another network: its {difference}'):
            Cascade.load(other, path)


@pytest.mark.parametrize(('content', 'message'), [
    ('', 'holds no cascade'), ('[]', 'holds no cascade'), ('{"stages": []}', 'holds no cascade'),
    ('{"stages": 1, "thresholds": 2, "network": 3}', 'holds no cascade'),
])
def test_a_file_that_holds_no_cascade_is_named(small_model: Any, tmp_path: Any, content: str, message: str) -> None:
    path = tmp_path / 'cascade.json'
    path.write_text(content)
    with pytest.raises(ValueError, match=f'cascade.json {message}'):
        Cascade.load(small_model(), path)


@pytest.mark.parametrize('changes', [
    {'thresholds': [2]}, {'thresholds': 0.5}, {'stages': 7}, {'stages': [[64, 1.0], [32, 1.0]]}, {'stages': [1, 2]}])
def test_a_file_with_an_impossible_cascade_is_named(small_model: Any, tmp_path: Any, changes: Any) -> None:
    model = small_model()
    with pytest.raises(ValueError, match=r'cascade.json: (thresholds?|stages|subnet) '):
        Cascade.load(model, write(tmp_path / 'cascade.json', model, **changes))
