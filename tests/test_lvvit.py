"""SuperViT on LV-ViT computes what a straightforward reference computes."""
import copy
import http.server
import math
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed
from parity import LOGITS, assert_gradients
from processes import run_ranks
from reference_lvvit import ReferenceLVViT, token_label_step
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_supervit import Subnet, TokenLabelTask
from timm_supervit.models.mix_token import box_share, draw_box, scale_box, swap_box

STEP = [(64, 1.0), (64, 0.3), (48, 1.0), (48, 0.6)]
BOX = (1, 0, 3, 3)  # on the 4 x 4 grid of the largest size

GRIDS = {
    'dropping in two blocks': dict(),
    'dropping in the first and the last block': dict(drop_layers=(0, 3)),
    'dropping in no block': dict(drop_layers=()),
    'one size': dict(img_sizes=(64,)),
    'a patch of 8': dict(patch_size=8, img_sizes=(24, 40)),
    'unscaled residuals': dict(skip_lam=1.),
    'rectangles': dict(img_sizes=((32, 16), (32, 48), (64, 32))),
}


@pytest.fixture
def lvvit(small_model: Any) -> Any:
    return partial(small_model, 'supervit_lvvit_small')


def create_pair(lvvit: Any, dtype: torch.dtype, **kwargs: Any) -> tuple[Any, ReferenceLVViT]:
    model = lvvit(**kwargs).to(dtype)
    reference = ReferenceLVViT(
        skip_lam=kwargs.get('skip_lam', 2.), img_sizes=model.img_sizes, drop_layers=model.drop_layers,
        patch_size=model.patch_embed.patch_size[0], embed_dim=48, depth=4, num_heads=3, num_classes=10).to(dtype)
    reference.load_state_dict(model.state_dict())
    return model, reference.eval()


def create_task(model: Any, criterion: Any = None, subnets: list | None = None) -> Any:
    task = ClassificationTask(model.train(), criterion or SoftTargetCrossEntropy(), verbose=False)
    if subnets:
        task.sample_subnets = lambda: [Subnet(*subnet) for subnet in subnets]
    return task


def get_losses(result: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([float(subnet_loss.loss) for subnet_loss in result['subnet_losses']], dtype=torch.float64)


def draw_token_labels(batch_size: int, num_patches: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(batch_size, 10, 2 + num_patches, dtype=dtype).softmax(dim=1)


@pytest.fixture
def fixed_box(monkeypatch: pytest.MonkeyPatch) -> Any:
    def fix(box: Any) -> None:
        monkeypatch.setattr('timm_supervit.training.token_labels.draw_box', lambda *_: tuple(box))

    return fix


# --- the reference


@pytest.mark.parametrize('share_prefix', [True, False])
@pytest.mark.parametrize('dtype', LOGITS)
@pytest.mark.parametrize('grid', GRIDS)
def test_every_subnet_gives_the_logits_of_the_reference(
        lvvit: Any,
        images: torch.Tensor,
        grid: str,
        dtype: torch.dtype,
        share_prefix: bool,
) -> None:
    model, reference = create_pair(lvvit, dtype, share_prefix=share_prefix, **GRIDS[grid])
    with torch.no_grad():
        outputs = model.forward_subnets(images.to(dtype), model.subnets)
        for subnet, output in zip(model.subnets, outputs, strict=True):
            torch.testing.assert_close(
                output, reference(images.to(dtype), *subnet), atol=LOGITS[dtype], rtol=0)


@pytest.mark.parametrize('distill_teacher', ['largest_size', 'own_size'])
@pytest.mark.parametrize('share_prefix', [True, False])
@pytest.mark.parametrize('batch_size', [2, 3])
def test_a_training_step_gives_the_losses_gradients_and_buffers_of_the_reference(
        lvvit: Any,
        fixed_box: Any,
        batch_size: int,
        share_prefix: bool,
        distill_teacher: str,
) -> None:
    model, reference = create_pair(
        lvvit, torch.float64, share_prefix=share_prefix, distill_teacher=distill_teacher,
        cls_weight=0.5, dense_weight=2.)
    images, target = torch.randn(batch_size, 3, 64, 64).double(), draw_token_labels(batch_size, 16)
    expected = token_label_step(
        reference.train(), images, target, STEP, BOX, cls_weight=0.5, dense_weight=2.,
        own_size_teacher=distill_teacher == 'own_size')
    fixed_box(BOX)
    result = create_task(model, subnets=STEP)(images, target)
    torch.testing.assert_close(get_losses(result), torch.stack(expected), atol=1e-10, rtol=0)
    result['loss'].backward()
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert_gradients(model, gradients)
    if share_prefix:
        assert model.patch_embed.bn1.num_batches_tracked == 2  # sizes
    else:
        torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()), atol=1e-10, rtol=0)


