"""What a download of a model's files prints."""

from pathlib import Path

import pytest
from huggingface_hub.utils import are_progress_bars_disabled

from anchorembed.model import load


def test_files_beside_a_model_come_without_a_bar(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disabled: list[bool] = []

    def downloaded(*_: object, **__: object) -> None:
        disabled.append(are_progress_bars_disabled())

    monkeypatch.setattr(load, "cached_file", downloaded)
    assert load.file_beside(str(tiny_folder), "modules.json") is None
    assert disabled == [True]
    assert not are_progress_bars_disabled()
