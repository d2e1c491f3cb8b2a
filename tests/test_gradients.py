"""Gradients: of every parameter, in both modes, and with checkpointing."""
from typing import Any

import pytest
import torch
from comparing import EXACT, ROUNDING, run_subnet
from torch import Tensor


@pytest.mark.parametrize('call', ['forward', 'forward_subnets', 'forward_features', 'forward_intermediates'])
@pytest.mark.parametrize('kwargs', [dict(), dict(reg_tokens=2), dict(global_pool='avg'), dict(no_embed_class=True)])
def test_every_parameter_gets_a_gradient_from_any_training_forward(
        small_model: Any,
        images: Tensor,
        call: str,
        kwargs: dict[str, Any],
) -> None:
    model = small_model(**kwargs).train()
    if call == 'forward_subnets':
        sum(output.sum() for output in model.forward_subnets(images, [(32, 1.0), (32, 0.3)])).backward()
    elif call == 'forward_intermediates':
        model.forward_head(model.forward_intermediates(images, img_size=32, keep_rate=0.3)[0]).sum().backward()
    elif call == 'forward_features':
        model.forward_head(model.forward_features(images, img_size=32, keep_rate=0.3)).sum().backward()
    else:
        run_subnet(model, images, (32, 0.3)).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    used, *unused = model.pos_embed_list
    assert used.grad.abs().sum() > 0
    for pos_embed in unused:
        torch.testing.assert_close(pos_embed.grad, torch.zeros_like(pos_embed), **EXACT)


def test_gradients_in_evaluation_mode_are_those_of_training_mode(small_model: Any, images: Tensor) -> None:
    model = small_model()
    gradients = []
    for training in (False, True):
        model.zero_grad()
        run_subnet(model.train(training), images, (48, 0.6)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], **ROUNDING)


@pytest.mark.parametrize('call', ['forward', 'forward_subnets'])
@pytest.mark.parametrize('drop_path_rate', [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(
        small_model: Any,
        images: Tensor,
        call: str,
        drop_path_rate: float,
) -> None:
    model = small_model(drop_path_rate=drop_path_rate).train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)  # the same blocks are left out
        subnets = [(64, 1.0), (64, 0.3), (32, 0.6)]
        outputs = model.forward_subnets(images, subnets) if call == 'forward_subnets' else [
            run_subnet(model, images, subnets[1])]
        sum(output.square().sum() for output in outputs).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], **ROUNDING)


def test_gradient_checkpointing_runs_the_blocks_again(small_model: Any, images: Tensor) -> None:
    model = small_model().train()
    model.set_grad_checkpointing()
    calls = []
    model.blocks[2].attn.qkv.register_forward_hook(lambda *_: calls.append(1))
    run_subnet(model, images, (64, 0.3)).sum().backward()
    assert len(calls) == 2