def test_rectangles_mix_and_learn_as_the_reference(lvvit: Any, fixed_box: Any) -> None:
    sizes = ((32, 16), (32, 48), (96, 48))
    model, reference = create_pair(lvvit, torch.float64, img_sizes=sizes, share_prefix=False)
    images, target, box = torch.randn(3, 3, 96, 48).double(), draw_token_labels(3, 18), (1, 0, 5, 2)
    step = [(sizes[2], 1.0), (sizes[2], 0.6), (sizes[1], 1.0), (sizes[1], 0.3)]
    expected = token_label_step(reference.train(), images, target, step, box)
    fixed_box(box)
    result = create_task(model, subnets=step)(images, target)
    torch.testing.assert_close(get_losses(result), torch.stack(expected), atol=1e-10, rtol=0)
    result['loss'].backward()
    assert_gradients(model, {name: p.grad for name, p in reference.named_parameters() if p.grad is not None})


# --- labels


SMOOTHING = pytest.mark.parametrize('criterion, smoothing', [
    (nn.CrossEntropyLoss(), 0.),
    (nn.CrossEntropyLoss(label_smoothing=0.2), 0.2),
    (LabelSmoothingCrossEntropy(0.1), 0.1),
])


@SMOOTHING
def test_hard_labels_teach_as_smoothed_labels_for_image_and_tokens(
        lvvit: Any,
        fixed_box: Any,
        criterion: nn.Module,
        smoothing: float,
) -> None:
    model, images, classes = lvvit().double(), torch.randn(3, 3, 64, 64).double(), torch.tensor([1, 5, 7])
    fixed_box(BOX)
    soft = nn.functional.one_hot(classes, 10).double() * (1 - smoothing) + smoothing / 10
    expected = get_losses(create_task(model, subnets=STEP)(images, soft[:, :, None].expand(-1, -1, 18)))
    hard = get_losses(create_task(model, criterion, STEP)(images, classes))
    torch.testing.assert_close(hard, expected, atol=1e-10, rtol=0)


@SMOOTHING
def test_token_labels_are_smoothed_as_the_criterion_smooths(
        lvvit: Any,
        fixed_box: Any,
        criterion: nn.Module,
        smoothing: float,
) -> None:
    model, images, labels = lvvit().double(), torch.randn(3, 3, 64, 64).double(), draw_token_labels(3, 16)
    fixed_box(BOX)
    smoothed = get_losses(create_task(model, subnets=STEP)(images, labels * (1 - smoothing) + smoothing / 10))
    actual = get_losses(create_task(model, criterion, STEP)(images, labels))
    torch.testing.assert_close(actual, smoothed, atol=1e-10, rtol=0)


def test_soft_labels_teach_as_token_labels_that_are_all_the_same(lvvit: Any, fixed_box: Any) -> None:
    model, images = lvvit().double(), torch.randn(2, 3, 64, 64).double()
    soft = torch.rand(2, 10).double().softmax(dim=1)
    fixed_box(BOX)
    expected = create_task(model, subnets=STEP)(images, soft[:, :, None].expand(-1, -1, 18))
    torch.testing.assert_close(
        get_losses(create_task(model, subnets=STEP)(images, soft)), get_losses(expected), atol=1e-10, rtol=0)


