"""Top-1 of all subnets against updates and CPU time: super-training, plain training, and one after the other.

    TIMM_SCRIPTS=FOLDER python tests/finetuning_benchmark.py WEIGHTS PHOTOGRAPHS FILE.jsonl --photographs 1000 \\
        --seed 0 --run super:6 --run plain:11 --run plain:6,super:3

``train.py`` of timm, unmodified, with ``supervit recipe finetune``, on a plain ViT and on SuperViT with that backbone.
WEIGHTS are the backbone's; PHOTOGRAPHS has train/CLASS and validation/CLASS, of which as many are taken as is said, the
same of each class. A run is the epochs of plain training, of super-training, or of both, where the second starts from
the averaged weights of the first, head included; ``super:3@3e-4`` is at another learning rate, and ``random:6`` is
super-training in one of the ways of ``token_reduction.py``. Averaged weights are evaluated, of a plain network with
resampled position embeddings. Each run is added as a line of FILE.jsonl, and its network kept in ``--networks`` as
RUN-PHOTOGRAPHS-SEED.pth.tar. Without ``--run``, what the file has is printed.
"""
import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from token_reduction import WAYS

from timm_supervit.results.rows import load_results, subnet_of
from timm_supervit.tools.recipe import recipe

BATCH_SIZE = 32
EVALUATED = 1000  # photographs


def link_photographs(source: Path, folder: Path, number: int) -> None:
    """Make a folder of the first photographs of each class, and of one of each class for train.py to validate on."""
    for split, images, new in (
            ('train', number, 'train'), ('validation', EVALUATED, 'validation'), ('validation', 10, 'some')):
        classes = sorted(path for path in (source / split).iterdir() if path.is_dir())
        for one in classes:
            target = folder / new / one.name
            target.mkdir(parents=True)
            for path in sorted(one.iterdir())[:images // len(classes)]:
                (target / path.name).symlink_to(path.resolve())


def call(*command: Any) -> float:
    """Run a Python program; return its CPU time in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f'{" ".join(map(str, command))}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}')
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def load_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(options: argparse.Namespace, stages: str, folder: Path) -> dict[str, Any]:
    """Train and evaluate, unless that was done; note the result and keep the network."""
    which = {'run': stages, 'photographs': options.photographs, 'seed': options.seed}
    network = options.networks / f'{stages}-{options.photographs}-{options.seed}.pth.tar'
    if done := [line for line in load_lines(options.output) if which.items() <= line.items() and network.exists()]:
        return done[-1]
    before, _, stage = stages.rpartition(',')
    first = run(options, before, folder) if before else {'updates': 0, 'cpu_minutes': 0.}
    start = ['--pretrained', '--pretrained-path', options.weights]
    if before:
        start = ['--initial-checkpoint', network.with_name(network.name.replace(stages, before))]
    kind, _, rest = stage.partition(':')
    epochs, _, lr = rest.partition('@')
    kwargs = [f'backbone={options.backbone}', f'img_sizes={",".join(map(str, options.img_sizes))}']
    size = options.img_sizes[-1]
    model = ['--model', options.backbone, '--img-size', size, '--model-kwargs', f'img_size={size}'] \
        if kind == 'plain' else ['--model', 'supervit', '--model-kwargs', *kwargs]
    script = [Path(os.environ['TIMM_SCRIPTS'], 'train.py')]
    if kind in WAYS:
        script = [Path(__file__).with_name('token_reduction.py'), '--train', kind, *script]
    seconds = call(
        *(['-P'] if len(script) == 1 else []), *script, '-c', folder / 'finetune.yaml', *model, *start,
        '--data-dir', folder, '--val-split', 'some', '--num-classes', 10, '--epochs', epochs, '--warmup-epochs', 1,
        '--seed', options.seed, '--batch-size', BATCH_SIZE, *(['--lr', lr] if lr else []), '--device', 'cpu', '--amp',
        '--amp-dtype', 'bfloat16', '--workers', 1, '--val-interval', 1000, '--output', folder, '--experiment', 'run')
    options.networks.mkdir(exist_ok=True)
    (folder / 'run' / 'last.pth.tar').rename(network)
    call('-m', 'timm_supervit', 'evaluate', network, '--use-ema', '--model-kwargs', kwargs[1], '--data-dir', folder,
         '--split', 'validation', '-b', 100, '--workers', 1, '--amp', '--amp-dtype', 'bfloat16', '--output',
         folder / 'run')
    result = which | {
        'updates': first['updates'] + int(epochs) * (options.photographs // BATCH_SIZE),
        'cpu_minutes': round(first['cpu_minutes'] + seconds / 60, 2),
        'top1': {str(subnet_of(row)): row['top1'] for row in load_results(folder / 'run' / 'evaluate.json').rows}}
    shutil.rmtree(folder / 'run')
    with options.output.open('a') as file:  # so that several of these programs may run at a time
        file.write(json.dumps(result) + '\n')
    print(result, flush=True)
    return result


def print_table(results: list[dict[str, Any]]) -> None:
    """Print means over seeds, with standard errors where there are several."""
    groups: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result['photographs'], result['updates'], result['run']), []).append(result)
    subnets = list(results[0]['top1'])
    print('| photographs | run | seeds | updates | CPU minutes |', ' | '.join(subnets), '|')
    print('|---' * (5 + len(subnets)) + '|')
    for (photographs, updates, name), group in sorted(groups.items()):
        cells = []
        for subnet in subnets:
            values = [one['top1'][subnet] for one in group]
            error = f' ± {np.std(values, ddof=1) / len(values) ** 0.5:.1f}' if len(values) > 1 else ''
            cells.append(f'{np.mean(values):.1f}{error}')
        minutes = np.mean([one['cpu_minutes'] for one in group])
        print(f'| {photographs} | {name} | {len(group)} | {updates} | {minutes:.1f} |', ' | '.join(cells), '|')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('weights', type=Path)
    parser.add_argument('data', type=Path)
    parser.add_argument('output', type=Path)
    parser.add_argument('--run', action='append', default=[])
    parser.add_argument('--photographs', type=int, default=1000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--backbone', default='vit_small_patch14_dinov2')
    parser.add_argument('--img-sizes', type=int, nargs='+', default=[56, 84])
    parser.add_argument('--networks', type=Path, default=Path('networks'))
    options = parser.parse_args()
    if options.run:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            link_photographs(options.data, folder, options.photographs)
            (folder / 'finetune.yaml').write_text(recipe('finetune'))
            for stages in options.run:
                run(options, stages, folder)
    print_table(load_lines(options.output))


if __name__ == '__main__':
    main()
