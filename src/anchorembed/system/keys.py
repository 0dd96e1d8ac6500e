"""API keys are read from environment variables, and never shown or written; HTTP requests that carry them."""

import logging
import os
import urllib.request
from email.message import Message
from typing import IO
from urllib.parse import urlsplit

from anchorembed.errors import InputError

_log = logging.getLogger(__name__)
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
LONGEST_PAUSE = 60.0  # seconds before a request is repeated
TEMPORARY = (408, 409, 425, 429, 502, 503, 504)  # HTTP statuses after which a request is repeated


def key_of(variable: str) -> str:
    """The key in an environment variable, without white space around it; empty if the variable is not set.

    Raises:
        InputError: if the key cannot be sent in an HTTP header; the message does not show it.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{variable}: it holds characters that no key has. Set it to the key alone.")
    return key


def json_headers(variable: str) -> dict[str, str]:
    """HTTP headers of a JSON request, with the key in an environment variable if it is set; raises as `key_of` does."""
    key = key_of(variable)
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would send the key to another server."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        """Follow no redirect."""


def opener_for(url: str, variable: str) -> urllib.request.OpenerDirector:
    """An opener for an address: it follows no redirect, and sends requests for this machine to no proxy.

    A warning says if the key in an environment variable would be sent to another machine without encryption.
    """
    parts = urlsplit(url)
    is_local = parts.hostname in _LOOPBACK
    if parts.scheme == "http" and not is_local and key_of(variable):
        _log.warning("%s has no encryption, and the key of %s is sent over it. Use https.", url, variable)
    return urllib.request.build_opener(NoRedirect, *([urllib.request.ProxyHandler({})] if is_local else []))


def pause_asked(headers: Message) -> float:
    """Seconds that a server asks to wait before the next try."""
    try:
        return float(headers.get("Retry-After", 0))
    except ValueError:  # a date
        return 0.0