def test_the_criterion_of_the_training_script_judges_image_labels(lvvit: Any, images: torch.Tensor) -> None:
    result = create_task(lvvit(), BinaryCrossEntropy(smoothing=0.))(images, torch.tensor([1, 2]))
    # Logits near 0 cost ln 2 = 0.7 in binary cross-entropy and ln 10 = 2.3 in that over the 10 classes.
    label_losses = [float(s.loss) for s in result['subnet_losses'] if s.role == 'label']
    assert label_losses[1] < 2 * math.log(2)


@pytest.mark.parametrize('shape', [(3,), (2, 9), (2, 10, 16), (2, 10, 17), (2, 16, 10), (2, 10, 18, 1)])
def test_labels_of_a_wrong_shape_are_refused(lvvit: Any, images: torch.Tensor, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r'\(2,\), \(2, 10\), \(2, 10, 18\)'):
        create_task(lvvit())(images, torch.zeros(shape))


# --- MixToken


def test_a_box_is_drawn_as_cutmix_draws_it() -> None:
    draws = random.Random(0)
    boxes = [draw_box((14, 14), draws) for _ in range(4000)]
    assert all(0 <= row0 <= row1 <= 14 and 0 <= col0 <= col1 <= 14 for row0, col0, row1, col1 in boxes)
    shares = torch.tensor([box_share(box, (14, 14)) for box in boxes])
    # By the definition of CutMix: sides of sqrt(1 - lam) of the grid's, lam uniform, around a center anywhere.
    halves = [int(14 * math.sqrt(1 - lam)) // 2 for lam in torch.rand(20000).tolist()]
    centers = torch.randint(14, (2, 20000))
    low, high = (centers - torch.tensor(halves)).clamp(min=0), (centers + torch.tensor(halves)).clamp(max=14)
    expected = (high - low).prod(dim=0) / 14 ** 2
    # The share's deviation is 0.23, that of a mean of 4,000 is 0.004.
    assert abs(shares.mean() - expected.mean()) < 0.015
    assert abs(shares.std() - expected.std()) < 0.015


def test_a_box_swaps_patches_with_the_batch_in_reverse_order() -> None:
    x = torch.arange(3).view(3, 1, 1).expand(3, 9, 2)
    swapped = swap_box(x, (0, 1, 2, 3), (3, 3))
    inside = torch.tensor([0, 1, 1, 0, 1, 1, 0, 0, 0]).bool()
    assert (swapped[:, inside] == torch.tensor([2, 1, 0]).view(3, 1, 1)).all()
    assert (swapped[:, ~inside] == x[:, ~inside]).all()
    assert swap_box(swapped, (0, 1, 2, 3), (3, 3)).equal(x)


def test_a_box_rounds_as_the_official_code_does() -> None:
    assert scale_box((0, 0, 14, 14), (14, 14), (8, 8)) == (0, 0, 8, 8)
    assert scale_box((0, 0, 14, 14), (14, 14), (12, 12)) == (0, 0, 11, 11)


def test_an_empty_box_mixes_nothing(lvvit: Any, images: torch.Tensor) -> None:
    model = lvvit()
    with torch.no_grad():
        (logits, token_logits), *_ = model.forward_subnets(images, STEP, (2, 2, 2, 2))
        evaluation = model(images, img_size=64, keep_rate=1.0)
    torch.testing.assert_close(logits + 0.25 * token_logits.amax(dim=1), evaluation)


def test_the_draws_go_on_where_a_checkpoint_stopped(lvvit: Any, images: torch.Tensor) -> None:
    task = create_task(lvvit(keep_rates=(1.0,)))
    target = torch.rand(2, 10)
    task(images, target)
    state = task.get_task_state()
    expected = [task(images, target)['loss'].detach() for _ in range(3)]
    other = create_task(task.model)
    other.load_task_state(state)
    assert torch.equal(torch.stack([other(images, target)['loss'] for _ in range(3)]), torch.stack(expected))
    assert len(set(map(float, expected))) == 3  # else the draws had nothing to say


# --- training


def test_a_step_leaves_the_settings_of_the_model_alone(lvvit: Any, images: torch.Tensor) -> None:
    model = lvvit()
    before = {key: value for key, value in vars(model).items() if not key.startswith('_') and key != 'training'}
    create_task(model)(images, torch.rand(2, 10))
    assert before == {key: value for key, value in vars(model).items() if key in before}


@pytest.mark.parametrize('share_prefix', [True, False])
@pytest.mark.parametrize('settings, roles', [
    (dict(train_subnets='sandwich'), ['label', 'distill'] * 2),
    (dict(train_subnets='all'), ['label', 'distill', 'distill'] * 3),
    (dict(train_subnets='active'), ['label']),
    (dict(train_subnets='active', img_size=48), ['label']),
    (dict(train_subnets='active', keep_rate=0.6), ['label']),
    (dict(train_subnets='active', keep_rate=0.6, drop_layers=()), ['label']),
])
def test_every_mode_trains_every_parameter(
        lvvit: Any,
        images: torch.Tensor,
        settings: dict[str, Any],
        roles: list[str],
        share_prefix: bool,
) -> None:
    model = lvvit(share_prefix=share_prefix, **settings)
    result = create_task(model, nn.CrossEntropyLoss())(images, torch.tensor([1, 2]))
    result['loss'].backward()
    assert isinstance(create_task(model), TokenLabelTask)
    assert [subnet_loss.role for subnet_loss in result['subnet_losses']] == roles
    assert result['output'].shape == (2, 10)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.aux_head.weight.grad.abs().sum() > 0


def test_an_active_subnet_that_drops_tokens_learns_by_its_evaluation_logits(lvvit: Any, images: torch.Tensor) -> None:
    model, target = lvvit(train_subnets='active', keep_rate=0.3), torch.tensor([1, 2])
    expected = nn.functional.cross_entropy(model.train()(images), target)
    torch.testing.assert_close(create_task(model, nn.CrossEntropyLoss())(images, target)['loss'], expected)


def test_an_active_subnet_that_drops_tokens_refuses_token_labels(lvvit: Any, images: torch.Tensor) -> None:
    model = lvvit(train_subnets='active', keep_rate=0.3)
    with pytest.raises(ValueError, match='keeps all its patches'):
        create_task(model)(images, draw_token_labels(2, 16))


def test_token_labels_of_a_smaller_active_subnet_have_its_grid(lvvit: Any, images: torch.Tensor) -> None:
    task = create_task(lvvit(train_subnets='active', img_size=48))
    assert task(images, draw_token_labels(2, 9, torch.float32))['loss'].isfinite()
    with pytest.raises(ValueError, match=r'\(2, 10, 11\)'):
        task(images, draw_token_labels(2, 16, torch.float32))


def train_on_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    torch.manual_seed(0)
    model = timm.create_model(
        'supervit_lvvit_small', img_sizes=(32, 48), embed_dim=48, depth=4, num_heads=3, num_classes=10,
        drop_layers=(1,))
    torch.manual_seed(rank)  # as train.py does
    task = create_task(model, nn.CrossEntropyLoss())
    task.prepare_distributed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    subnets = []
    for _ in range(2):
        result = task(torch.randn(2, 3, 48, 48), torch.tensor([1, 2]))
        result['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        subnets.append([subnet_loss.subnet for subnet_loss in result['subnet_losses']])
    torch.save(
        (model.aux_head.weight.detach(), subnets, task.draws.getstate()), f'{folder}/rank{rank}.pt')
    torch.distributed.destroy_process_group()


def test_ranks_draw_the_same_and_stay_together(tmp_path: Path) -> None:
    run_ranks(train_on_a_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f'rank{rank}.pt', weights_only=False) for rank in range(2))
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]
    assert first[2] == second[2]


