"""Adapters of PEFT: all subnets train through one, on several processes, and it is saved, loaded and merged."""
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from processes import preload, run_ranks
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from timm_supervit import SuperViTTask

peft = pytest.importorskip('peft')

# 'proj' is the name of the attention's projection, and that of the patch embedding, a convolution.
TARGETS = ['qkv', 'proj']
# Of LV-ViT 'head' is both heads; BatchNorm's statistics change in training, so they belong to the adapter.
MODULES_TO_SAVE = {'supervit_tiny': ['head'], 'supervit_lvvit_small': ['head', 'bn1', 'bn2', 'bn3']}


def adapt(name: str, model: Any) -> Any:
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=TARGETS, modules_to_save=MODULES_TO_SAVE[name], lora_dropout=0.1))


def run_all(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack(model.eval().forward_subnets(images, model.subnets))


def train_on_a_rank(
        rank: int,
        folder: str,
        name: str,
        settings: dict[str, Any],
        state: dict[str, Tensor],
        images: Tensor,
) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    model = timm.create_model(name, **settings)
    model.load_state_dict(state)
    torch.manual_seed(rank)
    adapted = adapt(name, model)
    task: Any = ClassificationTask(adapted.train(), nn.CrossEntropyLoss(), verbose=False)
    assert isinstance(task, SuperViTTask)
    task.prepare_distributed()
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=0.01)
    for _ in range(4):
        task(torch.randn(2, 3, 64, 64), torch.randint(10, (2,)))['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        adapted.save_pretrained(f'{folder}/adapter')
    parameters = {key: parameter.detach() for key, parameter in adapted.named_parameters()}
    torch.save((parameters, adapted.get_base_model().state_dict(), run_all(adapted, images)), f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('name', MODULES_TO_SAVE)
def test_an_adapter_trained_on_two_processes_is_saved_loaded_and_merged(
        small_model: Any,
        images: Tensor,
        tmp_path: Path,
        name: str,
) -> None:
    model = small_model(name)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    plain, subnets = run_all(model, images), model.subnets
    settings = dict(
        img_sizes=model.img_sizes, keep_rates=model.keep_rates, drop_layers=model.drop_layers, embed_dim=48, depth=4,
        num_heads=3, num_classes=10)
    preload('peft')
    run_ranks(train_on_a_rank, str(tmp_path), name, settings, start, images)

    (first, base, logits), (second, *_) = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    trained = {key for key in base if 'lora_' in key or '.modules_to_save.' in key}
    base = {key.replace('.base_layer', '').replace('.original_module', ''): base[key] for key in base.keys() - trained}
    torch.testing.assert_close(base, start, atol=0, rtol=0)
    for changed, before in zip(logits, plain, strict=True):
        assert (changed - before).abs().max() > 0.01

    loaded = peft.PeftModel.from_pretrained(model, tmp_path / 'adapter')
    torch.testing.assert_close(run_all(loaded, images), logits, atol=1e-5, rtol=0)
    merged = loaded.merge_and_unload()
    assert merged.subnets == subnets
    assert merged.state_dict().keys() == start.keys()
    torch.testing.assert_close(run_all(merged, images), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize('name', MODULES_TO_SAVE)
def test_subnets_are_reached_through_the_wrapper(small_model: Any, images: Tensor, name: str) -> None:
    model = small_model(name)
    plain, subnets = run_all(model, images), model.subnets
    adapted = adapt(name, model).eval()
    assert adapted.subnets == subnets
    with torch.no_grad():
        for outputs in (adapted.forward_subnets(images, subnets), adapted(images, subnets=subnets)):
            torch.testing.assert_close(torch.stack(outputs), plain, atol=1e-5, rtol=0)
        torch.testing.assert_close(adapted(images, img_size=48, keep_rate=0.3), plain[subnets.index((48, 0.3))])


@pytest.mark.parametrize('targets, modules_to_save', [
    (TARGETS, None), (['qkv'], ['head']), ('all-linear', None), (['head', 'conv2', 'fc1'], None)])
@pytest.mark.parametrize('name', MODULES_TO_SAVE)
def test_macs_count_the_adapter(
        small_model: Any,
        images: Tensor,
        name: str,
        targets: Any,
        modules_to_save: Any,
) -> None:
    config = peft.LoraConfig(target_modules=targets, modules_to_save=modules_to_save)
    adapted = peft.get_peft_model(small_model(name), config).eval()
    for img_size, keep_rate in adapted.subnets:
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad(), nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            adapted(images[:1], img_size=img_size, keep_rate=keep_rate)
        assert adapted.macs((img_size, keep_rate)) == counter.get_total_flops() // 2
