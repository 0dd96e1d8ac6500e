"""Data sets on the hub: a stand-in on loopback, several versions, what is there is named where something is not."""

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pytest

from anchorembed.data import hub as reading
from anchorembed.data.hub import HubDataset, located
from anchorembed.data.pairs import content_of, read_pairs
from anchorembed.data.rows import SAVE_AS_UTF8
from anchorembed.data.store import SourceFile, open_store
from anchorembed.errors import InputError
from hub_stand_in import Hub, hub_on_loopback
from text_files import fault, lines, texts

FIRST, SECOND = f"{1:040}", f"{2:040}"
CONFIGS = b"""---
configs:
- {config_name: small, data_files: small/*.jsonl}
- {config_name: large, data_files: large/*.jsonl}
---
"""


def rows(count: int, **more: object) -> bytes:
    made = [{"anchor": f"query {n}", "positive": f"answer {n}", "negative_1": "no", **more} for n in range(count)]
    return "".join(json.dumps(row) + "\n" for row in made).encode()


def parquet(count: int) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"query": [f"query {n}" for n in range(count)], "positive": ["answer"] * count})
    pa.parquet.write_table(table, sink, row_group_size=1000)
    return bytes(sink.getvalue().to_pybytes())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub where ``some/pairs`` has two splits, and ``some/configs`` two configurations."""
    with hub_on_loopback() as started:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", started.url)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", started.url)
        template = f"{started.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        started.sets["some/pairs"] = [{"data/train.jsonl": rows(5, extra=1), "data/test.jsonl": rows(2)}]
        started.sets["some/configs"] = [{"README.md": CONFIGS, "small/x.jsonl": rows(3), "large/x.jsonl": rows(4)}]
        started.sets["some/parquet"] = [{"only.parquet": parquet(3000)}]
        reading._commit.cache_clear()
        yield started
    reading._commit.cache_clear()


@pytest.mark.slow
def test_a_split_is_read_as_a_file_is(hub: Hub, said: list[str]) -> None:
    pairs = list(read_pairs("hf://some/pairs", source="s"))
    assert texts(pairs) == [(f"query {n}", f"answer {n}", ("no",)) for n in range(5)]
    assert [(pair.source, pair.line) for pair in pairs] == [("s", n) for n in range(1, 6)]
    assert said == ["hf://some/pairs: columns that are not used: 'extra'"]
    assert len(list(read_pairs("hf://some/pairs@test"))) == 2
    assert len(list(read_pairs("hf://some/configs:small"))) == 3
    assert len(list(read_pairs("hf://some/configs:large@train"))) == 4
    assert [pair.line for pair in read_pairs("hf://some/parquet")] == [*range(1, 3001)]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://some/none", "hf://some/none: the hub has no such data set, or it is private. Check the name"),
        ("hf://some/pairs@dev", "hf://some/pairs@dev: no split 'dev'. Splits there: train, test."),
        ("hf://some/pairs@tets", "Did you mean 'test'?"),
        ("hf://some/pairs:x", "Available: ['default']"),
        ("hf://some/configs", "available configs: ['small', 'large']). A configuration is written after a colon"),
        ("hf://some/configs:smal", "BuilderConfig 'smal' not found. Available: ['small', 'large']"),
        ("hf://some/pairs#v9", "hf://some/pairs: the hub has no revision 'v9' of it."),
        ("hf://pairs", "hf://pairs: not of the form hf://owner/name[:config][@split][#revision]. Write it so."),
        ("hf://../pairs", "not of the form"),
        ("hf://some/pairs/data/train.jsonl", "not of the form"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(hub: Hub, address: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        list(read_pairs(address))
    assert message in str(caught.value)


@pytest.mark.slow
def test_wrong_columns_bad_rows_and_damaged_files_are_named(hub: Hub) -> None:
    hub.sets["some/torn"] = [{"train.jsonl": b'{"anchor": "a'}]
    hub.sets["some/bad"] = [{"train.jsonl": b'{"q": "a"}\n'}]
    assert fault("hf://some/bad").startswith('hf://some/bad: no "query" or "anchor" and no "positive" ')
    hub.sets["some/bad"].append({"train.jsonl": rows(2) + b'{"anchor": "", "positive": "x"}\n'})
    assert fault(f"hf://some/bad#{SECOND}").startswith(f'hf://some/bad#{SECOND}:3: "anchor" is empty.')
    assert len(list(read_pairs(f"hf://some/bad#{SECOND}", on_skip=[].append))) == 2
    assert "hf://some/torn:1: cannot be read (" in fault("hf://some/torn")
    hub.sets["some/latin"] = [{"train.csv": "query,positive\ncafé,x\n".encode("latin-1")}]
    assert fault("hf://some/latin") == f"hf://some/latin: the text is not valid UTF-8.{SAVE_AS_UTF8}"


@pytest.mark.slow
def test_a_new_version_is_read_anew_and_an_old_one_where_it_is_named(hub: Hub, tmp_path: Path) -> None:
    def opened(address: str) -> int:
        reading._commit.cache_clear()  # as in another process
        return len(open_store([SourceFile("a", address)], tmp_path / "pairs"))

    assert opened("hf://some/pairs") == 5
    assert content_of("hf://some/pairs") == f"hf://some/pairs#{FIRST}"
    asked = len([line for line in hub.asked if "train.jsonl" in line])
    assert opened("hf://some/pairs") == 5
    assert len([line for line in hub.asked if "train.jsonl" in line]) == asked, "read from the cache"
    hub.sets["some/pairs"].append({"data/train.jsonl": rows(7)})
    assert opened("hf://some/pairs") == 7
    assert content_of("hf://some/pairs") == f"hf://some/pairs#{SECOND}"
    assert opened(f"hf://some/pairs#{FIRST}") == 5


def test_without_the_hub_the_version_read_last_is_used(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    source = SourceFile("a", "hf://some/pairs")
    open_store([source], tmp_path / "pairs")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    reading._commit.cache_clear()
    assert len(open_store([source], tmp_path / "pairs")) == 5
    assert f"the hub cannot be reached, so the version read last is taken: {FIRST}" in said[-1]
    with pytest.raises(InputError, match=r"hf://other/set: the hub cannot be reached .* was never read"):
        list(read_pairs("hf://other/set"))


def test_a_folder_as_on_the_hub_is_read_and_one_of_the_same_name_is_not(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "some" / "pairs"
    lines(copy / "data" / "train-0.jsonl", {"query": "a", "pos": ["b", "c"], "neg": ["d"]})
    lines(copy / "data" / "test-0.jsonl", {"query": "x", "pos": ["y"], "neg": []})
    assert texts(read_pairs(copy)) == [("a", "b", ("d",)), ("a", "c", ("d",))]
    monkeypatch.chdir(tmp_path)
    assert "hf://some/pairs: some/pairs is a path here, too. Give the path" in fault("hf://some/pairs")


def test_an_address_is_written_as_it_is_read() -> None:
    for address in ("hf://a/b", "hf://a/b:c-d@train", "hf://a/b.c@test", "hf://a/b:c#v1", "hf://a/b@train#refs/pr/1"):
        assert str(located(address)) == address
    assert located("hf://a/b:c@d#e") == HubDataset("a/b", "c", "d", "e")
    assert located("a/b.jsonl") == Path("a/b.jsonl")


def test_a_folder_of_several_kinds_of_files_is_refused(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", {"query": "a", "positive": "p"})
    (tmp_path / ".hidden.csv").write_text("no pairs")
    assert texts(read_pairs(tmp_path)) == [("a", "p", ())]
    (tmp_path / "b.csv").write_text("query,positive\nb,p\n")
    assert "it holds .csv and .jsonl files" in fault(tmp_path)


def test_a_folder_of_csv_has_the_texts_that_its_files_have(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.csv").write_text("query,positive,negative\na,NA,None\nb,null,n/a\nc,p,\n")
    assert texts(read_pairs(folder)) == [("a", "NA", ("None",)), ("b", "null", ("n/a",)), ("c", "p", ())]
    assert texts(read_pairs(folder)) == texts(read_pairs(folder / "a.csv"))


MIXED = [
    {"query": "a", "positive": "p", "negative": "n"},
    {"query": "b", "positive": 1969},
    {"anchor": "c", "pos": ["q", "r"], "neg": ["m"]},
    {"query": "d", "positive": "2024-01-01", "negative": ["n", "m"]},
]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("a.jsonl", MIXED),
        ("a.jsonl", ['{"query": "a", "positive": "p"', *MIXED]),
        ("a.csv", ["query,positive,negative", "how long,two years, or three,a day", "why,1969,no", "short,row"]),
        ("a.tsv", ["query\tpositive", 'who said it\t"To be or not', 'where is it\tin the 5" drawer', "why\tbecause"]),
    ],
)
def test_a_folder_has_the_pairs_and_faults_that_its_files_have(
    tmp_path: Path, name: str, rows: Sequence[str | Mapping[str, object]]
) -> None:
    """The readers of datasets encode columns of mixed types as JSON, take surplus cells as an index, and join lines."""
    file = lines(tmp_path / name, *rows)
    lines(tmp_path / "train" / name, *rows)
    faults, in_folder = list[str](), list[str]()
    expected = texts(read_pairs(file, on_skip=faults.append))
    assert texts(read_pairs(tmp_path / "train", on_skip=in_folder.append)) == expected
    assert [text.replace("/train/", "/") for text in in_folder] == faults
    assert expected


@pytest.mark.slow
def test_texts_on_the_hub_are_not_changed_by_their_neighbours(hub: Hub) -> None:
    hub.sets["some/mixed"] = [{"train.jsonl": b'{"query": "a", "positive": "p"}\n{"query": "b", "positive": 1969}\n'}]
    assert "hf://some/mixed:1: cannot be read (" in fault("hf://some/mixed")
    hub.sets["some/commas"] = [{"train.csv": b"query,positive\nhow long,two years, or three\n"}]
    assert "hf://some/commas: the rows have more cells than the header. Put quotes" in fault("hf://some/commas")
    hub.sets["some/quotes"] = [{"train.tsv": b'query\tpositive\nwho\t"To be\nwhere\tin the 5" drawer\n'}]
    assert texts(read_pairs("hf://some/quotes")) == [("who", '"To be', ()), ("where", 'in the 5" drawer', ())]


@pytest.mark.slow
def test_csv_on_the_hub_has_the_texts_that_its_files_have(hub: Hub) -> None:
    """pandas, by which datasets reads it, takes such words for no value unless told."""
    words = ("NA", "null", "nan", "None", "n/a")
    table = "query,positive,negative\n" + "".join(f"{word},{word},{word}\n" for word in words) + "c,p,\n"
    hub.sets["some/words"] = [{"train.csv": table.encode()}]
    hub.sets["some/tabs"] = [{"train.tsv": table.replace(",", "\t").encode()}]
    expected = [*((word, word, (word,)) for word in words), ("c", "p", ())]
    assert texts(read_pairs("hf://some/words")) == expected
    assert texts(read_pairs("hf://some/tabs")) == expected


def test_a_folder_where_some_files_are_named_by_a_split_is_refused(tmp_path: Path) -> None:
    for name in ("train.jsonl", "more.jsonl"):
        (tmp_path / name).write_text('{"query": "a", "positive": "b"}\n')
    with pytest.raises(InputError, match=r"the name of more\.jsonl has no split.*train-more\.jsonl"):
        list(read_pairs(tmp_path))
    (tmp_path / "more.jsonl").rename(tmp_path / "train-more.jsonl")
    assert len(list(read_pairs(tmp_path))) == 2
    (tmp_path / "test.jsonl").write_text('{"query": "t", "positive": "u"}\n')
    assert {pair.query for pair in read_pairs(tmp_path)} == {"a"}


def write_files(folder: Path, names: Sequence[str]) -> Path:
    """Files of a pair each, whose query is the file's name."""
    for name in names:
        file = lines(folder / name, {"query": name, "positive": "p"})
        if name.endswith(".gz"):
            file.write_bytes(gzip.compress(file.read_bytes()))
    return folder


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["Train.jsonl", "Test.jsonl"], ["Train.jsonl"]),
        (["faq (train).jsonl", "faq (test).jsonl"], ["faq (train).jsonl"]),
        (["train.jsonl", "train-eval.jsonl", "test/a.jsonl", "a/test.jsonl"], ["train.jsonl"]),
        (["Train/b.JSONL", "old/train/a.jsonl"], ["Train/b.JSONL", "old/train/a.jsonl"]),
        (["B.JSONL", "[a]/x*.jsonl", "c.jsonl.gz"], ["B.JSONL", "[a]/x*.jsonl", "c.jsonl.gz"]),
        (["latest.jsonl", "notes.txt", "more.txt", "folder.py", "README.md"], ["latest.jsonl"]),
        (["data/all-00000-of-00002.jsonl", "data/all-00001-of-00002.jsonl"], None),
    ],
)
def test_a_folder_is_split_by_the_words_in_its_names(tmp_path: Path, names: list[str], read: list[str] | None) -> None:
    folder = write_files(tmp_path / "folder", names)
    assert [pair.query for pair in read_pairs(folder)] == (read or names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pairs-test.jsonl"], "no split 'train' to read pairs of. Rename one of: test."),
        (["Eval.jsonl"], "no split 'train' to read pairs of. Rename one of: eval."),
        (["data/de-00000-of-00001.jsonl", "data/en-00000-of-00001.jsonl"], "Rename one of: de, en."),
        (["a.parquet.gz"], "a.parquet.gz:1: not readable as Parquet"),
    ],
)
def test_a_folder_without_files_to_train_on_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    assert message in fault(write_files(tmp_path / "folder", names))


def test_splits_that_a_readme_configures_are_taken(tmp_path: Path) -> None:
    write_files(tmp_path, ["new/a.jsonl", "old/a.jsonl", "held/a.jsonl", "small/a.jsonl", "large/a.jsonl"])
    card = "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\n"
    (tmp_path / "README.md").write_text(card.format("[{split: train, path: new/*}, {split: test, path: held/*}]"))
    assert [pair.query for pair in read_pairs(tmp_path)] == ["new/a.jsonl"]
    (tmp_path / "README.md").write_text(card.format("[{split: test, path: held/*}]"))
    assert "no split 'train' to read pairs of. Rename one of: test." in fault(tmp_path)
    (tmp_path / "README.md").write_text(CONFIGS.decode())
    assert fault(tmp_path).endswith(" Give the folder of one configuration, or name each file.")
