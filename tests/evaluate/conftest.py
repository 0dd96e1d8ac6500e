"""Files to evaluate on."""

from pathlib import Path

import pytest

from judged_files import write_test_files


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_test_files(tmp_path / "data")
