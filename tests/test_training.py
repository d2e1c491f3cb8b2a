"""Runs of several processes, killed runs and compiled runs reach what one undisturbed run reaches."""
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from processes import forks
from timm.models import save_for_hf
from timm.task import ClassificationTask, resume_task_checkpoint
from timm.utils import ModelEmaV3
from training_script import train

from timm_supervit.cli import main
from timm_supervit.tools.recipe import recipe as read_recipe
from timm_supervit.tools.recipe import recipe_names

TIMM_SCRIPTS = os.environ.get('TIMM_SCRIPTS')


def start(folder: Path, **options: Any) -> Any:
    folder.mkdir(exist_ok=True)
    process = forks.Process(target=train, args=(folder,), kwargs=options)
    process.start()
    return process


def finish(process: Any) -> int:
    process.join(timeout=120)
    return process.exitcode


def run(folder: Path, **options: Any) -> None:
    assert finish(start(folder, **options)) == 0, errors(folder)


def errors(folder: Path, rank: int = 0) -> str:
    return (folder / f'errors.{rank}.txt').read_text()


def steps(folder: Path, rank: int = 0) -> list[dict]:
    return [json.loads(line) for line in (folder / f'steps.{rank}.jsonl').read_text().splitlines()]


def weights(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(folder / f'weights.{rank}.pt', weights_only=True)


def test_a_killed_and_resumed_run_equals_one_that_was_never_interrupted(tmp_path):
    run(tmp_path / 'whole', drop_path=0.2)
    assert finish(start(tmp_path / 'killed', drop_path=0.2, kill_in=1)) == -signal.SIGKILL
    done = steps(tmp_path / 'killed')
    (tmp_path / 'killed' / 'steps.0.jsonl').unlink()
    run(tmp_path / 'killed', drop_path=0.2, resume=tmp_path / 'killed' / 'last.pth.tar')

    whole = steps(tmp_path / 'whole')
    assert done == whole[:len(done)]
    assert steps(tmp_path / 'killed') == [row for row in whole if row['epoch'] >= 1]
    for name, value in weights(tmp_path / 'whole').items():
        assert torch.equal(value, weights(tmp_path / 'killed')[name]), name


def test_two_ranks_draw_the_same_subnets_and_equal_one_process_with_both_batches(tmp_path):
    options = dict(optimizer='momentum', epochs=2)
    run(tmp_path / 'one', **options)
    ranks = [start(tmp_path / 'two', rank=rank, world_size=2, **options) for rank in range(2)]
    for rank, process in enumerate(ranks):
        assert finish(process) == 0, errors(tmp_path / 'two', rank)

    first, second = steps(tmp_path / 'two', 0), steps(tmp_path / 'two', 1)
    assert [[s[:2] for s in row['losses']] for row in first] == [[s[:2] for s in row['losses']] for row in second]
    for name, value in weights(tmp_path / 'two', 0).items():
        assert torch.equal(value, weights(tmp_path / 'two', 1)[name]), name
        # float64; the mean of two halves is rounded otherwise than the mean of the whole
        torch.testing.assert_close(value, weights(tmp_path / 'one')[name], rtol=1e-9, atol=1e-11, msg=name)


def test_a_rank_that_dies_ends_the_other_with_an_error(tmp_path):
    ranks = [start(tmp_path / 'two', rank=0, world_size=2), start(tmp_path / 'two', rank=1, world_size=2, kill_in=1)]
    began = time.monotonic()
    assert finish(ranks[0]) not in (None, 0, -signal.SIGKILL)
    assert finish(ranks[1]) == -signal.SIGKILL
    assert 'Error' in errors(tmp_path / 'two')
    assert time.monotonic() - began < 100  # start-up included; the store's timeout is 20 s


def test_a_checkpoint_that_was_cut_short_is_refused_by_name_and_the_one_before_resumes(tmp_path):
    run(tmp_path / 'run', epochs=2)
    last, previous = tmp_path / 'run' / 'last.pth.tar', tmp_path / 'run' / 'checkpoint-0.pth.tar'
    content = last.read_bytes()
    last.unlink()  # it is a hard link of checkpoint-1
    last.write_bytes(content[:len(content) // 2])
    model = timm.create_model(
        'supervit_tiny', embed_dim=24, depth=4, num_heads=2, img_sizes=(32, 48, 64), drop_layers=(1, 2), num_classes=3)
    task = ClassificationTask(model, verbose=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r'last\.pth\.tar.*the checkpoint before it'):
        resume_task_checkpoint(task, str(last), log_info=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert resume_task_checkpoint(task, str(previous), log_info=False) == 1


@pytest.mark.parametrize('drop_path_rate', [pytest.param(0., marks=pytest.mark.slow), 0.1])
def test_compiled_blocks_are_compiled_in_the_first_pass_over_the_subnets_and_never_again(drop_path_rate):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def create():
        torch.manual_seed(0)
        return timm.create_model(
            'supervit_tiny', img_sizes=(32, 48, 64), embed_dim=24, depth=4, num_heads=2, drop_layers=(1, 2),
            num_classes=3, drop_path_rate=drop_path_rate)

    model, plain = create(), create()
    task = ClassificationTask(model, verbose=False)
    task.compile(backend=count)
    x = torch.randn(2, 3, 64, 64)
    rates = [(a, b) for a in (.5, .7) for b in (.5, .7)]
    draws = [[(64, 1.), (64, a), (size, 1.), (size, b)] for size in (32, 48) for a, b in rates]
    passes = []
    # Dynamo gives up on a function that it has compiled too often, without a word unless it is told to fail.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(2):
            for subnets in draws:
                sum(logits.sum() for logits in model.forward_subnets(x, subnets)).backward()
            passes.append(len(graphs))
        with torch.no_grad():
            for subnet in model.subnets:
                expected = plain.eval()(x, img_size=subnet.img_size, keep_rate=subnet.keep_rate)
                actual = model.eval()(x, img_size=subnet.img_size, keep_rate=subnet.keep_rate)
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)  # another order of operations
    assert passes[0] == passes[1] > 0


@pytest.mark.parametrize('name', recipe_names())
def test_a_recipe_names_a_registered_model(name):
    assert timm.is_model(yaml.safe_load(read_recipe(name))['model'])


# What main_deit.py and main_lvvit.py of the official code have for defaults or are started with (their README).
OFFICIAL = dict(
    batch_size=256, opt='adamw', weight_decay=0.05, sched='cosine', epochs=300, warmup_epochs=5, warmup_lr=1e-6,
    min_lr=1e-5, drop_path=0.1, smoothing=0.1, aa='rand-m9-mstd0.5-inc1', color_jitter=0.4, reprob=0.25,
    remode='pixel', recount=1, model_ema=True)
OFFICIAL_DEIT = dict(
    OFFICIAL, cooldown_epochs=0, mixup=0.8, cutmix=1.0, mixup_prob=1.0, mixup_switch_prob=0.5, mixup_mode='batch',
    train_interpolation='bicubic', aug_repeats=3, model_ema_decay=0.99996, seed=0)
OFFICIAL_LVVIT = dict(
    OFFICIAL, lr=1.6e-3, cooldown_epochs=10, mixup=0.0, cutmix=0.0, train_interpolation='random',
    model_ema_decay=0.99992, dist_bn='', seed=42)


@pytest.mark.parametrize('name, official', [
    *((f'deit_{size}_in1k', OFFICIAL_DEIT) for size in ('tiny', 'small', 'base')),
    ('lvvit_small_in1k', OFFICIAL_LVVIT),
])
def test_a_recipe_of_the_paper_has_the_numbers_of_the_official_code(name, official):
    recipe = yaml.safe_load(read_recipe(name))
    assert {key: recipe.get(key) for key in official} == official
    lr = recipe.get('lr') or recipe['lr_base'] * 4 * recipe['batch_size'] / recipe['lr_base_size']
    assert lr == (1e-3 if official is OFFICIAL_DEIT else 1.6e-3)
    assert recipe.get('lr_base_scale', 'linear') == 'linear'


@pytest.mark.parametrize('photos', [500, 5_000])
def test_the_averaged_weights_of_finetune_forget_the_head_that_was_drawn_at_the_start(photos):
    recipe = yaml.safe_load(read_recipe('finetune'))
    average = ModelEmaV3(
        torch.nn.Linear(1, 1), decay=recipe['model_ema_decay'], use_warmup=recipe.get('model_ema_warmup', False))
    updates = photos // recipe['batch_size'] * recipe['epochs']
    left = math.prod(average.get_decay(update) for update in range(2, updates + 1))  # the first copies the weights
    assert updates > 200
    assert left < 1e-3


needs_scripts = pytest.mark.skipif(not TIMM_SCRIPTS, reason='TIMM_SCRIPTS does not name the folder of train.py')


@needs_scripts
def test_recipes_have_settings_that_train_py_knows():
    code = 'import sys, train; print(*vars(train.parser.parse_args([])))'
    known = subprocess.run(
        [sys.executable, '-c', code], cwd=TIMM_SCRIPTS, capture_output=True, text=True, check=True).stdout.split()
    for name in recipe_names():
        assert not yaml.safe_load(read_recipe(name)).keys() - set(known), name


@pytest.fixture
def image_folder(tmp_path):
    from PIL import Image

    for split in ('train', 'validation'):
        for label, colour in enumerate(('red', 'green', 'blue')):
            folder = tmp_path / 'data' / split / str(label)
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new('RGB', (24, 24), colour).save(folder / f'{i}.png')
    return tmp_path / 'data'


def launch(processes):
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
    return torchrun if processes > 1 else []


def run_script(name, data, *options, launcher=()):
    common = ['--model', 'supervit_digits', '--num-classes', '3', '--device', 'cpu', '--workers', '0', '--data-dir']
    return subprocess.run(
        [sys.executable, *launcher, Path(TIMM_SCRIPTS, name), *common, data, *options],
        # PYTHONSAFEPATH: the installed timm, which is the one that is tested, not the one beside the scripts.
        capture_output=True, text=True, timeout=240, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONSAFEPATH': '1'})


def run_train_py(data, *options, launcher=()):
    return run_script(
        'train.py', data, '--train-split', 'train', '--val-split', 'validation', '-b', '4', '--epochs', '1',
        '--opt', 'adamw', '--output', data.parent, '--experiment', 'run', *options, launcher=launcher)


@needs_scripts
def test_train_py_trains_by_each_of_its_criteria_and_refuses_one_class_at_the_start(image_folder):
    for criterion in (['--bce-loss', '--bce-sum'], ['--bce-loss', '--bce-target-thresh', '0.2', '--mixup', '0.2'],
                      ['--jsd-loss', '--aug-splits', '3', '--aa', 'rand-m9-mstd0.5']):
        train = run_train_py(image_folder, '--log-interval', '1', *criterion)
        assert train.returncode == 0, train.stderr[-2000:]
        rows = re.findall(r', distill (\S+) \(', train.stderr)
        assert rows and all(float(loss) > 0 for loss in rows)
    train = run_train_py(image_folder, '--num-classes', '1')
    assert train.returncode != 0
    assert re.search(r'ValueError: .*num_classes=1\b.*MSELoss', train.stderr)
    assert 'Train: 0' not in train.stderr


@needs_scripts
def test_train_py_super_trains_under_torchrun_and_validate_py_reads_the_result_at_any_subnet(image_folder):
    train = run_train_py(
        image_folder, '--grad-accum-steps', '2', '--clip-grad', '1', '--model-ema', '--drop-path', '0.1',
        launcher=launch(2))
    assert train.returncode == 0, train.stderr[-2000:]
    assert 'Super-training img_sizes (12, 16, 20, 24)' in train.stderr
    assert 'Subnets: label' in train.stderr
    validate = run_script(
        'validate.py', image_folder, '--split', 'validation', '--checkpoint', image_folder.parent / 'run/last.pth.tar',
        '--img-size', '24', '--model-kwargs', 'img_size=16', 'keep_rate=0.5')
    assert validate.returncode == 0, validate.stderr[-2000:]
    assert '"top1"' in validate.stdout


@needs_scripts
@pytest.mark.parametrize('options', [
    '--amp --amp-dtype bfloat16 --grad-checkpointing --channels-last',
    '--amp --amp-dtype float16 --grad-accum-steps 2 --clip-grad 1',
    '--mixup 0.8 --cutmix 1.0 --bce-loss',
    '--jsd-loss --aug-splits 3 --aa rand-m9',
    '--train-img-sizes 16 24 32',
    '--torchcompile eager --drop-path 0.1',
])
def test_the_switches_of_train_py_work(image_folder, options):
    train = run_train_py(image_folder, '--log-interval', '1', *options.split())
    assert train.returncode == 0, train.stderr[-2000:]
    for role in ('label', 'distill'):
        losses = [float(loss) for loss in re.findall(rf'Subnets:.* {role} (\S+)', train.stderr)]
        assert len(losses) >= 3
        assert all(loss >= 0 for loss in losses)


@needs_scripts
@pytest.mark.parametrize('distill_type', ['logit', 'feature'])
def test_distillation_of_train_py_trains_the_active_subnet(image_folder, distill_type):
    save_for_hf(timm.create_model('supervit_digits', num_classes=3), image_folder.parent / 'teacher')
    train = run_train_py(
        image_folder, '--model-kwargs', 'img_size=16', 'keep_rate=0.5', '--kd-distill-type', distill_type,
        '--kd-model-name', f'local-dir:{image_folder.parent / "teacher"}')
    assert train.returncode == 0, train.stderr[-2000:]
    assert 'Super-training' not in train.stderr


# What is smaller than in the recipe so that it runs on a CPU in seconds: one epoch, of batches that a few hundred
# images fill, in one worker; and the network, but for the digits' own.
FEW = ['--device', 'cpu', '--epochs', '1', '--cooldown-epochs', '0', '--batch-size', '32', '--workers', '1']
SMALL_NETWORK = [
    '--model-kwargs', 'img_sizes=32,48,64', 'embed_dim=48', 'depth=4', 'num_heads=3', 'drop_layers=1,2']


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    import numpy as np
    from PIL import Image

    folder, noise = tmp_path_factory.mktemp('photographs'), np.random.default_rng(0)
    for split, count in (('train', 100), ('validation', 10)):
        for label in range(3):
            (folder / split / str(label)).mkdir(parents=True)
            for i in range(count):
                small = Image.fromarray(noise.integers(256, size=(6, 8, 3), dtype=np.uint8))
                small.resize((80, 60)).save(folder / split / str(label) / f'{i}.jpg')
    return folder


def write_label_maps(photographs, tmp_path, named=None):
    """Write maps as the published ones are for all training photographs, all of the class that is named or of any."""
    for path in (photographs / 'train').rglob('*.jpg'):
        classes = torch.randint(3, (5, 18, 18)) if named is None else torch.full((5, 18, 18), named)
        file = tmp_path / 'maps' / path.relative_to(photographs / 'train').with_suffix('.pt')
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.stack([torch.full((5, 18, 18), 10.), classes]).half(), file)
    return tmp_path / 'maps'


@needs_scripts
@pytest.mark.parametrize('processes, loader', [(1, []), (1, ['--no-prefetcher']), (2, [])])
def test_train_py_learns_what_label_maps_say(photographs, tmp_path, processes, loader):
    maps = write_label_maps(photographs, tmp_path, named=1)

    def train(*options):
        result = subprocess.run(
            [sys.executable, *launch(processes), Path(TIMM_SCRIPTS, 'train.py'), '--model', 'supervit_lvvit_tiny',
             '--num-classes', '3', '--lr', '1e-2', '--warmup-epochs', '0', '--opt', 'adamw', '--aa', 'rand-m9',
             '--data-dir', photographs, '--dataset', f'label_maps/{maps}', '--output', tmp_path, '--experiment', 'run',
             *FEW, *SMALL_NETWORK, *loader, *options],
            capture_output=True, text=True, timeout=240,
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONSAFEPATH': '1'})
        assert result.returncode == 0, result.stderr[-2000:]
        return [int(epoch) for epoch in re.findall(r'Train: (\d+) \[ *0/', result.stderr)]

    last = tmp_path / 'run' / 'last.pth.tar'
    assert train() == [0]
    if processes > 1:
        assert train('--resume', last, '--epochs', '2') == [1]
    settings = dict(img_sizes=(32, 48, 64), embed_dim=48, depth=4, num_heads=3, drop_layers=(1, 2), num_classes=3)
    model = timm.create_model('supervit_lvvit_tiny', checkpoint_path=last, **settings).eval()
    with torch.no_grad():
        probs = model(torch.randn(8, 3, 64, 64)).softmax(dim=1)
    assert (probs[:, 1] > 0.5).all()  # whereas a third of the images are of this class


@needs_scripts
@pytest.mark.parametrize(('model', 'options', 'remedy'), [
    ('supervit_lvvit_tiny', ['--mixup', '0.8'], '--mixup'),
    ('supervit_lvvit_tiny', ['--cutmix', '1.0', '--no-prefetcher'], '--cutmix'),
    ('supervit_tiny', ['--cutmix', '1.0', '--workers', '1'], '--cutmix'),
    ('supervit_lvvit_tiny', ['--aug-splits', '3', '--aa', 'augmix-m5', '--jsd-loss'], '--aug-splits'),
    ('supervit_tiny', [], '--dataset label_maps'),
])
def test_train_py_stops_at_the_start_where_label_maps_cannot_be_learned(photographs, tmp_path, model, options, remedy):
    result = subprocess.run(
        [sys.executable, Path(TIMM_SCRIPTS, 'train.py'), '--model', model, '--num-classes', '3', '--data-dir',
         photographs, '--dataset', f'label_maps/{write_label_maps(photographs, tmp_path)}', '--output', tmp_path,
         '--experiment', 'run', *FEW, *SMALL_NETWORK, *options],
        capture_output=True, text=True, timeout=240, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONSAFEPATH': '1'})
    assert result.returncode != 0
    assert remedy in result.stderr.strip().splitlines()[-1]
    assert 'leave out' in result.stderr.strip().splitlines()[-1]
    assert 'Train: 0 [' not in result.stderr


@needs_scripts
@pytest.mark.parametrize('name', recipe_names())
def test_a_recipe_as_printed_runs_through_train_py(name, photographs, tmp_path):
    printed = CliRunner().invoke(main, ['recipe', name]).output
    (tmp_path / 'recipe.yaml').write_text(printed)
    recipe = yaml.safe_load(printed)
    options = [] if recipe['model'] == 'supervit_digits' else SMALL_NETWORK
    if 'label_maps' in printed:
        options = [*options, '--num-classes', '3', '--dataset', f'label_maps/{write_label_maps(photographs, tmp_path)}']
    processes = 2 if recipe.get('aug_repeats') else 1
    train = subprocess.run(
        [sys.executable, *launch(processes), Path(TIMM_SCRIPTS, 'train.py'), '-c', tmp_path / 'recipe.yaml',
         '--data-dir', photographs, '--output', tmp_path, '--experiment', 'run', '--log-interval', '1', *FEW, *options],
        capture_output=True, text=True, timeout=240, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONSAFEPATH': '1'})
    assert train.returncode == 0, train.stderr[-2000:]
    losses = [float(loss) for loss in re.findall(r'Train:.* Loss: *(\S+)', train.stderr)]
    assert len(losses) == 256 // 32 // processes if recipe.get('aug_repeats') else 300 // 32
    assert all(0 < loss < 100 for loss in losses)
    assert (tmp_path / 'run' / 'last.pth.tar').exists()


@needs_scripts
@pytest.mark.parametrize(('start', 'options'), [
    ('plain', ['--pretrained', '--pretrained-path']), ('super', ['--pretrained', '--pretrained-path']),
    ('super', ['--initial-checkpoint']), ('plain', ['--pretrained-path']),
])
def test_finetune_starts_from_a_file_without_the_hub(start, options, photographs, tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(read_recipe('finetune'))
    settings = dict(embed_dim=48, depth=4, num_heads=3)
    if start == 'plain':
        model = timm.create_model('vit_tiny_patch16_224', img_size=64, **settings)
    else:
        model = timm.create_model(
            'supervit_small', img_sizes=(32, 48, 64), drop_layers=(1, 2), num_classes=3, **settings)
    torch.save(model.state_dict(), tmp_path / 'start.pth')
    train = subprocess.run(
        [sys.executable, Path(TIMM_SCRIPTS, 'train.py'), '-c', recipe, '--data-dir', photographs, '--output', tmp_path,
         '--experiment', 'run', '--num-classes', '3', *FEW, *SMALL_NETWORK, *options, tmp_path / 'start.pth',
         '--lr', '1e-12', '--warmup-lr', '0', '--min-lr', '0', '--weight-decay', '0'],
        capture_output=True, text=True, timeout=240,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONSAFEPATH': '1', 'HF_HUB_OFFLINE': '1'})
    assert train.returncode == 0, train.stderr[-2000:]
    trained = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=False)['state_dict']
    same = {
        key: value.shape == trained[key].shape and torch.allclose(trained[key], value, atol=1e-9)
        for key, value in model.state_dict().items() if key in trained}
    if '--pretrained-path' in options[:1]:  # which timm passes over without --pretrained
        assert 'start.pth is not read' in train.stderr and '--pretrained' in train.stderr
        assert not same['blocks.0.attn.qkv.weight']
        return
    assert 'is not read' not in train.stderr
    assert all(same[key] for key in same if not key.startswith('head'))
    assert same['head.weight'] is (options == ['--initial-checkpoint'])
