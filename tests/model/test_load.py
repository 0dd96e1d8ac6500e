"""What a download of a model's files prints."""

from pathlib import Path

import pytest
from huggingface_hub.utils import are_progress_bars_disabled

from anchorembed.errors import InputError
from anchorembed.model import load


def test_files_beside_a_model_come_without_a_bar(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disabled: list[bool] = []

    def downloaded(*_: object, **__: object) -> None:
        disabled.append(are_progress_bars_disabled())

    monkeypatch.setattr(load, "cached_file", downloaded)
    assert load.file_beside(str(tiny_folder), "modules.json") is None
    assert disabled == [True]
    assert not are_progress_bars_disabled()


def test_a_hub_model_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*_: object, **__: object) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")

    monkeypatch.setattr(load, "_hub_answers", lambda _: True)
    monkeypatch.setattr(load, "cached_file", gated)
    with pytest.raises(InputError, match=r"'owner/name' cannot be loaded .*: You are trying to access a gated repo\. "):
        load.file_beside("owner/name", "README.md")


@pytest.mark.parametrize("named", ["faq", "faq/contrast"])
def test_a_run_folder_is_refused_with_the_model_in_it(named: str, tmp_path: Path) -> None:
    model = tmp_path / "faq" / "contrast" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    with pytest.raises(InputError, match=f"no config.json. Name {model}."):
        load.load_config(str(tmp_path / named))
