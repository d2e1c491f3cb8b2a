import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from reference import ReferenceSuperViT

from timm_supervit.cli import main
from timm_supervit.loading.class_names import shown_class_names
from timm_supervit.results.rows import load_results
from timm_supervit.tools.visualize import draw_kept_tokens, find_kept_tokens, read_image, visualize


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model('supervit_digits', embed_dim=48, depth=3, drop_layers=(1, 2)).eval()


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'photo.png')
    return tmp_path / 'photo.png'


def test_the_patches_that_are_left_are_those_that_the_class_token_attends_to_most(model, photo):
    image = read_image(photo, model)
    found = find_kept_tokens(model, image, model.subnet_macs([(24, 0.5)]))[0]
    reference = ReferenceSuperViT(
        (12, 16, 20, 24), (1, 2), patch_size=4, embed_dim=48, depth=3, num_heads=4, mlp_ratio=2., num_classes=10)
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        tokens = reference.patch_embed['proj'](image[None]).flatten(2).transpose(1, 2)
        tokens = torch.cat([reference.cls_token, tokens], dim=1) + reference.pos_embed_list[3]
        tokens = reference.blocks[0](tokens, 1.)
        _, attention = reference.blocks[1].attn(reference.blocks[1].norm1(tokens))
    scores = attention.mean(dim=1)[0, 0, 1:]
    expected = scores >= scores.sort(descending=True).values[18]  # ceil(0.5 * 37 tokens) patches, places 0 to 18
    assert found.kept[1].flatten().tolist() == expected.tolist()


def test_each_block_drops_from_what_the_one_before_has_left(model, photo):
    for row in find_kept_tokens(model, read_image(photo, model), model.subnet_macs([(24, 0.5), (12, 0.7)])):
        assert list(row.kept) == [1, 2]
        assert not (row.kept[2] & ~row.kept[1]).any()
        assert row.kept[2].sum() < row.kept[1].sum()
        assert row.image.shape == (row.subnet.img_size, row.subnet.img_size, 3)


def test_the_prediction_is_that_of_the_subnet(model, photo):
    image = read_image(photo, model)
    for row in find_kept_tokens(model, image, model.subnet_macs()):
        with torch.no_grad():
            probabilities = model(image[None], **row.subnet._asdict()).softmax(dim=1)[0]
        assert row.prediction == f'class {probabilities.argmax()}'
        assert row.probability == pytest.approx(probabilities.max().item(), abs=1e-6)  # one float32 rounding


def test_the_shown_image_is_the_photo_and_not_its_normalized_values(model, tmp_path):
    Image.new('RGB', (24, 24), (255, 0, 51)).save(tmp_path / 'red.png')
    found = find_kept_tokens(model, read_image(tmp_path / 'red.png', model), model.subnet_macs([(16, 1.0)]))[0]
    # Normalizing and back is exact to a few roundings of float32.
    np.testing.assert_allclose(found.image, np.broadcast_to([1, 0, 0.2], (16, 16, 3)), atol=1e-6)


def test_classes_have_the_models_names_or_imagenets():
    digits = timm.create_model('supervit_digits', embed_dim=48, depth=2, drop_layers=(1,))
    assert shown_class_names(digits)[3] == 'class 3'
    digits.pretrained_cfg['label_names'] = [f'digit {i}' for i in range(10)]
    assert shown_class_names(digits)[3] == 'digit 3'
    imagenet = timm.create_model('supervit_digits', embed_dim=48, depth=2, drop_layers=(1,), num_classes=1000)
    assert shown_class_names(imagenet)[207] == 'golden retriever'


