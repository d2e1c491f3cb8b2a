"""SuperViTs start from the weights of timm's vision transformers in any form that timm reads, and come back alone."""
import json
import re
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hub_server import hub_environment, serve
from timm.models import register_model, save_for_hf
from timm.models.vision_transformer import Block, ResPostBlock, _create_vision_transformer
from timm.task import ClassificationTask, TokenDistillationTask
from torch import Tensor, nn

EXACT = dict(atol=1e-6, rtol=1e-6)
SMALL: dict[str, Any] = dict(embed_dim=32, num_heads=2, depth=2)


def supervit(backbone: str, **kwargs: Any) -> Any:
    return timm.create_model('supervit', backbone=backbone, **kwargs)


def randomize(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def save_as_timm_does(model, path):
    torch.save(model.state_dict(), path)


def save_as_deit3(model, path):
    state_dict = {name.replace('ls1.gamma', 'gamma_1').replace('ls2.gamma', 'gamma_2'): value
                  for name, value in model.state_dict().items()}
    assert any('gamma_1' in name for name in state_dict)
    torch.save({'model': state_dict}, path)


def save_as_radio(model, path):
    """Write what NVIDIA's files hold: one large square grid of positions, which no class token is part of."""
    own = model.state_dict()
    raw = {f'radio_model.model.{name}': value for name, value in own.items() if name.startswith('blocks.')}
    raw |= {
        'radio_model.model.patch_generator.embedder.weight': own['patch_embed.proj.weight'].flatten(1),
        'radio_model.model.patch_generator.pos_embed': torch.randn(1, 20 * 20, model.embed_dim),
        'radio_model.model.patch_generator.cls_token.token': torch.cat([own['cls_token'][0], own['reg_token'][0]]),
    }
    torch.save(raw, path)


def save_as_dinov3(model, path):
    """Write what Meta's files hold: biases of the projection together, its keys' zero, and scales by other names."""
    raw = {re.sub('gamma_([12])', r'ls\1.gamma', name).replace('reg_token', 'storage_tokens'): value
           for name, value in model.state_dict().items() if not re.search('[qv]_bias', name)}
    for i, block in enumerate(model.blocks):
        q, v = block.attn.q_bias, block.attn.v_bias
        raw[f'blocks.{i}.attn.qkv.bias'] = torch.cat([q, torch.zeros_like(q), v]).detach()
    torch.save(raw, path)


def save_as_jax(model, path):
    dim, heads = model.embed_dim, model.blocks[0].attn.num_heads
    raw = {
        'embedding/kernel': model.patch_embed.proj.weight.permute(2, 3, 1, 0), 'cls': model.cls_token,
        'embedding/bias': model.patch_embed.proj.bias, 'Transformer/posembed_input/pos_embedding': model.pos_embed,
        'Transformer/encoder_norm/scale': model.norm.weight, 'Transformer/encoder_norm/bias': model.norm.bias,
        'head/kernel': model.head.weight.T, 'head/bias': model.head.bias,
    }
    for i, block in enumerate(model.blocks):
        prefix = f'Transformer/encoderblock_{i}/'
        for name, norm in (('LayerNorm_0', block.norm1), ('LayerNorm_2', block.norm2)):
            raw |= {f'{prefix}{name}/scale': norm.weight, f'{prefix}{name}/bias': norm.bias}
        attention = f'{prefix}MultiHeadDotProductAttention_1/'
        weights, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        for name, weight, bias in zip(('query', 'key', 'value'), weights, biases, strict=True):
            raw[f'{attention}{name}/kernel'] = weight.T.reshape(dim, heads, -1)
            raw[f'{attention}{name}/bias'] = bias.reshape(heads, -1)
        raw[f'{attention}out/kernel'] = block.attn.proj.weight.reshape(dim, heads, -1).permute(1, 2, 0)
        raw[f'{attention}out/bias'] = block.attn.proj.bias
        for r, layer in enumerate((block.mlp.fc1, block.mlp.fc2)):
            raw |= {f'{prefix}MlpBlock_3/Dense_{r}/kernel': layer.weight.T,
                    f'{prefix}MlpBlock_3/Dense_{r}/bias': layer.bias}
    np.savez(path, **{name: value.detach().numpy() for name, value in raw.items()})


FORMS: dict[str, Any] = {
    'vit_base_patch16_224': save_as_timm_does,
    'deit_tiny_distilled_patch16_224': save_as_timm_does,
    'deit3_small_patch16_224': save_as_deit3,
    'vit_small_patch14_reg4_dinov2': save_as_timm_does,
    'flexivit_small': save_as_timm_does,
    'vit_base_patch16_radio_v3': save_as_radio,
    'vit_large_patch16_radio_v3': save_as_radio,
    'vit_tiny_patch16_224': save_as_jax,
    'vit_tiny_r_s16_p8_224': save_as_timm_does,
    'eva02_base_patch16_clip_224': save_as_timm_does,
    'vit_small_patch16_rope_mixed_ape_224': save_as_timm_does,
    'vit_small_patch16_dinov3_qkvb': save_as_dinov3,
}


@pytest.mark.parametrize('backbone', FORMS)
def test_each_size_is_the_backbone_created_for_that_size_with_the_same_file(backbone, tmp_path):
    path = tmp_path / ('weights.npz' if FORMS[backbone] is save_as_jax else 'weights.pth')
    patch = timm.create_model(backbone, depth=1, device='meta').feature_info[0]['reduction']
    FORMS[backbone](randomize(timm.create_model(backbone, img_size=7 * patch, **SMALL)), path)
    source = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), custom_load=path.suffix == '.npz'))
    sizes = (2 * patch, (2 * patch, 3 * patch), 7 * patch, 9 * patch)
    model = supervit(backbone, img_sizes=sizes, **SMALL, **source).eval()
    for size in sizes:
        plain = timm.create_model(backbone, img_size=size, **SMALL, **source).eval()
        images = torch.randn(1, 3, *plain.patch_embed.img_size)
        with torch.no_grad():
            torch.testing.assert_close(model(images, img_size=size), plain(images), **EXACT)


