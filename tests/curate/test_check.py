"""What is found in a data set, on pairs whose faults are known."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from anchorembed.api import check as check_recipe
from anchorembed.curate.check import check, report
from anchorembed.data.store import SourceFile, open_store
from anchorembed.errors import InputError
from anchorembed.model.embedder import Embedder
from anchorembed.model.template import Prompts
from anchorembed.recipe_file import parse_recipe

ROWS = [
    {"query": "read a file", "positive": "open it first"},
    {"query": "read a  FILE", "positive": "Open it first"},  # the pair again, but for case and space
    {"query": "read a file", "positive": "use a table"},  # its query again
    {"query": "sort rows", "positive": "open it first"},  # its positive again
    {"query": "same text", "positive": "Same  text"},
    {"query": "list values", "positive": "a list", "negative": ["A list", "no"]},
    {"query": "write a row", "positive": "x" * 300},
    {"query": "from a test", "positive": "harmless"},
    {"query": "harmless", "positive": "Title. The document, itself"},
    {"query": "", "positive": "one-sided"},
    {"query": "one-sided"},
]
EXPECTED = {
    "repeated pair": [2],
    "repeated query": [3],
    "repeated positive": [4],
    "query is positive": [5],
    "negative is positive": [6],
    "text of a test": [8, 9],
}


@pytest.fixture
def tests(tmp_path: Path) -> Path:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": "d", "title": "Title", "text": "The document itself"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "From a test"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    return folder


def lines(examples: list[str]) -> list[int]:
    return [int(example.split(":")[1]) for example in examples]


def test_every_fault_is_counted_with_its_lines(tmp_path: Path, embedder: Embedder, tests: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    store = open_store([SourceFile("a", path)], tmp_path / "cache", skip_bad=True)
    done: list[int] = []
    (found,) = check(store, embedder.pairs, Prompts(), [tests], done.append)
    assert {name: lines(finding.examples) for name, finding in found.findings.items()} == EXPECTED
    assert {name: finding.count for name, finding in found.findings.items()} == {
        name: len(expected) for name, expected in EXPECTED.items()
    }
    assert (found.pairs, found.negatives, sum(done)) == (9, 2, 9)
    assert sum(found.dropped.values()) == 2
    assert any("empty" in reason for reason in found.dropped)
    assert found.document.limit == 48
    assert found.document.cut == pytest.approx(1 / 9)
    assert found.document.percentiles[100] == embedder.pairs.count(["x" * 300])[0]
    shown = report(found)
    assert "dropped 1: " in shown
    assert "text of a test 2 (22.2%)" in shown


def test_examples_are_few_and_counts_are_not(tmp_path: Path, embedder: Embedder) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(10 * (json.dumps(ROWS[0]) + "\n"))
    (found,) = check(open_store([SourceFile("a", path)], tmp_path / "cache"), embedder.pairs, Prompts())
    assert (found.findings["repeated pair"].count, len(found.findings["repeated pair"].examples)) == (9, 3)
    assert found.findings["text of a test"].count == 0


def test_a_test_that_is_not_there_is_an_error(tmp_path: Path, embedder: Embedder) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(InputError, match="no such file"):
        list(
            check(
                open_store([SourceFile("a", path)], tmp_path / "cache"), embedder.pairs, Prompts(), [tmp_path / "none"]
            )
        )


def test_tests_that_are_no_files_are_named(
    tmp_path: Path, tiny_folder: Path, tests: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"query": "a", "positive": "The document itself"}) + "\n")
    recipe = parse_recipe(
        {
            "data": {"sources": [{"name": "a", "path": str(path)}]},
            "model": {"name": str(tiny_folder)},
            "output": str(tmp_path / "run"),
            "compare": {"collections": {"Some": [str(tests), "SciFact"]}},
        }
    )
    caplog.set_level("INFO", "anchorembed.api")
    (found,) = check_recipe(recipe)
    assert "these tests are no local files, so pairs are not compared with them: SciFact" in caplog.messages
    assert found.findings["text of a test"].count == 1


def test_texts_are_counted_by_a_saved_model_s_own_template(tmp_path: Path, embedder: Embedder) -> None:
    """One whose header is longer than what would be derived."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"query": "sort", "positive": "sorted"}\n', encoding="utf-8")
    folder = tmp_path / "model"
    values = {"data": {"sources": [{"name": "p", "path": str(pairs)}]}, "output": str(tmp_path)}
    counted = []
    for header in ("", "sort sort sort sort "):
        template = replace(embedder.metadata.template, header=embedder.metadata.template.header + header)
        metadata = replace(embedder.metadata, template=template)
        Embedder(embedder.backbone, embedder.tokenizer, metadata).save(folder)
        (found,) = check_recipe(parse_recipe(values | {"model": {"name": str(folder)}}))
        counted.append(max(found.query.percentiles.values()))
    assert counted[1] >= counted[0] + 4


def test_a_limit_above_the_models_positions_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"query": "sort", "positive": "sorted"}\n', encoding="utf-8")
    data = {"sources": [{"name": "p", "path": str(pairs)}], "document_tokens": 1024}
    values = {"data": data, "model": {"name": str(tiny_folder)}, "output": str(tmp_path)}
    with pytest.raises(InputError, match=r"data\.document_tokens: 1024 is above 512, the max_position_embeddings"):
        list(check_recipe(parse_recipe(values)))
