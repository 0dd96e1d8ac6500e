"""Every fault of a recipe is reported at once, with its key path and the nearest known key."""

import json
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from anchorembed.compare.controls import ArmRecipe
from anchorembed.errors import InputError
from anchorembed.recipe_file import load_yaml, parse_as, parse_recipe, read_recipe, show_config
from anchorembed.recipe_schema import Recipe
from anchorembed.train.anchor_choice_loss import CHOICES
from anchorembed.train.prepare import prepare

GOOD = {"data": {"sources": [{"name": "a", "path": "a.jsonl"}]}, "output": "runs/a"}
ROOT = Path(__file__).parents[1]
E5 = [
    *("allnli", "dureader", "eli5_question_answer", "fever", "hotpot_qa", "miracl", "mrtydi", "msmarco_passage"),
    *("msmarco_document", "nq", "quora_duplicates", "squad", "t2ranking", "trivia_qa"),
]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_the_paper_s() -> None:
    recipe = parse_recipe(GOOD)
    assert recipe.reconstruct is None, "evidence is against it: results/README.md"
    recipe = parse_recipe(GOOD | {"reconstruct": {}})
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


def test_two_sources_of_one_name_are_refused() -> None:
    sources = [{"name": "a", "path": "a.jsonl"}, {"name": "a", "path": "b.jsonl"}]
    with pytest.raises(InputError, match="two of them are called a; rename one"):
        parse_recipe(GOOD | {"data": {"sources": sources}})


