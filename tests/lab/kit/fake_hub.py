"""A hub on this machine that speaks what `huggingface_hub` asks for: one repository, its listing
and its files.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", COMMIT)


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    repo: ClassVar[str]
    folder: ClassVar[Path]
    fetched: ClassVar[list[str]]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith(f"/api/models/{self.repo}"):
            parts = path.removeprefix(f"/api/models/{self.repo}").split("/")
            if len(parts) > 2 and parts[2] not in REVISIONS:
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return
            files = [file for file in self.folder.rglob("*") if file.is_file()]
            names = {file.relative_to(self.folder).as_posix(): file for file in files}
            tree = [
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": _digest(f)}
                for n, f in names.items()
            ]
            info = {
                "id": self.repo,
                "modelId": self.repo,
                "sha": COMMIT,
                "siblings": [{"rfilename": name} for name in names],
            }
            self._send(200, json.dumps(tree if "/tree/" in path else info).encode())
            return
        revision, _, name = path.removeprefix(f"/{self.repo}/resolve/").partition("/")
        file = self.folder / name
        if not path.startswith(f"/{self.repo}/resolve/") or not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if revision not in REVISIONS:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        content = file.read_bytes()
        if body:
            self.fetched.append(name)
        self._send(200, content, {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": COMMIT}, body)

    def _send(
        self, code: int, content: bytes, headers: dict[str, str] | None = None, body: bool = True
    ) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def fake_hub(repo: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A hub with `folder` as the repository `repo`: its address, and the names of the files that
    were fetched so far.
    """
    fetched: list[str] = []
    handler = type("Handler", (_Handler,), {"repo": repo, "folder": folder, "fetched": fetched})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
