"""The Ray Serve application: one replica without Ray, and two on a cluster, with all that goes wrong under load."""
import asyncio
import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from timm.data import create_transform
from timm.models import save_for_hf

from timm_supervit import Subnet, SubnetScheduler, load_model
from timm_supervit.images.datasets import preprocessing
from timm_supervit.results.rows import Results, save_results
from timm_supervit.results.rows import subnet_of as subnet_of_row
from timm_supervit.tools.profile import profile

pytest.importorskip('ray.serve', reason='the application needs the extra: pip install "timm-supervit[serve]"')

import starlette.requests
import uvicorn
from ray.serve.schema import ServeDeploySchema
from ray_cluster import Cluster, free_port, serve

from timm_supervit.serving import MAX_BODY, Arguments, SubnetServer, build_app


def encode(image: Image.Image, format: str = 'PNG', **kwargs: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    return file.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
PHOTO = encode(Image.fromarray(PIXELS))
UNREADABLE = {
    'nothing': b'',
    'text': b'no image at all',
    'torn': PHOTO[:-200],
    'a program': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n',
    'huge': encode(Image.new('1', (20_000, 10_000)), 'PNG'),
    'beyond what Pillow opens': encode(Image.new('1', (40_000, 10_000)), 'PNG'),
    'huge once resized': encode(Image.new('L', (200_000, 1))),
}


@pytest.fixture(scope='module')
def measured(model_to_export: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The model, evaluated and profiled; the arguments of the application."""
    folder = tmp_path_factory.mktemp('measured')
    model = model_to_export()
    save_for_hf(model, str(folder / 'model'), safe_serialization=True)
    results = profile(model, batch_sizes=(1, 8), rounds=5)
    save_results(results, folder, 'profile')
    rows: list[Any] = [{**subnet._asdict(), 'top1': 70. + i} for i, subnet in enumerate(model.subnets)]
    save_results(Results(results.model, rows, {}, results.network), folder, 'evaluate')
    return dict(model=f'local-dir:{folder / "model"}', evaluate=str(folder / 'evaluate.json'),
                profile=str(folder / 'profile.json'))


# One replica, without Ray


class Replica:
    """A replica whose network takes exactly as long as it should, in the event loop of a test."""

    def __init__(self, measured: dict[str, str], ms: dict[Subnet, float], slo_ms: float) -> None:
        scheduler = SubnetScheduler(
            {subnet: {1: cost, 4: cost * 2} for subnet, cost in ms.items()},
            {subnet: 70. + cost for subnet, cost in ms.items()}, slo_ms)
        self.server = SubnetServer.func_or_class(measured['model'], scheduler)
        self.batches: list[tuple[Subnet, int]] = []
        run = self.server.run

        def wait(images: Any, subnet: Subnet) -> Any:
            self.batches.append((subnet, len(images)))
            time.sleep(scheduler.latency_ms(subnet, len(images)) / 1e3)
            return run(images, subnet)

        self.server.run = wait

    async def send(self, body: bytes = PHOTO, method: str = 'POST') -> tuple[int, Any, Any]:
        parts = [{'type': 'http.request', 'body': body, 'more_body': False}]

        async def receive() -> Any:
            return parts.pop()

        response = await self.server(starlette.requests.Request({'type': 'http', 'method': method}, receive))
        return response.status_code, json.loads(bytes(response.body)), response.headers

    async def send_all(self, count: int) -> list[tuple[int, Any, Any]]:
        return await asyncio.gather(*(self.send() for _ in range(count)))


SMALL, LARGE = Subnet(8, 0.5), Subnet(24, 1.0)


@pytest.fixture
def replica(measured: dict[str, str]) -> Replica:
    return Replica(measured, {SMALL: 20., LARGE: 60.}, 400.)


def test_an_answer_is_that_of_the_model(replica: Replica, measured: dict[str, str]) -> None:
    status, answer, _ = asyncio.run(replica.send())
    model: Any = load_model(measured['model'])
    transform: Any = create_transform(**preprocessing(model), is_training=False)
    with torch.no_grad():
        expected = model(transform(Image.fromarray(PIXELS))[None], img_size=24, keep_rate=1.0).softmax(dim=1)[0]
    index = int(expected.argmax())
    assert (status, answer['index'], answer['class'], answer['subnet']) == (200, index, f'name {index}', '24:1')
    assert answer['probability'] == pytest.approx(expected[index].item(), abs=1e-5)
    assert 60 <= answer['time_ms'] < 400


def test_it_is_accurate_when_quiet_and_fast_in_a_burst(replica: Replica) -> None:
    async def play() -> Any:
        quiet = [await replica.send() for _ in range(3)]
        return quiet, await replica.send_all(30)

    quiet, burst = asyncio.run(play())
    assert {answer['subnet'] for _, answer, _ in quiet} == {'24:1'}
    served = [answer['subnet'] for status, answer, _ in burst if status == 200]
    assert served.count('8:0.5') >= 20
    assert max(size for _, size in replica.batches) == 4


def test_who_cannot_be_in_time_is_told_at_once(replica: Replica) -> None:
    async def play() -> Any:
        start = time.perf_counter()
        times: list[tuple[int, float]] = []

        async def one() -> None:
            status, _, headers = await replica.send()
            times.append((status, time.perf_counter() - start))
            assert status == 200 or headers['Retry-After'] == '1'

        await asyncio.gather(*(one() for _ in range(300)))
        return times

    times = asyncio.run(play())
    refused, served = ([seconds for status, seconds in times if status == wanted] for wanted in (503, 200))
    assert len(times) == len(refused) + len(served) == 300 and refused and served
    assert np.median(refused) < max(served)  # not when their time is over, but when that is known


@pytest.mark.parametrize('name', UNREADABLE)
def test_what_cannot_be_read_is_refused_with_the_reason(replica: Replica, name: str) -> None:
    status, answer, _ = asyncio.run(replica.send(UNREADABLE[name]))
    assert status == 400
    assert 'object at' not in answer['error'] and len(answer['error']) > 20
    assert not replica.batches


def test_long_bodies_and_other_methods_are_refused(replica: Replica) -> None:
    assert asyncio.run(replica.send(b'x' * (MAX_BODY + 1)))[0] == 413
    status, _, headers = asyncio.run(replica.send(method='GET'))
    assert (status, headers['Allow']) == (405, 'POST')


def test_images_of_any_kind_and_shape_are_read(replica: Replica) -> None:
    async def play() -> Any:
        return [(await replica.send(body))[0] for body in (
            encode(Image.fromarray(PIXELS), 'JPEG'), encode(Image.fromarray(PIXELS), 'WEBP'),
            encode(Image.new('P', (30, 20)), 'GIF'), encode(Image.new('RGBA', (3, 40))), encode(Image.new('L', (1, 1))),
            encode(Image.new('CMYK', (50, 50)), 'TIFF'), encode(Image.new('I;16', (9, 9))))]

    assert set(asyncio.run(play())) == {200}


def test_who_has_left_is_not_run(replica: Replica) -> None:
    async def play() -> None:
        first = asyncio.create_task(replica.send())
        await asyncio.sleep(0.03)
        others = [asyncio.create_task(replica.send()) for _ in range(3)]
        await asyncio.sleep(0.02)
        for task in others[:2]:
            task.cancel()
        assert (await first)[0] == (await others[2])[0] == 200
        await asyncio.gather(*others, return_exceptions=True)

    asyncio.run(play())
    assert sum(size for _, size in replica.batches) == 2


def test_a_batch_that_fails_is_answered_and_the_next_one_runs(replica: Replica) -> None:
    run = replica.server.run

    async def play() -> Any:
        replica.server.run = lambda *args: 1 / 0
        failed = await replica.send()
        replica.server.run = run
        return failed, await replica.send()

    failed, next_one = asyncio.run(play())
    assert failed[0] == 500 and 'division' in failed[1]['error']
    assert next_one[0] == 200
    replica.server.check_health()


def test_a_replica_whose_batches_have_stopped_is_not_healthy(
        replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(slack_ms: Any, rate: float) -> Any:
        raise ArithmeticError('no plan')

    async def check() -> None:
        monkeypatch.setattr(replica.server.scheduler, 'choose', fail)
        waiting = asyncio.create_task(replica.send())
        while not (replica.server.batches and replica.server.batches.done()):
            await asyncio.sleep(0.01)
        monkeypatch.undo()
        with pytest.raises(ArithmeticError):  # nor does the next request start them anew, which would hide it
            await replica.send()
        with pytest.raises(ArithmeticError):
            replica.server.check_health()
        waiting.cancel()

    asyncio.run(check())


def test_a_machine_that_is_slower_than_in_the_profile_is_known(replica: Replica) -> None:
    """Of a network that takes four times as long, the large subnet is late; it is left after a few requests."""
    run = replica.server.run

    def slowly(images: Any, subnet: Subnet) -> Any:
        time.sleep(3 * replica.server.scheduler.latency_ms(subnet, len(images)) / 1e3)
        return run(images, subnet)

    replica.server.scheduler = SubnetScheduler({SMALL: {1: 10.}, LARGE: {1: 60.}}, {SMALL: 70, LARGE: 80}, 150.)
    replica.server.slo = 0.15
    replica.server.run = slowly

    async def play() -> list[Any]:
        return [(await replica.send())[1] for _ in range(25)]

    answers = asyncio.run(play())
    assert answers[0]['time_ms'] > 150
    assert all(answer['subnet'] == '8:0.5' and answer['time_ms'] < 150 for answer in answers[-10:])


def test_what_does_not_fit_is_refused_before_anything_starts(measured: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='give more'):
        build_app(Arguments(**measured, slo_ms=1e-3))
    with pytest.raises(FileNotFoundError):
        build_app(Arguments(**{**measured, 'profile': str(tmp_path / 'none.json')}, slo_ms=100))
    with pytest.raises(ValueError, match='slo'):
        Arguments(**measured, slo_ms=100, slo=100)
    content = json.loads(Path(measured['profile']).read_text())
    content['network']['num_classes'] = 11
    (tmp_path / 'other.json').write_text(json.dumps(content))
    with pytest.raises(ValueError, match='different networks'):
        build_app(Arguments(**{**measured, 'profile': str(tmp_path / 'other.json')}, slo_ms=100))


def test_an_exported_file_is_served(exported: Callable[..., Path], measured: dict[str, str], tmp_path: Path) -> None:
    program = load_model(str(exported('onnx')))
    results = profile(program, batch_sizes=(1, 2), rounds=2)
    args = {**measured, 'model': str(exported('onnx')), 'profile': f'{tmp_path}/{save_results(results, tmp_path, "p")}'}
    build_app(Arguments(**args, slo_ms=1000))
    with pytest.raises(ValueError, match='in common'):  # a profile of the model, which runs in another runtime
        build_app(Arguments(**{**args, 'profile': measured['profile']}, slo_ms=1000))
    scheduler = SubnetScheduler.from_results(args['evaluate'], args['profile'], 1000, {'runtime': 'onnx'})
    server = SubnetServer.func_or_class(args['model'], scheduler)
    answer, = server.run([server.read_image(PHOTO)], subnet_of_row(results.rows[0]))
    assert answer['class'].startswith('name ')


# Two replicas on a cluster


@pytest.fixture(scope='module')
def cluster(measured: dict[str, str]) -> Iterator[Cluster]:
    with serve({'': {**measured, 'slo_ms': 500}}, replicas=2) as running:
        yield running


def post(url: str, body: bytes = PHOTO, timeout: float = 60) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=timeout) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        assert error.code != 503 or error.headers['Retry-After'] == '1'
        with error:
            return error.code, error.read()


def test_a_real_client_gets_answers(cluster: Cluster) -> None:
    status, answer = post(cluster.url)
    assert status == 200 and answer['subnet'] == '24:1' and answer['class'].startswith('name ')
    assert post(cluster.url, b'no image')[0] == 400
    assert post(cluster.url, b'x' * (MAX_BODY + 1))[0] == 413
    with urllib.request.urlopen(f'{cluster.url}/-/healthz') as response:
        assert response.read() == b'success'


def test_a_thousand_requests_at_once_are_all_answered(cluster: Cluster) -> None:
    with concurrent.futures.ThreadPoolExecutor(250) as pool:
        statuses = list(pool.map(lambda _: post(cluster.url)[0], range(1000)))
    assert set(statuses) <= {200, 503} and statuses.count(200) >= 2
    assert post(cluster.url)[0] == 200


def test_clients_that_leave_and_damaged_images_do_no_harm(cluster: Cluster) -> None:
    address = urlsplit(cluster.url)
    for body in (PHOTO, PHOTO[:100]):
        for _ in range(20):
            with socket.create_connection((address.hostname, address.port)) as client:
                client.sendall(b'POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n' % len(PHOTO) + body)
    for body in UNREADABLE.values():
        assert post(cluster.url, body)[0] == 400
    assert post(cluster.url)[0] == 200


def test_ray_has_the_metrics(cluster: Cluster) -> None:
    post(cluster.url)
    end = time.monotonic() + 30
    text = ''
    while time.monotonic() < end and not ('supervit_requests' in text and 'supervit_queue_length' in text):
        time.sleep(0.5)
        with contextlib.suppress(OSError, http.client.HTTPException), urllib.request.urlopen(
                cluster.metrics_url) as response:
            text = response.read().decode()
    assert 'ray_supervit_queue_length' in text
    counts = [line for line in text.splitlines() if line.startswith('ray_supervit_requests_total{')]
    assert any('outcome="in_time"' in line and 'subnet="24:1"' in line for line in counts)


def test_a_replica_that_is_killed_under_load_is_replaced(cluster: Cluster) -> None:
    """Requests that were at the one killed fail with an answer; all others are served, and a new replica comes."""
    stop, statuses = threading.Event(), []

    def send() -> None:
        while not stop.is_set():
            statuses.append(post(cluster.url)[0])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        senders = [pool.submit(send) for _ in range(8)]
        try:
            time.sleep(1)
            killed = cluster.replicas()[0].pid
            os.kill(killed, signal.SIGKILL)
            cluster.wait()
            time.sleep(0.5)
        finally:
            stop.set()
        for sender in senders:
            sender.result()  # every request had an answer
    assert set(statuses) <= {200, 500, 503}
    assert statuses.count(500) <= 8 and set(statuses[-20:]) <= {200, 503}
    assert killed not in {process.pid for process in cluster.replicas()} and len(cluster.replicas()) == 2


@pytest.mark.slow
def test_a_damaged_model_folder_is_told(measured: dict[str, str], tmp_path: Path) -> None:
    """The application does not start, with the reason in the log; the one beside it answers."""
    (tmp_path / 'config.json').write_text((Path(measured['model'][10:]) / 'config.json').read_text())
    (tmp_path / 'model.safetensors').write_bytes(b'damaged')
    good, damaged = ({**measured, 'model': model, 'slo_ms': 500} for model in (
        measured['model'], f'local-dir:{tmp_path}'))
    with serve({'good': good, 'damaged': damaged}) as cluster:
        end = time.monotonic() + 90
        while time.monotonic() < end and b'cannot be created' not in cluster.log.read_bytes():
            time.sleep(0.5)
        assert f'local-dir:{tmp_path} cannot be created' in ' '.join(cluster.log.read_text().split())
        assert post(f'{cluster.url}/good')[0] == 200
        with pytest.raises((OSError, AssertionError)):
            assert post(f'{cluster.url}/damaged', timeout=3)[0] == 200


# What docs/serving.md says

PAGE = (Path(__file__).parents[1] / 'docs' / 'serving.md').read_text(encoding='utf-8')


def test_the_server_in_the_page_answers(
        measured: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'output').mkdir()
    (tmp_path / 'output' / 'digits').symlink_to(measured['model'][10:])
    (tmp_path / 'results').symlink_to(Path(measured['profile']).parent)
    monkeypatch.chdir(tmp_path)
    block, = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)
    defined: dict[str, Any] = {'__name__': 'server'}
    exec(block, defined)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(defined['app'], port=port, log_level='error'))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        url = f'http://127.0.0.1:{port}'
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(lambda _: post(url, timeout=10), range(300)))
        assert {status for status, _ in answers} <= {200, 503}
        assert post(url)[1]['subnet'] == '24:1'
    finally:
        server.should_exit = True
        thread.join(10)
    model: Any = load_model(measured['model'])
    with torch.no_grad():
        expected = model(defined['transform'](Image.fromarray(PIXELS))[None], img_size=24, keep_rate=1.0).argmax()
    assert any(answer == {'index': int(expected), 'subnet': '24:1'} for status, answer in answers if status == 200)


def test_the_config_file_in_the_page_is_one_of_ray() -> None:
    block, = re.findall(r'```yaml\n(.*?)```', PAGE, re.DOTALL)
    application, = ServeDeploySchema.model_validate(yaml.safe_load(block)).applications
    assert application.import_path == f'{build_app.__module__}:{build_app.__name__}'
    assert Arguments(**application.args).slo_ms == 100
    assert [deployment.name for deployment in application.deployments] == [SubnetServer.name]
