"""Sources of vectors to verify: an OpenAI-compatible endpoint, or a library that loads an exported folder.

Axes: N texts, H dimension.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from anchorembed.errors import InputError, first_line, installed_by
from anchorembed.model.load import quiet
from anchorembed.model.vectors import Floats, Side
from anchorembed.system.keys import LONGEST_PAUSE, TEMPORARY, json_headers, opener_for, pause_asked

Library = Literal["langchain", "llamaindex", "sentence-transformers"]
PACKAGES: dict[Library, tuple[str, str]] = {  # package to install, module to import
    "langchain": ("langchain-huggingface", "langchain_huggingface"),
    "llamaindex": ("llama-index-embeddings-huggingface", "llama_index.embeddings.huggingface"),
    "sentence-transformers": ("sentence-transformers", "sentence_transformers"),
}
_METHODS: dict[Library, tuple[str, str, str, str]] = {  # class, its argument, methods of documents and of a query
    "langchain": ("HuggingFaceEmbeddings", "model_name", "embed_documents", "embed_query"),
    "llamaindex": ("HuggingFaceEmbedding", "model_name", "get_text_embedding_batch", "get_query_embedding"),
    "sentence-transformers": ("SentenceTransformer", "model_name_or_path", "encode_document", "encode_query"),
}
_LARGEST_REPLY = 2**28  # bytes
_PAUSES = (1.0, 2.0, 4.0)  # seconds before a request is repeated
_TO_CHECK = {401: "the API key", 403: "the API key", 404: "the URL and --served-name", 405: "the URL"}


class Refused(Exception):
    """The server gives no vector for a text, and says why."""


class _Missing(InputError):
    """The server has nothing at the URL."""


@dataclass(frozen=True, slots=True)
class Client:
    """A server or library whose vectors are verified.

    Attributes:
        name: of the server or library, for messages.
        embed: vectors of texts of a side, [N, H], as they are served; raises `Refused`.
        prompts_from: a sentence on what puts prompts before texts; empty if prompts must be sent with texts.
    """

    name: str
    embed: Callable[[Sequence[str], Side], Floats]
    prompts_from: str = ""


def open_library(library: Library, folder: str) -> Client:
    """Load an exported folder with a library, with the library's defaults.

    Raises:
        InputError: if there is no such folder, the library is not installed, or it does not load the folder.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder. With --with, name one that `anchorembed export` wrote.")
    package, module_name = PACKAGES[library]
    class_name, argument, of_documents, of_query = _METHODS[library]
    with installed_by(package):
        module: Any = import_module(module_name)
    try:
        with quiet():
            model = getattr(module, class_name)(**{argument: folder})
    except Exception as error:  # libraries raise errors of many kinds
        raise InputError(f"{folder}: {library} does not load it: {first_line(error)}") from error

    def embed(texts: Sequence[str], side: Side) -> Floats:
        if side == "document":
            return np.asarray(getattr(model, of_documents)(list(texts)), np.float32)
        return np.asarray([getattr(model, of_query)(text) for text in texts], np.float32)

    prompts_from = "Queries were given to the query method as they are, documents to the document method."
    return Client(library, embed, prompts_from)


def open_endpoint(
    url: str, served_name: str | None = None, api_key_env: str = "OPENAI_API_KEY", timeout: float = 60.0
) -> Client:
    """An OpenAI-compatible ``/v1/embeddings`` endpoint, by its server's address, with or without that path.

    Args:
        url: such as ``http://127.0.0.1:8080``; http or https. What it has after a ``?`` is sent with each request.
        served_name: of the model; by default the first that ``/v1/models`` lists, or ``default`` if it lists none.
        api_key_env: environment variable with the API key, sent if it is set.
        timeout: seconds to wait for a reply.

    Raises:
        InputError: if the URL is not one, the server cannot be reached, or it lists no model.
    """
    embeddings, models = _addresses(url)
    opener, headers = opener_for(embeddings, api_key_env), json_headers(api_key_env)
    exchange = partial(_exchange, opener=opener, headers=headers, timeout=timeout)
    name = served_name or _first_model(models, exchange)

    def embed(texts: Sequence[str], side: Side) -> Floats:
        body: dict[str, object] = {"model": name, "input": list(texts), "encoding_format": "float"}
        return _vectors(exchange(embeddings, body), len(texts), embeddings)

    return Client(f"{embeddings}, model {name!r}", embed)


