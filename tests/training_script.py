"""A training script in miniature, made of the pieces that timm's train.py is made of; tests run it as a process.

    python training_script.py FOLDER [--epochs N] [--resume FILE] [--kill-in EPOCH] [--rank R --world-size W] [...]

It writes every step's subnets and loss to FOLDER/steps.RANK.jsonl, and the last weights to FOLDER/weights.RANK.pt.
"""
import argparse
import datetime
import json
import os
import signal
from pathlib import Path

import torch
from timm import create_model
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, resume_task_checkpoint
from timm.utils import CheckpointSaver

BATCH_SIZE, STEPS, CLASSES = 4, 5, 3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('folder', type=Path)
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--resume')
    parser.add_argument('--kill-in', type=int, help='SIGKILL in the middle of this epoch')
    parser.add_argument('--rank', type=int, default=0)
    parser.add_argument('--world-size', type=int, default=1)
    parser.add_argument('--optimizer', default='adamw')
    parser.add_argument('--drop-path', type=float, default=0.)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(42 + args.rank)  # as train.py seeds: each rank its own

    model = create_model(
        'supervit_tiny', embed_dim=24, depth=4, num_heads=2, img_sizes=(32, 48, 64), drop_layers=(1, 2),
        num_classes=CLASSES, drop_path_rate=args.drop_path).double()
    torch.manual_seed(0)
    model.init_weights()  # the ranks start from the same weights, one process too
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    optimizer = create_optimizer_v2(model, opt=args.optimizer, lr=1e-2)
    first_epoch = resume_task_checkpoint(task, args.resume, optimizer, log_info=False) if args.resume else 0
    if args.world_size > 1:
        torch.distributed.init_process_group(
            'gloo', init_method=f'file://{args.folder}/store', rank=args.rank, world_size=args.world_size,
            timeout=datetime.timedelta(seconds=20))
        task.prepare_distributed(device_ids=[torch.device('cpu')])
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(args.folder), task=task)

    for epoch in range(first_epoch, args.epochs):
        torch.manual_seed(1000 + epoch)  # stochastic depth; train.py does not restore torch's generator either
        for step in range(STEPS):
            if epoch == args.kill_in and step == STEPS // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            x, y = batch(epoch, step, args.rank, args.world_size)
            optimizer.zero_grad()
            result = task(x, y)
            result['loss'].backward()
            optimizer.step()
            with open(args.folder / f'steps.{args.rank}.jsonl', 'a') as file:
                losses = [(*s[:2], s.loss.item()) for s in result['subnet_losses']]
                row = dict(epoch=epoch, step=step, losses=losses)
                file.write(json.dumps(row) + '\n')
        if args.rank == 0:
            saver.save_checkpoint(epoch, metric=epoch)
    torch.save(model.state_dict(), args.folder / f'weights.{args.rank}.pt')


def batch(epoch: int, step: int, rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's share of a global batch that does not depend on the number of ranks."""
    generator = torch.Generator().manual_seed(100 * epoch + step)
    x = torch.randn(BATCH_SIZE, 3, 64, 64, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (BATCH_SIZE,), generator=generator)
    return x.chunk(world_size)[rank], y.chunk(world_size)[rank]


if __name__ == '__main__':
    main()
