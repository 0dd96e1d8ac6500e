"""The guides are true and make a site: commands run in the order shown, or say why not; pages need no network."""

import ast
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import anchorembed
from anchorembed.cli.main import main
from anchorembed.model.load import load_config
from anchorembed.recipe_file import parse_recipe
from anchorembed.recipe_schema import Recipe
from pages import GUIDES, ROOT, blocks, command_lines, page
from tiny import recipe_values, write_pairs

# What is run by another test: what its line has, and the file of that test.
ELSEWHERE = {
    "anchorembed profile": "tests/test_cli.py",
    " --engine ray": "tests/search/test_ray.py",
    "speed/gpu.py --out gpu-out --tiny": "tests/test_speed.py",
    "docs/memory.py": "tests/test_docs.py",
    "anchorembed demo": "tests/test_demo.py",
    "anchorembed page": "tests/page/test_run_contents.py",
    " --vectors": "tests/train/test_read_vector.py",
    "anchorembed fit": "tests/test_fit.py",
    "anchorembed verify": "tests/export/test_verify.py",
    " --rerank": "tests/curate/test_rerank.py",
    " --dimensions": "tests/test_cli.py",
    " --like": "tests/test_cli.py",
    " --dtype": "tests/export/test_folder.py",
    " --to gguf": "tests/export/test_gguf.py",
    " --to openvino": "tests/export/test_graph.py",
    " --to onnx": "tests/export/test_graph.py",
}
COMMANDS = [(name, command) for name in GUIDES for block in blocks(name, "") for command in command_lines(block)]


def to_run(name: str) -> list[list[str]]:
    """The commands of a page that are run here."""
    open_ones = [command for of, command in COMMANDS if of == name and not command.marked]
    return [command.words for command in open_ones if not any(part in command.line for part in ELSEWHERE)]


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def here(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the guides' commands name, as the working folder."""
    (tmp_path / "my-tests" / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{number}", "text": f"sort the list {number}"} for number in range(12)]
    queries = [{"_id": f"q{number}", "text": f"list {number}"} for number in range(3)]
    for place in ("corpus.jsonl", "texts.jsonl", "my-tests/corpus.jsonl"):
        lines(tmp_path / place, documents)
    for place in ("queries.jsonl", "my-tests/queries.jsonl"):
        lines(tmp_path / place, queries)
    judged = "".join(f"q{number}\td{number}\t1\n" for number in range(3))
    (tmp_path / "my-tests" / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}", encoding="utf-8")
    stage = {"steps": 2, "batch_size": 8, "warmup_steps": 1, "evaluate_every": 2}
    values = recipe_values(write_pairs(tmp_path / "pairs.jsonl"), tiny_folder, tmp_path / "runs" / "faq")
    recipe = values | {"reconstruct": stage, "contrast": stage}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words: list[str], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of this package with a model of one's own for MODEL."""
    assert words[0] == "anchorembed", f"{' '.join(words)}: mark it `not run: why`, or name its test in ELSEWHERE"
    monkeypatch.setattr(sys, "argv", [str(model) if word == "MODEL" else word for word in words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code, " ".join(words)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in GUIDES if to_run(name) and name != "docs/index.md"])
def test_commands_run(name: str, here: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in to_run(name):
        run(words, tiny_folder, monkeypatch)


@pytest.mark.slow
def test_the_quick_start_goes_from_a_table_to_a_model_loaded_elsewhere(
    here: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = {file: blocks("docs/index.md", file.split(".")[1]) for file in ("faq.csv", "recipe.yaml", "answers.jsonl")}
    for file, (text,) in shown.items():
        assert f"`{file}`" in page("docs/index.md")
        (here / file).write_text(text.replace("smollm2-135m", str(tiny_folder)), encoding="utf-8")
    assert len(shown["faq.csv"][0].splitlines()) == 1 + 10
    for words in to_run("docs/index.md"):
        run(words, tiny_folder, monkeypatch)
    assert "runs/faq/contrast/model" in capsys.readouterr().err
    code, server = blocks("docs/index.md", "py")
    assert server.replace("faq-gguf", "OUT") in blocks("docs/serving.md", "py")  # which tests/export/test_gguf.py runs
    exec(code, {})  # noqa: S102 - the page's own code
    assert "tensor([[" in capsys.readouterr().out


def test_what_is_run_elsewhere_is() -> None:
    shown = [command.line for _, command in COMMANDS]
    for part, test in ELSEWHERE.items():
        assert any(part in line for line in shown), part
        assert (ROOT / test).is_file()


def test_marks_are_for_a_line_or_for_the_rest_of_a_block() -> None:
    block = "make a  # not run: here\nmake b  # said\n# not run:\nX=1 make c\n# not run: there\nmake d\nA tree\n"
    found = command_lines(block)
    assert [command.words[1] for command in found if command.marked] == ["a", "d"]
    assert [command.words for command in found if not command.marked] == [["make", "b"], ["make", "c"]]
    with pytest.raises(AssertionError, match="not run: why"):
        run(["python", "nothing.py"], Path(), pytest.MonkeyPatch())


@pytest.mark.parametrize("name", GUIDES)
def test_python_compiles_and_recipes_have_known_keys(name: str) -> None:
    for code in blocks(name, "py") + blocks(name, "python"):
        ast.parse(code)
    whole = {"data": {"sources": [{"name": "a", "path": "a.jsonl"}]}, "output": "run"}
    for text in blocks(name, "yaml"):
        values = yaml.safe_load(text)
        if values.keys() & Recipe.model_fields.keys():
            parse_recipe(whole | values, name)


def test_the_api_s_code_runs(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("docs/api.md", "py")
    exec(code.replace("smollm2-135m", str(tiny_folder)), {})  # noqa: S102 - the page's own code
    assert "[[" in capsys.readouterr().out


@pytest.mark.slow
def test_the_table_of_memory_is_what_its_script_prints(tiny_folder: Path) -> None:
    script = runpy.run_path(str(ROOT / "docs" / "memory.py"))
    assert script["table"](script["KNOWN"]) in page("docs/models.md")
    assert "| tiny | 0.00 |" in script["table"]({"tiny": load_config(str(tiny_folder))})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    built = sorted(site.rglob("*.html"))
    assert len(built) > len(GUIDES)
    loads = r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//|<link\b[^>]*\bhref=[\"']?(?:https?:)?//"
    assert re.search(loads, '<script defer src="//cdn"></script>')
    assert [path.name for path in built if re.search(loads, path.read_text(encoding="utf-8"))] == []
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert [style for style in styles if re.search(r"@import|url\([\"']?(?:https?:)?//", style)] == []
    assert 'src="journey.svg"' in (site / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_api_page_has_every_public_name(site: Path) -> None:
    found = set(re.findall(r'id="anchorembed\.(\w+)"', (site / "api.html").read_text(encoding="utf-8")))
    assert found >= set(anchorembed.__all__)
