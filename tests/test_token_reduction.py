"""The ways to spend fewer MACs that docs/method.md compares cost what they should, and one is the model's."""
from typing import Any

import pytest
import torch
from token_reduction import WAYS, count, merge, plan_merging, run, tokens_of
from torch import Tensor

from timm_supervit import Subnet


@torch.no_grad()
def test_keeping_by_attention_is_what_the_model_does(small_model: Any, images: Tensor) -> None:
    model = small_model()
    for subnet in model.subnets:
        logits = model.forward_head(run(model, images, subnet, 'attention'))
        torch.testing.assert_close(logits, model(images, **subnet._asdict()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('way', WAYS)
@torch.no_grad()
def test_each_way_is_another_one_at_the_same_cost(small_model: Any, images: Tensor, way: str) -> None:
    model, subnet = small_model(), Subnet(64, 0.3)
    before, after = tokens_of(model, subnet)
    tokens = run(model, images, subnet, way)
    assert tokens.isfinite().all()
    if way == 'merged':
        number, plan = 1 + model.num_patches(64), plan_merging(model, subnet)
        left = [number - sum(plan[:i]) for i in range(len(plan) + 1)]
        assert tokens.shape[1] == left[-1]
        assert 0.8 < count(model, left[:-1], left[1:]) / count(model, before, after) <= 1
    else:
        assert tokens.shape[1] == after[-1]
    if way != 'attention':
        torch.manual_seed(0)
        assert not torch.allclose(run(model, images, subnet, way)[:, 0], run(model, images, subnet, 'attention')[:, 0])


def test_merging_leaves_the_class_token_and_the_mean_of_all() -> None:
    x, keys, number = torch.randn(2, 11, 6), torch.randn(2, 11, 3), torch.ones(2, 11)
    first, number_after = merge(x, keys, number, 4)
    second, last = merge(first, torch.randn(2, 7, 3), number_after, 2)
    for tokens, numbers in ((first, number_after), (second, last)):
        torch.testing.assert_close(tokens[:, 0], x[:, 0])
        torch.testing.assert_close((tokens * numbers.unsqueeze(2)).sum(dim=1), x.sum(dim=1))
    assert last.sum(dim=1).tolist() == [11, 11]
    # The most similar pair of an even and an odd token goes first.
    keys = torch.eye(11)[None]
    keys[0, 6] = keys[0, 3]
    tokens, numbers = merge(x[:1], keys, number[:1], 1)
    assert numbers[0].max() == 2
    torch.testing.assert_close(tokens[0, numbers[0].argmax()], (x[0, 6] + x[0, 3]) / 2)