def test_missing_keys() -> None:
    with pytest.raises(InputError, match="missing key 'data'"):
        parse_recipe({"output": "x"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "holds list"),
        ("a: [", "not YAML"),
        ("", "holds NoneType"),
        ("a: \x00", "not YAML|cannot be read"),
        (
            "contrast: {}\nseed: 1\ncontrast: {}\n",
            r"r\.yaml: not YAML: line 3: the key 'contrast' is there twice, keep one$",
        ),
        ("data:\n  held_out: 0\n  'held_out': 50\n", r"not YAML: line 3: the key 'held_out' is there twice, keep one$"),
    ],
)
def test_what_is_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_recipe(write(tmp_path / "r.yaml", text))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("faq.csv", 'query,positive\nWhere is it?,"Here: or there, later"\n'),
        ("faq.tsv", "query positive\nwhy because\n"),
        ("faq.jsonl", '{"query": "why", "positive": "because"}\n'),
    ],
)
def test_a_file_of_pairs_is_no_recipe_of_any_verb(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(InputError, match=rf"{name}: a file of pairs.*data\.sources.*train --pairs .*{name} --base"):
        read_recipe(write(tmp_path / name, text))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32-be"])
def test_a_recipe_of_another_encoding_is_named_for_what_it_is(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(yaml.safe_dump(GOOD).encode(encoding))
    with pytest.raises(InputError, match=r"r\.yaml: the text is UTF-(16|32), not UTF-8\. Convert it: iconv -f"):
        read_recipe(path)
    path.write_bytes(yaml.safe_dump(GOOD).encode("utf-8-sig"))
    assert read_recipe(path) == parse_recipe(GOOD)
    path.write_bytes(b"# a\n# \xe4\n")
    with pytest.raises(InputError, match=r"r\.yaml:2: the line is not valid UTF-8\. Save the file as UTF-8"):
        read_recipe(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
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
    with pytest.raises(InputError, match=r"--set 'contrast\.lora=.*line 1: the key 'rank' is there twice, keep one"):
        read_recipe(path, ["contrast.lora={rank: 4, rank: 8}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("contrast.mask_above=off", "contrast.mask_above is False: in YAML no and off are false"),
        ("contrast.steps=yes", "contrast.steps is True: in YAML no and off are false"),
        ("reconstruct=no", "reconstruct is False: in YAML .* write null for none"),
        ("output=2024", "output is 2024: no path or name; write one, in quotes"),
        ("output=''", "output is '': no path or name"),
        ("model.name=' '", "model.name is ' ': no path or name"),
        ("data.sources=[{name: a, path: ''}]", "data.sources.0.path is '': no path or name"),
        ("data.sources=[{name: 1, path: a}]", "data.sources.0.name is 1: .*Quote it"),
        ("data.instruction=Find issue #1", "'data.instruction=Find issue #1': YAML takes # .* for a comment"),
        ("data.instruction=#1", "'data.instruction=#1': YAML takes # .* for a comment"),
    ],
)
def test_what_yaml_reads_otherwise_is_refused(override: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", yaml.safe_dump(GOOD))
    with pytest.raises(InputError, match=message):
        read_recipe(path, [override])
    quoted = read_recipe(path, ["data.instruction='Find issue #1'", "output='2024'", "contrast.recompute=yes"])
    assert (quoted.data.instruction, quoted.output) == ("Find issue #1", Path("2024"))


@pytest.mark.parametrize("tokens", [0, "Auto", None])
def test_a_fault_of_a_key_is_one_line_that_shows_its_value_alone(tokens: object) -> None:
    with pytest.raises(InputError) as caught:
        parse_recipe(GOOD | {"contrast": {"tokens_per_micro_batch": tokens}})
    cure = "give a whole number of 1 or more, or auto"
    assert str(caught.value) == f"recipe: contrast.tokens_per_micro_batch is {tokens!r}: {cure}."
    with pytest.raises(InputError, match=r"^recipe: contrast: guide has no effect without mask_above; set that, such"):
        parse_recipe(GOOD | {"contrast": {"guide": "other"}})


def test_an_override_of_a_yaml_alias_stays_where_it_is(tmp_path: Path) -> None:
    text = yaml.safe_dump(GOOD) + "reconstruct: &stage {steps: 5}\ncontrast: *stage\n"
    recipe = read_recipe(write(tmp_path / "r.yaml", text), ["contrast.steps=9"])
    assert recipe.reconstruct is not None
    assert recipe.contrast is not None
    assert (recipe.reconstruct.steps, recipe.contrast.steps) == (5, 9)


def test_keys_of_merged_yaml_are_not_there_twice() -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2, z: 2}\nc: {<<: *b, <<: *a, x: 3}\n"
    assert load_yaml(text) == yaml.safe_load(text)
    assert load_yaml(text)["c"] == {"x": 3, "y": 1, "z": 2}


def test_show_config_names_every_key_and_reads_back() -> None:
    recipe = parse_recipe(GOOD | {"seed": 5})
    shown = show_config(recipe)
    assert parse_recipe(yaml.safe_load(shown)) == recipe
    own = {"mine": {"like": "both", "title": "Mine", "what": "Both.", "before": {"bag_weight": 1.0}}}
    compared = parse_recipe(
        GOOD | {"compare": {"arms": ["both", "mine"], "own_arms": own, "collections": {"A": ["a"]}}}
    )
    assert parse_recipe(yaml.safe_load(show_config(compared))) == compared
    bare = show_config()
    for key in (
        "d2q_weight: 0.8",
        "scale: 50.0",
        "tokens_per_micro_batch: auto",
        "# Rank of the adapters.",
        "# Inverse temperature.",
    ):
        assert key in bare


def test_a_recipe_adds_to_the_one_it_extends(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    base = GOOD | {"contrast": {"steps": 5, "lora": {"rank": 2, "targets": ["q_proj", "k_proj"]}}, "reconstruct": {}}
    write(tmp_path / "base.yaml", yaml.safe_dump(base))
    middle = {"extends": "../base.yaml", "contrast": {"lora": {"targets": ["v_proj"]}}, "reconstruct": None}
    write(tmp_path / "deep" / "middle.yaml", yaml.safe_dump(middle))
    path = write(tmp_path / "deep" / "last.yaml", "extends: middle.yaml\nseed: 3\ncontrast: {steps: 7}\n")
    recipe = read_recipe(path, ["contrast.scale=20"])
    assert recipe.reconstruct is None
    assert recipe.contrast is not None
    assert recipe.contrast.lora is not None
    assert (recipe.contrast.steps, recipe.contrast.scale, recipe.seed) == (7, 20, 3)
    assert (recipe.contrast.lora.rank, recipe.contrast.lora.targets) == (2, ["v_proj"])
    assert recipe.data == parse_recipe(GOOD).data


@pytest.mark.parametrize("name", ["", "a/b", "..", " a"])
def test_an_arm_is_named_as_a_folder_can_be(name: str) -> None:
    compare = {"own_arms": {name: {"like": "both"}}, "collections": {"One": ["a"]}}
    with pytest.raises(InputError, match=re.escape(f"compare.own_arms.{name}") + ".*a folder gets this name; use lett"):
        parse_recipe(GOOD | {"compare": compare})


def test_steps_given_later_replace_epochs(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", yaml.safe_dump(GOOD | {"contrast": {"epochs": 3, "batch_size": 8}}))
    path = write(tmp_path / "r.yaml", "extends: base.yaml\ncontrast: {steps: 7}\n")
    cases = [(path, [], (7, None)), (tmp_path / "base.yaml", ["contrast.steps=5"], (5, None))]
    cases += [(path, ["contrast.epochs=2"], (7, 2)), (tmp_path / "base.yaml", ["contrast.batch_size=4"], (1000, 3))]
    for recipe, overrides, expected in cases:
        contrast = read_recipe(recipe, overrides).contrast
        assert contrast is not None
        assert (contrast.steps, contrast.epochs) == expected, overrides


def test_a_table_of_the_one_it_extends_can_be_left_out(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", yaml.safe_dump(GOOD | {"compare": {"collections": {"One": ["a"], "Two": ["b"]}}}))
    path = write(tmp_path / "r.yaml", "extends: base.yaml\ncompare: {collections: {One: null, Three: [a]}}\n")
    recipe = read_recipe(path)
    assert recipe.compare is not None
    assert recipe.compare.collections == {"Two": ["b"], "Three": ["a"]}
    with pytest.raises(InputError, match="collections"):
        read_recipe(path, ["compare.collections=null"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: r.yaml", "extends itself"),
        ("extends: ./../{folder}/r.yaml", "extends itself"),
        ("extends: none.yaml", r"none\.yaml: no such file"),
        ("extends: [a]", "is no file's name"),
        ("extends: other.yaml\na: &a {b: *a}", "by a YAML alias"),
    ],
)
def test_what_cannot_be_extended(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "other.yaml", "a: &a {b: *a}")
    path = write(tmp_path / "r.yaml", text.replace("{folder}", tmp_path.name))
    with pytest.raises(InputError, match=message):
        read_recipe(path)


def test_a_control_is_named_by_its_arm() -> None:
    with pytest.raises(InputError, match=r"directions is 'd2d': .* add the arm auto to compare\.arms"):
        parse_recipe(GOOD | {"reconstruct": {"directions": "d2d"}})
    with pytest.raises(InputError, match=r"unknown key 'reconstruct\.decode'\. An arm of a comparison may set it"):
        parse_recipe(GOOD | {"reconstruct": {"decode": False}})


def test_options_without_effect_are_refused() -> None:
    for empty in (None, []):
        with pytest.raises(InputError, match="no table is left"):
            parse_recipe(GOOD | {"compare": {"collections": {"One": empty}}})
    with pytest.raises(InputError, match="decode: false leaves no loss; set bag_weight"):
        parse_as(ArmRecipe, GOOD | {"reconstruct": {"decode": False}}, "arm")
    with pytest.raises(InputError, match="guide has no effect without mask_above"):
        parse_recipe(GOOD | {"contrast": {"guide": "other"}})
    with pytest.raises(InputError, match="distill has no effect without hard_negatives"):
        parse_recipe(GOOD | {"contrast": {"distill": 1, "hard_negatives": 0}})
    with pytest.raises(InputError, match="residual: bfloat16 has no effect with precision: float32"):
        parse_recipe(GOOD | {"model": {"residual": "bfloat16", "precision": "float32"}})


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({}, 1),
        ({"anchor": "centred"}, 2),
        ({"anchor": "centred_gradient"}, 2),
        ({"contrast_weight": 1.0}, 2),
        ({"read_weight": 1.0, "anchor": "centred"}, CHOICES),
        ({"read_weight": 1.0, "directions": "q2d"}, CHOICES),
    ],
)
@pytest.mark.parametrize("schema", [Recipe, ArmRecipe])
def test_a_loss_has_the_pairs_that_it_needs(schema: type[Recipe], settings: dict[str, object], least: int) -> None:
    parse_as(schema, GOOD | {"reconstruct": settings | {"batch_size": least}}, "recipe")
    if least > 1:
        with pytest.raises(InputError, match=rf"batch_size is {least - 1}\. Set batch_size: {least} or more"):
            parse_as(schema, GOOD | {"reconstruct": settings | {"batch_size": least - 1}}, "recipe")


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_in_the_repository_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANCHOREMBED_DATA", "data")
    monkeypatch.setenv("E5_DATA", "data")
    read_recipe(path)


@pytest.mark.parametrize("name", ["e5.yaml", "paper.yaml", "paper-3b.yaml", "paper-8b.yaml"])
def test_recipes_for_e5_s_data_read_that_folder(
    name: str, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few made lines of each of the 14 files: instructions go before queries; before documents, where alike."""
    monkeypatch.setenv("E5_DATA", str(tmp_path))
    for number, file in enumerate(E5):
        rows = [{"query": f"q{number} {row}", "positive": f"p{number} {row}", "negative": "n"} for row in range(3)]
        write(tmp_path / f"{file}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    recipe = read_recipe(ROOT / "recipes" / name, [f"model.name={tiny_folder}", "data.held_out=0"])
    assert [source.name for source in recipe.data.sources] == E5
    assert recipe.reconstruct is not None
    assert recipe.contrast is not None
    assert (recipe.reconstruct.steps, recipe.reconstruct.batch_size, recipe.contrast.hard_negatives) == (2000, 512, 1)
    prepared = prepare(recipe, recipe.model.name)
    tokenizer = prepared.embedder.tokenizer
    for number, source in enumerate(recipe.data.sources):
        (pair,) = prepared.tokens([3 * number + 1])
        asked = f"Instruct: {source.instruction}\nQuery: "
        before = asked if source.name in ("allnli", "quora_duplicates") else ""
        texts = [
            tokenizer.decode(ids, skip_special_tokens=True) for ids in (pair.query, pair.document, *pair.negatives)
        ]
        assert texts == [f"{asked}q{number} 1", f"{before}p{number} 1", f"{before}n"]
        assert tokenizer.decode(pair.document_text) == f"p{number} 1"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_its_recipes(path: Path) -> None:
    settings = load_config_from_file(str(path))
    assert settings.num_processes == 8
    assert settings.mixed_precision == "no"
    if settings.distributed_type == DistributedType.FSDP:
        assert settings.fsdp_config["fsdp_version"] == 2
        assert not settings.fsdp_config["fsdp_cpu_ram_efficient_loading"]
    else:
        assert settings.distributed_type == DistributedType.MULTI_GPU


def test_home_and_variables_stand_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", "there")
    stage = {"evaluate_on": ["~/t", "$WHERE/t"]}
    found = parse_recipe(
        {
            "data": {"sources": [{"name": "p", "path": "~/$WHERE/p.jsonl"}]},
            "model": {"name": "$WHERE/m"},
            "reconstruct": stage,
            "contrast": stage | {"from": "~/s", "mask_above": 0.0, "guide": "~/g"},
            "output": "~/${WHERE}",
            "compare": {"collections": {"T": ["~/c", "scifact"]}},
        }
    )
    home = str(tmp_path)
    assert str(found.data.sources[0].path) == f"{home}/there/p.jsonl"
    assert (found.model.name, str(found.output)) == ("there/m", f"{home}/there")
    assert found.reconstruct.evaluate_on == found.contrast.evaluate_on == [f"{home}/t", "there/t"]
    assert (found.contrast.from_, found.contrast.guide) == (f"{home}/s", f"{home}/g")
    assert found.compare.collections == {"T": [f"{home}/c", "scifact"]}
