"""Chat models that write: one loaded here, or one behind an OpenAI-compatible endpoint."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from http.client import HTTPException, IncompleteRead
from itertools import takewhile
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anchorembed.curate.prompt import Messages
from anchorembed.errors import InputError, first_line
from anchorembed.model.load import load_model, quiet
from anchorembed.model.metadata import find_metadata
from anchorembed.model.sentence_transformers_settings import find_embedder_settings
from anchorembed.model.template import special_pieces
from anchorembed.system.device import compute_dtype, find_device
from anchorembed.system.files import hash_texts
from anchorembed.system.keys import LONGEST_PAUSE, TEMPORARY, json_headers, opener_for, pause_asked

KEY_VARIABLE = "ANCHOREMBED_WRITER_KEY"
TOKENS_A_QUERY = 32  # limit of a reply, for each query

_AT_ONCE = 8  # requests
_LARGEST_REPLY = 1 << 22  # bytes
_TEMPORARY = (*TEMPORARY, 500)


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's reply, and the tokens it read and wrote; 0 if an endpoint does not say."""

    text: str
    tokens_in: int
    tokens_out: int


class Writer(Protocol):
    """A chat model."""

    @property
    def settings(self) -> str:
        """Name and settings that decide its replies, as text."""

    def reply(self, conversations: Sequence[Messages], most_tokens: int) -> list[Reply]:
        """Continue each conversation by at most ``most_tokens`` tokens."""


# --- A model in this process -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelWriter:
    """A causal language model in this process, loaded at the first reply; greedy at temperature 0.

    Thoughts are switched off, as they would be longer than a reply may be. Without a chat template the turns' texts are
    joined.

    Raises:
        InputError: if the model was trained as an embedder, and so writes no text.
    """

    name: str
    temperature: float = 0.3
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        if find_metadata(self.name) or find_embedder_settings(self.name):
            raise InputError(
                f"--base: {self.name} was trained as an embedder and writes no queries. Give --writer, too."
            )

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        device = find_device(self.device)
        half = compute_dtype("auto", device, "float32") == torch.bfloat16
        model, tokenizer = load_model(self.name, "bfloat16" if half else "float32", device)
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise InputError(f"--base: the tokenizer of {self.name} has no eos_token. Give --writer, too.")
        return model, tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, which pads on the left."""
        return self._loaded[1]

    @property
    def settings(self) -> str:
        """Name, temperature and seed."""
        return f"model {self.name} {self.temperature} {self.seed}"

    @torch.inference_mode()
    def reply(self, conversations: Sequence[Messages], most_tokens: int) -> list[Reply]:
        """Continue all conversations in one batch; the same conversations give the same replies."""
        model: Any = self._loaded[0]
        texts = [self._rendered(messages) for messages in conversations]
        chat = bool(self.tokenizer.chat_template)
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not chat)
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        ends = _ends(model, self.tokenizer)
        options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.temperature:
            options = {"do_sample": True, "temperature": self.temperature, "top_p": 0.95, "top_k": 0}
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices), quiet():
            torch.manual_seed(int(hash_texts([str(self.seed), *texts])[:15], 16))
            generated = model.generate(
                **inputs,
                max_new_tokens=most_tokens,
                eos_token_id=ends,
                pad_token_id=self.tokenizer.pad_token_id,
                **options,
            )
        read = inputs["attention_mask"].sum(1).tolist()
        rows = generated[:, inputs["input_ids"].shape[1] :].tolist()
        written = [list(takewhile(lambda token: token not in ends, row)) for row in rows]
        replies = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [Reply(*each) for each in zip(replies, read, map(len, written), strict=True)]

    def _rendered(self, messages: Messages) -> str:
        safe = [{**message, "content": self._without_specials(message["content"])} for message in messages]
        if not self.tokenizer.chat_template:
            return "\n\n".join(message["content"] for message in safe) + "\n\n"
        try:
            rendered = self.tokenizer.apply_chat_template(
                safe, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except Exception as error:  # a chat template is a program of the model's author: it can raise anything
            raise InputError(
                f"--base: the chat template of {self.name} refuses the prompt ({first_line(error)}). Change it by "
                "--prompt; some models take no system turn."
            ) from error
        opens_thoughts = str(rendered).rstrip().endswith("<think>")  # whatever enable_thinking is
        return f"{rendered}\n</think>\n\n" if opens_thoughts else str(rendered)

    def _without_specials(self, text: str) -> str:
        """A text in which names of special tokens are broken by a space, so that they are text."""
        for token in sorted(special_pieces(self.tokenizer), key=len, reverse=True):
            if len(token) > 2:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of tokens that end a reply."""
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*ids, tokenizer.eos_token_id) if token is not None})


