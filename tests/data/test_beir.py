"""BEIR folders as retrieval tests and as pairs; every fault of their judgements names its file and line."""

import gzip
from pathlib import Path

import pytest

from anchorembed.data.beir import read_collection
from anchorembed.data.documents import Document
from anchorembed.data.pairs import read_pairs
from anchorembed.errors import InputError
from text_files import CURE, beir, fault, texts


def test_a_collection_keeps_the_queries_with_something_to_find(tmp_path: Path) -> None:
    folder = beir(tmp_path / "set", "q1\td1\t2\nq1\td2\t0\n2\td3\t-1\r\n\n2\td1\t1\nq3\td2\t0\n")
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress((folder / "corpus.jsonl").read_bytes()))
    (folder / "corpus.jsonl").unlink()
    collection = read_collection(folder)
    assert collection.name == "set"
    assert collection.documents == (Document("d1", "T\none"), Document("d2", "two"), Document("d3", ""))
    assert collection.queries == (Document("q1", "first"), Document("2", "second"))
    assert collection.qrels == {"q1": {"d1": 2, "d2": 0}, "2": {"d3": -1, "d1": 1}}


@pytest.mark.parametrize(
    ("judgements", "message"),
    [
        ("q1\td1\t1\nq9\td1\t1\n", "test.tsv:3: query 'q9' is not in queries.jsonl. Add it, or remove the line."),
        ("q1\td9\t0\n", "test.tsv:2: document 'd9' is not in corpus.jsonl. Add it, or remove the line."),
        ("q1\td1\t1.0\n", "test.tsv:2: the score '1.0' is not an integer. Write 0, 1, 2, ..."),
        ("q1 d1 1\n", "test.tsv:2: 1 fields, not 3. Write query id, document id and score, separated by tabs."),
        ("q1\td1\t1\nq1\td1\t2\n", "test.tsv:3: query 'q1' and document 'd1' have two scores. Keep one."),
        ("q1\td1\t0\n", "test.tsv: no judgement above 0. Give at least one relevant document."),
    ],
)
def test_bad_judgements(tmp_path: Path, judgements: str, message: str) -> None:
    folder = beir(tmp_path, judgements)
    with pytest.raises(InputError) as caught:
        read_collection(folder)
    assert str(caught.value) == f"{folder}/qrels/{message}"


def test_judgements_need_their_header_and_every_file(tmp_path: Path) -> None:
    folder = beir(tmp_path / "a", "q1\td1\t1\n", header="")
    with pytest.raises(InputError, match=r"test\.tsv:1: the header is \['q1', 'd1', '1'\]\. Write \['query-id'"):
        read_collection(folder)
    with pytest.raises(InputError, match=r"dev\.tsv: no such file\. Splits there: test\."):
        read_collection(folder, "dev")
    (folder / "queries.jsonl").unlink()
    with pytest.raises(InputError, match=r"no queries\.jsonl or queries\.jsonl\.gz"):
        read_collection(folder)
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        read_collection(tmp_path / "nowhere")


def test_pairs_of_a_beir_folder_are_its_positive_judgements(tmp_path: Path) -> None:
    folder = beir(tmp_path, "q3\td2\t1\n", split="all")
    assert texts(read_pairs(folder)) == [("third", "two", ())]
    beir(tmp_path, "q1\td1\t2\nq1\td2\t0\n2\td2\t1\n", split="train")
    assert texts(read_pairs(folder)) == [("first", "T\none", ()), ("second", "two", ())]
    assert [pair.line for pair in read_pairs(folder)] == [2, 4]


def test_bad_judgements_of_pairs_can_be_skipped(tmp_path: Path) -> None:
    folder = beir(tmp_path, "q1\td3\t1\nq9\td1\t1\nq1\td9\t1\nq1\td1\t1\n", split="train")
    assert fault(folder) == f'{folder}/qrels/train.tsv:2: "positive" is empty. {CURE}'
    told: list[str] = []
    assert [pair.line for pair in read_pairs(folder, on_skip=told.append)] == [5]
    assert [message.removeprefix(f"{folder}/qrels/") for message in told] == [
        'train.tsv:2: "positive" is empty.',
        "train.tsv:3: query 'q9' is not in queries.jsonl.",
        "train.tsv:4: document 'd9' is not in corpus.jsonl.",
    ]


def test_pairs_of_a_beir_folder_with_several_splits_but_no_train(tmp_path: Path) -> None:
    beir(tmp_path, "q1\td1\t1\n", split="dev")
    folder = beir(tmp_path, "q1\td1\t1\n")
    assert fault(folder) == f"{folder}/qrels: no split 'train' to read pairs of. Rename one of: dev, test."
    (folder / "qrels" / "dev.tsv").unlink()
    assert (
        fault(folder) == f"{folder}/qrels: no split 'train' to read pairs of. Rename one of: test."
    )  # not to train on