@pytest.mark.parametrize('route', ['checkpoint_path', 'load_state_dict'])
def test_a_checkpoint_of_a_backbone_is_resampled_as_the_backbone_resamples_it(route, tmp_path):
    plain = randomize(timm.create_model('flexivit_small', **SMALL))
    path = tmp_path / 'plain.pth'
    torch.save(plain.state_dict(), path)
    sizes = (96, 144)
    if route == 'checkpoint_path':
        model = supervit('flexivit_small', img_sizes=sizes, checkpoint_path=path, **SMALL)
    else:
        model = supervit('flexivit_small', img_sizes=sizes, **SMALL)
        model.load_state_dict(plain.state_dict())
    source = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    expected = supervit('flexivit_small', img_sizes=sizes, **SMALL, **source)
    for actual, wanted in zip(model.pos_embed_list, expected.pos_embed_list, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError('this went to the network')

    monkeypatch.setattr(socket.socket, 'connect', refuse)


@pytest.mark.parametrize('backbone', [
    'vit_small_patch14_reg4_dinov2.lvd142m', 'deit_tiny_distilled_patch16_224', 'flexivit_small',
    'vit_small_resnet26d_224', 'vit_base_patch16_clip_quickgelu_224.openai',
])
def test_a_saved_supervit_comes_back_from_its_folder_alone(backbone, tmp_path, offline):
    model = randomize(supervit(backbone, num_classes=5, keep_rates=(0.4, 1.0), **SMALL))
    save_for_hf(model, str(tmp_path / 'saved'))
    config = json.loads((tmp_path / 'saved' / 'config.json').read_text())
    assert config['architecture'] == 'supervit'
    assert config['model_args']['backbone'] == backbone
    again = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    assert again.subnets == model.subnets
    assert again.drop_layers == model.drop_layers
    assert again.pos_embed_resampling == model.pos_embed_resampling
    for key in ('mean', 'std', 'interpolation', 'crop_pct', 'input_size', 'classifier'):
        assert json.dumps(again.pretrained_cfg[key]) == json.dumps(model.pretrained_cfg[key])
    images = torch.randn(1, 3, 64, 64)
    for subnet in (model.subnets[0], model.subnets[-1]):
        with torch.no_grad():
            assert torch.equal(again(images, **subnet._asdict()), model(images, **subnet._asdict()))
    other = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True, img_sizes=model.img_sizes[1:])
    assert torch.equal(other.pos_embed_list[0], again.pos_embed_list[1])


