"""Ten steps of a recipe, built of timm's pieces as its train.py builds them, are ten steps of the official loop."""
import argparse
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from reference_loop import DEIT, LVVIT, OfficialLoop, Settings, create_reference, learning_rate, mix, smooth, spread
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor

from timm_supervit.tools.recipe import recipe as read_recipe

NUM_STEPS = 10  # each an epoch of one batch: all of the warmup, and as much of the cosine
NUM_CLASSES, NUM_PATCHES = 10, 16
SHAPE = dict(
    img_sizes=(16, 24, 32), patch_size=8, drop_layers=(1, 2),
    embed_dim=48, depth=4, num_heads=3, num_classes=NUM_CLASSES)
RECIPES = {'deit_small_in1k': DEIT, 'lvvit_small_in1k': LVVIT}


class Batch(NamedTuple):
    """What the data set gives: images [B, 3, H, W], their classes [B], and label maps [B, classes, 2 + patches]."""

    images: Tensor
    classes: Tensor
    maps: Tensor


class Run(NamedTuple):
    """What is left of a training: the weights at its start and its end, their average, and the draws of each step."""

    start: dict[str, Tensor]
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    draws: list[dict[str, Any]]


def make_batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(2)

    def make() -> Batch:
        images = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
        maps = (3 * torch.randn(4, NUM_CLASSES, 2 + NUM_PATCHES, generator=generator, dtype=torch.float64)).softmax(1)
        return Batch(images, torch.randint(NUM_CLASSES, (4,), generator=generator), maps)

    return [make() for _ in range(NUM_STEPS)]


def read_arguments(recipe: str) -> argparse.Namespace:
    """Return what train.py makes of a recipe on four processes."""
    args = argparse.Namespace(**{'momentum': 0.9, 'lr': None} | yaml.safe_load(read_recipe(recipe)))
    if args.lr is None:
        assert args.lr_base_scale == 'linear'
        args.lr = args.lr_base * args.batch_size * 4 / args.lr_base_size
    return args


