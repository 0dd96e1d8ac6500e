"""The recipe of pairs alone names its sources by their files."""

from pathlib import Path

from anchorembed.train.default_recipe import recipe_of_pairs
from tiny import write_pairs


def test_a_hidden_file_is_named_by_its_path(tmp_path: Path) -> None:
    path = str(write_pairs(tmp_path / ".x.jsonl"))
    (source,) = recipe_of_pairs([path], "base", tmp_path / "run").data.sources
    assert source.name == path
