"""A Ray Serve application that classifies images in time, with the most accurate subnet that the load allows.

    serve run timm_supervit.serving:build_app model=local-dir:output/digits \
        evaluate=results/evaluate.json profile=results/profile.json slo_ms=100
    curl --data-binary @photo.jpg http://127.0.0.1:8000

Replicas, autoscaling, routing, GPUs and the health check are Ray's. A replica has one model and one queue; before each
batch it asks ``SubnetScheduler`` what to run. Needs the extra ``serve``.
"""
import asyncio
import bisect
import contextlib
import io
import logging
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import metrics
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from timm.data import create_transform
from torch import Tensor

from .cascade import probabilities
from .images.datasets import img_mode, preprocessing
from .images.passes import check_finite, inference
from .loading.class_names import shown_class_names
from .loading.load import load_model
from .programs.program import is_program
from .results.rows import load_results
from .scheduler import SubnetScheduler
from .subnets import Subnet, size_2d

MAX_BODY = 20 * 2 ** 20  # bytes
MAX_PIXELS = 50_000_000  # of an image, as it comes and as it is resized
FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG', 'TIFF', 'WEBP')  # Pillow has others that start programs

_logger = logging.getLogger('ray.serve')


class Arguments(BaseModel):
    """What ``build_app`` takes, as KEY=VALUE of ``serve run`` or under ``args`` of a config file.

    Attributes:
        model: What to serve, as for ``load_model``: a name, ``local-dir:DIR``, a checkpoint or an exported file.
        evaluate: The file of ``supervit evaluate``.
        profile: The file of ``supervit profile``, measured where it is to run, with several ``--batch-size``.
        slo_ms: Time from the arrival of a request in which it should be answered, in ms.
    """

    model_config = ConfigDict(extra='forbid')

    model: str
    evaluate: str
    profile: str
    slo_ms: float


def build_app(args: Arguments) -> serve.Application:
    """Return the application; a replica asks for the threads, or the GPU, that the profile was measured on.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If the files do not fit each other or the model; see ``SubnetScheduler.from_results``.
    """
    kind, _, folder = args.model.partition(':')
    model = f'{kind}:{os.path.abspath(folder)}' if kind == 'local-dir' else args.model
    if os.path.isfile(model):
        model = os.path.abspath(model)
    setting = {'runtime': os.path.splitext(model)[1][1:].lower()} if is_program(model) else {
        'runtime': 'eager', 'precision': 'float32'}
    scheduler = SubnetScheduler.from_results(args.evaluate, args.profile, args.slo_ms, setting)
    info = load_results(args.profile).info
    on_gpu = str(info.get('device')).startswith('cuda')
    resources = {'num_gpus': 1} if on_gpu else {'num_cpus': info.get('threads', 1)}
    deployment: Any = SubnetServer  # as Ray's decorator makes it
    return deployment.options(ray_actor_options=resources).bind(model, scheduler, 'cuda' if on_gpu else 'cpu')


class _Waiting(NamedTuple):
    deadline: float
    image: Tensor
    answer: asyncio.Future


