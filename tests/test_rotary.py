"""SuperViTs on timm's ``Eva``, whose positions are rotary: EVA-02, DINOv3, Perception Encoder and their kin."""
import copy
import json
import re
import socket
from collections import defaultdict
from typing import Any

import pytest
import reference_rotary
import timm
import torch
from huggingface_hub import ModelCard
from timm.models import save_for_hf
from timm.models._manipulate import reinit_non_persistent_buffers
from timm.models.eva import Eva
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from timm_supervit import Cascade, Subnet
from timm_supervit.programs.program import load_program
from timm_supervit.subnets import size_2d
from timm_supervit.tools.convert import convert

NAMES = [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__ == 'timm.models.eva']
THREE = ['eva02_tiny_patch14_224', 'vit_small_patch16_rope_mixed_ape_224', 'vit_small_patch16_dinov3_qkvb']
ROUNDING = dict(atol=1e-5, rtol=1e-4)  # of float32, where sums are in another order


def supervit(name: str, **kwargs: Any) -> Any:
    return timm.create_model('supervit', backbone=name, **kwargs)


def randomize(model: Any) -> Any:
    """Give a model weights that are large enough for each of them to show in the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def small(name: str) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Return settings that make a backbone small, and image sizes of 2 x 2, 3 x 4 and 5 x 5 patches."""
    patch = timm.create_model(name, device='meta').patch_embed.patch_size[0]
    settings: dict[str, Any] = dict(depth=3, embed_dim=64, num_heads=4, num_classes=10)
    if 'sapiens' in name:  # it has a number of key heads for each block, and would draw coordinates in training
        settings |= dict(num_kv_heads=(4, 2, 2), rope_rescale_coords=1.)
    return settings, (2 * patch, (3 * patch, 4 * patch), 5 * patch)


def small_pair(name: str, **kwargs: Any) -> tuple[Any, Any]:
    """Return a small SuperViT on a backbone and that backbone at full size, of the same weights."""
    settings, sizes = small(name)
    plain = randomize(timm.create_model(name, img_size=sizes[-1], **settings))
    model = supervit(name, img_sizes=sizes, keep_rates=(0.3, 0.6, 1.0), drop_layers=(0, 1), **settings, **kwargs)
    model.load_state_dict(plain.state_dict())
    return model.eval(), plain


def kind_of(model: Any) -> Any:
    """Return what a network is made of, whatever its sizes."""
    attn = model.blocks[0].attn
    modules = {(re.sub(r'\d+', '', name), type(module)) for name, module in model.named_modules()}
    parameters = {re.sub(r'\d+', '', name) for name, _ in model.named_parameters()}
    return (frozenset(modules), frozenset(parameters), getattr(model.rope, 'grid_indexing', None), model.global_pool,
            model.no_embed_class, len({block.attn.k_proj.out_features for block in model.blocks if attn.qkv is None}))


def kinds() -> dict[Any, list[str]]:
    result = defaultdict(list)
    for name in NAMES:
        plain = timm.create_model(name, device='meta')
        if plain.cls_token is not None:
            result[kind_of(plain)].append(name)
    return result


ONE_OF_EACH = [names[0] for names in kinds().values()]


def test_every_name_becomes_a_supervit_of_the_same_weights_or_is_refused_with_reason():
    accepted = 0
    for name in NAMES:
        plain = timm.create_model(name, device='meta')
        assert type(plain) is Eva
        if plain.cls_token is None:
            with pytest.raises(ValueError, match=f'{name}.*class token'):
                supervit(name, device='meta')
            continue
        accepted += 1
        model = supervit(name, device='meta')
        expected = {key: tuple(value.shape) for key, value in plain.state_dict().items()}
        found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        position = expected.pop('pos_embed', None)
        positions = [found.pop(key) for key in list(found) if key.startswith('pos_embed_list.')]
        assert found == expected, name
        assert (len(positions), *positions[-1:]) == ((4, position) if position else (0,)), name
        assert size_2d(model.img_sizes[-1]) == plain.patch_embed.img_size, name
    print(f'\n{accepted} names of {len(ONE_OF_EACH)} kinds, {len(NAMES) - accepted} without a class token')
    assert accepted >= 58


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_with_all_tokens_it_is_the_backbone_of_each_size_bit_for_bit(name):
    settings, sizes = small(name)
    model, _ = small_pair(name)
    for size in sizes:
        plain = randomize(timm.create_model(name, img_size=size, **settings))
        dynamic, cached = (
            timm.create_model(name, img_size=size, **settings, dynamic_img_size=way).eval() for way in (True, False))
        for network in (dynamic, cached, model):
            network.load_state_dict(plain.state_dict())
        images = torch.randn(2, 3, *plain.patch_embed.img_size)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            with torch.no_grad():
                expected, *ways = (
                    copy.deepcopy(network).to(dtype)(images.to(dtype)) for network in (plain, dynamic, cached))
                found = copy.deepcopy(model).to(dtype)(images.to(dtype), img_size=size)
                if dtype is torch.float32 or torch.equal(*ways):
                    assert torch.equal(found, expected), (size, dtype)
                else:
                    assert any(torch.equal(found, way) for way in ways), (size, dtype)


