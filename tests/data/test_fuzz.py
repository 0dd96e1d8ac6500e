"""Whatever a file holds, a reader gives records or one clear error, and every line is a record or a counted fault.

20,000 inputs in all, made by mutating valid ones, the same every time; what a test fails on stays in its folder.
"""

import gzip
import io
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors.torch import save_file

from anchorembed.data.beir import read_collection
from anchorembed.data.documents import read_corpus, read_texts
from anchorembed.data.evaluation_files import read_test_set
from anchorembed.data.pairs import read_pairs
from anchorembed.errors import InputError
from anchorembed.evaluate.tasks import read_instructions
from anchorembed.model.load import load_model
from anchorembed.model.metadata import read_metadata
from anchorembed.recipe_file import read_recipe
from tiny import save_tiny

PAIRS = b'{"query": "a", "positive": "b", "negatives": ["c", "d"]}\n{"anchor": "e", "document": "f", "negative": "g"}\n'
CORPUS = b'{"_id": "1", "title": "t", "text": "a"}\n{"_id": 2, "text": "b"}\n'
TABLE = b'query,positive,negative\na,"b\nc",d\ne,f,\n'
QRELS = b"query-id\tcorpus-id\tscore\n1\t2\t1\n2\t1\t0\n"
RERANK = b'{"query_id": "1", "query": "a", "positive": ["b"], "negative": ["c"]}\n'
RECIPE = b"""data:
  sources: [{name: p, path: p.jsonl}]
  held_out: 3
model: {name: m, precision: auto}
reconstruct: {steps: 2, learning_rate: 1e-4, directions: both}
contrast: {lora: {rank: 2, targets: [q_proj]}}
output: out
"""
NASTY = [
    *(b"\xff", b"\x00", b"\xef\xbb\xbf", b"\r\n", b"\n", b'"', b"'", b"{", b"}", b"[", b"]", b",", b":", b"\t", b"\\"),
    *(b"\\ud800", b"\xed\xa0\x80", b"1e999", b"-0", b"NaN", b"null", b"true", b"9" * 5000, b"[" * 3000, b"{a: " * 900),
    *("é\u2028\u0085".encode(), b"&a [*a, *a]", b"!!python/object:os.system", b"*a", b"- ", b"  ", b"#", b"|\n"),
]
EACH = 2000
FEW = 1000  # of YAML files, whose parser takes longest


def mutations(valid: bytes, count: int) -> Iterator[bytes]:
    """Yield different inputs, each with one to four changes: at the beginning, the end or anywhere."""
    rng, made = random.Random(0), {valid}
    while len(made) <= count:
        changed = valid
        for _ in range(rng.choice([1, 1, 1, 1, 1, 2, 3, 4])):
            changed = mutated(changed, rng)
        if changed not in made:
            made.add(changed)
            yield changed


def mutated(content: bytes, rng: random.Random) -> bytes:
    size = len(content)
    at = rng.choice([0, size, rng.randint(0, size), rng.randint(0, size)])
    upto = at + rng.randint(0, int(0.3 * size))
    match rng.choice(["insert", "delete", "repeat", "end"]):
        case "insert":
            nasty = rng.choice([rng.choice(NASTY), rng.randbytes(rng.randint(0, 6))])
            return content[:at] + nasty + content[at:]
        case "delete":
            return content[:at] + content[upto:]
        case "repeat":
            return content[:upto] + content[at:]
    return content[:at]


def parquet() -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"query": ["a", "b"], "positive": ["c", "d"]}), sink)
    return sink.getvalue()


