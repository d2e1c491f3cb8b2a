"""Timeliness and accuracy under load, measured on the real server: the scheduler and fixed subnets, in turns.

    OMP_NUM_THREADS=1 python tests/serving_benchmark.py FILE.json [--seconds 10] [--passes 2]

``supervit_small``, exported to ONNX with random weights, since speed does not depend on them; the accuracy of an answer
is what the authors published for its subnet (docs/published.json). It is profiled first, and then served by as many
applications as there are contestants, each of one replica of one thread: the scheduler with all subnets, and with one
subnet alone. An independent client sends JPEG files, open loop: at the times of a gamma renewal process, whatever the
answers are. The load goes from 0.3 to 3 times what the full subnet serves, and back. All contestants get the same
requests, one after the other in a new order for each pass. An answer is in time if the client has it within the limit,
four times the latency of the full subnet; the server is told nine tenths of it, for the way.
"""
import argparse
import asyncio
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import timm
import torch
from PIL import Image
from ray_cluster import serve
from serving_simulation import arrivals, day, published

from timm_supervit import Subnet
from timm_supervit.results.rows import Results, load_results, save_results, subnet_of
from timm_supervit.tools.export import export

BATCH_SIZES = (1, 2, 4, 8)
CV2 = (1, 4, 8)  # squared coefficient of variation of the times between arrivals
QUIET = 0.3


async def send(url: str, times: list[float], body: bytes, limit: float) -> list[dict[str, Any]]:
    """Send requests at these times, and return what came back for each, with its time on the client's clock."""
    rows: list[dict[str, Any]] = []

    async def one(session: aiohttp.ClientSession, at: float) -> None:
        row: dict[str, Any] = {'at': round(at, 4), 'status': 0}
        rows.append(row)
        try:
            async with session.post(url, data=body) as response:
                row['status'] = response.status
                answer = await response.json()
                row['subnet'], row['server_ms'] = answer.get('subnet'), answer.get('time_ms')
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
            row['error'] = repr(error)
        row['seconds'] = round(time.perf_counter() - start - at, 4)
        row['in_time'] = row['status'] == 200 and row['seconds'] <= limit

    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        start = time.perf_counter() + 0.1
        tasks = []
        for at in times:
            await asyncio.sleep(max(0, start + at - time.perf_counter()))
            tasks.append(asyncio.create_task(one(session, at)))
        await asyncio.gather(*tasks)
    return rows


def summarize(rows: list[dict[str, Any]], accuracy: dict[str, float]) -> dict[str, Any]:
    in_time = [row for row in rows if row['in_time']]
    return {
        'requests': len(rows), 'in_time': len(in_time),
        'timeliness': round(100 * len(in_time) / max(len(rows), 1), 2),
        'top1': round(float(np.mean([accuracy[row['subnet']] for row in in_time])), 2) if in_time else None,
        'refused': sum(row['status'] == 503 for row in rows),
        'late': sum(row['status'] == 200 and not row['in_time'] for row in rows),
        'other': sum(row['status'] not in (200, 503) for row in rows),
    }


def photo() -> bytes:
    """Return a JPEG of 256 x 256 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((256, 256)).save(file, 'JPEG', quality=90)
    return file.getvalue()


def prepare(folder: Path, rounds: int) -> Path:
    """Export and profile the network; write what each contestant knows of accuracy."""
    torch.manual_seed(0)
    export(timm.create_model('supervit_small').eval(), folder, 'onnx')
    model = folder / 'supervit_small.onnx'
    sizes = [word for size in BATCH_SIZES for word in ('-b', str(size))]
    subprocess.run(
        [sys.executable, '-m', 'timm_supervit', 'profile', str(model), *sizes, '--rounds', str(rounds), '--output',
         str(folder), '-q'], check=True, stdout=subprocess.DEVNULL)
    network = load_results(folder / 'profile.json').network
    evaluated = {subnet: {**subnet._asdict(), 'top1': top1} for subnet, _, top1 in published()}
    for name, subnets in {'scheduler': list(evaluated), **{contestant(s): [s] for s in evaluated}}.items():
        rows: list[Any] = [evaluated[subnet] for subnet in subnets]
        save_results(Results('supervit_small', rows, {}, network), folder, name)
    return model


def contestant(subnet: Subnet) -> str:
    return str(subnet).replace(':', '-')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('output', type=Path)
    parser.add_argument('--seconds', type=float, default=10, help='of a run')
    parser.add_argument('--passes', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=5, help='of the profile')
    options = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = prepare(folder, options.rounds)
        print(f'profiled after {time.perf_counter() - begin:.0f} s', flush=True)
        profile = load_results(folder / 'profile.json')
        latency = {(str(subnet_of(row)), row['batch_size']): row['latency_ms'] for row in profile.rows}
        full = '224:1'
        capacity = max(1e3 * size / latency[full, size] for size in BATCH_SIZES)
        limit_ms = 4 * latency[full, 1]
        accuracy = {str(subnet): top1 for subnet, _, top1 in published()}
        contestants = ['scheduler', *(contestant(subnet) for subnet, _, _ in published())]
        # Of the quiet load the full subnet is the other one to know.
        runs = [
            (name, cv2, 'day', seed) for name in contestants for cv2 in CV2 for seed in range(options.passes)]
        runs += [(name, 1, 'quiet', seed) for name in ('scheduler', '224-1') for seed in range(options.passes)]
        runs.sort(key=lambda run: (run[3], random.Random(repr(run)).random()))
        rows: dict[Any, list[dict[str, Any]]] = {}
        args = {name: dict(model=model, profile=folder / 'profile.json', evaluate=folder / f'{name}.json',
                           slo_ms=0.9 * limit_ms) for name in contestants}
        with serve(args, cpus=2 * len(args)) as cluster:
            print(f'served after {time.perf_counter() - begin:.0f} s', flush=True)
            body = photo()
            for name in contestants:  # first calls take longer
                asyncio.run(send(f'{cluster.url}/{name}', [0.3 * i for i in range(5)], body, 1))
            for name, cv2, load, seed in runs:
                rates = day(0.3 * capacity, 3 * capacity) if load == 'day' else [QUIET * capacity]
                times = arrivals(np.random.default_rng([seed, cv2]), rates, options.seconds, cv2)
                seen = asyncio.run(send(f'{cluster.url}/{name}', times, body, limit_ms / 1e3))
                rows.setdefault((name, cv2, load), []).extend(seen)
                if (name, cv2, load, seed) == ('scheduler', 4, 'day', 0):
                    trace = seen
                print(name, cv2, load, seed, summarize(seen, accuracy), flush=True)
                time.sleep(0.5)
    content = {
        'about': __doc__, 'limit_ms': limit_ms, 'capacity_of_full': capacity, 'seconds': options.seconds,
        'passes': options.passes, 'profile': profile.info,
        'latency_ms': {subnet: {size: latency[subnet, size] for size in BATCH_SIZES} for subnet in accuracy},
        'results': [{'contestant': name, 'cv2': cv2, 'load': load, **summarize(seen, accuracy)}
                    for (name, cv2, load), seen in sorted(rows.items())],
        'trace': trace,
    }
    options.output.write_text(json.dumps(content, indent=1) + '\n')
    for row in content['results']:
        print(row)
    print(f'{time.perf_counter() - begin:.0f} s')


if __name__ == '__main__':
    main()