@pytest.mark.parametrize('fused', [True, False], ids=['fused', 'written out'])
@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_a_kept_token_keeps_its_rotation(name, fused):
    model, _ = small_pair(name)
    model = model.double()
    for block in model.blocks:
        block.attn.fused_attn = fused
    tolerance = 1e-10 if model.rope is None else 2e-6  # timm has coordinates and frequencies in float32
    for size in model.img_sizes:
        images = torch.randn(3, 3, 80, 80, dtype=torch.float64)
        for rate in (0.3, 0.6, 1.0):
            with torch.no_grad():
                found = model(images, img_size=size, keep_rate=rate)
                expected = torch.stack([reference_rotary.logits(model, image, size, rate) for image in images])
                torch.testing.assert_close(found, expected, atol=tolerance, rtol=0, check_dtype=False)
                if rate < 1 and model.rope is not None and size == model.img_sizes[-1]:
                    wrong = [reference_rotary.logits(model, image, size, rate, by_first_rows=True) for image in images]
                    assert (torch.stack(wrong) - found).abs().amax() > 0.1


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_several_subnets_share_what_they_have_in_common(name):
    model, _ = small_pair(name)
    images, subnets = torch.randn(2, 3, 80, 80), model.subnets
    for training in (False, True):
        model.train(training)
        alone = [model(images, *[None, False], *subnet) for subnet in subnets]
        sum(output.square().mean() for output in alone).backward()
        expected = {key: parameter.grad for key, parameter in model.named_parameters()}
        model.zero_grad()
        together = model.forward_subnets(images, subnets)
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one, other, **ROUNDING)
        sum(output.square().mean() for output in together).backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad.any(), key
            torch.testing.assert_close(
                parameter.grad, expected[key], atol=1e-4, rtol=1e-3, msg=lambda m, k=key: f'{k}: {m}')
        model.zero_grad()


@pytest.mark.parametrize('name', ONE_OF_EACH)
def test_costs_are_those_of_the_flop_counter(name):
    model, _ = small_pair(name)
    model.requires_grad_(False)
    for subnet in model.subnets:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(torch.randn(1, 3, 32, 32), img_size=subnet.img_size, keep_rate=subnet.keep_rate)
        assert counter.get_total_flops() // 2 == model.macs(subnet), subnet


@pytest.mark.parametrize('name', THREE)
def test_dense_features_and_kept_patches_tell_the_same(name):
    model, plain = small_pair(name)
    size = model.img_sizes[-1]
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = plain.forward_intermediates(images, norm=True)
        found = model.forward_intermediates(images, norm=True)
        assert all(map(torch.equal, [found[0], *found[1]], [expected[0], *expected[1]]))
        for rate in (0.3, 0.6):
            final, maps = model.forward_intermediates(images, keep_rate=rate, norm=True)
            torch.testing.assert_close(final, model.forward_features(images, keep_rate=rate))
            kept = model.kept_patches(images, keep_rate=rate)
            assert list(kept) == [0, 1]
            last = maps[-1].flatten(2).transpose(1, 2)
            rows = torch.stack([image[patches] for image, patches in zip(last, kept[1], strict=True)])
            torch.testing.assert_close(rows, final[:, model.num_prefix_tokens:], **ROUNDING)


@pytest.mark.parametrize('name', THREE)
def test_a_cascade_goes_on_with_the_rotations_of_the_images_that_are_left(name):
    model, _ = small_pair(name)
    size = model.img_sizes[-1]
    stages, images = [(model.img_sizes[0], 1.0), (size, 0.3), (size, 1.0)], torch.randn(16, 3, size, size)
    with torch.no_grad():
        halves = [float(logits.softmax(1).amax(1).median()) for logits in model.forward_subnets(images, stages[:2])]
        cascade = Cascade(model, stages, halves)
        logits, exits = cascade(images, return_exits=True)
        assert exits.unique().tolist() == [0, 1, 2]
        for i, stage in enumerate(exits.tolist()):
            alone = model(images[i:i + 1], **cascade.stages[stage]._asdict())
            torch.testing.assert_close(logits[i:i + 1], alone, **ROUNDING)


