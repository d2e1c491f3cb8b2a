"""A Ray cluster of one machine on the loopback that serves applications, for tests and benchmarks.

It has no dashboard and little shared memory. It is stopped by process id: no other cluster of the machine is touched.
As a program it is the process that the cluster belongs to: Ray's own ``serve run``, on a Ray that has these settings.
"""
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

# Ray would tell its makers of each start, report metrics each 10 s only, and give way to all other processes.
ENV = {'RAY_USAGE_STATS_ENABLED': '0', 'RAY_metrics_report_interval_ms': '1000', 'RAY_worker_niceness': '0'}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


class Cluster:
    """A running cluster.

    Attributes:
        url: Where the applications are, each under its name.
        metrics_url: Where Ray has the metrics, in the format of Prometheus.
        process: The process that it belongs to.
        log: What that one and its replicas print.
    """

    def __init__(self, folder: Path, applications: dict[str, dict[str, Any]], replicas: int, cpus: int) -> None:
        self.num_replicas = replicas * len(applications)
        port, metrics_port = free_port(), free_port()
        self.url, self.metrics_url = f'http://127.0.0.1:{port}', f'http://127.0.0.1:{metrics_port}/metrics'
        self.log = folder / 'log'
        config = folder / 'config.yaml'
        config.write_text(json.dumps({  # which is YAML, too
            'http_options': {'host': '127.0.0.1', 'port': port},
            'applications': [{
                'name': name or 'default', 'route_prefix': f'/{name}',
                'import_path': 'timm_supervit.serving:build_app',
                'args': {key: str(value) for key, value in args.items()},
                'deployments': [{'name': 'SubnetServer', 'num_replicas': replicas}],
            } for name, args in applications.items()]}))
        with open(self.log, 'wb') as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, config, str(metrics_port), str(cpus), folder / 'ray'],
                env={**os.environ, **ENV}, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)

    def wait(self, seconds: float = 120) -> None:
        """Wait until all replicas are there and the proxy answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f'{self.url}/-/healthz', timeout=5) as answer:
                if answer.status == 200 and len(self.replicas()) >= self.num_replicas:
                    return
            time.sleep(0.2)
        raise TimeoutError(f'the application is not there\n{self.log.read_text(errors="replace")[-5000:]}')

    def replicas(self) -> list[psutil.Process]:
        """Return the processes of the replicas that are ready."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                title = ''.join(process.cmdline())
                if title.startswith('ray::ServeReplica') and 'initialize' not in title:
                    found.append(process)
        return found

    def stop(self) -> None:
        """End the process, and all that it has started."""
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.process.pid)
            family = process.children(recursive=True)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            for left in psutil.wait_procs([process, *family], 3)[1]:
                with contextlib.suppress(psutil.Error):
                    left.kill()


@contextlib.contextmanager
def serve(applications: dict[str, dict[str, Any]], replicas: int = 1, cpus: int = 2) -> Iterator[Cluster]:
    """Serve applications, by their names with the arguments of ``build_app``, each on so many replicas."""
    with tempfile.TemporaryDirectory(prefix='ray', ignore_cleanup_errors=True) as folder:  # short: sockets are in it
        cluster = Cluster(Path(folder), applications, replicas, cpus)
        try:
            cluster.wait()
            yield cluster
        finally:
            cluster.stop()


if __name__ == '__main__':
    import ray
    from ray.serve.scripts import cli

    ray.init(
        num_cpus=int(sys.argv[3]), object_store_memory=100_000_000, include_dashboard=False,
        _node_ip_address='127.0.0.1', _metrics_export_port=int(sys.argv[2]), _temp_dir=sys.argv[4])
    cli(['run', sys.argv[1]])
