"""A hub of data sets on loopback: files of several commits, as `huggingface_hub` and `datasets` ask for them."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]  # by path


class Hub:
    """Data sets by name, each a list of versions, the newest last; commits are numbered ``"0" * 39 + "1"`` and on."""

    def __init__(self) -> None:
        self.sets: dict[str, list[Files]] = {}
        self.asked: list[str] = []
        self.url = ""

    def commit(self, name: str) -> str:
        return f"{len(self.sets[name]):040}"

    def files(self, name: str, revision: str) -> Files | None:
        versions = self.sets[name]
        number = len(versions) if revision == "main" else int(revision) if revision.isdigit() else 0
        return versions[number - 1] if 0 < number <= len(versions) else None


class _Answers(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(f"{self.command} {path}")
        parts = path.split("/")
        of_api = parts[0] == "api"
        name, (verb, revision, *rest) = "/".join(parts[1:][of_api:][:2]), [*parts[1:][of_api:][2:], "", ""][:99]
        if name not in self.hub.sets:
            self._fail("RepoNotFound")
            return
        files = self.hub.files(name, revision or "main")
        if files is None:
            self._fail("RevisionNotFound")
        elif verb == "resolve":
            self._file(name, revision, files.get("/".join(filter(None, rest))))
        elif verb == "tree":
            self._json(_entries(files, "/".join(filter(None, rest))))
        elif verb == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith(b"{") else _form(body)
            self._json([entry for path in asked for entry in _entries(files, "") if entry["path"] == path])
        else:
            sha = self.hub.commit(name) if revision in ("", "main") else f"{int(revision):040}"
            self._json({"id": name, "sha": sha, "siblings": [{"rfilename": path} for path in files]})

    def _file(self, name: str, revision: str, content: bytes | None) -> None:
        if content is None:
            self._fail("EntryNotFound")
            return
        sha = self.hub.commit(name) if revision == "main" else f"{int(revision):040}"
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}  # noqa: S324 - as git has it
        part, status = content, 200
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            end = min(int(last or len(content)), len(content) - 1)
            part, status = content[int(first) : end + 1], 206
            headers["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
        self._send(status, part, headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": "not here"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _form(body: bytes) -> list[str]:
    pairs = [part.partition("=") for part in body.decode().split("&")]
    return [unquote(value) for key, _, value in pairs if key == "paths"]


def _entries(files: Files, under: str) -> list[dict[str, Any]]:
    """Files and folders below a folder, as the hub lists them."""
    folders = {"/".join(path.split("/")[:depth]) for path in files for depth in range(1, path.count("/") + 1)}
    listed: list[dict[str, Any]] = [{"type": "directory", "oid": "0" * 40, "path": path, "size": 0} for path in folders]
    listed += [
        {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "path": path, "size": len(content)}  # noqa: S324
        for path, content in files.items()
    ]
    return [entry for entry in listed if not under or entry["path"].startswith(f"{under}/")]


@contextmanager
def hub_on_loopback() -> Iterator[Hub]:
    """A running hub; `Hub.url` is its endpoint."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