def test_what_a_script_resolves_beforehand_leaves_the_backbones_configuration_as_it_is():
    backbone = 'vit_base_patch16_clip_quickgelu_224.openai'
    resolved = timm.models.resolve_model_input_args('supervit', backbone=backbone, depth=2)
    assert timm.create_model(**resolved).pretrained_cfg['mean'] == supervit(backbone, depth=2).pretrained_cfg['mean']


REFUSED: dict[str, Any] = {
    'no class token': ('vit_base_patch16_siglip_224', {}, 'no class token'),
    'no class token of its own': ('aimv2_large_patch14_224', {}, 'no class token'),
    'average pooling alone': ('vit_base_patch16_gap_224', {}, 'no class token'),
    'relative positions': ('vit_relpos_base_patch16_cls_224', {}, 'positions are relative'),
    'relative positions of each pair': ('beit_base_patch16_224', {}, r'positions are relative \(Beit\)'),
    'rotary positions without a class token': ('vit_betwixt_patch16_rope_reg4_gap_256', {}, 'no class token'),
    'tokens of any grid': ('naflexvit_base_patch16_gap', {}, r'no VisionTransformer \(NaFlexVit\)'),
    'no vision transformer': ('resnet18', {}, r'no VisionTransformer \(ResNet\)'),
    'parallel blocks': ('vit_small_patch16_18x2_224', {}, 'blocks are ParallelThingsBlock'),
    'parallel branches': ('vit_base_patch16_xp_224', {}, 'blocks are ParallelScalingBlock'),
    'differential attention': ('vit_dlittle_patch16_reg1_gap_256', {}, 'attention is differential'),
    'other blocks': ('vit_tiny_patch16_224', dict(block_fn=ResPostBlock), 'blocks are ResPostBlock'),
    'other attention': ('vit_tiny_patch16_224', dict(attn_layer=nn.Identity), 'attention is Identity'),
    'an unknown name': ('vit_smal_patch16_224', {}, 'no name of a model.*did you mean vit_small_patch16_224'),
    'a name that timm has given up': ('vit_base_resnet50_384', {}, 'no name of a model'),
    'a folder': (
        'local-dir:some/vit', {}, r"no name of a model.*cfg_overlay=\{'file': 'some/vit/model.safetensors'\}"),
    'a repository': (
        'hf-hub:me/vit_tiny_patch16_224.mine', {},
        r"backbone='vit_tiny_patch16_224', pretrained=True, .*\{'hf_hub_id': 'me/vit_tiny_patch16_224.mine'\}"),
    'a repository without its prefix': ('me/flowers', {}, r"backbone=.*\{'hf_hub_id': 'me/flowers'\}"),
    'an unknown tag': ('deit_small_patch16_224.nope', {}, "no tag 'nope'; use fb_in1k"),
    'a SuperViT': ('supervit_lvvit_tiny', {}, 'a SuperViT itself'),
    'no text': (7, {}, 'no name of a model'),
    'a size of half patches': ('vit_small_patch14_dinov2', dict(img_sizes=(140, 224, (280, 301))), '301 is not div'),
    'a size of half a stem': ('vit_tiny_r_s16_p8_224', dict(img_sizes=(80,)), '80 is not divisible by .* 32; use 64'),
    'register tokens on a distilled network': ('deit_tiny_distilled_patch16_224', dict(reg_tokens=2), 'reg_tokens 2'),
}


@pytest.mark.parametrize('what', REFUSED)
def test_what_cannot_be_a_supervit_is_refused_with_the_reason(what, offline):
    backbone, settings, reason = REFUSED[what]
    with pytest.raises(ValueError, match=reason):
        supervit(backbone, pretrained=what != 'a size of half a stem', depth=1, **settings)


FROM_THE_HUB = '''
import timm, torch
kwargs = dict(num_classes=4, embed_dim=48, num_heads=3, depth=4)
try:
    timm.create_model('supervit', backbone='hf-hub:me/vit_tiny_patch16_224', pretrained=True, **kwargs)
except ValueError as error:
    _, _, advice = str(error).partition('as in ')
settings = eval(f'dict({advice.partition(";")[0]})')
settings['pretrained_cfg_overlay']['num_classes'] = 4
model = timm.create_model('supervit', **settings, **kwargs)
torch.save(model.eval()(torch.ones(1, 3, 224, 224)), 'logits.pt')
'''


