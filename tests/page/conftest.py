"""A finished run of a tiny model, whose texts must be escaped, and the page of it.

The model was named by a relative path, from another working folder than that of the tests.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from anchorembed.page.contents import Page
from anchorembed.page.run_contents import page_of_run
from anchorembed.recipe_file import parse_recipe
from anchorembed.recipe_schema import Recipe
from anchorembed.train.kept_recipe import with_absolute_paths
from anchorembed.train.run import train
from tiny import recipe_values, write_pairs

EVIL = '<b>&"'


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Recipe]:
    folder = tmp_path_factory.mktemp("page")
    path = write_pairs(folder / "pairs.jsonl", 120)
    pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [
        json.dumps({"query": f"{EVIL} {pair['query']}", "positive": f"{pair['positive']} {EVIL}"}) for pair in pairs
    ]
    path.write_text("\n".join(rows), encoding="utf-8")
    stage = {"steps": 4, "batch_size": 8, "warmup_steps": 1, "evaluate_every": 2}
    values = recipe_values(path, Path(tiny_folder.name), folder / "run") | {"reconstruct": stage, "contrast": stage}
    values["data"] |= {"instruction": "find the text", "query_tokens": 64}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANCHOREMBED_CACHE", str(folder / "cache"))
        recipe = parse_recipe(values)
        with pytest.MonkeyPatch.context() as elsewhere:
            elsewhere.chdir(tiny_folder.parent)
            train(recipe)
            recipe = with_absolute_paths(recipe)
        yield recipe


@pytest.fixture(scope="session")
def page(run: Recipe) -> Page:
    return page_of_run(run.output)[0]