# --- the model in timm


@pytest.mark.parametrize('name, settings', [
    ('supervit_lvvit_tiny', (240, 12, 4, 1., 0.9)),
    ('supervit_lvvit_small', (384, 16, 6, 2., 0.9)),
    ('supervit_lvvit_medium', (512, 20, 8, 2., 1.0)),
])
def test_each_factory_has_the_published_shape(name: str, settings: tuple[Any, ...]) -> None:
    model = timm.create_model(name, device='meta')
    block = model.blocks[0]
    scale = getattr(block.ls1, 'factor', 1.)
    assert (model.embed_dim, len(model.blocks), block.attn.num_heads, 1 / scale, model.pretrained_cfg['crop_pct']) == (
        settings)
    assert block.attn.qkv.bias is None
    assert model.norm.eps == block.norm1.eps == 1e-5
    assert block.mlp.fc1.out_features == 3 * model.embed_dim
    assert model.drop_layers == (3, 6, 9)


@pytest.mark.parametrize('settings', [dict(), dict(patch_size=8, img_sizes=(24, 40)), dict(drop_layers=())])
def test_macs_are_what_torch_counts(lvvit: Any, settings: dict[str, Any]) -> None:
    model = lvvit(**settings)
    largest = model.img_sizes[-1]
    for subnet in model.subnets:
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad(), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            model(torch.randn(1, 3, largest, largest), img_size=subnet.img_size, keep_rate=subnet.keep_rate)
        assert model.macs(subnet) == counter.get_total_flops() // 2


