"""Vectors as endpoints give them, and one clear error for each kind of reply that holds none."""

import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from anchorembed.errors import InputError
from anchorembed.export.clients import Client, Refused, open_endpoint, open_library, with_prompts
from anchorembed.model.vectors import Floats, Side
from embeddings_server import Refusal, serving


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds slept between requests, in order; no time passes."""
    slept: list[float] = []
    monkeypatch.setattr(import_module("anchorembed.export.clients"), "time", SimpleNamespace(sleep=slept.append))
    return slept


def rows(texts: list[str]) -> list[list[float]]:
    return [[float(len(text)), 1.0] for text in texts]


@pytest.mark.parametrize("query", ["", "?api-version=2024&a=b/"])
@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/embeddings"])
def test_vectors_come_in_the_order_of_the_texts(path: str, query: str) -> None:
    with serving(rows, query=query) as url:
        client = open_endpoint(url + path + query)
        np.testing.assert_array_equal(client.embed(["a", "abc"], "query"), [[1, 1], [3, 1]])
    assert client.name == f"{url}/v1/embeddings{query}, model 'tiny'"


def test_name_and_key_are_sent_and_to_this_machine_past_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("OTHER_KEY", "secret")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    seen: list[dict[str, Any]] = []
    with serving(rows, models=None, seen=seen) as url:
        open_endpoint(url).embed(["a"], "query")
        open_endpoint(url, "mine", "OTHER_KEY").embed(["b"], "query")
    assert seen[0] == {"model": "default", "input": ["a"], "encoding_format": "float", "key": None}
    assert seen[1] == {"model": "mine", "input": ["b"], "encoding_format": "float", "key": "Bearer secret"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"<html>", "the reply is not JSON: b'<html>'"),
        (b"[1]", "no list `data`"),
        (b'{"data": [{"embedding": "AAAA"}]}', "the vectors are not|no list `data`"),
        (b'{"data": []}', "0 vectors for 2 texts"),
        (b'{"data": [{"embedding": [1.0]}]}', "1 vectors for 2 texts"),
        (b'{"data": [{"embedding": [1.0]}, {"embedding": [1.0, 2.0]}]}', r"one dimension \(lengths \[1, 2\]\)"),
        (b'{"data": [{"embedding": [NaN]}, {"embedding": [1.0]}]}', "not finite"),
        (b'{"data": [{"embedding": [null]}, {"embedding": [1.0]}]}', "not finite"),
        (b'{"data": [{"embedding": []}, {"embedding": []}]}', "not finite"),
        (b'{"data": [{"embedding": [[1.0]]}, {"embedding": [[1.0]]}]}', "not finite"),
    ],
    ids=str,
)
def test_a_reply_without_vectors_is_named(raw: bytes, message: str) -> None:
    with serving(rows, raw=raw) as url, pytest.raises(InputError, match=message):
        open_endpoint(url).embed(["a", "b"], "document")


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (400, Refused, "400: too long"),
        (500, Refused, "500: too long"),
        (401, InputError, "the server says 401: too long Check the API key"),
        (404, InputError, "the server says 404: too long Check the URL and --served-name"),
        (302, InputError, "the server says 302"),
        (503, InputError, "the server says 503: too long Repeat the command when it is ready"),
    ],
)
def test_what_the_server_says_is_passed_on(
    status: int, kind: type[Exception], message: str, pauses: list[float]
) -> None:
    def refuse(texts: list[str]) -> Any:
        raise Refusal(status, "too long")

    with serving(refuse) as url, pytest.raises(kind, match=message):
        open_endpoint(url).embed(["a"], "document")
    assert pauses == ([1, 2, 4] if status == 503 else [])


def test_what_fails_for_the_moment_is_asked_again(pauses: list[float]) -> None:
    def busy_at_first(texts: list[str]) -> Any:
        if not pauses:
            raise Refusal(429, "slow down")
        return rows(texts)

    with serving(busy_at_first) as url:
        assert len(open_endpoint(url).embed(["a"], "document")) == 1
    assert pauses == [1]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (503, "/v1/models: the server says 503: Loading model Repeat the command"),
        (500, r"/v1/models: lists no model \(500: Loading model\)\. Name it by --served-name"),
    ],
)
def test_a_list_of_models_that_fails_is_named(status: int, message: str, pauses: list[float]) -> None:
    with serving(rows, list_status=status) as url, pytest.raises(InputError, match=message):
        open_endpoint(url)


def test_no_server_is_named() -> None:
    with serving(rows) as url:
        pass
    with pytest.raises(InputError, match=r"no reply: .*refused.* Is the server running"):
        open_endpoint(url)


@pytest.mark.parametrize(
    "url", ["file:///etc/hosts", "ftp://host/x", "a-folder", "http://", "http://host:port", "http://host/modèle"]
)
def test_what_is_no_http_url_is_named(url: str) -> None:
    with pytest.raises(InputError, match=r"not an http or https URL|not a URL"):
        open_endpoint(url)


def test_a_slow_server_is_named() -> None:
    wait = threading.Event()

    def slow(texts: list[str]) -> list[list[float]]:
        wait.wait(5)
        return rows(texts)

    with serving(slow) as url:
        client = open_endpoint(url, "mine", timeout=0.05)
        with pytest.raises(InputError, match=r"no reply: .*timed out.*--timeout \(0.05 s\)"):
            client.embed(["a"], "document")
        wait.set()


def test_a_folder_or_library_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        open_library("sentence-transformers", str(tmp_path / "none"))
    with pytest.raises(InputError, match="sentence-transformers does not load it"):
        open_library("sentence-transformers", str(tmp_path))


def test_prompts_of_a_file_are_sent_around_each_text(tmp_path: Path) -> None:
    asked: list[str] = []

    def embed(texts: Sequence[str], side: Side) -> Floats:
        asked.extend(texts)
        return np.ones((len(texts), 2), np.float32)

    file = tmp_path / "prompts.json"
    file.write_text('{"query": "Q ", "document": "D ", "suffix": " end", "max_tokens": 9}', encoding="utf-8")
    client = with_prompts(Client("it", embed), file)
    client.embed(["a", "b"], "query")
    client.embed(["c"], "document")
    assert asked == ["Q a end", "Q b end", "D c end"]
    assert str(file) in client.prompts_from
    for content in ("[", "[]", '{"query": "q"}', '{"query": 1, "document": "", "suffix": ""}'):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=r"prompts\.json: no prompts with the texts"):
            with_prompts(client, file)
    with pytest.raises(InputError, match=r"Name the prompts\.json that"):
        with_prompts(client, tmp_path / "none.json")


def test_a_key_without_encryption_is_warned_of(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    monkeypatch.setenv("OTHER_KEY", "secret")
    for url in ("http://127.0.0.1:1", "https://example.org", "http://example.org"):
        open_endpoint(url, "mine", "OTHER_KEY")
    (warning,) = said
    assert warning == (
        "http://example.org/v1/embeddings has no encryption, and the key of OTHER_KEY is sent over it. Use https."
    )
