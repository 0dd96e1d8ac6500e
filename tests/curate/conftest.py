"""Packages to harvest."""

from pathlib import Path

import pytest

from anchorembed.curate.docstrings import Package
from python_packages import write_packages


@pytest.fixture
def packages(tmp_path: Path) -> list[Package]:
    return write_packages(tmp_path / "site")