def train(recipe: str, model: Any, batches: list[Batch], has_maps: bool) -> Run:
    """Train as train.py does."""
    args = read_arguments(recipe)
    mixup_fn = None
    if args.mixup or args.cutmix:
        mixup_fn = Mixup(
            mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, prob=args.mixup_prob, switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode, label_smoothing=args.smoothing, num_classes=NUM_CLASSES)
    criterion = SoftTargetCrossEntropy() if mixup_fn else LabelSmoothingCrossEntropy(args.smoothing)
    task = ClassificationTask(model=model.double().train(), criterion=criterion, verbose=False)
    optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args))
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay)
    scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(args))
    start, draws = copy.deepcopy(model.state_dict()), []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: draws.append({'subnets': kwargs['subnets'], 'box': kwargs.get('mix_box')}),
        with_kwargs=True)
    for epoch, (images, classes, maps) in enumerate(batches):
        target = maps if has_maps else classes
        if mixup_fn:
            np.random.seed(epoch)
            images, target = mixup_fn(images.clone(), target)
            target = target.double()
        torch.manual_seed(epoch)
        task(images, target)['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=epoch + 1)
        scheduler.step(epoch + 1)
    average = unwrap_model(task.get_eval_model(ema=True)).state_dict()
    return Run(start, model.state_dict(), average, draws)


def train_officially(
        settings: Settings,
        run: Run,
        batches: list[Batch],
        has_maps: bool,
        drop_path: float,
        **rules: bool,
) -> OfficialLoop:
    """Train a reference network from the same start, by the same draws."""
    loop = OfficialLoop(create_reference(settings, run.start, **SHAPE), settings, **rules)
    loop.model.set_drop_path(drop_path)
    for epoch, ((images, classes, maps), draws) in enumerate(zip(batches, run.draws, strict=True)):
        if settings is DEIT:
            images, target = mix(images, classes, NUM_CLASSES, settings.smoothing, seed=epoch)
        else:
            target = smooth(maps if has_maps else spread(classes, NUM_CLASSES, NUM_PATCHES), settings.smoothing)
        torch.manual_seed(epoch)
        loop.step(epoch, images, target, **draws)
    return loop


def list_differences(run: Run, loop: OfficialLoop, with_buffers: bool) -> Iterator[tuple[str, float]]:
    """Yield the largest difference of each tensor, of weights and averages; biases of keys by themselves."""
    parameters = {name for name, _ in loop.model.named_parameters()}
    for what, ours, expected in (
            ('weights', run.weights, loop.model.state_dict()), ('average', run.average, loop.average)):
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            if value.is_floating_point() and (with_buffers or name in parameters):
                difference = (ours[name] - value).abs()
                if name.endswith('qkv.bias'):
                    difference, keys = difference.view(3, -1)[::2], difference.view(3, -1)[1]
                    yield f'{name} of the {what}, keys', keys.max().item()
                yield f'{name} of the {what}', difference.max().item()


def create(small_model: Any, recipe: str, passes: str) -> tuple[Any, float]:
    """Create the recipe's network in small, with its stochastic depth where passes are separate; return the rate, too.

    Passes that share what they have in common share masks of stochastic depth and statistics of BatchNorm as well.
    """
    args = read_arguments(recipe)
    if passes == 'shared':
        return small_model(args.model, **SHAPE), 0.
    model = small_model(args.model, **SHAPE, share_prefix=False, drop_path_rate=args.drop_path)
    return model, RECIPES[recipe].drop_path


@pytest.mark.parametrize('passes', ['shared', 'separate'])
@pytest.mark.parametrize('recipe, labels', [
    ('deit_small_in1k', 'classes'), ('lvvit_small_in1k', 'classes'), ('lvvit_small_in1k', 'label maps')])
def test_ten_steps_of_a_recipe_are_ten_of_the_official_loop(
        small_model: Any,
        recipe: str,
        labels: str,
        passes: str,
) -> None:
    settings, batches, has_maps = RECIPES[recipe], make_batches(), labels == 'label maps'
    model, drop_path = create(small_model, recipe, passes)
    run = train(recipe, model, batches, has_maps)
    loop = train_officially(settings, run, batches, has_maps, drop_path)
    assert {subnet for draws in run.draws for subnet in draws['subnets']} > {(16, 1.0), (24, 1.0), (32, 1.0)}
    for name, value in run.start.items():
        assert not torch.equal(run.weights[name], value) or 'running' in name, name
    for name, difference in list_differences(run, loop, with_buffers=passes == 'separate'):
        # No attention depends on the bias of its keys. Its gradient is a rounding error, and AdamW makes a step of it.
        assert difference < (1e-10 if name.endswith('keys') else 1e-12), name


def test_four_rules_of_the_official_loop_are_known_to_differ(small_model: Any) -> None:
    batches = make_batches()
    model, _ = create(small_model, 'deit_small_in1k', 'shared')
    run = train('deit_small_in1k', model, batches, has_maps=False)
    for rule, differing in (
            ('late_schedule', 'cls_token of the weights'), ('decayed_positions', 'pos_embed_list.0 of the weights'),
            ('awaited_gradients', 'pos_embed_list.0 of the weights'), ('averaged_start', 'cls_token of the average')):
        loop = train_officially(DEIT, run, batches, has_maps=False, drop_path=0., **{rule: True})
        assert dict(list_differences(run, loop, with_buffers=True))[differing] > 1e-9, rule


@pytest.mark.parametrize('recipe', RECIPES)
def test_every_epoch_has_the_official_learning_rate(recipe: str) -> None:
    args, settings = read_arguments(recipe), RECIPES[recipe]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.lr)
    scheduler, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args))
    assert num_epochs == args.epochs + args.cooldown_epochs
    for epoch in range(settings.epochs + settings.cooldown_epochs):
        assert optimizer.param_groups[0]['lr'] == pytest.approx(learning_rate(settings, epoch), rel=1e-12), epoch
        scheduler.step(epoch + 1)