def test_features_are_dense_maps_of_the_size(lvvit: Any, images: torch.Tensor) -> None:
    model = lvvit()
    with torch.no_grad():
        maps = model.forward_intermediates(images, indices=[1, 3], intermediates_only=True, img_size=48, keep_rate=0.3)
        assert [y.shape for y in maps] == [(2, 48, 3, 3)] * 2
        features = lvvit(features_only=True, out_indices=(1, 3))
        assert [y.shape for y in features(images)] == [(2, 48, 4, 4)] * 2


def test_threads_can_run_different_subnets_of_one_model(lvvit: Any, images: torch.Tensor) -> None:
    model = lvvit()

    def run(subnet: Subnet) -> torch.Tensor:
        with torch.no_grad():
            return model(images, img_size=subnet.img_size, keep_rate=subnet.keep_rate)

    expected = [run(subnet) for subnet in model.subnets]
    with ThreadPoolExecutor(4) as pool:
        for actual, one in zip(pool.map(run, model.subnets * 5), expected * 5, strict=True):
            assert torch.equal(actual, one)


def test_both_heads_follow_the_number_of_classes(lvvit: Any, images: torch.Tensor) -> None:
    model = lvvit().double()
    model.reset_classifier(7)
    assert model.aux_head.weight.shape == (7, 48)
    assert model.aux_head.weight.dtype == torch.float64
    assert model(images.double()).shape == (2, 7)
    model.reset_classifier(0)
    pooled = model.forward_head(model.forward_features(images.double()), pre_logits=True)
    assert torch.equal(model(images.double()), pooled)
    assert not any(key.startswith(('head', 'aux_head')) for key in model.state_dict())
    model.reset_classifier(7, '')
    assert model(images.double()).shape == (2, 17, 7)


def test_the_patch_size_can_change(lvvit: Any, images: torch.Tensor) -> None:
    model = lvvit(img_sizes=(32, 64))
    model.set_input_size(patch_size=8)
    assert model.patch_embed.proj.kernel_size == (4, 4)
    assert (model.patch_embed.patch_size, model.patch_embed.grid_size) == ((8, 8), (8, 8))
    assert model.forward_features(images).shape == (2, 65, 48)
    model.set_input_size(48)
    assert model.img_sizes == (32, 48, 64)
    assert model(images).shape == (2, 10)


def test_a_saved_model_comes_back_from_its_folder(lvvit: Any, images: torch.Tensor, tmp_path: Path) -> None:
    model = lvvit(dense_weight=0.5, skip_lam=3.)
    model.subnet = Subnet(48, 0.6)
    timm.models.save_for_hf(model, tmp_path)
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert (other.dense_weight, other.subnet, other.img_sizes) == (0.5, Subnet(48, 0.6), model.img_sizes)
    assert torch.equal(other(images), model(images))


