"""API keys, which are in environment variables, and in no message and no file."""

import os

from anchorembed.errors import InputError


def key_of(variable: str) -> str:
    """The key in an environment variable, without white space around it; empty where there is none.

    Raises:
        InputError: if no HTTP header can hold it; the message does not show it.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{variable}: it holds characters that no key has. Set it to the key alone.")
    return key
