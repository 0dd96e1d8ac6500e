"""Names are shown as they are, and the bar of training shows the chosen metrics."""

import io

import pytest
from rich.console import Console

from anchorembed.system import progress
from anchorembed.system.progress import SHOWN, bars_on_terminals_only, counting_bar, metrics_note, progress_bar


def test_brackets_in_a_name_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as bar:
        bar.add_task("embedding for model[x]/[red]run", total=3, note="of [bold]pairs")
    shown = capsys.readouterr().err
    assert "model[x]/[red]run" in shown
    assert "of [bold]pairs" in shown


def test_nothing_is_cut_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=sink, force_terminal=True, width=80))
    with progress_bar() as bar:
        bar.add_task("reconstruct", total=2000, note=metrics_note(dict.fromkeys(SHOWN, -12.345)))
    shown = sink.getvalue()
    for word in ("reconstruct", "0/2000", "loss", "-12.345", "gain_q2d"):
        assert word in shown
    assert "…" not in shown


def test_what_is_no_terminal_gets_one_whole_line_or_none(capsys: pytest.CaptureFixture[str]) -> None:
    def shown() -> str:
        with progress_bar() as bar:
            task = bar.add_task("reconstruct", total=2000, note="")
            bar.update(task, completed=2000, note=metrics_note(dict.fromkeys(SHOWN, -12.345)))
        return capsys.readouterr().err

    whole = shown()
    assert whole.count("\n") == 1
    assert whole.startswith("reconstruct 2000/2000 loss -12.345  gain_q2d")
    assert whole.rstrip().endswith("held_out_accuracy -12.345")
    with bars_on_terminals_only():
        assert shown() == ""
    assert shown() == whole


def test_without_a_known_number_only_what_is_done_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for total, expected in ((None, "embedding 10"), (20, "embedding 10/20")):
        with counting_bar("embedding", total) as advance:
            advance(10)
        assert capsys.readouterr().err.strip() == expected
    with counting_bar("embedding", None):
        pass
    assert capsys.readouterr().err == ""


def test_the_note_has_the_chosen_metrics_in_their_order() -> None:
    metrics = {"tokens": 12.0, "held_out_accuracy": 0.5, "loss": 1.23456, "learning_rate": 1e-4}
    assert metrics_note(metrics) == "loss 1.235  held_out_accuracy 0.500"
    assert metrics_note({}) == ""
