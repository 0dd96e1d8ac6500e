"""Reading text: every format gives the same pairs, every fault names its file and line, and nothing is read ahead."""

import bz2
import gzip
import json
import lzma
import os
import threading
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from anchorembed.data.documents import read_corpus, read_texts
from anchorembed.data.evaluation_files import read_test_set
from anchorembed.data.pairs import TextPair, read_pairs
from anchorembed.data.rows import SAVE_AS_UTF8
from anchorembed.errors import InputError
from anchorembed.system.files import write_jsonl
from text_files import CURE, fault, lines, texts

GOOD = '{"query": "why", "positive": "because"}'
ROWS = [
    {"query": "why ☃", "positive": 'because, "so"', "negative": "no\nway"},
    {"query": "how", "positive": "  thus", "negative": None},
]
EXPECTED = [("why ☃", 'because, "so"', ("no\nway",)), ("how", "  thus", ())]

# Formats

CSV_TEXT = 'query,positive,negative,note\n"why ☃","because, ""so""","no\nway",1\n\nhow,  thus,,2\n'


def write_as(path: Path) -> Path:
    if path.name.endswith(".gz"):
        plain = write_as(path.with_suffix(""))
        path.write_bytes(gzip.compress(plain.read_bytes()))
        return path
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist([{"note": 1, **row} for row in ROWS]), path, row_group_size=1)
    elif path.suffix == ".csv":
        path.write_text(CSV_TEXT, encoding="utf-8")
    elif path.suffix == ".jsonl":
        lines(path, *ROWS)
    elif path.name == "dict":
        datasets.DatasetDict(
            train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:1])
        ).save_to_disk(path)
    elif path.name == "shuffled":
        datasets.Dataset.from_list(ROWS[::-1]).select([1, 0]).save_to_disk(path)
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return path