def test_the_picture_shows_less_of_the_image_where_more_is_dropped(model, tmp_path):
    Image.new('RGB', (24, 24)).save(tmp_path / 'black.png')
    found = find_kept_tokens(model, read_image(tmp_path / 'black.png', model), model.subnet_macs([(24, 0.5)]))[0]
    darkness = []
    for kept in (np.zeros((6, 6), bool), found.kept[1], np.ones((6, 6), bool)):
        draw_kept_tokens([found._replace(kept={1: kept})]).savefig(tmp_path / 'picture.png', dpi=200)
        picture = np.asarray(Image.open(tmp_path / 'picture.png').convert('L'))
        darkness.append((picture < 20).sum())
    assert darkness[0] < darkness[1] < darkness[2]
    share = (darkness[1] - darkness[0]) / (darkness[2] - darkness[0])
    assert share == pytest.approx(19 / 36, abs=0.03)  # patches do not end on whole pixels of the picture


def test_the_rows_say_how_many_patches_are_left_after_each_block(model, photo):
    results, pictures = visualize(model, [photo], [(24, 0.5), (12, 1.0)])
    # ceil(0.5 * 37 tokens) patches, then ceil(0.5 * 20); a rate of 1 drops nothing
    assert [(row['image'], row['kept']) for row in results.rows] == [('photo', {1: 19, 2: 10}), ('photo', {})]
    assert len(pictures) == 1


@pytest.mark.parametrize('settings', [dict(num_classes=0), dict(num_classes=1), dict(global_pool='')])
@pytest.mark.parametrize('name', ['supervit_digits', 'supervit_lvvit_tiny'])
def test_a_network_without_classes_is_drawn_and_predicts_nothing(photo, name, settings):
    shape = dict(img_sizes=(12, 24), patch_size=4, embed_dim=48, depth=3, num_heads=4, drop_layers=(1, 2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, **shape, **settings).eval()
    results, (picture,) = visualize(model, [photo], [(24, 0.5)])
    row, = results.rows
    assert (row['prediction'], row['probability'], row['kept']) == (None, None, {1: 19, 2: 10})
    caption, = (text.get_text() for part in picture.subfigs for text in part.texts)
    assert '%' not in caption and 'class' not in caption


@pytest.fixture
def arguments(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    return [
        'visualize', 'supervit_digits', '--checkpoint', str(tmp_path / 'model.pth'), '--device', 'cpu',
        '--output', str(tmp_path / 'out'), '--model-kwargs', 'embed_dim=48', 'depth=3', 'drop_layers=(1,2)']


def test_the_command_draws_the_chosen_subnets_and_lists_their_predictions(arguments, photo, tmp_path):
    subnets = ['--subnet', '24:0.5', '--subnet', '12:1.0']
    result = CliRunner().invoke(main, [*arguments, *subnets, str(photo)])
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / 'out' / 'visualize.png').size[0] == 1600
    rows = load_results(tmp_path / 'out' / 'visualize.json').rows
    assert [(row['img_size'], row['keep_rate']) for row in rows] == [(24, 0.5), (12, 1.0)]
    assert all(row['prediction'] in result.stdout for row in rows)


def test_each_picture_has_four_rows_at_most(arguments, photo, tmp_path):
    copies = [photo.with_name(f'{i}.png') for i in range(9)]
    for copy in copies:
        copy.write_bytes(photo.read_bytes())
    assert CliRunner().invoke(main, [*arguments, *map(str, copies)]).exit_code == 0
    heights = [Image.open(tmp_path / 'out' / f'visualize{page}.png').size[1] for page in ('', '-2', '-3')]
    assert heights[0] == heights[1] == 4 * heights[2]
    assert len(load_results(tmp_path / 'out' / 'visualize.json').rows) == 9


@pytest.mark.parametrize('damage', ['truncated', 'text'])
def test_an_unreadable_image_is_named_and_nothing_is_written(arguments, photo, tmp_path, damage):
    content = photo.read_bytes()
    photo.write_bytes(content[:len(content) // 2] if damage == 'truncated' else b'hello')
    result = CliRunner().invoke(main, [*arguments, str(photo)])
    assert result.exit_code == 1
    assert 'photo.png cannot be read as an image' in result.stderr
    assert not any((tmp_path / 'out').iterdir())


def test_a_missing_image_is_a_usage_error(arguments, tmp_path):
    assert CliRunner().invoke(main, [*arguments, str(tmp_path / 'none.png')]).exit_code == 2
