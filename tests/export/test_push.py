"""An exported folder is uploaded as it is, to a private repository, by a stand-in for the hub."""

import base64
import json
import shlex
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest

from anchorembed.errors import InputError
from anchorembed.export.push import push


class Hub(BaseHTTPRequestHandler):
    """The answers that an upload of small files needs."""

    calls: list[tuple[str, object]] = []  # noqa: RUF012 - of the one server of a test
    files: dict[str, bytes] = {}  # noqa: RUF012

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.calls.append((self.path, body))
        server = f"http://127.0.0.1:{self.server.server_address[1]}"
        if self.headers.get("authorization") != "Bearer right":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.answer({"url": f"{server}/somebody/model"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{server}/somebody/model/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.answer({})

    def do_GET(self) -> None:
        self.answer({"id": "somebody/model", "sha": "0" * 40, "siblings": []})

    def answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.calls, Hub.files = [], {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("HF_TOKEN", "right")
        yield Hub
        server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "my model"
    (out / "1_Pooling").mkdir(parents=True)
    (out / "config.json").write_text("{}")
    (out / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    return out


@pytest.mark.parametrize("public", [False, True])
def test_all_files_are_uploaded_to_a_private_repository(public: bool, hub: type[Hub], folder: Path) -> None:
    assert push(folder, "somebody/model", public=public).endswith("/somebody/model")
    assert hub.files == {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.json")}
    path, body = hub.calls[0]
    assert isinstance(body, bytes)
    settings = json.loads(body)
    assert path == "/api/repos/create"
    assert (settings["name"], settings["organization"]) == ("model", "somebody")
    assert settings.get("private", settings.get("visibility")) in ({False, "public"} if public else {True, "private"})


@pytest.mark.parametrize("public", [False, True])
def test_what_the_hub_refuses_is_said_with_the_cure(
    public: bool, hub: type[Hub], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(InputError, match=r"401.*is written\. Log in") as refused:
        push(folder, "somebody/model", public=public)
    command = shlex.split(str(refused.value).rpartition("then: ")[2])
    assert command == ["hf", "upload", "somebody/model", str(folder), *([] if public else ["--private"])]
    with pytest.raises(InputError, match="OWNER/NAME"):
        push(folder, "model")
    assert not hub.files