@pytest.mark.parametrize(
    "name", ["p.jsonl", "p.jsonl.gz", "P.JSONL", "p.csv", "p.csv.gz", "p.parquet", "saved", "dict", "shuffled"]
)
def test_every_format_gives_the_same_pairs(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "P.JSONL":
        lines(path, *ROWS)
    else:
        write_as(path)
    assert texts(read_pairs(path)) == EXPECTED


def test_quotes_in_tsv_are_letters(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.tsv", "query\tpositive\tnegative", '15" screen\t"so"\t', '"a\tb\tc" d')
    assert texts(read_pairs(path)) == [('15" screen', '"so"', ()), ('"a', "b", ('c" d',))]


def test_several_negatives_in_a_cell_are_json(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.csv", "query,positive,negatives", 'a,b,"[""c"", ""d""]"', "e,f,[g]", "h,i,[]")
    assert [pair.negatives for pair in read_pairs(path)] == [("c", "d"), ("[g]",), ()]


def test_a_pair_knows_its_source_and_where_it_begins(tmp_path: Path) -> None:
    rows = lines(tmp_path / "p.jsonl", "", GOOD, "  ", GOOD)
    assert [(pair.source, pair.line) for pair in read_pairs(rows, source="faq")] == [("faq", 2), ("faq", 4)]
    assert [pair.line for pair in read_pairs(write_as(tmp_path / "p.csv"))] == [2, 5]
    assert [pair.line for pair in read_pairs(write_as(tmp_path / "p.parquet"))] == [1, 2]


def test_given_scores_are_read(tmp_path: Path) -> None:
    rows = [
        {"query": "a", "positive": "b", "negatives": ["c", "d"], "scores": [2, -1.5, 0]},
        {"query": "e", "positive": "f", "negatives": None, "scores": None},
    ]
    assert [pair.scores for pair in read_pairs(lines(tmp_path / "p.jsonl", *rows))] == [(2.0, -1.5, 0.0), ()]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert [pair.scores for pair in read_pairs(tmp_path / "p.parquet")] == [(2.0, -1.5, 0.0), ()]
    path = tmp_path / "p.csv"
    path.write_text('query,positive,negative,scores\na,b,c,"[1, 0.5]"\nd,e,,\n', encoding="utf-8")
    assert [pair.scores for pair in read_pairs(path)] == [(1.0, 0.5), ()]


def test_rows_are_numbered_on_across_parquet_batches(tmp_path: Path) -> None:
    table = pa.table({"query": [f"q{at}" for at in range(3000)], "positive": ["p"] * 2999 + [" "]})
    pa.parquet.write_table(table, tmp_path / "p.parquet")
    assert fault(tmp_path / "p.parquet") == f'{tmp_path}/p.parquet:3000: "positive" is empty. {CURE}'


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv"])
def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path, name: str) -> None:
    content = f"{GOOD}\n{GOOD}\n" if name == "p.jsonl" else "query,positive\nwhy,because\nwhy,because\n"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    assert texts(read_pairs(tmp_path / name)) == [("why", "because", ())] * 2


def test_other_names_for_the_columns(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "p.jsonl",
        {"anchor": "a", "document": "b", "negatives": ["c", "d"], "id": 7},
        {"anchor": "a", "positive": "b", "negatives": "c"},
        {"query": "a", "document": "b", "negative": []},
        {"query": "a", "document": "b", "negatives": None},
    )
    assert texts(read_pairs(path)) == [("a", "b", ("c", "d")), ("a", "b", ("c",)), ("a", "b", ()), ("a", "b", ())]


N_TUPLE = {"anchor": "a", "positive": "b", "negative_1": "c", "negative_10": "e", "negative_2": "d", "margin": 3}


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".jsonl":
        return lines(path, *rows)
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    elif path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.parquet", "saved"])
def test_negatives_of_n_tuples_are_read_in_order_and_other_columns_said_once(
    tmp_path: Path, name: str, said: list[str]
) -> None:
    rows = [N_TUPLE, {**N_TUPLE, "negative_2": None}]
    path = write_rows(tmp_path / name, rows)
    assert [pair.negatives for pair in read_pairs(path)] == [("c", "d", "e"), ("c", "e")]
    assert said == [f"{path}: columns that are not used: 'margin'"]
    row = {**N_TUPLE, "negative": "x"}
    assert 'both "negative" and "negative_1" are given. Keep one of them.' in fault(
        write_rows(tmp_path / f"other {name}", [row])
    )


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.parquet", "saved"])
@pytest.mark.parametrize(
    ("column", "good", "bad"),
    [("label", 1, 0), ("label", True, False), ("score", 1.0, 0.2), ("score", 1, 3.8), ("label", "1", "entailment")],
)
def test_a_pair_that_is_labelled_as_none_does_not_train(
    tmp_path: Path, name: str, column: str, good: object, bad: object
) -> None:
    rows: list[dict[str, object]] = [{"query": "a", "positive": "b", column: value} for value in (good, None, bad)]
    path = write_rows(tmp_path / name, rows)
    message = fault(path)
    assert f'"{column}" is ' in message
    assert f'Keep the rows of label 1 alone, or remove the column "{column}" if all pairs are positives.' in message
    assert len(list(read_pairs(path, on_skip=[].append))) == 2
    assert len(list(read_pairs(write_rows(tmp_path / f"good {name}", rows[:2])))) == 2


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.parquet", "saved"])
def test_several_positives_are_as_many_pairs_each_with_its_score(tmp_path: Path, name: str) -> None:
    flag = {"query": "a", "pos": ["b", "c"], "neg": ["d", "e"], "pos_scores": [3.0, 2.5], "neg_scores": [0.5, -1.0]}
    if name == "p.csv":
        flag = {key: value if isinstance(value, str) else json.dumps(value) for key, value in flag.items()}
    assert list(read_pairs(write_rows(tmp_path / name, [flag]))) == [
        TextPair("a", "b", ("d", "e"), line=1 + (name == "p.csv"), scores=(3.0, 0.5, -1.0)),
        TextPair("a", "c", ("d", "e"), line=1 + (name == "p.csv"), scores=(2.5, 0.5, -1.0)),
    ]


def test_positives_negatives_and_scores_may_be_absent(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "p.jsonl",
        {"query": "a", "pos": ["b"], "neg": [], "pos_scores": None, "neg_scores": None},
        {"query": "a", "positives": ["b", "c"], "scores": [2, 1]},
        {"query": "a", "positive": "b", "negative": "c", "label": [7.5, -2]},  # as sentence-transformers distils
        {"query": "a", "positive": '["b"]'},  # a text
    )
    read = [(pair.positive, pair.negatives, pair.scores) for pair in read_pairs(path)]
    assert read == [("b", (), ()), ("b", (), (2.0,)), ("c", (), (1.0,)), ("b", ("c",), (7.5, -2.0)), ('["b"]', (), ())]


@pytest.mark.parametrize("cell", ["['c', 'd']", "[\"c\", 'd']", "['c' 'd']", "[ 'c'\n 'd']"])
def test_a_list_as_python_prints_it_is_no_text(tmp_path: Path, cell: str) -> None:
    rows: list[dict[str, object]] = [{"query": "a", "positive": "b", "negative": cell}]
    for name in ("p.csv", "p.jsonl", "p.parquet"):
        assert '"negative" is a list as Python prints it. Write it as JSON: ["a", "b"].' in fault(
            write_rows(tmp_path / name, rows)
        )


def test_a_layout_without_a_usable_pair_says_its_columns(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", {"question": "a", "answer": "b"}, {"question": "a", "answer": "b", "id": 1})
    with pytest.raises(InputError) as caught:
        list(read_pairs(path, on_skip=[].append))
    assert "no usable pair" in str(caught.value)
    assert "Columns there: 'question', 'answer', 'id'." in str(caught.value)
    assert f'{path}:1: no "query" or "anchor" and no "positive" or "document" here' in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize(
    ("name", "read"),
    [("p.jsonl", read_pairs), ("p.csv", read_pairs), ("c.jsonl", read_corpus), ("t.txt", read_texts)],
)
def test_utf16_is_named_for_what_it_is(
    tmp_path: Path, name: str, read: Callable[[Path], Iterable[object]], encoding: str
) -> None:
    path, packed = tmp_path / name, tmp_path / f"{name}.gz"
    path.write_bytes(f"{GOOD}\n".encode(encoding))
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for file in (path, packed):
        with pytest.raises(InputError, match=rf"{name}.*: the text is UTF-(16|32), not UTF-8\. Convert it: iconv -f"):
            list(read(file))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", gzip.compress(GOOD.encode(), mtime=0), "compressed by gzip, not text. Name it .gz."),
        ("p.csv", gzip.compress(CSV_TEXT.encode(), mtime=0), "compressed by gzip, not text. Name it .gz."),
        (
            "p.csv.gz",
            gzip.compress(gzip.compress(CSV_TEXT.encode(), mtime=0), mtime=0),
            "compressed by gzip, not text. Unpack it.",
        ),
        ("p.jsonl", bz2.compress(GOOD.encode()), "compressed by bzip2, not text. Unpack it."),
        ("p.jsonl", lzma.compress(GOOD.encode()), "compressed by xz, not text. Unpack it."),
        ("p.csv", b"PK\3\4 as of a spreadsheet", "compressed by zip, not text. Unpack it."),
    ],
    ids=["gzip jsonl", "gzip csv", "gzip twice", "bzip2", "xz", "zip"],
)
def test_a_compressed_file_is_named_for_what_it_is(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert fault(tmp_path / name) == f"{tmp_path / name}: the file is {message}"
    with pytest.raises(InputError, match="compressed by"):
        list(read_corpus((tmp_path / name).rename(tmp_path / name.replace("csv", "json"))))


@pytest.mark.parametrize(
    ("name", "header", "message"),
    [
        ("p.csv", "query;positive", "semicolons, not commas. Save it with commas between cells."),
        ("p.csv", '"query";"positive"', "semicolons, not commas. Save it with commas between cells."),
        ("p.csv", "query\tpositive", "tabs, not commas. Name it .tsv."),
        ("p.tsv", "query,positive", "commas, not tabs. Name it .csv."),
        ("p.tsv", "query;positive", "semicolons, not tabs. Save it with tabs between cells."),
    ],
)
def test_other_separators_are_named_for_what_they_are(tmp_path: Path, name: str, header: str, message: str) -> None:
    path = lines(tmp_path / name, header, header)
    assert fault(path) == f"{path}:1: the cells are separated by {message}"
    with pytest.raises(InputError, match="the cells are separated by"):
        read_test_set(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b'"query";"positive"\nx;y\n', "a.csv:1: the cells are separated by semicolons"),
        ("a.csv", "query,positive\nx,y\n".encode("utf-16"), "a.csv: the text is UTF-16"),
        ("a.jsonl", '{"query": "x", "positive": "y"}\n'.encode("utf-16"), "a.jsonl: the text is UTF-16"),
    ],
)
def test_a_file_in_a_folder_is_named_for_what_it_is(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_pairs(tmp_path, on_skip=[].append))


