"""A model card says what its folder says, and its examples are code that runs."""

import json
import logging
import re
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from anchorembed.errors import InputError
from anchorembed.export.card import RESULTS, Kind, _cell, _exported_usage, _literal, write_card
from anchorembed.export.run import export
from anchorembed.model.embedder import Embedder
from anchorembed.model.metadata import METADATA
from anchorembed.model.template import Prompts
from anchorembed.recipe_file import parse_recipe
from anchorembed.system.files import hash_content
from anchorembed.train.run import train
from tiny import recipe_values, save_tiny, write_pairs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    base = save_tiny(folder / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    values = recipe_values(write_pairs(folder / "pairs.jsonl"), base, folder / "faq")
    values["data"] |= {"query_tokens": 48, "instruction": "find"}
    schedule = {"steps": 1, "batch_size": 8, "warmup_steps": 0, "evaluate_every": 0}
    train(parse_recipe(values | {"reconstruct": schedule, "contrast": schedule | {"scale": 20}}))
    return folder / "faq" / "contrast" / "model"


def test_a_trained_model_has_a_card_of_both_stages(trained: Path) -> None:
    card = huggingface_hub.ModelCard.load(trained / "README.md")
    assert (card.data.license, card.data.base_model, card.data.library_name) == ("apache-2.0", None, "transformers")
    assert card.text.lstrip().startswith("# faq/contrast/model\n")
    assert "made from `base`" in card.text
    assert "54 query-document pairs were trained on, 6 held out" in card.text
    assert f"| p | 60 | `{hash_content(trained.parents[2] / 'pairs.jsonl')}` |" in card.text
    assert card.text.index("Stage I, reconstruction") < card.text.index("Stage II, contrastive learning")
    assert "| scale | `20.0` |" in card.text
    assert "| query prompt | `Instruct: find\\nQuery: ` |" in card.text
    assert str(trained.parents[2]) not in card.content, "no path of this machine"


def test_an_exported_card_s_example_gives_our_vectors(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export(trained, "out")
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert "sentence-transformers" in card.data.tags
    here = str(trained.parents[2]).encode()
    assert [file.name for file in Path("out").rglob("*") if file.is_file() and here in file.read_bytes()] == []
    write_card(Path("out"), "out", 32, "folder")
    assert Path("out/README.md").read_text() == card.content, "as of an export of the export"
    first, *others = re.findall(r"```py\n(.*?)```", card.text, re.DOTALL)
    names: dict[str, np.ndarray] = {}
    exec(first, names)  # noqa: S102 - what we wrote
    texts = re.findall(r'\["(.*?)"\]', first)
    embedder = Embedder.load(trained, precision="float32")
    np.testing.assert_allclose(names["queries"], embedder.encode(texts[:1], "query"), atol=1e-4)
    np.testing.assert_allclose(names["documents"], embedder.encode(texts[1:]), atol=1e-4)
    for code in others:
        compile(code, "card", "exec")
        assert "'query'" in code or "query_instruction='Instruct: find\\nQuery: '" in code


def test_the_card_names_the_data_of_all_runs(trained: Path, tmp_path: Path) -> None:
    model = shutil.copytree(trained, tmp_path / "model")
    metadata = json.loads((model / METADATA).read_text())
    last = metadata["history"]
    last["before"] += [{key: last[key] for key in ("plan", "data")}]
    other = last["plan"]["data.sources"][0] | {"name": "other"}
    last["plan"] = last["plan"] | {"data.sources": [other], "data.sources.other.content": "0123"}
    last["data"] = last["data"] | {"train": 900, "held_out": 40, "sources": {"other": 950}}
    (model / METADATA).write_text(json.dumps(metadata))
    write_card(model, "title", 32)
    card = (model / "README.md").read_text()
    first = "54 query-document pairs were trained on, 6 held out."
    assert f"{first} Then 900 query-document pairs were trained on, 40 held out.\n" in card
    assert re.findall(r"^\| (\w+) \| (\d+) \| `\w+` \|$", card, re.MULTILINE) == [("p", "60"), ("other", "950")]


@pytest.mark.parametrize(
    ("base", "readme", "base_model", "reason"),
    [
        ("mine", "license: mit\ntitle: My model: v2", None, "mapping values are not allowed here"),
        ("mine", "license: mit\n2024: x", None, "keywords must be strings"),
        ("gone/mine", None, None, "no such folder"),
        ("owner/mine", None, "owner/mine", "You are trying to access a gated repo"),
    ],
)
def test_a_licence_that_cannot_be_read_is_left_out(
    base: str,
    readme: str | None,
    base_model: str | None,
    reason: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def gated(*_: object, **__: object) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")

    model = shutil.copytree(trained, tmp_path / "model")
    if readme:
        shutil.copytree(trained, tmp_path / base)
        (tmp_path / base / "README.md").write_text(f"---\n{readme}\n---\n# Base\n")
    if base_model:
        monkeypatch.setattr("anchorembed.model.load._hub_answers", lambda _: True)
        monkeypatch.setattr("anchorembed.model.load.cached_file", gated)
    metadata = json.loads((model / METADATA).read_text())
    metadata["history"]["base"] = base_model or str(tmp_path / base)
    (model / METADATA).write_text(json.dumps(metadata))
    with caplog.at_level(logging.WARNING):
        write_card(model, "title", 32)
    assert f"the licence of {metadata['history']['base']} is not known" in caplog.text
    assert reason in caplog.text
    card = huggingface_hub.ModelCard.load(model / "README.md")
    assert (card.data.license, card.data.base_model) == (None, base_model)
    assert f"made from `{base_model or 'mine'}`" in card.text
    assert str(tmp_path) not in card.content


@pytest.mark.parametrize("kind", ["native", "folder"])
def test_a_licence_of_another_name_keeps_name_and_link(kind: Kind, trained: Path, tmp_path: Path) -> None:
    model = shutil.copytree(trained, tmp_path / "model")
    fields = {"license": "other", "license_name": "qwen: research", "license_link": "https://x.y/LICENSE"}
    header = "".join(f"{key}: {json.dumps(text)}\n" for key, text in fields.items())
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "README.md").write_text(f"---\n{header}---\n# Base\n")
    metadata = json.loads((model / METADATA).read_text())
    metadata["history"]["base"] = str(tmp_path / "base")
    (model / METADATA).write_text(json.dumps(metadata))
    write_card(model, "title", 32, kind)
    card = huggingface_hub.ModelCard.load(model / "README.md")
    assert {key: card.data.to_dict()[key] for key in fields} == fields
    assert "that of the base model, qwen: research." in card.text


def test_results_are_shown_where_there_are_some(trained: Path, tmp_path: Path) -> None:
    (row,) = json.loads((trained / RESULTS).read_text())
    assert (row["test"], row["metric"], row["items"]) == ("held-out pairs", "nDCG@10", "6")
    assert f"| held-out pairs | nDCG@10 | 6 | {row['base model']} |" in (trained / "README.md").read_text()
    export(trained, tmp_path / "out")
    assert "## Results" in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "out" / RESULTS).unlink()
    write_card(tmp_path / "out", "title", 32, "folder")
    assert "## Results" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[1]", b'[{"a": 1}, {"b": 2}]', b"\xff", b'[{"a"'])
def test_damaged_results_are_named_and_no_export_is_left(trained: Path, tmp_path: Path, content: bytes) -> None:
    copied = tmp_path / "model"
    shutil.copytree(trained, copied)
    (copied / RESULTS).write_bytes(content)
    with pytest.raises(InputError, match=r"results\.json: damaged .*Repeat the `anchorembed train` that wrote it"):
        export(copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_kind_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(InputError, match=r"anchorembed\.json: no such file"):
        write_card(tiny_folder, "title", 32)


def test_what_users_name_is_no_markup() -> None:
    assert _literal("a `b` | c") == "`` a `b` \\| c ``"
    assert _cell("<script> | `x`\ny_z") == r"\<script\> \| \`x\` y\_z"


def test_servers_are_told_of_the_document_prompt() -> None:
    *_, told = _exported_usage("m", Prompts("", "passage: "))
    assert "put the document prompt before documents yourself" in told
