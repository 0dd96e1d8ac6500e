"""A key that no header can hold is refused by its variable's name, and is in no message."""

import pytest

from anchorembed.curate.writers import KEY_VARIABLE, EndpointWriter
from anchorembed.errors import InputError
from anchorembed.export.clients import open_endpoint
from anchorembed.system.keys import key_of


def test_white_space_around_a_key_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", " secret\r\n")
    assert key_of("SOME_KEY") == "secret"
    assert not key_of("NO_SUCH_KEY")


@pytest.mark.parametrize("key", ["sec\rret", "sec\nret", "sécret→"])
def test_a_key_that_no_header_holds_is_refused_without_showing_it(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", key)
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(InputError, match="SOME_KEY: it holds characters") as by_verify:
        open_endpoint("http://127.0.0.1:9", api_key_env="SOME_KEY")
    with pytest.raises(InputError, match=f"{KEY_VARIABLE}: it holds characters") as by_writer:
        EndpointWriter("http://127.0.0.1:9/v1", "m").reply([[{"role": "user", "content": "x"}]], 5)
    assert not any("ret" in str(error.value) for error in (by_verify, by_writer))