@pytest.mark.parametrize("rows", ["query,positive\nwhy,because\ncafé,b\n", "query,posé\nwhy,because\n"])
def test_csv_of_another_encoding_in_a_folder_is_named_with_its_line(tmp_path: Path, rows: str) -> None:
    lines(tmp_path / "train-1.csv", "query,positive", "a,b")
    (tmp_path / "train-2.csv").write_bytes(rows.encode("latin-1"))
    line = rows[: rows.index("é")].count("\n") + 1
    assert fault(tmp_path).startswith(f"{tmp_path}/train-2.csv:{line}: ")


def test_a_carriage_return_within_a_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b"query,pos\ritive\na,b\n")
    with pytest.raises(InputError, match=r"p\.csv:1: the row is not valid CSV"):
        list(read_pairs(tmp_path / "p.csv"))


def test_unused_columns_are_said_where_only_the_first_pairs_are_read(tmp_path: Path, said: list[str]) -> None:
    path = lines(tmp_path / "p.jsonl", *[{"query": "a", "positive": "b", "margin": 1}] * 3)
    assert len(list(islice(read_pairs(path), 2))) == 2
    assert said == [f"{path}: columns that are not used: 'margin'"]


# Bad rows

BAD_ROWS = [
    ('{"query": "a", "pos": []}', '"pos" is empty.'),
    ('{"query": "a", "positive": ["b", ""]}', '"positive" is empty.'),
    ('{"query": "a", "pos": ["b"], "positive": "c"}', 'both "positive" and "pos" are given. Keep one of them.'),
    (
        '{"query": "a", "pos": ["b"], "pos_scores": [1, 2]}',
        '"pos_scores" must be a list: a number for the positive, 1 here.',
    ),
    (
        '{"query": "a", "pos": ["b"], "neg": ["c"], "pos_scores": [1]}',
        '"pos_scores" is given without "neg_scores".',
    ),
    (
        '{"query": "a", "pos": ["b"], "scores": [1], "pos_scores": [1]}',
        'both "scores" and "pos_scores" are given. Keep one of them.',
    ),
    (
        '{"query": "a", "positive": "b", "scores": [1, 2]}',
        '"scores" must be a list: a number for the positive and for each negative, 1 here.',
    ),
    (
        '{"query": "a", "positive": "b", "scores": 1}',
        '"scores" must be a list: a number for the positive and for each negative, 1 here.',
    ),
    ('{"query": "a", "positive": "b", "scores": [NaN]}', '"scores" must hold numbers between -1e+06 and 1e+06.'),
    ('{"query": "a", "positive": "b", "scores": [true]}', '"scores" must hold numbers between -1e+06 and 1e+06.'),
    ('{"query": "why", "positive": ""}', '"positive" is empty.'),
    ('{"query": " \\t\\u00a0", "positive": "x"}', '"query" is empty.'),
    ('{"query": "why", "positive": 7}', '"positive" is a number, not text.'),
    ('{"query": null, "positive": "x"}', '"query" is null, not text.'),
    ('{"query": ["why"], "positive": "x"}', '"query" is a list, not text.'),
    ('{"query": "why", "positive": "x", "negative": ""}', '"negative" is empty.'),
    ('{"query": "why", "positive": "x", "negatives": ["a", " "]}', '"negatives" is empty.'),
    ('{"query": "why", "positive": "x", "negatives": ["a", {}]}', '"negatives" is an object, not text.'),
    ('{"query": "why", "positive": "x", "negatives": true}', '"negatives" is a boolean, not text.'),
    ('{"query": "why", "anchor": "x", "positive": "x"}', 'both "query" and "anchor" are given. Keep one of them.'),
    (
        '{"query": "why", "positive": "x", "negative": "x", "negatives": []}',
        'both "negative" and "negatives" are given. Keep one of them.',
    ),
    (
        '{"querry": "why", "positive": "x"}',
        "no \"query\" or \"anchor\" here, only 'querry', 'positive'. Did you mean 'query'?",
    ),
    (
        '{"query": "why", "docment": "x"}',
        "no \"positive\" or \"document\" here, only 'query', 'docment'. Did you mean 'document'?",
    ),
    ("{}", 'no "query" or "anchor" and no "positive" or "document" here, only nothing.'),
    ('{"query": "a \\ud83d b", "positive": "x"}', '"query" is not valid UTF-8 at character 3 (a lone surrogate).'),
    (
        '{"query": "why',
        "the line is not valid JSON (Unterminated string starting at, column 11).",
    ),
    ('["why", "x"]', "the line is a list, not a JSON object."),
    ("NaN", "the line is a number, not a JSON object."),
    ('{"query": "why", "positive": "caf\udce9"}', f"the line is not valid UTF-8.{SAVE_AS_UTF8}"),
]