@pytest.mark.parametrize('settings, message', [
    (dict(patch_size=15, img_sizes=(30,)), 'patch_size 15 is odd'),
    (dict(cls_weight=-1.), 'cls_weight -1.0'),
    (dict(cls_weight=0., dense_weight=0.), 'nor both 0'),
    (dict(init_values=1e-5), 'skip_lam=1'),
])
def test_settings_that_do_not_fit_are_refused(lvvit: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lvvit(**settings)


def test_mixing_needs_a_first_subnet_that_keeps_all_tokens(lvvit: Any, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match='put a subnet of keep_rate'):
        lvvit().forward_subnets(images, STEP[1:], BOX)


# --- weights


def make_plain(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights as those of a plain LV-ViT of the largest size."""
    plain = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith('pos_embed_list')}
    return plain | {'pos_embed': model.pos_embed_list[-1].detach().clone()}


def test_plain_weights_are_a_start(lvvit: Any, images: torch.Tensor) -> None:
    model, other = lvvit(), lvvit(img_sizes=(32, 64))
    nn.init.zeros_(other.head.weight)
    other.load_state_dict(make_plain(model))
    assert torch.equal(other(images), model(images))  # the largest size needs no resampling


def test_an_official_checkpoint_gives_its_averaged_weights(lvvit: Any, images: torch.Tensor, tmp_path: Path) -> None:
    model = lvvit()
    averaged = copy.deepcopy(model.state_dict())
    nn.init.zeros_(model.head.weight)
    torch.save(
        {'epoch': 1, 'arch': 'super_lvvit_s', 'state_dict': model.state_dict(), 'state_dict_ema': averaged},
        tmp_path / 'model_best.pth.tar')
    other = lvvit()
    timm.models.load_checkpoint(other, str(tmp_path / 'model_best.pth.tar'))
    assert torch.equal(other.head.weight, averaged['head.weight'])
    model.load_state_dict(averaged)
    assert torch.equal(other(images), model(images))


@pytest.mark.parametrize('name, other', [
    ('supervit_tiny', 'supervit_lvvit_small'), ('supervit_lvvit_small', 'supervit_tiny')])
def test_weights_of_the_other_backbone_are_refused(small_model: Any, name: str, other: str) -> None:
    model = small_model(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match='nothing was loaded'):
        model.load_state_dict(small_model(other).state_dict())
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)


@pytest.mark.parametrize('variant, file', [
    ('tiny', 'v0.2.0/lvvit_t.pth'),
    ('small', '1.0/lvvit_s-26M-224-83.3.pth.tar'),
    ('medium', '1.0/lvvit_m-56M-224-84.0.pth.tar'),
])
def test_the_tag_points_at_the_released_file(variant: str, file: str) -> None:
    cfg = timm.get_pretrained_cfg(f'supervit_lvvit_{variant}.lvvit_in1k')
    assert cfg.url == f'https://github.com/zihangJiang/TokenLabeling/releases/download/{file}'


@pytest.fixture
def release(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address at which a server on this machine offers it."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


@pytest.mark.parametrize('wrapped', [True, False])
@pytest.mark.parametrize('num_classes', [1000, 10])
def test_released_weights_are_downloaded(
        lvvit: Any,
        images: torch.Tensor,
        release: tuple[Path, str],
        num_classes: int,
        wrapped: bool,
) -> None:
    folder, address = release
    model = lvvit(num_classes=1000)
    weights = make_plain(model)
    if wrapped:  # as timm's saver does, from several GPUs
        weights = {'epoch': 300, 'state_dict': {f'module.{key}': value for key, value in weights.items()}}
    torch.save(weights, folder / 'lvvit_s.pth.tar')
    settings = dict(img_sizes=(32, 64), drop_layers=(1, 2), embed_dim=48, depth=4, num_heads=3)
    other = timm.create_model(
        'supervit_lvvit_small.lvvit_in1k', pretrained=True, num_classes=num_classes, cache_dir=folder / 'cache',
        pretrained_cfg_overlay=dict(url=f'{address}/lvvit_s.pth.tar'), **settings).eval()
    assert torch.equal(other.forward_features(images), model.forward_features(images))
    assert torch.equal(other.aux_head.weight, model.aux_head.weight) == (num_classes == 1000)
