"""Super-training as a task of timm: which subnets a step runs, what they learn from, and what a checkpoint keeps."""
import argparse
import copy
import logging
import statistics
import warnings
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from comparing import EXACT
from reference import ReferenceSuperViT, soft_cross_entropy
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    load_task_ema_checkpoint,
    resume_task_checkpoint,
)
from timm.utils import CheckpointSaver
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from timm_supervit import Subnet, SuperViTTask
from timm_supervit.training.task import distillation_loss

TARGET = torch.tensor([3, 7])


@pytest.fixture
def create_task(small_model: Any) -> Any:
    def create(**kwargs: Any) -> Any:
        return ClassificationTask(small_model(**kwargs).train(), nn.CrossEntropyLoss(), verbose=False)

    return create


def names(subnets: list[Subnet]) -> list[tuple[int, float]]:
    return [tuple(subnet) for subnet in subnets]


# --- which task ---


def test_the_classification_task_of_a_supervit_is_a_super_training_task(small_model: Any) -> None:
    for arguments in (
            lambda model: ClassificationTask(model, nn.CrossEntropyLoss()),
            lambda model: ClassificationTask(model=model, criterion=nn.CrossEntropyLoss(), verbose=False),
            lambda model: ClassificationTask(model, criterion_kwargs=dict(smoothing=0.1), device=torch.device('cpu'))):
        task = arguments(small_model())
        assert type(task) is SuperViTTask
        assert isinstance(task, ClassificationTask)
    assert type(SuperViTTask(small_model(), nn.CrossEntropyLoss())) is SuperViTTask
    assert type(ClassificationTask(nn.DataParallel(small_model()), nn.CrossEntropyLoss())) is SuperViTTask


def test_other_models_and_other_tasks_are_untouched(small_model: Any) -> None:
    vit = timm.create_model('test_vit')
    assert type(ClassificationTask(vit, nn.CrossEntropyLoss())) is ClassificationTask
    assert type(ClassificationTask(nn.Linear(1, 1), nn.MSELoss())) is ClassificationTask


class Mine(ClassificationTask):
    pass


OTHER_TASKS: dict[str, Any] = {
    'a subclass': lambda model: Mine(model, nn.CrossEntropyLoss()),
    'labels of several classes': MultiLabelClassificationTask,
    'distillation of logits': lambda model: LogitDistillationTask(
        student_model=model, teacher_model=timm.create_model('test_vit', num_classes=10), verbose=False),
    'distillation of features': lambda model: FeatureDistillationTask(
        model, timm.create_model('test_vit', num_classes=10), verbose=False),
}