@pytest.mark.parametrize(("row", "what"), BAD_ROWS)
def test_a_bad_line_is_named_with_its_cure_or_dropped_and_told(tmp_path: Path, row: str, what: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(f"{GOOD}\n{row}\n{GOOD}\n".encode(errors="surrogateescape"))
    assert fault(path) == f"{path}:2: {what} {CURE}"

    told: list[str] = []
    assert [pair.line for pair in read_pairs(path, on_skip=told.append)] == [1, 3]
    assert told == [f"{path}:2: {what}"]
    assert len(list(read_pairs(path, on_skip=[].append))) == 2


@pytest.mark.parametrize("row", ["[" * 100_000, '{"query": ' + "9" * 5000 + "}"])
def test_json_beyond_the_parser_is_a_bad_line(tmp_path: Path, row: str) -> None:
    path = lines(tmp_path / "p.jsonl", row, GOOD)
    assert "p.jsonl:1: the line's JSON is beyond what can be read" in fault(path)
    assert len(list(read_pairs(path, on_skip=[].append))) == 1


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("why", "the row has 1 cells, the header 2."),
        ("why,be\0cause", "the row holds a NUL byte."),
        ('why,"be"cause', "the row is not valid CSV (',' expected after '\"')."),
        ("caf\udce9,because", f'"query" is not valid UTF-8 at character 4 (byte 0xE9).{SAVE_AS_UTF8}'),
        ("why,", '"positive" is empty.'),
    ],
)
def test_bad_csv_rows(tmp_path: Path, row: str, what: str) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(f'query,positive\n"two\nlines",x\n{row}\nhow,thus\n'.encode(errors="surrogateescape"))
    assert fault(path) == f"{path}:4: {what} {CURE}"
    assert [pair.line for pair in read_pairs(path, on_skip=[].append)] == [2, 5]


