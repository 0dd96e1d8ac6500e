"""Learning curves are those of the logs."""

import json
from pathlib import Path

from anchorembed.page.learning_curves import learning_curves


def test_curves_are_those_of_the_logs(tmp_path: Path) -> None:
    log = tmp_path / "contrast" / "log.jsonl"
    log.parent.mkdir()
    entries = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "held_out_accuracy": 0.5}]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    loss, accuracy = learning_curves({"one": tmp_path, "none": tmp_path / "none"})
    assert loss.curves == {"one": [(1, 2.0), (2, 1.0)]}
    assert (accuracy.title, accuracy.curves) == ("Stage II: accuracy on held-out pairs", {"one": [(2, 0.5)]})