# A replica keeps its own queue, so Ray hands over all requests at once.
@serve.deployment(max_ongoing_requests=100_000)
class SubnetServer:
    """A replica: its queue of images, and the batches that it runs, one after the other."""

    def __init__(self, model: str, scheduler: SubnetScheduler, device: str = 'cpu') -> None:
        """Load a model onto a device, and run each subnet once, since a first call takes longer."""
        self.scheduler = scheduler
        self.slo = scheduler.slo_ms / 1e3
        self.model = load_model(model, device=device)
        self.names = shown_class_names(self.model)
        config = preprocessing(self.model)
        self.transform: Any = create_transform(**config, is_training=False)
        self.mode = img_mode(self.model)
        self.side = max(size_2d(config['input_size'][1:])) / config['crop_pct']
        self.model.subnet_macs(scheduler.subnets)  # refuses what the model does not run
        for subnet in scheduler.subnets:
            self.run([torch.zeros(config['input_size'])], subnet)
        self.queue: list[_Waiting] = []
        self.num_reading = 0
        self.busy_until = 0.
        self.slowness = 1.  # how many times as long as in the profile batches take of late, 1 or more
        self.rate, self.last_arrival = 0., 0.
        self.batches: asyncio.Task | None = None
        self.readers = ThreadPoolExecutor(2, 'reader')  # as many images in full size are in memory at once
        self.runner = ThreadPoolExecutor(1, 'runner')
        tags: Any = ('outcome', 'subnet')
        self.requests = metrics.Counter(
            'supervit_requests', 'Requests by how they ended and the subnet that answered.', tags)
        self.queue_length = metrics.Gauge('supervit_queue_length', 'Images that wait for a batch.')

    async def __call__(self, request: Request) -> Response:
        """Answer the bytes of an image, sent by POST, with its class."""
        outcome, subnet = 'failed', ''
        try:
            answer = await self.answer(request, time.perf_counter())
            outcome, subnet = 'in_time' if answer['time_ms'] <= self.scheduler.slo_ms else 'late', answer['subnet']
            return JSONResponse(answer)
        except HTTPException as error:
            outcome = {503: 'refused', 500: 'failed'}.get(error.status_code, 'unreadable')
            return JSONResponse({'error': error.detail}, error.status_code, error.headers)
        except (asyncio.CancelledError, ClientDisconnect):
            outcome = 'left'
            raise
        finally:
            self.requests.inc(tags={'outcome': outcome, 'subnet': subnet})

    def check_health(self) -> None:
        """Let Ray replace the replica if its batches have stopped."""
        if self.batches and self.batches.done():
            self.batches.result()

    async def answer(self, request: Request, arrival: float) -> dict[str, Any]:
        """Return the answer to a request, or raise an ``HTTPException``."""
        if request.method != 'POST':
            raise HTTPException(405, 'send the bytes of an image by POST', {'Allow': 'POST'})
        # Decays with the time to answer in, so that one burst is seen as a whole.
        self.rate = 1 / self.slo + self.rate * math.exp((self.last_arrival - arrival) / self.slo)
        self.last_arrival = arrival
        if len(self.queue) + self.num_reading >= self.scheduler.most_waiting:
            raise self.refusal()
        self.num_reading += 1
        try:
            body = await _read_body(request)
            image = await asyncio.get_running_loop().run_in_executor(self.readers, self.read_image, body)
        finally:
            self.num_reading -= 1
        waiting = _Waiting(arrival + self.slo, image, asyncio.get_running_loop().create_future())
        bisect.insort(self.queue, waiting, key=lambda waiting: waiting.deadline)
        self.refuse_hopeless()
        if self.batches is None or self.batches.done():
            self.check_health()
            self.batches = asyncio.create_task(self.run_batches())
        answer = await waiting.answer
        return {**answer, 'time_ms': round(1e3 * (time.perf_counter() - arrival), 3)}

    def read_image(self, body: bytes) -> Tensor:
        """Return the normalized image [C, H, W] of the bytes of a file."""
        try:
            with Image.open(io.BytesIO(body), formats=FORMATS) as image:
                # A long, narrow image grows when its shorter side is resized to that of the network.
                pixels = max(image.size) * max(min(image.size), self.side ** 2 / min(image.size))
                if pixels > MAX_PIXELS:
                    raise ValueError(f'{image.width} x {image.height} pixels are too many; send {MAX_PIXELS:,} at most')
                return self.transform(image.convert(self.mode))
        except UnidentifiedImageError as error:
            raise HTTPException(400, f'the bytes are no image; send one of {", ".join(FORMATS)}') from error
        except Exception as error:  # Pillow raises more than OSError: SyntaxError, DecompressionBombError, ...
            raise HTTPException(400, f'the image cannot be read: {" ".join(str(error).split())}') from error

    async def run_batches(self) -> None:
        """Run batches until nobody waits."""
        while self.refuse_hopeless():
            now = time.perf_counter()
            rate = self.rate * math.exp((self.last_arrival - now) / self.slo)
            subnet, size = self.scheduler.choose(self.slack_ms(now), self.slowness * rate)
            batch = self.queue[:size]
            del self.queue[:size]
            expected = self.scheduler.latency_ms(subnet, size) / 1e3
            self.busy_until = now + self.slowness * expected
            try:
                answers = await asyncio.get_running_loop().run_in_executor(
                    self.runner, self.run, [waiting.image for waiting in batch], subnet)
            except Exception as error:
                _logger.exception('a batch of %d images failed on %s', size, subnet)
                for waiting in batch:
                    _settle(waiting, HTTPException(500, f'the network failed: {error}'))
            else:
                for waiting, answer in zip(batch, answers, strict=True):
                    _settle(waiting, answer)
            self.busy_until = 0.
            slowness = self.slowness + 0.1 * ((time.perf_counter() - now) / expected - self.slowness)
            # Never so slow that nobody would be tried any more.
            self.slowness = min(max(1., slowness), self.scheduler.slo_ms / self.scheduler.shortest_ms)

    def slack_ms(self, start: float) -> list[float]:
        """Return the time left to each who waits from then on, in ms of a machine as fast as in the profile."""
        return [1e3 * (waiting.deadline - start) / self.slowness for waiting in self.queue]

    def refuse_hopeless(self) -> bool:
        """Refuse who cannot be in time any more, and forget who has left; return whether anyone waits."""
        self.queue = [waiting for waiting in self.queue if not waiting.answer.done()]
        start = max(time.perf_counter(), self.busy_until)
        hopeless = self.scheduler.count_hopeless(self.slack_ms(start))
        for waiting in self.queue[:hopeless]:
            _settle(waiting, self.refusal())
        del self.queue[:hopeless]
        self.queue_length.set(len(self.queue))
        return bool(self.queue)

    def refusal(self) -> HTTPException:
        """Return the answer to who cannot be served in time."""
        return HTTPException(
            503, f'more requests than can be answered in {self.scheduler.slo_ms:g} ms; try again later',
            {'Retry-After': str(math.ceil(self.slo))})

    def run(self, images: Sequence[Tensor], subnet: Subnet) -> list[dict[str, Any]]:
        """Return the answer to each of a batch of images."""
        with inference(self.model):
            logits = self.model(torch.stack(list(images)).to(self.model.device), **subnet._asdict())
            check_finite([logits], [subnet])
            best, indices = probabilities(logits).max(dim=1)
        return [
            {'class': self.names[i], 'index': i, 'probability': round(p, 6), 'subnet': str(subnet)}
            for p, i in zip(best.tolist(), indices.tolist(), strict=True)]


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async with contextlib.aclosing(request.stream()) as parts:
        async for part in parts:
            body += part
            if len(body) > MAX_BODY:
                raise HTTPException(413, f'the image is larger than {MAX_BODY:,} bytes; send a smaller one')
    return bytes(body)


def _settle(waiting: _Waiting, answer: Any) -> None:
    if not waiting.answer.done():  # as it is where the client has left
        if isinstance(answer, Exception):
            waiting.answer.set_exception(answer)
        else:
            waiting.answer.set_result(answer)
