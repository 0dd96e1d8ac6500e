"""Fixtures that every test may ask for."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from anchorembed.model.embedder import Embedder
from anchorembed.model.tokens import Lengths
from tiny import save_tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "slow" not in request.keywords:
        monkeypatch.setenv("ANCHOREMBED_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def embedder(tiny_folder: Path) -> Embedder:
    return Embedder.load(tiny_folder, precision="float32", lengths=Lengths(24, 48))


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Messages that the package logs in this process, as they come."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("anchorembed")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield messages
    log.removeHandler(handler)
    log.setLevel(level)
