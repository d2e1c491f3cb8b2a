"""Measures the speed of the network side by side with slower and with idealized forms of itself.

    python tests/benchmark.py subnets    each subnet, against the reference and against keeping the first tokens
    python tests/benchmark.py all        all subnets at once, against one after the other
    python tests/benchmark.py step       a training step, against four separate passes; its peak memory too
    python tests/benchmark.py rotary     each rate of a network with rotary positions, against one without and timm's
    python tests/benchmark.py elastic    one ONNX file of all subnets, against a file for each, and its int8 form

All contestants take turns in one process, so that drift of the machine hits all alike. Ratios are medians over the
rounds of the ratio within a round; in brackets, their quartiles. Options: --help.
"""
import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from reference import ReferenceSuperViT, soft_cross_entropy, training_step
from reference_lvvit import ReferenceLVViT

from timm_supervit import Subnet, SuperVisionTransformer, SuperViTTask
from timm_supervit.models.lvvit import ScaledResidualBlock, SuperLVViT
from timm_supervit.models.token_keeping import TokenKeepingBlock
from timm_supervit.programs.program import load_program
from timm_supervit.subnets import format_size
from timm_supervit.tools.export import export


class KeepFirst:
    """Drops as many tokens as the block of the package, without looking which: what dropping costs at least."""

    def forward(self, x, num_keep=None, rank=False):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        x = x if num_keep is None else x[:, :self.num_prefix_tokens + num_keep]
        y = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return (y, x, torch.arange(x.shape[1], device=x.device).expand(len(x), -1)) if rank else y


class KeepFirstBlock(KeepFirst, TokenKeepingBlock):
    pass


class KeepFirstScaledBlock(KeepFirst, ScaledResidualBlock):
    pass