def test_a_comma_without_quotes_is_told_by_its_cure(tmp_path: Path) -> None:
    more = 'p.csv:2: the row has 3 cells, the header 2. Put quotes around a cell that holds a comma ("one, two"), or'
    assert more in fault(lines(tmp_path / "p.csv", "query,positive", "why,because,so"))
    tsv = lines(tmp_path / "p.tsv", "query\tpositive", "why\tbecause\tso")
    assert fault(tsv) == f"{tsv}:2: the row has 3 cells, the header 2. {CURE}"


def test_an_unclosed_quote_is_told_by_the_line_it_opens_on(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.csv", "query,positive", "how,thus", 'why,"because', "x,y")
    assert "p.csv:3: the row of lines 3 to 4 is not valid CSV (unexpected end of data)" in fault(path)
    skipped: list[str] = []
    assert [pair.query for pair in read_pairs(path, on_skip=skipped.append)] == ["how"]
    assert [message.split(": ")[0] for message in skipped] == [f"{path}:3", f"{path}:4"]
    assert [pair.line for pair in read_pairs(path, on_skip=[].append)] == [2]


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.csv", "query,positive", f"how,{'long ' * 100_000}")
    assert len(next(read_pairs(path)).positive) == 500_000


def test_invalid_utf8_in_parquet_is_a_bad_row(tmp_path: Path) -> None:
    broken = pa.array([b"why", b"caf\xe9"]).view(pa.string())
    pa.parquet.write_table(pa.table({"query": broken, "positive": ["x", "y"]}), tmp_path / "p.parquet")
    assert "p.parquet:2: the row is not valid UTF-8." in fault(tmp_path / "p.parquet")
    assert len(list(read_pairs(tmp_path / "p.parquet", on_skip=[].append))) == 1


# Faults of a whole file, which --skip-bad does not mend


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            "question,documnt",
            ':1: no "query" or "anchor" and no "positive" or "document" here, only \'question\', \'documnt\'. '
            "Did you mean 'document'? Rename the columns, which the first line names, or add that line.",
        ),
        (
            "qery,positive",
            ":1: no \"query\" or \"anchor\" here, only 'qery', 'positive'. Did you mean 'query'? "
            "Rename the columns, which the first line names, or add that line.",
        ),
        (
            "query,positive,document",
            ':1: both "positive" and "document" are given. Keep one of them. '
            "Rename the columns, which the first line names, or add that line.",
        ),
        (
            "query,query,positive",
            ":1: a column name occurs twice among ['query', 'query', 'positive']. Rename or remove one of them.",
        ),
    ],
)
def test_wrong_columns_stop_the_reading(tmp_path: Path, header: str, message: str) -> None:
    path = lines(tmp_path / "p.csv", header, "a,b,c")
    assert fault(path) == f"{path}{message}"
    with pytest.raises(InputError):
        list(read_pairs(path, on_skip=[].append))


