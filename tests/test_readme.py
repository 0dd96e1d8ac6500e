"""What the README and the guides show is true: code, commands, keys, extras and files; the README stays short."""

import doctest
import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

from anchorembed.cli.main import app
from anchorembed.data.pairs import (
    LABEL_NAMES,
    NEGATIVE_NAMES,
    POSITIVE_NAMES,
    QUERY_NAMES,
    SIDE_SCORES_NAMES,
    read_pairs,
)
from anchorembed.recipe_file import read_recipe
from anchorembed.recipe_schema import Recipe
from pages import GUIDES, ROOT, blocks, page

PAGES = ["README.md", "CONTRIBUTING.md", "results/README.md", "results/gpu/README.md", "speed/NOTES.md"]
PAGES += GUIDES
README = page("README.md")


def inline(name: str) -> list[str]:
    """Inline code of a page, each with single spaces."""
    text = re.sub(r"^```.*?^```", "", page(name), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def examples(code: str) -> doctest.DocTest:
    test = doctest.DocTestParser().get_doctest(code, {}, "README.md", "README.md", 0)
    assert len(test.examples) >= 3
    return test


@pytest.mark.default_model
def test_code_gives_the_output_shown() -> None:
    test = examples("".join(blocks("README.md", "python")))
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS).run(test)
    assert result.failed == 0


def test_code_runs_with_any_model(tiny_folder: Path) -> None:
    code = "".join(blocks("README.md", "python"))
    assert '"smollm2-135m"' in code
    names: dict[str, object] = {}
    for example in examples(code.replace("smollm2-135m", str(tiny_folder))).examples:
        exec(example.source, names)  # noqa: S102 - the README's own code
    assert {"queries", "documents"} <= names.keys()


def commands(name: str) -> list[list[str]]:
    """What follows `anchorembed` in a page's command lines and inline code."""
    lines = "".join(blocks(name, "")).splitlines()
    lines += [code for code in inline(name) if code.startswith("anchorembed ")]
    split = [shlex.split(line, comments=True) for line in lines if "anchorembed " in line]
    return [words[words.index("anchorembed") + 1 :] for words in split if "anchorembed" in words]


@pytest.mark.parametrize("name", PAGES)
def test_commands_have_the_verbs_and_options_shown(name: str) -> None:
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for verb, *words in filter(lambda words: words[:1] != ["--help"], commands(name)):
        assert verb in verbs, verb
        verbs[verb].make_context(verb, words)


def test_commands_are_found_and_a_wrong_option_is_a_fault() -> None:
    assert len(commands("README.md")) >= 5
    verb = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    with pytest.raises(Exception, match="No such option"):
        verb.make_context("train", ["recipe.yaml", "--fast"])


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith(("README", "docs/"))])
def test_keys_it_names_are_keys_of_a_recipe(name: str) -> None:
    sections = {key: field.annotation for key, field in Recipe.model_fields.items()}
    keys = r"\b(data|model|reconstruct|contrast|compare)\.([a-z]\w*)\b"
    for section, key in re.findall(keys, "\n".join(inline(name) + blocks(name, ""))):
        if key not in ("gguf", "md", "onnx", "py", "yaml"):
            schema = getattr(sections[section], "__args__", (sections[section],))[0]
            fields = {field.alias or name for name, field in schema.model_fields.items()}
            assert key in fields, f"{section}.{key}"


def test_the_recipe_is_one(tmp_path: Path) -> None:
    (text,) = blocks("README.md", "yaml")
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    assert read_recipe(tmp_path / "recipe.yaml").reconstruct is None


FORMS = [(suffix, text) for suffix in ("jsonl", "csv") for text in blocks("docs/pairs.md", suffix)]


@pytest.mark.parametrize(("suffix", "text"), FORMS)
def test_files_of_pairs_are_read(suffix: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / f"pairs.{suffix}"
    path.write_text(text, encoding="utf-8")
    assert len(list(read_pairs(path))) >= 2


def test_every_column_of_pairs_is_in_an_example() -> None:
    shown = "".join(text for _, text in FORMS)
    names = (*QUERY_NAMES, *POSITIVE_NAMES, *NEGATIVE_NAMES, *LABEL_NAMES, *SIDE_SCORES_NAMES)
    assert [name for name in names if f'"{name}"' not in shown or f"`{name}`" not in page("docs/pairs.md")] == []


@pytest.mark.parametrize("name", PAGES)
def test_files_it_names_exist(name: str) -> None:
    named = set(re.findall(r"(?<![\w/.])((?:src|tests|recipes|docs|speed|results)/[\w/.-]*\w)", page(name)))
    links = set(re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", page(name)))
    assert named | links
    folder = (ROOT / name).parent
    missing = [link for link in links if not (folder / link).exists()]
    assert missing + [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_the_folder_tree_is_complete() -> None:
    tree = README[README.index("src/anchorembed/\n") :].split("```")[0]
    here = {path.name for path in (ROOT / "src" / "anchorembed").iterdir() if path.name[0] not in "_."}
    assert {name for name in here if name not in tree} == {"py.typed"}


def test_extras_are_those_of_the_package() -> None:
    extras = tomllib.loads(page("pyproject.toml"))["project"]["optional-dependencies"]
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == extras.keys() - {"dev", "docs", "test"}


def test_make_has_the_targets_shown() -> None:
    code = "\n".join(inline("README.md") + blocks("README.md", ""))
    named = set(re.findall(r"^make ([a-z-]+)", code, re.MULTILINE))
    assert {"demo", "quick", "test"} <= named
    assert named <= set(" ".join(re.findall(r"^([a-z -]+):", page("Makefile"), re.MULTILINE)).split())


def test_the_readme_is_short() -> None:
    assert len(README.split()) < 1500


def test_the_picture_is_what_its_script_draws() -> None:
    drawing = runpy.run_path(str(ROOT / "docs" / "journey.py"))["drawing"]()
    assert page("docs/journey.svg") == drawing
    assert "prefers-color-scheme: dark" in drawing