def interleave(contestants: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Time all contestants in each round; return seconds by name."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 2):
        for name, run in contestants.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if i >= 2:  # two rounds of warm-up
                times[name].append(time.perf_counter() - start)
    return times


def synchronize(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def ratio(times: dict[str, list[float]], name: str, base: str) -> tuple[float, str]:
    ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return median, f'{median:.3f} [{low:.3f}, {high:.3f}]'


def networks(args: argparse.Namespace) -> tuple[SuperVisionTransformer, SuperVisionTransformer, ReferenceSuperViT]:
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=1000)
    settings = dict(embed_dim=model.embed_dim, depth=len(model.blocks), num_heads=model.blocks[0].attn.num_heads)
    if isinstance(model, SuperLVViT):
        settings['skip_lam'] = 1 / getattr(model.blocks[0].ls1, 'factor', 1.)
        reference, block_fn = ReferenceLVViT(**settings), KeepFirstScaledBlock
    else:
        reference, block_fn = ReferenceSuperViT(**settings), KeepFirstBlock
    reference.load_state_dict(model.state_dict())
    keep_first = type(model)(**settings, block_fn=block_fn)
    keep_first.load_state_dict(model.state_dict())
    return tuple(m.to(args.device) for m in (model, keep_first, reference))


def measure_subnets(args: argparse.Namespace) -> None:
    model, keep_first, reference = (m.eval() for m in networks(args))
    x = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    to_reference, to_keep_first = [], []
    print('subnet        ms   / reference             / keeping the first tokens')
    for size, rate in model.subnets:
        def run(network, size=size, rate=rate):
            with torch.inference_mode(), autocast(args):
                return network(x, img_size=size, keep_rate=rate)

        times = interleave({
            'ours': lambda: run(model), 'reference': lambda: run(reference), 'first': lambda: run(keep_first),
        }, args.rounds, args.device)
        r, reference_text = ratio(times, 'ours', 'reference')
        f, first_text = ratio(times, 'ours', 'first')
        to_reference.append(r)
        to_keep_first.append(f)
        milliseconds = 1000 * statistics.median(times['ours'])
        print(f'{size} @ {rate:<4g} {milliseconds:7.1f}   {reference_text}   {first_text}', flush=True)
    means = [statistics.geometric_mean(ratios) for ratios in (to_reference, to_keep_first)]
    print(f'geometric mean {means[0]:14.3f}{means[1]:24.3f}')


def measure_all(args: argparse.Namespace) -> None:
    model = networks(args)[0].eval()
    x = torch.randn(args.batch_size, 3, 224, 224, device=args.device)

    def at_once():
        with torch.inference_mode(), autocast(args):
            return model.forward_subnets(x, model.subnets)

    def one_by_one():
        with torch.inference_mode(), autocast(args):
            return [model(x, img_size=size, keep_rate=rate) for size, rate in model.subnets]

    times = interleave({'at once': at_once, 'one by one': one_by_one}, args.rounds, args.device)
    print(f'all subnets at once / one by one: {ratio(times, "at once", "one by one")[1]}')


def measure_step(args: argparse.Namespace) -> None:
    model, _, reference = (m.train() for m in networks(args))
    criterion = soft_cross_entropy
    x = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    target = torch.rand(args.batch_size, 1000, device=args.device).softmax(dim=1)
    subnets: list = []
    tasks = {}
    contestants: dict[str, Callable[[], object]] = {}

    def step(task):
        task.model.zero_grad()
        task.sample_subnets = lambda: subnets
        with autocast(args):
            loss = task(x, target)['loss']
        loss.backward()

    def separate(network):
        network.zero_grad()
        with autocast(args):
            training_step(network, x, target, subnets)

    for name, checkpointing in (('ours', False), ('ours, checkpointing', True)):
        copy = timm.create_model(args.model, num_classes=1000).to(args.device).train()
        copy.set_grad_checkpointing(checkpointing)
        tasks[name] = SuperViTTask(copy, criterion, verbose=False)
        if args.compile:
            tasks[name].compile()
        contestants[name] = lambda task=tasks[name]: step(task)
    contestants['four passes of ours'] = lambda: separate(model)
    contestants['four passes of the reference'] = lambda: separate(reference)
    if args.compile:
        SuperViTTask(model, criterion, verbose=False).compile()

    # Every smaller size and rate comes up equally often, as in training.
    draws = [
        [Subnet(224, 1.), Subnet(224, rate), Subnet(size, 1.), Subnet(size, other)]
        for size in (128, 160, 192) for rate, other in ((.5, .7), (.7, .5))
    ]
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for subnets[:] in draws:
        for name, seconds in interleave(contestants, args.rounds, args.device).items():
            times[name] += seconds
    print(f'{"":30}  ms per step   ours / it              peak memory')
    for name, run in contestants.items():
        _, text = ratio(times, 'ours', name)
        subnets[:] = draws[-1]
        print(f'{name:30} {1000 * statistics.median(times[name]):9.1f}     {text}   {peak_memory(run, args.device)}')


def measure_rotary(args: argparse.Namespace) -> None:
    name, settings = args.backbone, dict(img_sizes=(224,), num_classes=1000)
    plain = timm.create_model(name, img_size=224, num_classes=1000).to(args.device).eval()
    model = timm.create_model('supervit', backbone=name, **settings).to(args.device).eval()
    unrotated = timm.create_model('supervit', backbone=name, use_rot_pos_emb=False, **settings).to(args.device).eval()
    x = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    print(f'{name}, {model.num_patches(224)} patches, width {model.embed_dim}, batch {args.batch_size}')
    print('rate         ms   / without rotations     / timm, all tokens')
    for rate in (0.5, 0.7, 1.0):
        def run(network, **subnet):
            with torch.inference_mode(), autocast(args):
                return network(x, **subnet)

        times = interleave({
            'ours': lambda rate=rate: run(model, keep_rate=rate),
            'unrotated': lambda rate=rate: run(unrotated, keep_rate=rate),
            'timm': lambda: run(plain),
        }, args.rounds, args.device)
        print(f'{rate:<9g} {1000 * statistics.median(times["ours"]):7.1f}   {ratio(times, "ours", "unrotated")[1]}'
              f'   {ratio(times, "ours", "timm")[1]}', flush=True)


def measure_elastic(args: argparse.Namespace) -> None:
    model = networks(args)[0].eval()
    x = torch.randn(args.batch_size, 3, 224, 224)
    folder = Path(args.folder)
    paths = {'elastic': folder / f'{args.model}.onnx', 'int8': folder / f'{args.model}-int8.onnx'}
    for name, path in paths.items():
        if not path.exists():
            export(model, folder, 'onnx', quantize='int8' if name == 'int8' else None)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    for name, path in paths.items():
        print(f'{name}: {path.stat().st_size / weights:.3f} x the weights, session {session_memory(path):.0f} MiB')
    programs = {name: load_program(path) for name, path in paths.items()}
    worst = 0.
    print('subnet        ms   / fixed file            int8 / elastic')
    for subnet in model.subnets:
        path = folder / f'{args.model}-{format_size(subnet.img_size)}-{subnet.keep_rate}.onnx'
        if not path.exists():
            export(model, folder, 'onnx', [subnet])
        fixed = load_program(path)
        times = interleave({
            'elastic': lambda subnet=subnet: programs['elastic'](x, *subnet),
            'fixed': lambda fixed=fixed: fixed(x),
            'int8': lambda subnet=subnet: programs['int8'](x, *subnet),
        }, args.rounds, args.device)
        print(f'{subnet!s:9} {1000 * statistics.median(times["elastic"]):7.1f}   {ratio(times, "elastic", "fixed")[1]}'
              f'   {ratio(times, "int8", "elastic")[1]}', flush=True)
        with torch.no_grad():
            expected = model(x, img_size=subnet.img_size, keep_rate=subnet.keep_rate)
        worst = max(worst, (programs['elastic'](x, *subnet) - expected).abs().max().item())
    print(f'largest difference from the model {worst:.1e}')
    print(f'session of the last fixed file {session_memory(path):.0f} MiB')


def session_memory(path: Path) -> float:
    """Return the MiB by which a process grows when it loads a file and runs its largest subnet once."""
    code = (
        'import sys, torch; from timm_supervit.programs.program import load_program\n'
        'import onnxruntime; torch.set_num_threads(1)\n'
        'rss = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 / 2 ** 20\n'
        'before = rss(); program = load_program(sys.argv[1])\n'
        'program(torch.zeros(1, *program.pretrained_cfg["input_size"])); print(rss() - before)')
    return float(subprocess.run(
        [sys.executable, '-c', code, str(path)], capture_output=True, text=True, check=True).stdout)


def peak_memory(run: Callable[[], object], device: str) -> str:
    """Run once and return the most memory that tensors took beyond what was there before, as text."""
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return f'{(torch.cuda.max_memory_allocated() - before) / 2 ** 20:.0f} MiB'
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    allocated = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == '[memory]':
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return f'{peak / 2 ** 20:.0f} MiB'


def autocast(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    return torch.autocast(args.device, torch.bfloat16) if args.amp else contextlib.nullcontext()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('measurement', choices=('subnets', 'all', 'step', 'rotary', 'elastic'))
    parser.add_argument('--folder', default='output/benchmark', help='where exported files are or go (elastic only)')
    parser.add_argument('--model', default='supervit_small')
    parser.add_argument('--backbone', default='vit_small_patch16_rope_224', help='rotary only')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast')
    parser.add_argument('--compile', action='store_true', help='torch.compile the blocks (step only)')
    arguments = parser.parse_args()
    {'subnets': measure_subnets, 'all': measure_all, 'step': measure_step, 'rotary': measure_rotary,
     'elastic': measure_elastic}[arguments.measurement](arguments)