@pytest.mark.parametrize('task', OTHER_TASKS)
def test_another_task_says_once_that_it_trains_the_active_subnet_alone(small_model: Any, task: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        made = OTHER_TASKS[task](small_model(img_size=48, keep_rate=0.6))
    assert not isinstance(made, SuperViTTask)
    messages = [str(w.message) for w in caught if 'trains only' in str(w.message)]
    assert len(messages) == 1
    for part in (type(made).__name__, '48:0.6', '--kd-model-name', 'train_subnets=active'):
        assert part in messages[0]
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*trains only')
        OTHER_TASKS[task](small_model(train_subnets='active'))
        OTHER_TASKS[task](timm.create_model('test_vit', num_classes=10))


def test_super_training_is_announced_in_one_line(small_model: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ClassificationTask(small_model(train_subnets='all'), nn.CrossEntropyLoss())
    lines = [record.getMessage() for record in caplog.records if record.name.startswith('timm_supervit')]
    assert len(lines) == 1
    for part in ('(32, 48, 64)', '(0.3, 0.6, 1.0)', 'all'):
        assert part in lines[0]
    caplog.clear()
    ClassificationTask(small_model(), nn.CrossEntropyLoss(), verbose=False)
    assert caplog.records == []


# --- which subnets ---


def test_a_sandwich_is_the_largest_and_a_smaller_size_each_with_a_lower_rate(create_task: Any) -> None:
    task = create_task()
    draws = [names(task.sample_subnets()) for _ in range(600)]
    for (size_1, rate_1), (size_2, rate_2), (size_3, rate_3), (size_4, rate_4) in draws:
        assert size_1 == size_2 == 64
        assert size_3 == size_4 in (32, 48)
        assert rate_1 == rate_3 == 1.0
        assert {rate_2, rate_4} <= {0.3, 0.6}
    counts = Counter((rate_2, size_3, rate_4) for _, (_, rate_2), (size_3, _), (_, rate_4) in draws)
    assert len(counts) == 8
    # Eight combinations, drawn independently: 75 of each expected, with a standard deviation of 8.
    assert min(counts.values()) > 35
    assert max(counts.values()) < 115


def test_all_is_every_subnet_each_size_with_its_teacher_first(create_task: Any) -> None:
    task = create_task(train_subnets='all')
    subnets = names(task.sample_subnets())
    assert sorted(subnets) == [(size, rate) for size in (32, 48, 64) for rate in (0.3, 0.6, 1.0)]
    for size in (32, 48, 64):
        assert next(rate for s, rate in subnets if s == size) == 1.0
    assert names(task.sample_subnets()) == subnets


def test_active_is_the_active_subnet(create_task: Any, images: Tensor) -> None:
    task = create_task(train_subnets='active', img_size=48, keep_rate=0.6)
    assert names(task.sample_subnets()) == [(48, 0.6)]
    task.model.subnet = (32, 0.3)
    assert names(task.sample_subnets()) == [(32, 0.3)]
    result = task(images, TARGET)
    torch.testing.assert_close(result['output'], task.model(images))
    torch.testing.assert_close(result['loss'], nn.functional.cross_entropy(result['output'], TARGET), **EXACT)


@pytest.mark.parametrize('grid, sandwich, complete', [
    (dict(img_sizes=(64,)), 2, 3), (dict(keep_rates=(1.0,)), 2, 3), (dict(keep_rates=(0.5,)), 4, 6),
    (dict(img_sizes=(64,), keep_rates=(1.0,)), 1, 1),
])
def test_small_grids_train_too(
        create_task: Any,
        images: Tensor,
        grid: dict[str, Any],
        sandwich: int,
        complete: int,
) -> None:
    for mode, count in (('sandwich', sandwich), ('all', complete)):
        task = create_task(train_subnets=mode, **grid)
        subnets = task.sample_subnets()
        assert len(set(subnets)) == len(subnets) == count
        task(images, TARGET)['loss'].backward()


def test_the_draws_are_the_task_s_own(create_task: Any) -> None:
    torch.manual_seed(3)
    first = create_task()
    state = torch.get_rng_state()
    draws = [first.sample_subnets() for _ in range(20)]
    torch.testing.assert_close(torch.get_rng_state(), state, **EXACT)
    torch.manual_seed(3)
    second = create_task()
    torch.rand(100)  # as augmentation or dropout on one rank may draw
    assert [second.sample_subnets() for _ in range(20)] == draws
    torch.manual_seed(4)
    third = create_task()
    assert [third.sample_subnets() for _ in range(20)] != draws


# --- what they learn from ---


@pytest.mark.parametrize('distill_teacher', ['own_size', 'largest_size'])
@pytest.mark.parametrize('mode', ['sandwich', 'all'])
@pytest.mark.parametrize('share_prefix', [True, False])
def test_losses_and_gradients_are_those_of_separate_passes(
        create_task: Any,
        images: Tensor,
        mode: str,
        share_prefix: bool,
        distill_teacher: str,
) -> None:
    task = create_task(train_subnets=mode, share_prefix=share_prefix, distill_teacher=distill_teacher).double()
    task.criterion = SoftTargetCrossEntropy()
    reference = ReferenceSuperViT(
        img_sizes=(32, 48, 64), drop_layers=(1, 2), embed_dim=48, depth=4, num_heads=3, num_classes=10).double()
    reference.load_state_dict(task.model.state_dict())
    images, target = images.double(), torch.rand(2, 10).double().softmax(dim=1)
    result = task(images, target)
    result['loss'].backward()
    losses = []
    for subnet, role, _ in result['subnet_losses']:
        logits = reference(images, *subnet)
        if subnet.keep_rate == 1:
            assert role == 'label'
            losses.append(soft_cross_entropy(logits, target))
            if len(losses) == 1 or distill_teacher == 'own_size':
                teacher = logits.detach().softmax(dim=1)
        else:
            assert role == 'distill'
            losses.append((teacher * (teacher.log() - logits.log_softmax(dim=1))).sum(dim=1).mean())
        losses[-1].backward()
    torch.testing.assert_close(
        torch.tensor([loss for *_, loss in result['subnet_losses']], dtype=torch.float64),
        torch.stack(losses).detach(), atol=1e-10, rtol=0)
    torch.testing.assert_close(result['loss'], sum(losses), atol=1e-10, rtol=0)
    others = dict(reference.named_parameters())
    for name, parameter in task.model.named_parameters():
        gradient = torch.zeros_like(parameter) if others[name].grad is None else others[name].grad
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-10, rtol=0, msg=name)


def test_the_result_is_what_timm_s_training_loop_reads(create_task: Any, images: Tensor) -> None:
    task = create_task()
    result = task(images, TARGET)
    assert result['loss'].ndim == 0
    assert result['loss'].requires_grad
    torch.testing.assert_close(result['output'], task.model(images, img_size=64, keep_rate=1.0), atol=1e-5, rtol=1e-5)
    assert [role for _, role, _ in result['subnet_losses']] == ['label', 'distill', 'label', 'distill']
    torch.testing.assert_close(result['loss'], sum(loss for *_, loss in result['subnet_losses']))


@pytest.mark.parametrize('criterion', [
    nn.CrossEntropyLoss(), LabelSmoothingCrossEntropy(0.1), nn.CrossEntropyLoss(label_smoothing=0.1), None])
def test_any_criterion_of_the_script_is_taken(small_model: Any, images: Tensor, criterion: Any) -> None:
    task = ClassificationTask(small_model().train(), criterion, verbose=False)
    result = task(images, TARGET)
    output = result['output']
    assert result['subnet_losses'][0].loss == pytest.approx(task.criterion(output, TARGET).item(), abs=1e-10)


def test_mixed_targets_are_taken(small_model: Any, images: Tensor) -> None:
    mixed, target = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=10)(images.clone(), TARGET)
    task = ClassificationTask(small_model().train(), SoftTargetCrossEntropy(), verbose=False)
    assert task(mixed, target)['loss'].isfinite()


