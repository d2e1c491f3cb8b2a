import base64
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from timm_supervit.cli import main
from timm_supervit.tools import convert
from timm_supervit.tools.checkpoints import CheckpointError
from timm_supervit.tools.convert import convert_checkpoint
from timm_supervit.tools.results import Results

SETTINGS = dict(embed_dim=48, depth=3, drop_layers=(1,), keep_rates=(0.4, 1.0), num_classes=7)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model('supervit_digits', **SETTINGS).eval()


def other_model():
    torch.manual_seed(1)
    return timm.create_model('supervit_digits', **SETTINGS).eval()


def save(state, path, **kwargs):
    torch.save(state, path, **kwargs)
    return path


@pytest.mark.parametrize(('keys', 'use_ema'), [
    (('model', 'model_ema'), False),
    (('model_ema', 'model'), True),
    (('state_dict', 'state_dict_ema'), False),
    (('state_dict_ema', 'state_dict'), True),
])
def test_a_training_checkpoint_becomes_a_folder_that_timm_creates_the_same_model_from(model, tmp_path, keys, use_ema):
    wanted, unwanted = keys
    states = {wanted: model.state_dict(), unwanted: other_model().state_dict(), 'epoch': 3}
    path = save(states, tmp_path / 'checkpoint.pth')
    convert_checkpoint(path, other_model(), tmp_path / 'hub', use_ema=use_ema)
    loaded = timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True).eval()
    assert loaded.subnets == model.subnets
    images = torch.randn(2, 3, 24, 24)
    for img_size, keep_rate in model.subnets:
        subnet = dict(img_size=img_size, keep_rate=keep_rate)
        assert torch.equal(loaded(images, **subnet), model(images, **subnet))  # the weights are copied, not computed


@pytest.mark.parametrize('name', ['weights.safetensors', 'weights.pth'])
def test_a_bare_state_dict_is_converted_too(model, tmp_path, name):
    (save_file if name.endswith('safetensors') else torch.save)(model.state_dict(), tmp_path / name)
    convert_checkpoint(tmp_path / name, other_model(), tmp_path / 'hub')
    converted = load_file(tmp_path / 'hub' / 'model.safetensors')
    assert {path.name for path in (tmp_path / 'hub').iterdir()} == {'README.md', 'config.json', 'model.safetensors'}
    assert all(torch.equal(converted[key], value) for key, value in model.state_dict().items())


@pytest.fixture
def older(model, tmp_path):
    convert_checkpoint(save(model.state_dict(), tmp_path / 'older.pth'), other_model(), tmp_path / 'hub')
    return tmp_path / 'hub'


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_weights_of_another_model_are_refused_and_the_older_folder_stays(model, older, tmp_path):
    before = contents(older)
    path = save(timm.create_model('supervit_digits', depth=4, drop_layers=(1,)).state_dict(), tmp_path / 'deep.pth')
    with pytest.raises(CheckpointError, match=r'deep\.pth: These weights do not fit'):
        convert_checkpoint(path, model, older)
    assert contents(older) == before