READERS: dict[str, tuple[str, bytes, Callable[[Path], object]]] = {
    "pairs": ("p.jsonl", PAIRS, lambda path: list(read_pairs(path))),
    "gzipped pairs": ("p.jsonl.gz", gzip.compress(PAIRS, mtime=0), lambda path: list(read_pairs(path))),
    "table": ("p.csv", TABLE, lambda path: list(read_pairs(path))),
    "parquet": ("p.parquet", parquet(), lambda path: list(read_pairs(path))),
    "corpus": ("c.jsonl", CORPUS, lambda path: list(read_corpus(path))),
    "texts": ("t.txt", b"one\n\ntwo\r\nthree", lambda path: list(read_texts(path))),
    "test set": ("r.jsonl", RERANK, read_test_set),
    "recipe": ("r.yaml", RECIPE, read_recipe),
    "instructions": ("i.yaml", b"default: find\nSTS: compare\n", read_instructions),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_read_or_refused(name: str, tmp_path: Path) -> None:
    file, seed, read = READERS[name]
    path = tmp_path / file
    path.write_bytes(seed)
    assert read(path)

    for content in mutations(seed, FEW if path.suffix == ".yaml" else EACH):
        path.write_bytes(content)
        try:
            read(path)
        except InputError as error:
            assert file in str(error) or name == "recipe"  # noqa: PT017 - as there may be no error


@pytest.mark.slow
def test_qrels_and_their_texts(tmp_path: Path) -> None:
    (tmp_path / "qrels").mkdir()
    for name in ("corpus", "queries"):
        (tmp_path / f"{name}.jsonl").write_bytes(CORPUS)
    read = 0
    for content in mutations(QRELS, EACH):
        (tmp_path / "qrels" / "test.tsv").write_bytes(content)
        try:
            found = read_collection(tmp_path)
        except InputError:
            continue
        assert all(max(grades.values()) > 0 for grades in found.qrels.values())
        read += 1
    assert read > 10, "next to nothing can be read: the test shows little"


@pytest.mark.slow
def test_every_line_is_a_pair_or_a_counted_fault(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    whole_file = ("no usable pair", "the text is UTF-16, not UTF-8", "the text is UTF-32, not UTF-8")
    for content in mutations(PAIRS * 3, EACH):
        path.write_bytes(content)
        faults: list[str] = []
        try:
            pairs = list(read_pairs(path, on_skip=faults.append))
        except InputError as error:
            assert any(fault in str(error) for fault in whole_file)  # noqa: PT017 - as above
            continue
        text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
        rows = {pair.line for pair in pairs}  # one with several positives is several pairs
        assert len(rows) + len(faults) == sum(bool(line) and not line.isspace() for line in text.split("\n"))


def test_a_line_of_fifty_megabytes(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(PAIRS + b'{"query": "' + b"x" * 50_000_000 + b'"}\n' + PAIRS)
    with pytest.raises(InputError, match=r"p\.jsonl:3: no .positive"):
        list(read_pairs(path))
    assert len(list(read_pairs(path, on_skip=[].append))) == 4


def test_metadata_of_a_model_folder(tmp_path: Path) -> None:
    path = tmp_path / "anchorembed.json"
    seed = (
        b'{"template": {"bos": "", "header": "h", "suffix": "", "end": "e"}, "lengths": {"query": 8, "document": 8}, '
        b'"prompts": {"query": "q", "document": ""}, "history": {}, "format": 1}'
    )
    path.write_bytes(seed)
    assert read_metadata(tmp_path) is not None
    for place, nasty in itertools.product(range(0, len(seed), 3), NASTY):
        path.write_bytes(seed[:place] + nasty + seed[place:])
        try:
            read_metadata(tmp_path)
        except InputError as error:
            assert "damaged" in str(error)  # noqa: PT017 - as above


def test_lying_weights_are_refused_by_name(tmp_path: Path) -> None:
    """A safetensors header that promises more than the file holds, one that is no JSON, a GGUF cut short."""
    folder = save_tiny(tmp_path / "model")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    for damaged in (whole[:-100], whole[:8] + b"x" * size + whole[8 + size :], (2**62).to_bytes(8, "little") + b"{}"):
        weights.write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be loaded"):
            load_model(str(folder))
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\xff\xff")
    with pytest.raises(InputError, match=r"short\.gguf' cannot be loaded"):
        load_model(str(tmp_path / "short.gguf"))


def test_code_and_pickles_of_a_model_folder_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that names its own code, though whoever is asked says yes, and one whose only weights are a pickle."""
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *question: (asked.append(question), "y")[1])
    folder = save_tiny(tmp_path / "code")
    config: dict[str, Any] = yaml.safe_load((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "model_type": "unheard-of",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()
    assert not asked
    other = save_tiny(tmp_path / "pickle")
    (other / "model.safetensors").rename(other / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(str(other))
    third = save_tiny(tmp_path / "escape")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (third / "model.safetensors").unlink()
    (third / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / "outside.safetensors")
    with pytest.raises(InputError, match="outside"):
        load_model(str(third))