@pytest.mark.parametrize(
    ("columns", "renamed"),
    [
        (("question", "answer"), '"question" to "query" and "answer" to "positive"'),
        (("Response", "Prompt", "note"), '"Prompt" to "query" and "Response" to "positive"'),
        (("text1", "text2", "id"), '"text1" to "query" and "text2" to "positive"'),
        (("answer", "query"), '"answer" to "positive"'),
        (("title", "context", "question"), '"question" to "query" and "context" to "positive"'),
        (("frage", "antwort"), '"frage" to "query" and "antwort" to "positive"'),
        (("frage", "antwort", "note"), None),
        (("question", "id"), None),
        (("id", "antwort"), None),
        (("Where is it?", "Here it is."), None),
    ],
)
def test_columns_of_other_names_are_to_be_renamed_in_every_format(
    tmp_path: Path, columns: tuple[str, ...], renamed: str | None
) -> None:
    rows: list[dict[str, object]] = [dict.fromkeys(columns, "a")]
    lines(tmp_path / "p.jsonl", *rows)
    for name, separator in (("p.csv", ","), ("p.tsv", "\t")):
        lines(tmp_path / name, separator.join(columns), separator.join("a" for _ in columns))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    lines(tmp_path / "folder" / "p.jsonl", *rows)
    for name in ("p.jsonl", "p.csv", "p.tsv", "p.parquet", "saved", "folder"):
        said = fault(tmp_path / name)
        assert said.endswith(f" Rename {renamed}.") if renamed else 'Rename "' not in said
        with pytest.raises(InputError, match=f"Rename {renamed}" if renamed else "no "):
            list(read_pairs(tmp_path / name, on_skip=[].append))