@pytest.mark.parametrize('mode', ['sandwich', 'all', 'active'])
def test_every_parameter_gets_a_gradient_from_a_step_on_one_image(
        create_task: Any,
        images: Tensor,
        mode: str,
) -> None:
    task = create_task(train_subnets=mode)
    task(images[:1], TARGET[:1])['loss'].backward()
    assert all(parameter.grad is not None for parameter in task.parameters())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_step_runs_under_autocast(create_task: Any, images: Tensor, dtype: torch.dtype) -> None:
    task = create_task()
    with torch.autocast('cpu', dtype):
        result = task(images, TARGET)
    result['loss'].backward()
    assert result['loss'].isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in task.parameters())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_compared_in_full_precision(dtype: torch.dtype) -> None:
    logits, teacher_logits = (torch.randn(2, 8, 100) / 50).to(dtype)  # nearly equal: KL of 4e-4
    teacher = teacher_logits.double().softmax(dim=1)
    expected = (teacher * (teacher.log() - logits.double().log_softmax(dim=1))).sum() / 8
    loss = distillation_loss(logits.requires_grad_(), teacher_logits)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)
    with torch.autocast('cpu', dtype):
        torch.testing.assert_close(distillation_loss(logits, teacher_logits).double(), expected, rtol=1e-3, atol=0)