@pytest.mark.parametrize('name', THREE)
def test_a_new_input_size_is_the_backbone_at_that_size(name):
    model, plain = small_pair(name)
    patch = model.patch_embed.patch_size[0]
    model.set_input_size(img_size=(4 * patch, 6 * patch))
    plain.set_input_size(img_size=(4 * patch, 6 * patch))
    if plain.rope is not None and getattr(plain.rope, 'feat_shape', None) is not None:
        plain.rope.update_feat_shape(list(plain.patch_embed.grid_size))
    images = torch.randn(2, 3, 4 * patch, 6 * patch)
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain(images), **ROUNDING)
        assert not torch.allclose(model(images), model(images, keep_rate=0.5))


@pytest.mark.parametrize('name', THREE)
def test_gradient_checkpointing_and_compiled_blocks_change_nothing(name):
    model, _ = small_pair(name, drop_path_rate=0.)
    images = torch.randn(2, 3, 80, 80)
    subnets = [Subnet(model.img_sizes[-1], 1.0), Subnet(model.img_sizes[-1], 0.6), Subnet(model.img_sizes[0], 0.3)]
    expected = model.forward_subnets(images, subnets)
    sum(output.square().mean() for output in expected).backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    for change in (lambda: model.set_grad_checkpointing(), lambda: model.set_grad_checkpointing(False),
                   lambda: model.compile(backend='aot_eager')):
        change()
        model.zero_grad()
        outputs = model.train().forward_subnets(images, subnets)
        for output, wanted in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output, wanted, **ROUNDING)
        sum(output.square().mean() for output in outputs).backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[key], atol=1e-4, rtol=1e-3)


def test_rotations_are_computed_once_and_are_in_no_state_dict(monkeypatch):
    model, _ = small_pair('vit_small_patch16_dinov3')
    assert not any('rotation' in key or 'rope' in key for key in model.state_dict())
    monkeypatch.setattr(type(model.rope), 'get_embed', lambda *_, **__: pytest.fail('computed again'))
    with torch.no_grad():
        model(torch.randn(2, 3, 80, 80), keep_rate=0.6)
        model.train()(torch.randn(2, 3, 80, 80), keep_rate=0.6)


def test_tables_follow_the_dtype_and_a_model_that_was_made_on_the_meta_device():
    model, plain = small_pair('vit_small_patch16_dinov3')
    settings, sizes = small('vit_small_patch16_dinov3')
    on_meta = supervit('vit_small_patch16_dinov3', img_sizes=sizes, drop_layers=(0, 1), device='meta', **settings)
    on_meta.to_empty(device='cpu').eval()
    reinit_non_persistent_buffers(on_meta)
    on_meta.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        assert torch.equal(on_meta(images, keep_rate=0.6), model(images, keep_rate=0.6))
        there_and_back = copy.deepcopy(model).to(torch.bfloat16).float()
        assert torch.equal(there_and_back.rotation_table, model.rotation_table)
        precise = copy.deepcopy(model).double()
        assert (precise.rotation_table - model.rotation_table).abs().max() > 1e-10  # not what was rounded before


def test_random_coordinates_are_drawn_in_training_alone_and_for_each_call():
    name = 'vit_small_patch16_dinov3'
    model, plain = small_pair(name, rope_rescale_coords=2.)
    images = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        assert torch.equal(model(images), plain(images))
        model.train()
        assert not torch.equal(model(images), model(images))
        settings, sizes = small(name)
        theirs = timm.create_model(name, img_size=sizes[-1], rope_rescale_coords=2., **settings).train()
        theirs.load_state_dict(plain.state_dict())
        torch.manual_seed(3)
        expected = theirs(images)
        torch.manual_seed(3)
        assert torch.equal(model(images), expected)


@pytest.mark.parametrize('name', ['eva02_tiny_patch14_224', 'vit_base_patch16_sapiens2'])
def test_an_adapter_on_the_projection_acts(name):
    peft = pytest.importorskip('peft')
    model, _ = small_pair(name)
    images = torch.randn(2, 3, 80, 80)
    targets = ['qkv'] if model.blocks[0].attn.qkv is not None else ['q_proj', 'v_proj']
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    for rate in (0.6, 1.0):
        with torch.no_grad():
            assert not torch.allclose(adapted(images, keep_rate=rate), model(images, keep_rate=rate), **ROUNDING)
    sum(output.square().mean() for output in adapted.train()(images, subnets=model.subnets)).backward()
    for key, parameter in adapted.named_parameters():
        assert ('lora' in key) == (parameter.grad is not None), key
    merged = adapted.eval().merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(images, keep_rate=0.6), adapted(images, keep_rate=0.6), **ROUNDING)


