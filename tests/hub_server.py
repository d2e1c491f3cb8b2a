"""A Hub on the loopback: as much of its HTTP interface as the real ``huggingface_hub`` client needs for models.

It serves the files below a folder, ``ROOT/owner/name/file``, and stores what timm pushes there: weights by the route of
large files (Git LFS batches), other files in the commit itself. A client finds it by ``HF_ENDPOINT``, which it reads
when it is imported:

    with serve(root) as url:
        subprocess.run(command, env=hub_environment(url, cache))
"""
import base64
import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = '0123456789abcdef0123456789abcdef01234567'
LARGE_FILES = ('.safetensors', '.bin')  # as a new repository's .gitattributes say


class HubHandler(BaseHTTPRequestHandler):
    """One request.

    ``server.root`` is the folder, ``server.requests`` the list of what was asked for, ``server.objects`` the large
    files by their SHA-256.
    """

    protocol_version = 'HTTP/1.1'
    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def answer(self, status: int, body: bytes = b'', **headers: str) -> None:
        self.send_response(status)
        for name, value in {'X-Repo-Commit': COMMIT, **headers}.items():
            self.send_header(name.replace('_', '-'), value)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def answer_json(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type='application/json')

    def do_HEAD(self) -> None:
        self.serve_file()

    def do_GET(self) -> None:
        if match := re.fullmatch(r'/api/models/([^/]+/[^/]+)(/revision/[^/]+)?', self.path):
            files = [{'rfilename': path.name} for path in (self.server.root / match[1]).iterdir()]
            self.answer_json({'id': match[1], 'sha': COMMIT, 'siblings': files, 'tags': [], 'cardData': {}})
        else:
            self.serve_file()

    def serve_file(self) -> None:
        self.server.requests.append((self.command, self.path))
        match = re.fullmatch(r'/([^/]+/[^/]+)/resolve/[^/]+/(.+)', self.path.partition('?')[0])
        folder = self.server.root / match[1] if match else None
        if match is None or not folder.is_dir():
            self.answer(404, X_Error_Code='RepoNotFound')
        elif not (folder / match[2]).is_file():
            self.answer(404, X_Error_Code='EntryNotFound')
        else:
            content = (folder / match[2]).read_bytes()
            self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')

    def read_body(self) -> bytes:
        if self.headers['Transfer-Encoding'] != 'chunked':
            return self.rfile.read(int(self.headers['Content-Length']))
        body = b''
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_PUT(self) -> None:
        content = self.read_body()
        if hashlib.sha256(content).hexdigest() == self.path.removeprefix('/lfs/'):
            self.server.objects[self.path.removeprefix('/lfs/')] = content
        self.answer(200)

    def upload_of(self, oid: str, size: int) -> dict[str, Any]:
        url = f'http://{self.headers["Host"]}/lfs/{oid}'
        if oid in self.server.objects:
            return {'oid': oid, 'size': size}
        return {'oid': oid, 'size': size, 'actions': {'upload': {'href': url}, 'verify': {'href': f'{url}/verify'}}}

    def do_POST(self) -> None:
        body = self.read_body().decode()
        if self.path == '/api/repos/create':
            request = json.loads(body)
            name = f'{request.get("organization") or "user"}/{request["name"]}'
            (self.server.root / name).mkdir(parents=True, exist_ok=True)
            self.answer_json({'url': f'http://{self.headers["Host"]}/{name}', 'name': name, 'id': name})
        elif self.path == '/api/validate-yaml':
            self.answer_json({'errors': [], 'warnings': []})
        elif match := re.fullmatch(r'/api/models/([^/]+/[^/]+)/preupload/[^/]+', self.path):
            files = [
                {'path': path, 'uploadMode': 'lfs' if path.endswith(LARGE_FILES) else 'regular', 'shouldIgnore': False}
                for path in (file['path'] for file in json.loads(body)['files'])
            ]
            self.answer_json({'files': files})
        elif re.fullmatch(r'/[^/]+/[^/]+\.git/info/lfs/objects/batch', self.path):
            objects = [self.upload_of(item['oid'], item['size']) for item in json.loads(body)['objects']]
            self.answer_json({'transfer': 'basic', 'objects': objects})
        elif match := re.fullmatch(r'/lfs/([0-9a-f]+)/verify', self.path):
            self.answer(200 if match[1] in self.server.objects else 404)
        elif match := re.fullmatch(r'/api/models/([^/]+/[^/]+)/commit/[^/?]+', self.path.partition('?')[0]):
            for line in map(json.loads, body.splitlines()):
                value = line['value']
                if line['key'] == 'file':
                    (self.server.root / match[1] / value['path']).write_bytes(base64.b64decode(value['content']))
                elif line['key'] == 'lfsFile':
                    (self.server.root / match[1] / value['path']).write_bytes(self.server.objects[value['oid']])
            url = f'http://{self.headers["Host"]}/{match[1]}/commit/{COMMIT}'
            self.answer_json({'success': True, 'commitOid': COMMIT, 'commitUrl': url, 'hookOutput': ''})
        else:
            self.answer(404)


@contextlib.contextmanager
def serve(root: Path, requests: list[tuple[str, str]] | None = None) -> Iterator[str]:
    """Serve a folder as a Hub while the context lasts; yield its address.

    Args:
        root: Folder of ``owner/name/file``.
        requests: Takes the method and path of every request for a file.
    """
    server: Any = ThreadingHTTPServer(('127.0.0.1', 0), HubHandler)
    server.root, server.requests, server.objects = root, requests if requests is not None else [], {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def hub_environment(url: str, cache: Path) -> dict[str, str]:
    """Return the environment of a process whose Hub is the one at ``url``, with a cache and a token of its own."""
    settings = {
        'HF_ENDPOINT': url, 'HF_HOME': str(cache), 'HF_TOKEN': 'hf_loopback', 'HF_HUB_DISABLE_XET': '1',
        'HF_HUB_DISABLE_TELEMETRY': '1', 'NO_PROXY': '127.0.0.1', 'no_proxy': '127.0.0.1',
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(('HF_', 'HUGGING'))}
    return inherited | settings
