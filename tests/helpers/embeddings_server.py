"""An OpenAI-compatible embeddings server on loopback, which embeds by a function and can be broken."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from anchorembed.model.embedder import Embedder
from anchorembed.model.packing import pack
from anchorembed.model.tokens import own_backend


class Refusal(Exception):
    """The server answers with this status and message."""


@dataclass
class Broken:
    """A server's own way from text to vector; by default it is right for texts of up to ``limit`` tokens."""

    embedder: Embedder
    limit: int
    before: str = "<s>Text: "
    after: str = "</s>"
    rewrite: Callable[[str], str] = lambda text: text
    specials_are_text: bool = True
    pooling: str = "last"
    cut: str = "text"
    dimensions: int = 10_000
    norm: bool = True
    noise: float = 0.0
    padding: int = 0  # end tokens after each text that is not the longest of its request
    asked: list[str] = field(default_factory=list)

    def __call__(self, texts: list[str]) -> list[list[float]]:
        self.asked += texts
        return [self.vector(text, self.padding if len(text) < max(map(len, texts)) else 0) for text in texts]

    def vector(self, text: str, padding: int) -> list[float]:
        backend = own_backend(self.embedder.tokenizer)
        backend.encode_special_tokens = self.specials_are_text
        inner = backend.encode(self.rewrite(text), add_special_tokens=False).ids
        backend.encode_special_tokens = False
        before, after = (backend.encode(part, add_special_tokens=False).ids for part in (self.before, self.after))
        room = self.limit - len(before) - len(after) if self.cut == "text" else None
        if self.cut == "refuse" and len(before + inner + after) > self.limit:
            raise Refusal(400, f"maximum context length is {self.limit} tokens")
        ids = before + inner[:room] + after
        if self.cut == "end":
            ids = ids[: self.limit]
        elif self.cut == "start":
            ids = ids[-self.limit :]
        ids = (ids or [0]) + after * padding
        batch = pack([ids])
        states = self.embedder.backbone.states(self.embedder.backbone.embed(batch.tokens), batch).detach().numpy()
        vector = {"last": states[-1], "first": states[0], "mean": states.mean(axis=0)}[self.pooling]
        vector = vector[: self.dimensions]
        scale = np.linalg.norm(vector)
        rng = np.random.default_rng(len(ids))
        vector = vector + self.noise * scale / len(vector) ** 0.5 * rng.standard_normal(len(vector))
        return [float(value) for value in (vector / np.linalg.norm(vector) if self.norm else vector)]


@contextmanager
def serving(
    embed: Callable[[list[str]], Any],
    models: str | None = "tiny",
    raw: bytes | None = None,
    seen: list[dict[str, Any]] | None = None,
    query: str = "",
    list_status: int = 200,
) -> Iterator[str]:
    """Serve ``/v1/embeddings`` on loopback and yield the address.

    ``raw`` replaces every reply of vectors; ``seen`` takes the key and the body of each request. A request must have
    the ``query``, such as ``?version=1``. ``list_status`` is that of the list of models.
    """

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status: int, content: bytes) -> None:
            self.send_response(status)
            if status in (301, 302):
                self.send_header("Location", "/v1/embeddings")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            if models is None or self.path != f"/v1/models{query}":
                return self.reply(404, b"Not Found")
            listed = {"data": [{"id": models}]} if list_status == 200 else {"error": {"message": "Loading model"}}
            return self.reply(list_status, json.dumps(listed).encode())

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if seen is not None:
                seen.append(asked | {"key": self.headers["Authorization"]})
            if self.path != f"/v1/embeddings{query}":
                return self.reply(404, b"Not Found")
            try:
                vectors = embed(asked["input"])
            except Refusal as refusal:
                status, message = refusal.args
                return self.reply(status, json.dumps({"error": {"message": message}}).encode())
            rows = [{"index": index, "embedding": row} for index, row in enumerate(vectors)]
            return self.reply(200, raw or json.dumps({"data": rows[::-1]}).encode())  # index, not order, counts

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
