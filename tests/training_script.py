"""A training script in miniature, made of the pieces that timm's train.py is made of; tests run it in processes.

It writes every step's subnets and loss to FOLDER/steps.RANK.jsonl, the last weights to FOLDER/weights.RANK.pt, and what
goes to stderr to FOLDER/errors.RANK.txt.
"""
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


def train(
        folder: Path,
        epochs: int = 3,
        resume: Path | None = None,
        kill_in: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        optimizer: str = 'adamw',
        drop_path: float = 0.,
) -> None:
    """Train, in this process; with ``kill_in`` until SIGKILL in the middle of that epoch."""
    with (folder / f'errors.{rank}.txt').open('w') as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    torch.manual_seed(42 + rank)  # as train.py seeds: each rank its own

    model = create_model(
        'supervit_tiny', embed_dim=24, depth=4, num_heads=2, img_sizes=(32, 48, 64), drop_layers=(1, 2),
        num_classes=CLASSES, drop_path_rate=drop_path).double()
    torch.manual_seed(0)
    model.init_weights()  # the ranks start from the same weights, one process too
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    updates = create_optimizer_v2(model, opt=optimizer, lr=1e-2)
    first_epoch = resume_task_checkpoint(task, str(resume), updates, log_info=False) if resume else 0
    if world_size > 1:
        torch.distributed.init_process_group(
            'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=world_size,
            timeout=datetime.timedelta(seconds=20))
        task.prepare_distributed(device_ids=[torch.device('cpu')])
    saver = CheckpointSaver(model, updates, checkpoint_dir=str(folder), task=task)

    for epoch in range(first_epoch, epochs):
        torch.manual_seed(1000 + epoch)  # stochastic depth; train.py does not restore torch's generator either
        for step in range(STEPS):
            if epoch == kill_in and step == STEPS // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            x, y = batch(epoch, step, rank, world_size)
            updates.zero_grad()
            result = task(x, y)
            result['loss'].backward()
            updates.step()
            with (folder / f'steps.{rank}.jsonl').open('a') as file:
                losses = [(*s[:2], s.loss.item()) for s in result['subnet_losses']]
                row = dict(epoch=epoch, step=step, losses=losses)
                file.write(json.dumps(row) + '\n')
        if rank == 0:
            saver.save_checkpoint(epoch, metric=epoch)
    torch.save(model.state_dict(), folder / f'weights.{rank}.pt')


def batch(epoch: int, step: int, rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's share of a global batch that does not depend on the number of ranks."""
    generator = torch.Generator().manual_seed(100 * epoch + step)
    x = torch.randn(BATCH_SIZE, 3, 64, 64, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (BATCH_SIZE,), generator=generator)
    return x.chunk(world_size)[rank], y.chunk(world_size)[rank]