def with_prompts(client: Client, file: Path) -> Client:
    """A client that sends each text with what ``prompts.json`` of an export to GGUF puts before and after it.

    Raises:
        InputError: if the file cannot be read, or lacks one of the texts ``query``, ``document`` and ``suffix``.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        query, document, after = (content[key] + "" for key in ("query", "document", "suffix"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: no prompts with the texts query, document and suffix: {first_line(error)}. Name the prompts.json "
            "that `anchorembed export --to gguf` wrote."
        ) from error
    before = {"query": query, "document": document}

    def embed(texts: Sequence[str], side: Side) -> Floats:
        return client.embed([before[side] + text + after for text in texts], side)

    return Client(client.name, embed, f"Texts were sent as {file} says.")


def _addresses(url: str) -> tuple[str, str]:
    """The addresses of vectors and of the list of models."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise InputError(f"{url}: not a URL ({error}). Name one such as http://127.0.0.1:8080.") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isascii():
        raise InputError(
            f"{url}: not an http or https URL of ASCII characters. Name one such as http://127.0.0.1:8080. An exported "
            "folder needs --with langchain, llamaindex or sentence-transformers."
        )
    path = parts.path.rstrip("/").removesuffix("/embeddings") or "/v1"
    return parts._replace(path=f"{path}/embeddings").geturl(), parts._replace(path=f"{path}/models").geturl()


def _exchange(
    url: str,
    body: dict[str, object] | None,
    opener: urllib.request.OpenerDirector,
    headers: dict[str, str],
    timeout: float,
) -> Any:  # noqa: ANN401
    """The reply to a GET, or to a POST of a body, read as JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)  # noqa: S310 - http or https, which `_addresses` checks
    try:
        content = _send(request, opener, timeout)
    except urllib.error.HTTPError as error:
        raise _refusal(url, error) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or first_line(error)
        timed_out = isinstance(error, TimeoutError) or isinstance(reason, TimeoutError)
        cure = f"Is --timeout ({timeout:g} s) too short?" if timed_out else "Is the server running?"
        raise InputError(f"{url}: no reply: {reason}. {cure}") from error
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{url}: the reply is not JSON: {content[:80]!r}. Check the URL.") from error


def _send(
    request: urllib.request.Request,
    opener: urllib.request.OpenerDirector,
    timeout: float,
    pauses: Sequence[float] = _PAUSES,
) -> bytes:
    """The reply's content; after a temporary failure the request is repeated, after each of the ``pauses``."""
    try:
        with opener.open(request, timeout=timeout) as reply:
            content: bytes = reply.read(_LARGEST_REPLY)
            return content
    except urllib.error.HTTPError as error:
        if error.code not in TEMPORARY or not pauses:
            raise
        time.sleep(min(LONGEST_PAUSE, max(pauses[0], pause_asked(error.headers))))
    return _send(request, opener, timeout, pauses[1:])


def _refusal(url: str, error: urllib.error.HTTPError) -> Exception:
    message = _message(error.read(4096))
    if error.code in _TO_CHECK or error.code < 400:
        kind = _Missing if error.code == 404 else InputError
        to_check = _TO_CHECK.get(error.code, "the URL")
        return kind(f"{url}: the server says {error.code}: {message} Check {to_check}.")
    if error.code in TEMPORARY:
        return InputError(f"{url}: the server says {error.code}: {message} Repeat the command when it is ready.")
    return Refused(f"{error.code}: {message}")


def _message(content: bytes) -> str:
    """The message in an error's body, as one line."""
    text = content.decode(errors="replace")
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        for key in ("error", "message", "detail"):
            value = value.get(key, value) if isinstance(value, dict) else value
        text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.split())[:300] or "(no message)"


def _first_model(url: str, exchange: Callable[[str, None], Any]) -> str:
    try:
        return str(exchange(url, None)["data"][0]["id"])
    except _Missing:  # text-embeddings-inference has no such list, and takes any name
        return "default"
    except (Refused, KeyError, IndexError, TypeError) as error:
        reason = f" ({error})" if isinstance(error, Refused) else ""
        raise InputError(f"{url}: lists no model{reason}. Name it by --served-name.") from error


def _vectors(reply: Any, count: int, url: str) -> Floats:  # noqa: ANN401 - JSON
    """The vectors of a reply in the order of the texts, [N, H]."""
    try:
        entries = sorted(reply["data"], key=lambda entry: entry.get("index", 0))
        rows = [entry["embedding"] for entry in entries]
        lengths = sorted(set(map(len, rows)))
        vectors = np.array(rows, np.float32) if len(lengths) == 1 else np.empty((len(rows), 0), np.float32)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{url}: the reply has no list `data` with an `embedding` of floats each.") from error
    if len(rows) != count:
        raise InputError(f"{url}: {len(rows)} vectors for {count} texts. It is no embeddings endpoint.")
    if vectors.ndim != 2 or vectors.size == 0 or not np.isfinite(vectors).all():
        raise InputError(f"{url}: the vectors are not finite numbers of one dimension (lengths {lengths}).")
    return vectors
