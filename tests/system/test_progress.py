"""Names are shown as they are, and the bar of training shows the chosen metrics."""

import pytest

from anchorembed.system.progress import metrics_note, progress_bar


def test_brackets_in_a_name_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as bar:
        bar.add_task("embedding for model[x]/[red]run", total=3, note="of [bold]pairs")
    shown = capsys.readouterr().err
    assert "model[x]/[red]run" in shown
    assert "of [bold]pairs" in shown


def test_the_note_has_the_chosen_metrics_in_their_order() -> None:
    metrics = {"tokens": 12.0, "held_out_accuracy": 0.5, "loss": 1.23456, "learning_rate": 1e-4}
    assert metrics_note(metrics) == "loss 1.235  held_out_accuracy 0.500"
    assert metrics_note({}) == ""
