"""What the bar of training shows."""

from anchorembed.system.progress import metrics_note


def test_the_note_has_the_chosen_metrics_in_their_order() -> None:
    metrics = {"tokens": 12.0, "held_out_accuracy": 0.5, "loss": 1.23456, "learning_rate": 1e-4}
    assert metrics_note(metrics) == "loss 1.235  held_out_accuracy 0.500"
    assert metrics_note({}) == ""
