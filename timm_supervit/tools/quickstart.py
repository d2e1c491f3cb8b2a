"""The whole way in minutes on a CPU: train a small SuperViT on handwritten digits, evaluate its subnets, save it."""
import os
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits as load_sklearn_digits
from sklearn.model_selection import train_test_split
from timm.data import create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import random_seed

from ..images.datasets import ReadableImages
from ..results.files import fill_folder
from ..results.fingerprint import Source
from ..results.pictures import draw_operating_points
from ..results.rows import Results, write_results
from . import Progress, silent
from .evaluate import evaluate

Example = tuple[Image.Image, int]


def load_digits(img_size: int) -> tuple[list[Example], list[Example]]:
    """Return scikit-learn's 1,797 handwritten digits, 1,437 to train on and 360 to test on, always the same.

    Args:
        img_size: Side to which the images of 8 x 8 pixels are enlarged.
    """
    digits: Any = load_sklearn_digits()
    images = [
        Image.fromarray((pixels * 255 / 16).astype('uint8')).convert('RGB').resize((img_size, img_size))
        for pixels in digits.images
    ]
    examples = list(zip(images, digits.target.tolist(), strict=True))
    return tuple(train_test_split(examples, test_size=360, stratify=digits.target, random_state=0))


def train(model: Any, examples: list[Example], epochs: int, progress: Progress = silent) -> None:
    """Super-train a model with timm's loader, task, optimizer and scheduler, as timm's ``train.py`` would.

    Args:
        model: A SuperViT.
        examples: Images and their classes.
        epochs: Passes over the examples.
        progress: Follows the epochs, such as ``tqdm.tqdm``.
    """
    device = torch.device('cpu')
    config = resolve_data_config({}, model=model)
    dataset: Any = ReadableImages(examples)
    loader = create_loader(
        dataset,
        input_size=config['input_size'],
        batch_size=64,
        is_training=True,
        scale=(0.8, 1.0),
        ratio=(0.9, 1.1),
        hflip=0.,  # a mirrored digit is none
        color_jitter=0.,
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        num_workers=0,
        device=device,
    )
    task = ClassificationTask(model, criterion=torch.nn.CrossEntropyLoss(), device=device, verbose=False)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=2e-3, weight_decay=0.05)
    scheduler: Any
    scheduler, epochs = create_scheduler_v2(
        optimizer, num_epochs=epochs, warmup_epochs=min(5, epochs // 2), min_lr=1e-5, step_on_epochs=False,
        updates_per_epoch=len(loader))
    task.train()
    for epoch in progress(range(epochs), 'Training'):
        for step, (images, target) in enumerate(loader, start=epoch * len(loader)):
            optimizer.zero_grad()
            loss = task(images, target)['loss']
            loss.backward()
            optimizer.step()
            scheduler.step_update(step + 1)
    model.eval()


def quickstart(
        output: str | os.PathLike = 'output/digits',
        seed: int = 42,
        epochs: int = 40,
        progress: Progress = silent,
) -> Results:
    """Train ``supervit_digits`` on handwritten digits, evaluate all its subnets on held-out ones, and save both.

    Args:
        output: Folder for the model, which ``timm.create_model('local-dir:...', pretrained=True)`` loads, the results
            as ``evaluate.json`` and ``evaluate.csv``, their picture ``evaluate.png``, and the held-out digits as a data
            set of images, ``validation/CLASS/NUMBER.png``. Nothing is written before all of it is there.
        seed: Start of all random numbers; the same seed gives the same numbers.
        epochs: Passes over the training digits.
        progress: Follows the epochs and the batches of the evaluation, such as ``tqdm.tqdm``.

    Returns:
        The results on the held-out digits.

    Raises:
        OSError: If the folder cannot be written to.
    """
    with fill_folder(output) as folder:
        random_seed(seed)
        # Xavier's initialization: the usual deviation of 0.02 is far too small for this width, and learns slowly.
        model: Any = timm.create_model('supervit_digits', weight_init='jax')
        examples, held_out = load_digits(model.img_sizes[-1])
        train(model, examples, epochs, progress)
        model.source = Source(f'local-dir:{Path(output)}')
        results = evaluate(model, held_out, workers=0, progress=progress)
        if results.partial:
            raise KeyboardInterrupt
        results.info = {'partial': False, 'skipped': [], 'seed': seed, 'epochs': epochs}
        model.pretrained_cfg['label_names'] = [str(digit) for digit in range(model.num_classes)]
        timm.models.save_for_hf(model, str(folder), safe_serialization=True)
        picture = draw_operating_points(results.rows, title='supervit_digits on held-out digits')
        write_results(results, folder, 'evaluate', {'.png': picture})
        for i, (image, target) in enumerate(held_out):
            path = folder / 'validation' / str(target) / f'{i:03}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return results