@pytest.mark.parametrize('part', ['EvaBlock', 'EvaAttention'])
def test_blocks_that_are_not_known_are_refused(part, monkeypatch):
    import timm.models.eva as eva

    class Later(getattr(eva, part)):
        pass

    monkeypatch.setattr(eva, part, Later)
    settings, sizes = small('eva02_tiny_patch14_224')
    with pytest.raises(ValueError, match=r'Later.*newer timm-supervit'):
        supervit('eva02_tiny_patch14_224', img_sizes=sizes, drop_layers=(0, 1), **settings)


def test_a_part_of_the_attention_that_is_not_known_is_refused(monkeypatch):
    import timm.models.eva as eva

    create = eva.EvaAttention.__init__

    def with_more(self, *args, **kwargs):
        create(self, *args, **kwargs)
        self.temperature = nn.Linear(1, 1)

    monkeypatch.setattr(eva.EvaAttention, '__init__', with_more)
    settings, sizes = small('eva02_tiny_patch14_224')
    with pytest.raises(NotImplementedError, match='temperature'):
        supervit('eva02_tiny_patch14_224', img_sizes=sizes, drop_layers=(0, 1), **settings)


@pytest.mark.parametrize('format, name, settings', [
    ('onnx', THREE[2], {}), ('pt2', THREE[2], {}), ('onnx', THREE[1], {}), ('pt2', THREE[0], {}),
    pytest.param('pt2', THREE[1], {}, marks=pytest.mark.slow),
    pytest.param('onnx', THREE[0], {}, marks=pytest.mark.slow),
    pytest.param('onnx', THREE[2], dict(quantize='int8'), marks=pytest.mark.slow),
    pytest.param('onnx', 'vit_pe_core_base_patch16_224', {}, marks=pytest.mark.slow),
])
def test_one_exported_file_runs_every_subnet(format, name, settings, exported, model_to_export):
    of = dict(name='supervit', backbone=name, patch_size=4)
    model, program = model_to_export(**of), load_program(exported(format, **settings, **of))
    tolerance = dict(atol=0.2, rtol=0) if settings else dict(atol=1e-5, rtol=0)
    for batch_size in (1, 3):
        images = torch.randn(batch_size, 3, 24, 20)
        for size in model.img_sizes:
            for rate in (1.0,) if settings else (0.3, 0.77, 1.0):  # int8 may keep other patches
                with torch.no_grad():
                    expected = model(images, img_size=size, keep_rate=rate)
                torch.testing.assert_close(program(images, size, rate), expected, **tolerance)


@pytest.mark.parametrize('name', THREE)
def test_a_saved_model_comes_back_from_its_folder_alone(name, tmp_path, monkeypatch):
    model, _ = small_pair(name)
    save_for_hf(model, str(tmp_path))
    monkeypatch.setattr(socket.socket, 'connect', lambda *_: pytest.fail('this went to the network'))
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    images = torch.randn(2, 3, 80, 80)
    with torch.no_grad():
        for subnet in model.subnets:
            assert torch.equal(again(images, **subnet._asdict()), model(images, **subnet._asdict()))
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_sizes=model.img_sizes[1:]).eval()
    with torch.no_grad():
        assert torch.equal(other(images, keep_rate=0.6), model(images, keep_rate=0.6))


@pytest.mark.parametrize('name, expected', [
    ('vit_small_patch16_dinov3.lvd1689m', dict(license='other', license_name='dinov3-license')),
    ('vit_base_patch16_sapiens2.fb', dict(license='other', license_name='sapiens2-license')),
    ('eva02_tiny_patch14_224.mim_in22k', dict(license='mit')),
])
def test_folder_and_card_carry_the_licence_of_the_backbone(name, expected, tmp_path):
    settings, sizes = small(name)
    model = supervit(name, img_sizes=sizes, drop_layers=(0, 1), **settings)
    folder = convert(model, tmp_path / 'own')
    card = ModelCard.load(folder / 'README.md').data.to_dict()
    assert {key: card[key] for key in expected} == expected
    assert ('license_link' in card) == ('license_name' in expected)
    config = json.loads((folder / 'config.json').read_text())
    assert config['pretrained_cfg']['license'] == expected.get('license_name', expected['license'])
    given = convert(model, tmp_path / 'given', license='cc-by-nc-4.0')
    assert ModelCard.load(given / 'README.md').data.license == 'cc-by-nc-4.0'