def test_what_the_error_advises_for_a_repository_reads_its_weights(tmp_path):
    vit = timm.create_model('vit_tiny_patch16_224', num_classes=4, embed_dim=48, num_heads=3, depth=4).eval()
    save_for_hf(vit, str(tmp_path / 'hub/me/vit_tiny_patch16_224'), safe_serialization=True)
    with serve(tmp_path / 'hub') as url:
        result = subprocess.run(
            [sys.executable, '-c', FROM_THE_HUB], cwd=tmp_path, env=hub_environment(url, tmp_path / 'cache'),
            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    with torch.no_grad():
        torch.testing.assert_close(
            torch.load(tmp_path / 'logits.pt'), vit(torch.ones(1, 3, 224, 224)), atol=1e-5, rtol=0)


@pytest.mark.parametrize('name', ['supervit_small', 'supervit_lvvit_small'])
def test_a_network_with_a_backbone_of_its_own_takes_no_other(name):
    with pytest.raises(ValueError, match=rf'{name} has a backbone of its own.*"supervit", backbone='):
        timm.create_model(name, backbone='vit_tiny_patch16_224')


def test_a_backbone_without_weights_says_so(offline):
    with pytest.raises(RuntimeError, match=r'vit_base_r26_s32_224.* has no pretrained weights'):
        supervit('vit_base_r26_s32_224', pretrained=True)


@pytest.fixture
def distilled() -> Any:
    return supervit('deit_tiny_distilled_patch16_224', img_sizes=(32, 64), num_classes=3, **SMALL).train()


def test_a_distilled_network_super_trains_by_the_mean_of_its_heads(distilled):
    images = torch.randn(2, 3, 64, 64)
    tokens = distilled.forward_features(images)
    expected = (distilled.head(tokens[:, 0]) + distilled.head_dist(tokens[:, 1])) / 2
    torch.testing.assert_close(distilled(images), expected)
    task = ClassificationTask(distilled, verbose=False)
    task(images, torch.tensor([0, 1]))['loss'].backward()
    assert all(parameter.grad is not None for parameter in distilled.parameters())


def test_timms_task_for_distillation_tokens_trains_both_heads_of_the_active_subnet(distilled):
    distilled.train_subnets = 'active'
    teacher = timm.create_model('vit_tiny_patch16_224', img_size=64, num_classes=3, **SMALL)
    task = TokenDistillationTask(distilled, teacher, verbose=False)
    task(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))['loss'].backward()
    assert all(head.weight.grad.any() for head in (distilled.head, distilled.head_dist))


def test_a_plain_block_that_keeps_all_tokens_runs_in_all_calls():
    model = supervit('vit_tiny_patch16_224', img_sizes=(32, 64), drop_layers=[1], **SMALL).eval()
    model.blocks[0] = Block(32, 2, qkv_bias=True).eval()
    images: Tensor = torch.randn(1, 3, 64, 64)
    several = model.forward_subnets(images, model.subnets)
    for subnet, logits in zip(model.subnets, several, strict=True):
        torch.testing.assert_close(logits, model(images, **subnet._asdict()), atol=1e-5, rtol=1e-4)


@register_model
def vit_of_a_user(pretrained: bool = False, **kwargs: Any) -> Any:
    return _create_vision_transformer('vit_of_a_user', pretrained, patch_size=8, **{**SMALL, **kwargs})


def test_a_vit_that_somebody_registered_is_a_backbone_too():
    model = supervit('vit_of_a_user', img_sizes=(32, 64)).eval()
    plain = randomize(timm.create_model('vit_of_a_user', img_size=64))
    model.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain(images), **EXACT)


def test_timm_itself_is_left_as_it_is():
    supervit('vit_tiny_patch16_224', **SMALL)
    model = timm.create_model('vit_tiny_patch16_224', **SMALL)
    assert type(model) is timm.models.VisionTransformer
    assert model.pretrained_cfg['architecture'] == 'vit_tiny_patch16_224'
