"""A call changes nothing on the model, so that threads and failures harm nobody."""
import threading
import warnings
from typing import Any

import pytest
import timm
import torch
from comparing import EXACT, run_subnet
from parity import list_grid
from timm.task import ClassificationTask
from torch import Tensor, nn

from timm_supervit import Cascade, Subnet


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything a call could change: attributes of all modules, parameters, buffers, hooks."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ('_parameters', '_buffers'):
                state |= {f'{name}.{k}': None if v is None else v.detach().clone() for k, v in value.items()}
            elif key != '_modules':
                state[f'{name}.{key}'] = repr(value)
    return state


def test_images_of_a_size_that_is_not_in_the_grid_are_one_warning(small_model: Any) -> None:
    model, x = small_model(img_size=48, keep_rate=0.6), torch.zeros(1, 3, 40, 40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('default')
        for _ in range(3):
            model(x)
    assert len(caught) == 1
    for part in ('40 x 40', '(32, 48, 64)', '48:0.6', '--model-kwargs img_size='):
        assert part in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model(x, img_size=32)  # who names a size knows
        for size in model.img_sizes:
            model(torch.zeros(1, 3, size, size))
    with pytest.warns(UserWarning, match='every subnet resizes them'):
        model.forward_subnets(x, model.subnets)


OTHER_CALLS: dict[str, Any] = {
    'features': lambda model, x: model.forward_features(x),
    'several subnets': lambda model, x: model.forward_features_subnets(x, model.subnets),
    'intermediates': lambda model, x: model.forward_intermediates(x),
    'layers': lambda model, x: model.get_intermediate_layers(x, n=2),
    'kept patches': lambda model, x: model.kept_patches(x),
    'one rate': lambda model, x: model.kept_patches(x, keep_rate=0.6),
    'a cascade': lambda model, x: Cascade(model, [(32, 0.6), (64, 1.0)], [0.9])(x),
    'a cascade that goes on': lambda model, x: Cascade(model, [(64, 0.6), (64, 1.0)], [0.9])(x),
}


@pytest.mark.parametrize('call', OTHER_CALLS)
@pytest.mark.parametrize('name', ['supervit_tiny', 'supervit_lvvit_small'])
def test_every_call_says_that_images_of_another_size_are_resized(small_model: Any, name: str, call: str) -> None:
    model = small_model(name, dynamic_img_size=True)  # by which timm's ViT runs at the size of the images
    with pytest.warns(UserWarning, match=r'64 x 72 .*\(32, 48, 64\).* resizes them') as caught:
        OTHER_CALLS[call](model, torch.zeros(1, 3, 64, 72))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        OTHER_CALLS[call](model, torch.zeros(1, 3, 48, 48))


def test_features_and_token_labels_say_so_too(small_model: Any) -> None:
    features = timm.create_model('supervit_digits', features_only=True, dynamic_img_size=True)
    with pytest.warns(UserWarning, match='28 x 32'):
        assert features(torch.zeros(1, 3, 28, 32))[-1].shape[-2:] == (6, 6)
    task = ClassificationTask(small_model('supervit_lvvit_small').train(), nn.CrossEntropyLoss(), verbose=False)
    with pytest.warns(UserWarning, match='40 x 40'):
        task(torch.zeros(2, 3, 40, 40), torch.tensor([1, 2]))


@pytest.mark.parametrize('call', ['forward', 'forward_subnets', 'forward_intermediates', 'kept_patches'])
@pytest.mark.parametrize('training', [False, True])
def test_a_call_changes_nothing_on_the_model(small_model: Any, images: Tensor, call: str, training: bool) -> None:
    model = small_model().train(training)
    before = snapshot(model)
    if call == 'forward_subnets':
        model.forward_subnets(images, model.subnets)
    else:
        getattr(model, call)(images, img_size=32, keep_rate=0.3)
    after = snapshot(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(after[name], value, **EXACT)
        else:
            assert after[name] == value, name


def test_a_failing_call_changes_nothing_on_the_model(small_model: Any, images: Tensor) -> None:
    model = small_model()
    expected = model(images)
    with pytest.raises(ValueError, match='keep_rate'):
        model(images, img_size=32, keep_rate=2.0)
    assert model.subnet == Subnet(64, 1.0)
    torch.testing.assert_close(model(images), expected, **EXACT)


def test_eight_threads_run_eight_subnets_of_one_model(small_model: Any) -> None:
    model = small_model()
    subnets = list_grid(model)[:8]
    inputs = [torch.randn(2, 3, 64, 64) for _ in subnets]
    with torch.no_grad():
        alone = [run_subnet(model, x, subnet) for x, subnet in zip(inputs, subnets, strict=True)]
    barrier, together = threading.Barrier(8), [[torch.empty(0)] * 20 for _ in subnets]

    def work(i: int) -> None:
        barrier.wait()
        with torch.no_grad():  # per thread
            together[i] = [run_subnet(model, inputs[i], subnets[i]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, outputs in zip(alone, together, strict=True):
        for output in outputs:
            torch.testing.assert_close(output, expected, **EXACT)
