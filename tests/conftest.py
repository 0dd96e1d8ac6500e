"""Fixtures that every test may ask for."""

import logging
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from anchorembed.model.embedder import Embedder
from anchorembed.model.tokens import Lengths
from tiny import save_tiny


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--limit", type=float, help="fail a test that takes more seconds, unless it is marked slow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with most slow tests come first, so that no process is left alone with one at the end."""
    marks = ("slow", "default_model")
    slow = Counter(item.path for item in items if any(map(item.get_closest_marker, marks)))
    items.sort(key=lambda item: -slow[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    limit = item.config.getoption("--limit")
    if limit and report.passed and call.duration > limit and not item.get_closest_marker("slow"):
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid}: its {call.when} took {call.duration:.1f} s, above {limit:g}. "
            "Make it faster, or mark it with @pytest.mark.slow, which `make quick` leaves out."
        )
    return report


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "default_model" not in request.keywords:
        monkeypatch.setenv("ANCHOREMBED_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _logger_restored() -> Iterator[None]:
    """The command line has the package's messages printed from then on: not in other tests."""
    log = logging.getLogger("anchorembed")
    level, handlers = log.level, [*log.handlers]
    yield
    log.setLevel(level)
    log.handlers[:] = handlers


@pytest.fixture
def embedder(tiny_folder: Path) -> Embedder:
    return Embedder.load(tiny_folder, precision="float32", lengths=Lengths(24, 48))


@pytest.fixture
def said(_logger_restored: None) -> list[str]:
    """Messages that the package logs in this process, as they come."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("anchorembed").addHandler(handler)
    logging.getLogger("anchorembed").setLevel(logging.INFO)
    return messages
