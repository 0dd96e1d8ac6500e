"""Fixtures that every test may ask for."""

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
