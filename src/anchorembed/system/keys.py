"""API keys are read from environment variables, and never shown or written."""

import os
import urllib.request
from email.message import Message
from typing import IO

from anchorembed.errors import InputError


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