def test_training_teaches_every_subnet() -> None:
    model = timm.create_model('supervit_digits')
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    images, target = torch.randn(10, 3, 24, 24), torch.arange(10)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        task(images, target)['loss'].backward()
        optimizer.step()
    with torch.no_grad():
        for subnet, logits in zip(model.subnets, model.eval().forward_subnets(images, model.subnets), strict=True):
            assert (logits.argmax(dim=1) == target).float().mean() >= 0.8, subnet


def test_a_loss_that_is_not_finite_names_its_subnet(create_task: Any, images: Tensor) -> None:
    task = create_task()
    with torch.no_grad():
        task.model.pos_embed_list[2].fill_(float('nan'))
    task(images, TARGET)  # a step does not wait for its losses
    with pytest.raises(FloatingPointError, match=r'64:1.*label.*nan.*lower the learning rate'):
        task.log_losses()
    task(images, TARGET)
    with pytest.raises(FloatingPointError, match=r'64:'):
        task.get_checkpoint_state()  # nor is anything of them saved
    task.log_interval = 1
    with pytest.raises(FloatingPointError) as error:
        task(images, TARGET)
    assert 'img_size=32' not in str(error.value)
    assert 'img_size=48' not in str(error.value)


# --- what a checkpoint keeps ---


def save(task: Any, folder: Path) -> str:
    optimizer = torch.optim.AdamW(task.parameters())
    saver = CheckpointSaver(
        task.model, optimizer, args=argparse.Namespace(model='supervit_tiny', lr=1.0), task=task,
        checkpoint_dir=str(folder), recovery_dir=str(folder))
    saver.save_checkpoint(0, metric=1.0)
    return str(folder / 'last.pth.tar')


def test_a_resumed_task_goes_on_drawing_where_it_stopped(create_task: Any, tmp_path: Path) -> None:
    task = create_task()
    for _ in range(7):
        task.sample_subnets()
    path = save(task, tmp_path)
    expected = [task.sample_subnets() for _ in range(20)]
    torch.manual_seed(99)
    resumed = create_task()
    with torch.no_grad():
        resumed.model.norm.weight.zero_()
    assert resume_task_checkpoint(resumed, path) == 1
    assert [resumed.sample_subnets() for _ in range(20)] == expected
    for name, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, task.model.state_dict()[name], **EXACT)


def test_a_checkpoint_holds_the_plain_model(create_task: Any, small_model: Any, tmp_path: Path) -> None:
    task = create_task()
    checkpoint = torch.load(save(task, tmp_path), weights_only=False)
    assert checkpoint['state_dict'].keys() == task.model.state_dict().keys()
    model = small_model()
    load_checkpoint(model, str(tmp_path / 'last.pth.tar'))
    assert task.get_eval_model() is task.model


def test_a_checkpoint_without_the_draws_leaves_them_alone(create_task: Any, tmp_path: Path) -> None:
    task = create_task()
    torch.save({'model': task.model.state_dict(), 'epoch': 3}, tmp_path / 'official.pth')
    before = task.draws.getstate()
    resume_task_checkpoint(task, str(tmp_path / 'official.pth'))
    assert task.draws.getstate() == before


def test_the_average_follows_the_plain_model(create_task: Any, images: Tensor, tmp_path: Path) -> None:
    task = create_task()
    task.setup_ema(decay=0.5)
    before = copy.deepcopy(task.model.state_dict())
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(1.)
    task.update_ema(step=2)  # the first step takes the weights as they are
    averaged = timm.utils.unwrap_model(task.get_eval_model(ema=True))
    assert averaged.state_dict().keys() == before.keys()
    for name, value in averaged.state_dict().items():
        torch.testing.assert_close(value, before[name] + 0.5)
    assert averaged.eval()(images, img_size=32, keep_rate=0.3).isfinite().all()
    path = save(task, tmp_path)
    other = create_task()
    other.setup_ema(decay=0.5)
    load_task_ema_checkpoint(other, path)
    for name, value in timm.utils.unwrap_model(other.get_eval_model(ema=True)).state_dict().items():
        torch.testing.assert_close(value, averaged.state_dict()[name], **EXACT)
    assert 'task_state_ema' not in torch.load(path, weights_only=False)


