"""Names with square brackets are shown as they are."""

import pytest

from anchorembed.system.progress import progress_bar


def test_brackets_in_a_name_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as bar:
        bar.add_task("embedding for model[x]/[red]run", total=3, note="of [bold]pairs")
    shown = capsys.readouterr().err
    assert "model[x]/[red]run" in shown
    assert "of [bold]pairs" in shown