# --- An endpoint -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EndpointWriter:
    """A model behind ``URL/chat/completions``; each request is tried up to ``tries`` times if it fails temporarily.

    The key is read from the environment variable ``ANCHOREMBED_WRITER_KEY``, and never shown or written.
    """

    url: str
    model: str
    temperature: float = 0.3
    seed: int = 0
    timeout: float = 120.0  # seconds of a request
    tries: int = 6
    pause: float = 2.0  # seconds before the second try, doubled before each later one
    _opener: urllib.request.OpenerDirector = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not _is_address(self.url):
            raise InputError(
                f"--writer: {self.url!r} is no http or https URL of ASCII characters. Write one such as "
                "http://host:8000/v1."
            )
        object.__setattr__(self, "_opener", opener_for(self.url, KEY_VARIABLE))

    @property
    def settings(self) -> str:
        """The model's name, temperature and seed; the same model may move to another address."""
        return f"endpoint {self.model} {self.temperature} {self.seed}"

    def reply(self, conversations: Sequence[Messages], most_tokens: int) -> list[Reply]:
        """Send a request for each conversation, eight at a time.

        Raises:
            InputError: if the endpoint refuses, keeps failing, or its answer is not a chat completion.
        """
        with ThreadPoolExecutor(_AT_ONCE, "writer") as pool:
            return list(pool.map(lambda messages: self._ask(messages, most_tokens), conversations))

    def _ask(self, messages: Messages, most_tokens: int) -> Reply:
        body = {"model": self.model, "messages": messages, "max_tokens": most_tokens}
        body |= {"temperature": self.temperature, "seed": self.seed}
        answer = self._post(json.dumps(body).encode())
        try:
            content = json.loads(answer)
            choice, usage = content["choices"][0], content.get("usage") or {}
            # Without content the limit was spent on thoughts, which some endpoints take out.
            text = choice["message"]["content"] or ("<think>" if choice.get("finish_reason") == "length" else "")
            if not isinstance(text, str):
                raise TypeError("the content is no text")
            return Reply(text, int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            shown = answer[:200].decode(errors="replace")
            raise InputError(f"--writer: {self._address} answers no chat completion: {shown!r}. Check it.") from error

    @property
    def _address(self) -> str:
        parts = urlsplit(self.url)
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        return parts._replace(path=f"{path}/chat/completions").geturl()

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self._address, body, json_headers(KEY_VARIABLE))  # noqa: S310 - checked above
        asked, fault = 0.0, ""
        for number in range(self.tries):
            if number:
                time.sleep(min(LONGEST_PAUSE, max(2 ** (number - 1) * self.pause, asked)))
            try:
                with self._opener.open(request, timeout=self.timeout) as answer:
                    content: bytes = answer.read(_LARGEST_REPLY)
                    if answer.length and len(content) < _LARGEST_REPLY:
                        raise IncompleteRead(content, answer.length)
                    return content
            except urllib.error.HTTPError as error:
                message = _start_of(error).decode(errors="replace")
                fault = f"HTTP {error.code} {' '.join(message.split())[:200]}"
                if error.code not in _TEMPORARY:
                    raise InputError(f"--writer: {self._address}: {fault}. {_cure(error.code)}") from error
                asked = pause_asked(error.headers)
            except (OSError, HTTPException) as error:  # no connection, a timeout, a connection that breaks
                asked, fault = 0.0, first_line(error)
        raise InputError(
            f"--writer: {self._address} failed {self.tries} times, at last: {fault}. Repeat the command when it works; "
            "what is written is kept."
        )


def _is_address(url: str) -> bool:
    """Whether a URL is of http or https, with a host and, if it has a port, a number for it."""
    try:
        parts = urlsplit(url)
        is_complete = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port, or of brackets
        return False
    return is_complete and url.isascii() and url.isprintable() and " " not in url


def _start_of(error: urllib.error.HTTPError) -> bytes:
    """The first bytes of what an endpoint says of an error; none if the connection breaks."""
    try:
        return error.read(500)
    except (OSError, HTTPException):
        return b""


def _cure(status: int) -> str:
    if status in (401, 403):
        return f"Set {KEY_VARIABLE} to a key that it takes."
    if status in (301, 302, 303, 307, 308):
        return "It points elsewhere, which is not followed. Give the address it points to."
    return "Check --writer and --writer-model."