# --- timm's other tasks ---


def test_distillation_trains_the_active_subnet(small_model: Any, images: Tensor) -> None:
    model = small_model(img_size=48, keep_rate=0.6).train()
    teacher = timm.create_model('supervit_tiny', embed_dim=48, depth=4, num_heads=3, num_classes=10, drop_layers=())
    task = LogitDistillationTask(model, teacher, nn.CrossEntropyLoss(), verbose=False)
    result = task(images, TARGET)
    torch.testing.assert_close(result['output'], model(images, img_size=48, keep_rate=0.6), **EXACT)
    result['loss'].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_feature_distillation_trains_the_active_subnet(small_model: Any, images: Tensor) -> None:
    model = small_model(img_size=48, keep_rate=0.6).train()
    teacher = small_model(embed_dim=24)
    task = FeatureDistillationTask(model, teacher, nn.CrossEntropyLoss(), verbose=False)
    result = task(images, TARGET)
    result['loss'].backward()
    assert result['loss'].isfinite()


def test_a_supervit_teaches_with_its_active_subnet(small_model: Any, images: Tensor) -> None:
    student = small_model().train()
    task = LogitDistillationTask(student, small_model(keep_rate=0.3), nn.CrossEntropyLoss(), verbose=False)
    assert task(images, TARGET)['loss'].isfinite()


def test_accumulation_and_compilation_hooks_of_the_loop_work(create_task: Any, images: Tensor) -> None:
    task = create_task(img_sizes=(64,), depth=2, drop_layers=(1,))
    with task.no_sync():
        task(images, TARGET)['loss'].backward()
    task.compile(backend='eager')
    assert task(images, TARGET)['loss'].isfinite()
    assert task.get_checkpoint_state()['state_dict'].keys() == task.model.state_dict().keys()


# --- a step and its device ---


