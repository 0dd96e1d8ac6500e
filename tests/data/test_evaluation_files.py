"""Columns say what a test file asks; what is wrong is said with file and line."""

import gzip
import json
from pathlib import Path

import pytest

from anchorembed.api import mine
from anchorembed.data.evaluation_files import (
    Candidates,
    LabelledText,
    SentencePair,
    find_test_sets,
    read_test_set,
    stem,
)
from anchorembed.errors import InputError
from anchorembed.evaluate.find import find_tasks
from text_files import beir, fault

RERANK = {"query_id": "q7", "query": "sort", "positive": ["sorts"], "negative": ["opens", "reads"]}


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_query_without_an_id_has_its_line_number(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text(
        'query_id,query,positive,negative\n,q,"[""a""]","[""b""]"\nx,q,"[""a""]","[""b""]"\n'
    )
    rows = [RERANK | {"query_id": None}, {key: value for key, value in RERANK.items() if key != "query_id"}]
    for path, ids in ((tmp_path / "r.csv", ["2", "x"]), (lines(tmp_path / "r.jsonl", *rows), ["1", "2"])):
        assert [row.id for row in read_test_set(path).rows if isinstance(row, Candidates)] == ids


def test_each_kind_is_known_by_its_columns(tmp_path: Path) -> None:
    found = read_test_set(lines(tmp_path / "a_test.jsonl", RERANK))
    assert (found.name, found.kind) == ("a_test", "Reranking")
    assert found.rows == (Candidates("q7", "sort", ("sorts",), ("opens", "reads")),)
    (tmp_path / "b.tsv").write_text("sentence1\tsentence2\tscore\nx\ty\t2.5\n", encoding="utf-8")
    assert read_test_set(tmp_path / "b.tsv").rows == (SentencePair("x", "y", 2.5),)
    (tmp_path / "b.tsv").write_text('sentence1\tsentence2\tscore\n"x" y\t"z\t2.5\n', encoding="utf-8")
    assert read_test_set(tmp_path / "b.tsv").rows == (SentencePair('"x" y', '"z', 2.5),)
    (tmp_path / "c.csv").write_text("sentence1,sentence2,label\nx,y,1\n", encoding="utf-8")
    found = read_test_set(tmp_path / "c.csv")
    assert (found.kind, found.rows) == ("PairClassification", (SentencePair("x", "y", 1.0),))
    for header in ("text,label", "text,category"):
        (tmp_path / "d.csv").write_text(f'{header}\n"a, b",good\n', encoding="utf-8")
        assert read_test_set(tmp_path / "d.csv").rows == (LabelledText("a, b", "good"),)
    (tmp_path / "r.csv").write_text('query,positive,negative\nsort,"[""sorts""]","[""a"", ""b""]"\n', encoding="utf-8")
    assert read_test_set(tmp_path / "r.csv").rows == (Candidates("2", "sort", ("sorts",), ("a", "b")),)
    with gzip.open(tmp_path / "e.jsonl.gz", "wt", encoding="utf-8") as sink:
        sink.write(json.dumps({"text": "a", "label": 3}) + "\n")
    assert read_test_set(tmp_path / "e.jsonl.gz").rows == (LabelledText("a", "3"),)


def test_a_folder_has_its_files_whatever_the_case_of_their_suffix(tmp_path: Path) -> None:
    files = [lines(tmp_path / name, RERANK) for name in ("A.JSONL", "b.jsonl", "c_test.jsonl.GZ")]
    lines(tmp_path / "notes.txt")
    lines(tmp_path / "._A.JSONL", "as other systems write beside each file")
    (tmp_path / "older.csv").mkdir()
    assert sorted(find_test_sets(tmp_path)) == files
    assert [stem(file) for file in files] == ["A", "b", "c_test"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (RERANK | {"positive": []}, r'a\.jsonl:2: "positive" is an empty list'),
        (RERANK | {"negative": "one"}, r'a\.jsonl:2: "negative" is no list'),
        (RERANK | {"negative": "['a', 'b']"}, r'"negative" is a list as Python prints it\. Write it as JSON'),
        (RERANK | {"query": " "}, r'a\.jsonl:2: "query" is empty'),
        ({"text": "a", "label": "b"}, r"a\.jsonl:2: its columns are those of Classification"),
        ({"quary": "a"}, r"a\.jsonl:2: its columns are quary\. Give query, positive and negative; sentence1"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_test_set(lines(tmp_path / "a.jsonl", RERANK, row))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence1": "a", "sentence2": "b", "score": "high"}, "'high', not a number"),
        ({"sentence1": "a", "sentence2": "b", "score": float("nan")}, "nan, not a number"),
        ({"sentence1": "a", "sentence2": "b", "label": 2}, "2, neither 0 nor 1"),
    ],
)
def test_bad_values_are_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_test_set(lines(tmp_path / "a.jsonl", row))


def test_what_cannot_be_a_test_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="share 1 ids"):
        read_test_set(lines(tmp_path / "a.jsonl", RERANK, RERANK))
    with pytest.raises(InputError, match="no row"):
        read_test_set(lines(tmp_path / "b.jsonl"))
    (tmp_path / "c.txt").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="unknown format"):
        read_test_set(tmp_path / "c.txt")
    for name in ("b", "a"):
        beir(tmp_path / "several" / name, "q1\td1\t1\n")
    several = tmp_path / "several"
    with pytest.raises(InputError, match=f"It holds BEIR folders. Name one or more of: {several}/a, {several}/b."):
        find_tasks([str(several)])
    assert fault(several).endswith(f"It holds BEIR folders. Name one or more of: {several}/a, {several}/b.")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"s_test.jsonl": {"sentence1": "a", "sentence2": "b", "score": 1}}, "1 pair of sentences"),
        (
            {"c_test.jsonl": {"text": "a", "label": "x"}, "c_train.jsonl": {"text": "b", "label": "x"}},
            "at least two lab",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_before_it_is_embedded(
    files: dict[str, dict[str, object]], message: str, tmp_path: Path
) -> None:
    for name, row in files.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        find_tasks([str(tmp_path)])


def test_outputs_that_cannot_be_files_are_refused_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is a folder"):
        mine(tmp_path / "no-such-pairs.jsonl", tmp_path)
    with pytest.raises(InputError, match=r"mined\.csv: pairs are written as JSONL.*Name it \.jsonl"):
        mine(tmp_path / "no-such-pairs.jsonl", tmp_path / "mined.csv")


def test_columns_of_a_test_that_are_not_used_are_said(tmp_path: Path, said: list[str]) -> None:
    row = {"sentence1": "a", "sentence2": "b", "score": 1, "genre": "news", "label": 0}
    path = lines(tmp_path / "a.jsonl", row, row)
    read_test_set(path)
    assert said == [f"{path}: columns that are not used: 'genre', 'label'"]