def test_a_failure_while_writing_leaves_the_older_folder_as_it_was(model, older, tmp_path, monkeypatch):
    before = contents(older)

    def fill_disk(self, path):
        path.write_text('half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(convert.ModelCard, 'save', fill_disk)
    with pytest.raises(OSError, match='No space left'):
        convert_checkpoint(save(other_model().state_dict(), tmp_path / 'new.pth'), model, older)
    assert contents(older) == before
    assert {path.name for path in tmp_path.iterdir()} == {'hub', 'older.pth', 'new.pth'}


def test_an_older_conversion_is_replaced(model, older, tmp_path):
    new = other_model().state_dict()
    convert_checkpoint(save(new, tmp_path / 'new.pth'), model, older)
    assert torch.equal(load_file(older / 'model.safetensors')['cls_token'], new['cls_token'])


def test_a_folder_with_other_files_is_not_replaced(model, tmp_path):
    path = save(model.state_dict(), tmp_path / 'checkpoint.pth')
    with pytest.raises(FileExistsError, match=r'checkpoint\.pth, which would be lost'):
        convert_checkpoint(path, model, tmp_path)
    assert path.is_file()


def results_of(network, **changes):
    rows = [dict(img_size=s.img_size, keep_rate=s.keep_rate, macs=network.macs(s), top1=50. + i)
            for i, s in enumerate(network.subnets)]
    return Results(**{'model': 'supervit_digits', 'rows': rows, **changes})


def test_the_model_card_lists_the_operating_points(model):
    card = convert.model_card(model, 'hf-hub:someone/net', results_of(model))
    lines = [line.split() for line in card.text.splitlines() if line.startswith('|')]
    assert len(lines) == 2 + len(model.subnets)
    for line, (img_size, keep_rate), top1 in zip(lines[2:], model.subnets, range(50, 70), strict=False):
        assert line[1:4:2] == [str(img_size), f'{keep_rate:.2f}']
        assert line[7] == f'{top1:.2f}'
    assert card.data.library_name == 'timm'
    assert "timm.create_model('hf-hub:someone/net', pretrained=True)" in card.text


@pytest.mark.parametrize(('change', 'message'), [
    ({'model': 'supervit_small'}, 'these results are of supervit_small'),
    ({'rows': [{'img_size': 12, 'keep_rate': 0.9, 'top1': 1.}]}, 'with other settings than this supervit_digits'),
    ({'info': {'partial': True}}, 'interrupted'),
])
def test_results_that_are_not_the_models_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        convert.model_card(model, 'local-dir:net', results_of(model, **change))


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small files needs."""

    committed: dict[str, bytes] = {}

    def do_POST(self):
        address = f'http://{self.headers["host"]}/someone/net'
        body = self.rfile.read(int(self.headers.get('content-length') or 0))
        answer = {}
        if self.path == '/api/repos/create':
            answer = {'url': address, 'id': '1'}
        elif '/preupload/' in self.path:
            answer = {'files': [
                {'path': file['path'], 'uploadMode': 'regular', 'shouldIgnore': False}
                for file in json.loads(body)['files']]}
        elif '/commit/' in self.path:
            for line in map(json.loads, body.splitlines()):
                if line['key'] == 'file':
                    self.committed[line['value']['path']] = base64.b64decode(line['value']['content'])
            answer = {'commitUrl': f'{address}/commit/1', 'commitOid': '1', 'hookOutput': ''}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header('content-type', 'application/json')
        self.send_header('content-length', str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *args):
        pass


def run_push(folder, address, home):
    code = 'import sys; from timm_supervit.tools.convert import push_folder; print(push_folder(*sys.argv[1:]))'
    environment = {**os.environ, 'HF_ENDPOINT': address, 'HF_TOKEN': 'token', 'HF_HOME': str(home)}
    return subprocess.run(
        [sys.executable, '-c', code, folder, 'someone/net'], env=environment, capture_output=True, text=True)


def test_pushing_uploads_the_folder_as_it_is(older, tmp_path):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}'
    try:
        result = run_push(older, address, tmp_path / 'home')
    finally:
        server.shutdown()
        server.server_close()
    assert result.stdout.strip() == f'{address}/someone/net/commit/1', result.stderr
    assert Hub.committed == contents(older)


def test_a_hub_out_of_reach_is_reported_with_what_to_do(older, tmp_path):
    result = run_push(older, 'http://127.0.0.1:9', tmp_path / 'home')  # port 9, discard: nothing listens
    assert result.returncode == 1
    assert 'hub is complete but was not uploaded to someone/net' in result.stderr.splitlines()[-1]


def test_the_command_converts_and_tells_usage_from_failure(model, tmp_path):
    path = save({'model': model.state_dict()}, tmp_path / 'official.pth')
    kwargs = ['embed_dim=48', 'depth=3', 'drop_layers=(1,)', 'keep_rates=(0.4,1.0)']
    arguments = ['--model', 'supervit_digits', '--output', str(tmp_path / 'hub'), '--model-kwargs', *kwargs]
    result = CliRunner().invoke(main, ['convert', str(path), '--num-classes', '7', *arguments])
    assert result.exit_code == 0, result.output
    assert (tmp_path / 'hub' / 'model.safetensors').is_file()
    failed = CliRunner().invoke(main, ['convert', str(path), *arguments])  # ten classes, where the file has seven
    assert failed.exit_code == 1
    assert 'head.weight' in failed.stderr
    assert CliRunner().invoke(main, ['convert', str(tmp_path / 'none.pth'), *arguments]).exit_code == 2