@pytest.mark.parametrize('name', ['supervit_tiny', 'supervit_lvvit_small'])
@pytest.mark.parametrize('mode', ['sandwich', 'all', 'active'])
def test_a_step_never_waits_for_the_device(
        small_model: Any,
        images: Tensor,
        name: str,
        mode: str,
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    def create_tasks() -> list[Any]:
        models = [small_model(name, train_subnets=mode, keep_rates=(0.5, 1.0), depth=2, drop_layers=(1,))
                  for _ in range(2)]
        return [ClassificationTask(model.train(), nn.CrossEntropyLoss(), verbose=verbose)
                for model, verbose in zip(models, (True, False), strict=True)]

    for task in create_tasks():
        with FakeTensorMode(allow_non_fake_inputs=True):  # a tensor without data answers no question about its values
            task(torch.empty(2, 3, 64, 64), torch.zeros(2, dtype=torch.long))['loss'].backward()
    tasks = create_tasks()
    for read in ('item', 'tolist', '__float__', '__int__', '__bool__', 'cpu', 'numpy'):
        monkeypatch.setattr(Tensor, read, lambda *_, read=read: pytest.fail(f'{read} of a tensor'))
    for task in tasks:
        task(images, TARGET)['loss'].backward()


def test_losses_are_logged_by_the_count_of_steps_and_not_kept(
        small_model: Any,
        images: Tensor,
        caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger='timm_supervit')
    for verbose in (True, False):
        caplog.clear()
        task = ClassificationTask(small_model().train(), nn.CrossEntropyLoss(), verbose=verbose)
        task.log_interval = 3
        losses, tensors = [], []
        for step in range(1, 8):
            result = task(images / step, TARGET)  # other losses in every step
            losses += [row.loss.item() for row in result['subnet_losses'] if row.subnet == Subnet(64, 1.0)]
            tensors += [weakref.ref(row.loss) for row in result['subnet_losses']]
            del result
            lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith('Subnets:')]
            assert len(lines) == (step // 3 if verbose else 0)
            assert [tensor for tensor in tensors if tensor() is not None] == []  # of the losses their sums are kept
            if step % 3 == 0:
                assert not verbose or f'64:1 {statistics.fmean(losses[-3:]):#.3g}' in lines[-1]


@pytest.mark.parametrize('name', ['supervit_tiny', 'supervit_lvvit_small'])
@pytest.mark.parametrize('mode', ['sandwich', 'all', 'active'])
def test_every_parameter_learns_in_evaluation_mode_too(small_model: Any, images: Tensor, name: str, mode: str) -> None:
    task = ClassificationTask(small_model(name, train_subnets=mode).eval(), nn.CrossEntropyLoss(), verbose=False)
    task.model.eval()  # frozen BatchNorm or no dropout, as in fine-tuning
    task(images, TARGET)['loss'].backward()
    assert [n for n, p in task.model.named_parameters() if p.grad is None] == []
    if mode != 'active':
        norm = task.model.blocks[0].norm1.weight
        assert norm.grad.abs().sum() > 0


# --- the order of parameters ---


@pytest.mark.parametrize('name', ['supervit_tiny', 'supervit_lvvit_small'])
def test_parameters_are_in_the_order_of_timm(small_model: Any, name: str) -> None:
    model = small_model(name)
    for _ in range(2):
        names = [name for name, _ in model.named_parameters()]
        heads = ['head.weight', 'head.bias']
        assert names[-2:] == heads
        if name == 'supervit_lvvit_small':
            assert names[-4:-2] == ['aux_head.weight', 'aux_head.bias']
        last_pos_embed = names.index(f'pos_embed_list.{len(model.img_sizes) - 1}')
        assert last_pos_embed < names.index('blocks.0.norm1.weight')
        task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
        clipped = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
        assert not clipped & {id(p) for p in model.head.parameters()}
        assert len(clipped) == len(names) - 2
        model.reset_classifier(7)
        model.set_input_size(80)


# --- criteria and batches that do not fit ---


@pytest.mark.parametrize('name', ['supervit_tiny', 'supervit_lvvit_small'])
def test_a_criterion_that_does_not_reduce_is_refused(small_model: Any, images: Tensor, name: str) -> None:
    task = ClassificationTask(small_model(name).train(), nn.CrossEntropyLoss(reduction='none'), verbose=False)
    with pytest.raises(ValueError, match='reduction="mean"'):
        task(images, TARGET)


@pytest.mark.parametrize('name', ['supervit_tiny', 'supervit_lvvit_small'])
def test_an_image_that_is_not_finite_ends_the_training_by_name(small_model: Any, images: Tensor, name: str) -> None:
    task = ClassificationTask(small_model(name).train(), nn.CrossEntropyLoss(), verbose=False)
    images[1, 0, 5, 5] = float('nan')
    task(images, TARGET)
    with pytest.raises(FloatingPointError, match=r'64:1 \(label\): nan'):
        task.log_losses()


@pytest.mark.parametrize('name', ['supervit_tiny', 'supervit_lvvit_small'])
def test_an_empty_batch_is_refused_and_one_image_trains(small_model: Any, images: Tensor, name: str) -> None:
    task = ClassificationTask(small_model(name).train(), nn.CrossEntropyLoss(), verbose=False)
    with pytest.raises(ValueError, match='holds no image'):
        task(images[:0], TARGET[:0])
    result = task(images[:1], TARGET[:1])
    result['loss'].backward()
    assert result['loss'].isfinite()


@pytest.mark.parametrize('arguments, interval', [
    ([], 50), (['--log-interval', '7'], 7), (['--log-interval=7'], 7), (['--log-interval', 'seven'], 50)])
def test_the_interval_of_the_log_is_the_script_s(
        create_task: Any,
        monkeypatch: pytest.MonkeyPatch,
        arguments: list[str],
        interval: int,
) -> None:
    monkeypatch.setattr('sys.argv', ['train.py', *arguments])
    assert create_task().log_interval == interval
