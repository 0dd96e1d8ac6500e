"""A stand-in for an OpenAI-compatible chat endpoint, on loopback, that writes by a function and can fail."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, bytes] | tuple[int, bytes, dict[str, str]]  # status, body and headers


@dataclass
class Endpoint:
    """What was asked, and what is answered before anything else."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    first_answers: list[Answer] = field(default_factory=list)

    @property
    def documents(self) -> list[str]:
        """The last turn of each request."""
        return [request["messages"][-1]["content"] for request in self.asked]


def completion(text: str) -> bytes:
    """A chat completion of one message."""
    message = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return json.dumps(message | {"usage": {"prompt_tokens": 10, "completion_tokens": 4}}).encode()


@contextmanager
def chat_endpoint(write: Callable[[str], str]) -> Iterator[Endpoint]:
    """Serve replies that ``write`` makes of the last turn."""
    endpoint = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            endpoint.asked.append(request)
            endpoint.keys.append(self.headers.get("Authorization"))
            endpoint.paths.append(self.path)
            status, body, *headers = (
                endpoint.first_answers.pop(0)
                if endpoint.first_answers
                else (200, completion(write(request["messages"][-1]["content"])))
            )
            self.send_response(status if self.path.partition("?")[0] == "/v1/chat/completions" else 404)
            for name, value in headers[0].items() if headers else ():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
