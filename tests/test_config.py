"""Every fault of a recipe is reported at once, with its key path and the nearest known key."""

from pathlib import Path

import pytest
import yaml

from anchorembed.config import parse_recipe, read_recipe, show_config
from anchorembed.errors import InputError

GOOD = {"data": {"sources": [{"name": "a", "path": "a.jsonl"}]}, "output": "runs/a"}
ROOT = Path(__file__).parents[1]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_the_paper_s() -> None:
    recipe = parse_recipe(GOOD)
    assert recipe.reconstruct is not None
    assert recipe.contrast is not None
    assert (recipe.reconstruct.learning_rate, recipe.reconstruct.warmup_steps) == (4e-5, 300)
    assert (recipe.reconstruct.steps, recipe.reconstruct.batch_size, recipe.reconstruct.d2q_weight) == (2000, 512, 0.8)
    assert (recipe.contrast.learning_rate, recipe.contrast.scale) == (2e-4, 50.0)
    assert recipe.contrast.lora is not None
    assert (recipe.contrast.lora.rank, recipe.contrast.lora.alpha, recipe.contrast.lora.dropout) == (16, 32, 0.05)


def test_all_faults_at_once(tmp_path: Path) -> None:
    values = GOOD | {"contrast": {"temprature": 1, "steps": "many", "scael": 3}, "reconstruct": {"steps": 0}}
    with pytest.raises(InputError) as caught:
        read_recipe(write(tmp_path / "r.yaml", yaml.safe_dump(values)))
    message = str(caught.value)
    assert "unknown key 'contrast.scael'. Did you mean 'scale'?" in message
    assert "unknown key 'contrast.temprature'." in message
    assert "contrast.steps is 'many'" in message
    assert "reconstruct.steps is 0" in message
    assert all(line.startswith(str(tmp_path / "r.yaml")) for line in message.splitlines())


def test_missing_keys() -> None:
    with pytest.raises(InputError, match="missing key 'data'"):
        parse_recipe({"output": "x"})


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1, 2]", "holds list"), ("a: [", "not YAML"), ("", "holds NoneType"), ("a: \x00", "not YAML|cannot be read")],
)
def test_what_is_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_recipe(write(tmp_path / "r.yaml", text))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", yaml.safe_dump(GOOD))
    recipe = read_recipe(path, ["contrast.lora.rank=4", "reconstruct=null", "contrast.from=elsewhere", "seed=7"])
    assert recipe.reconstruct is None
    assert recipe.contrast is not None
    assert recipe.contrast.lora is not None
    assert (recipe.contrast.lora.rank, recipe.contrast.from_, recipe.seed) == (4, "elsewhere", 7)
    for wrong in ("seed", "=3", "output.x=1", "output=2025-02-30", "seed=" + "[" * 3000):
        with pytest.raises(InputError, match="--set"):
            read_recipe(path, [wrong])


def test_an_override_of_a_yaml_alias_stays_where_it_is(tmp_path: Path) -> None:
    text = yaml.safe_dump(GOOD) + "reconstruct: &stage {steps: 5}\ncontrast: *stage\n"
    recipe = read_recipe(write(tmp_path / "r.yaml", text), ["contrast.steps=9"])
    assert recipe.reconstruct is not None
    assert recipe.contrast is not None
    assert (recipe.reconstruct.steps, recipe.contrast.steps) == (5, 9)


def test_show_config_names_every_key_and_reads_back() -> None:
    recipe = parse_recipe(GOOD | {"seed": 5})
    shown = show_config(recipe)
    assert parse_recipe(yaml.safe_load(shown)) == recipe
    bare = show_config()
    for key in ("d2q_weight: 0.8", "scale: 50.0", "tokens_per_micro_batch: 8192", "# Rank of the adapters."):
        assert key in bare


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_in_the_repository_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANCHOREMBED_DATA", "data")
    read_recipe(path)
