"""The core trains, embeds and exports without any package of an extra; a verb whose extra is missing says what to type.

Each check runs in a process of its own, in which the packages are hidden (`without.py`).
"""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from anchorembed.errors import InputError, extra
from conftest import write_pairs

ROOT = Path(__file__).parents[1]
OPTIONAL = ["bm25s", "gguf", "ir_measures", "lancedb", "matplotlib", "mteb", "polars", "pytrec_eval", "ray"]
# torch and sentence-transformers bring these themselves (sklearn needs scipy); nothing asks for them before `export`.
BROUGHT = ["jinja2", "scipy", "sklearn"]
FILES = {"pairs": "pairs.jsonl", "texts": "texts.jsonl", "gguf": "model.gguf", "out": "out"}
CORE = """
import sys
from pathlib import Path
from without import hide

optional, folder = sys.argv[1].split(","), Path(sys.argv[2])
hidden = hide(*optional)

import numpy as np
from anchorembed import Embedder, encode, read_recipe, train
from conftest import save_tiny, write_pairs

save_tiny(folder / "tiny")
write_pairs(folder / "pairs.jsonl")
(folder / "texts.txt").write_text("sort a list\\nopen a file\\n", encoding="utf-8")
stage = "{steps: 2, batch_size: 4, warmup_steps: 1, evaluate_every: 1}"
(folder / "recipe.yaml").write_text(f'''
data: {{sources: [{{name: p, path: {folder}/pairs.jsonl}}], query_tokens: 16, document_tokens: 24, held_out: 4}}
model: {{name: {folder}/tiny, precision: float32, device: cpu}}
reconstruct: {stage}
contrast: {stage}
output: {folder}/run
''', encoding="utf-8")
model = train(read_recipe(folder / "recipe.yaml"))
assert (folder / "run" / "reconstruct" / "model").is_dir()
vectors = Embedder.load(model).encode(["sort a list"])
assert vectors.shape == (1, 32) and np.isfinite(vectors).all()
assert encode(model, folder / "texts.txt", folder / "vectors.parquet") == 2
hidden.names -= {"jinja2", "scipy", "sklearn"}
from anchorembed import export
assert export(model, folder / "out") > 0.9999
loaded = {name.partition(".")[0] for name in sys.modules} & set(hidden.names)
assert not loaded, loaded
"""


def python(*arguments: object) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "src")])
    environment = os.environ | {"PYTHONPATH": path, "NO_COLOR": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def without(package: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return python(ROOT / "tests" / "without.py", package, *arguments)


def test_the_core_needs_no_extra(tmp_path: Path) -> None:
    done = python("-c", CORE, ",".join(OPTIONAL + BROUGHT), tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("needed", ["peft", "sentence_transformers"])
def test_a_package_the_core_needs_would_be_missed(needed: str, tmp_path: Path) -> None:
    """One from the beginning of the script and one from its end: so what it hides is hidden all along."""
    done = python("-c", CORE, needed, tmp_path)
    assert done.returncode == 1
    assert f"No module named '{needed}'" in done.stderr


@pytest.mark.parametrize(
    ("package", "of_extra", "arguments"),
    [
        ("lancedb", "search", ["search", "{model}", "{texts}", "a query"]),
        ("ir_measures", "eval", ["evaluate", "{model}", "{texts}"]),
        ("bm25s", "mine", ["mine", "{pairs}", "-o", "{out}"]),
        ("matplotlib", "compare", ["compare", str(ROOT / "recipes" / "compare-own.yaml"), "--plan"]),
        ("gguf", "gguf", ["encode", "{gguf}", "{texts}", "-o", "{out}"]),
        ("gguf", "gguf", ["encode", "smollm2-135m", "{texts}", "-o", "{out}"]),
        ("ray", "ray", ["encode", "{model}", "{texts}", "-o", "{out}", "--engine", "ray"]),
        ("lancedb", "eval,search,gguf", ["demo", str(ROOT / "recipes" / "demo.yaml")]),
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
    named: set[str] = set()
    for path in (ROOT / "src" / "anchorembed").glob("*.py"):
        for names in re.findall(r'with extra\("([^"]+)"\)', path.read_text(encoding="utf-8")):
            named |= set(names.split(","))
    assert named == {"eval", "search", "mine", "mteb", "compare", "gguf", "ray"}
    assert named <= set(extras)
    assert extras["all"] == [f"anchorembed[{','.join(sorted(named))}]"]
    core = {re.split(r"[<>=]", line)[0].replace("-", "_") for line in project["dependencies"]}
    assert not core & {*OPTIONAL, *BROUGHT}