def test_wrong_columns_in_parquet_and_saved_datasets(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"query": ["a"], "text": ["b"]}), tmp_path / "p.parquet")
    datasets.Dataset.from_list([{"query": "a", "text": "b"}]).save_to_disk(tmp_path / "saved")
    for name in ("p.parquet", "saved"):
        assert f"{name}: no \"positive\" or \"document\" here, only 'query', 'text'" in fault(tmp_path / name)


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.csv.gz"])
def test_a_gzip_file_cut_short_gives_what_it_holds_and_then_says_so(tmp_path: Path, name: str) -> None:
    rows = [f"{os.urandom(30).hex()},x" for _ in range(2000)]
    if name.startswith("p.jsonl"):
        rows = [json.dumps({"query": row, "positive": "x"}) for row in rows]
    else:
        rows.insert(0, "query,positive")
    data = gzip.compress("\n".join(rows).encode())
    path = tmp_path / name
    path.write_bytes(data[: len(data) // 2])
    read: list[TextPair] = []
    with pytest.raises(InputError, match=rf"{name}:\d+: the gzip data is cut short .*Copy the file again") as caught:
        read.extend(read_pairs(path, on_skip=[].append))
    assert 100 < len(read) < 1900
    assert str(caught.value).startswith((f"{path}:{read[-1].line + 1}:", f"{path}:{read[-1].line + 2}:"))

    path.write_bytes(data[:200] + bytes(50) + data[250:])
    assert "the gzip data is cut short or damaged" in fault(path)
    path.write_text("plain text", encoding="utf-8")
    assert "the gzip data is cut short or damaged (Not a gzipped file" in fault(path)


def test_files_that_are_not_what_their_name_says(tmp_path: Path) -> None:
    assert "p.parquet:1: not readable as Parquet" in fault(lines(tmp_path / "p.parquet", GOOD))
    lines(tmp_path / "saved" / "dataset_info.json", "{}")
    assert "saved: not readable as a saved dataset" in fault(tmp_path / "saved")
    datasets.Dataset.from_dict({"query": [], "positive": []}).save_to_disk(tmp_path / "empty")
    message = fault(tmp_path / "empty")  # older versions of datasets load it
    assert any(
        f"empty: {words}" in message for words in ("this saved dataset, or a split of it, has no rows", "no usable")
    )
    (tmp_path / "dir.jsonl").mkdir()
    with pytest.raises(InputError, match=r"dir\.jsonl: cannot be read \(Is a directory\)"):
        list(read_corpus(tmp_path / "dir.jsonl"))


def test_missing_and_unknown_files_are_told_at_once(tmp_path: Path) -> None:
    lines(tmp_path / "pairs.jsonl", GOOD)
    with pytest.raises(
        InputError, match=r"pair\.jsonl: no such file or folder\. Did you mean 'pairs\.jsonl'\? Check the path"
    ):
        read_pairs(tmp_path / "pair.jsonl")
    with pytest.raises(InputError, match=r"p\.xlsx: unknown format\. Give \.jsonl, \.csv.*BEIR.*hf://"):
        read_pairs(lines(tmp_path / "p.xlsx", "x"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: a folder of unknown format\. Give \.jsonl"):
        read_pairs(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.jsonl", ""), ("p.jsonl", "\n{}\n"), ("p.csv", ""), ("p.csv", "query,positive\n"), ("p.jsonl.gz", "")],
)
def test_a_file_without_a_usable_pair_is_an_error(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        list(read_pairs(tmp_path / name, on_skip=[].append))
    assert str(caught.value) == f"{tmp_path / name}: no usable pair. Give at least one query with its positive."


def test_a_saved_dataset_without_a_train_split(tmp_path: Path) -> None:
    some = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(all=some).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(validation=some).save_to_disk(tmp_path / "held")
    datasets.DatasetDict(dev=some, test=some).save_to_disk(tmp_path / "two")
    assert texts(read_pairs(tmp_path / "one")) == EXPECTED
    assert fault(tmp_path / "two") == f"{tmp_path}/two: no split 'train' to read pairs of. Rename one of: dev, test."
    assert fault(tmp_path / "held") == f"{tmp_path}/held: no split 'train' to read pairs of. Rename one of: validation."
    assert texts(read_pairs(tmp_path / "two" / "dev")) == EXPECTED


# Streaming


@pytest.mark.parametrize(("name", "header"), [("p.jsonl", ""), ("p.csv", "query,positive\n")])
def test_the_first_pair_comes_before_the_rest_is_written(tmp_path: Path, name: str, header: str) -> None:
    """The writer waits for the first pair to be read; a reader that reads ahead would wait for the writer."""
    path = tmp_path / name
    os.mkfifo(path)
    first_read = threading.Event()
    waited: list[bool] = []

    def write() -> None:
        row = f"{GOOD}\n" if not header else "why,because\n"
        with path.open("w", encoding="utf-8") as pipe:
            pipe.write(header + row)
            pipe.flush()
            waited.append(first_read.wait(timeout=10))
            pipe.write(row)

    writer = threading.Thread(target=write)
    writer.start()
    pairs = read_pairs(path)
    assert next(pairs).query == "why"
    first_read.set()
    assert len(list(pairs)) == 1
    writer.join()
    assert waited == [True]


def test_a_bad_line_far_down_is_told_only_when_reached(tmp_path: Path) -> None:
    pairs = read_pairs(lines(tmp_path / "p.jsonl", *[GOOD] * 50_000, "{"))
    assert [next(pairs).line for _ in range(50_000)][-1] == 50_000
    with pytest.raises(InputError, match=r"p\.jsonl:50001: the line is not valid JSON"):
        next(pairs)


# Writing


@pytest.mark.parametrize("name", ["new/p.jsonl", "new/p.jsonl.gz", "new/p.JSONL.GZ"])
def test_what_is_written_reads_back(tmp_path: Path, name: str) -> None:
    assert write_jsonl(tmp_path / name, ROWS) == 2
    assert texts(read_pairs(tmp_path / name)) == EXPECTED
    once = (tmp_path / name).read_bytes()
    write_jsonl(tmp_path / name, iter(ROWS))
    assert (tmp_path / name).read_bytes() == once
    assert not name.lower().endswith(".gz") or once[4:8] == bytes(4), "no time stamp"
