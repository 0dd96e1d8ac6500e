"""Both stages on a tiny model: they learn, resume exactly, skip what is finished, and refuse what changed."""

import gc
import json
import os
import shutil
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from anchorembed.compare.controls import ControlReconstruct
from anchorembed.data.pairs import TextPair
from anchorembed.errors import InputError
from anchorembed.evaluate.find import measure_on
from anchorembed.model.backbone import weights_sha256
from anchorembed.model.embedder import Embedder
from anchorembed.model.metadata import read_metadata
from anchorembed.model.template import instruct
from anchorembed.model.tokens import Lengths, PairTokenizer, TokenPair
from anchorembed.recipe_file import parse_recipe
from anchorembed.recipe_schema import Contrast, Lora, Recipe, Reconstruct, Schedule
from anchorembed.train import contrast as steps
from anchorembed.train import loop
from anchorembed.train import run as training
from anchorembed.train.contrast import Contrastive
from anchorembed.train.loop import Interrupted, _rounded
from anchorembed.train.prepare import prepare
from anchorembed.train.run import contrast, reconstruct, train
from anchorembed.train.stage import step
from stages import ready
from tiny import recipe_values, save_tiny, write_pairs

Make = Callable[..., Recipe]


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: Path) -> Make:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 80)

    def make(output: str = "run", **changes: dict[str, Any] | None) -> Recipe:
        common = {"batch_size": 8, "warmup_steps": 2, "save_every": 3, "evaluate_every": 4, "learning_rate": 3e-3}
        stages: dict[str, Any] = {"reconstruct": common | {"steps": 8}, "contrast": common | {"steps": 8}}
        for stage, change in changes.items():
            stages[stage] = None if change is None else stages[stage] | change
        return parse_recipe(recipe_values(pairs, tiny_folder, tmp_path / output) | stages)

    return make


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def log(model: Path) -> list[dict[str, float]]:
    entries = [json.loads(line) for line in (model.parent / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in entry.items() if key not in ("seconds", "peak_gb")} for entry in entries]


@pytest.mark.slow
def test_both_stages_learn(recipe: Make, said: list[str]) -> None:
    changes = {"steps": 60}
    model = train(recipe(reconstruct=changes, contrast=changes))
    for stage in ("reconstruct", "contrast"):
        losses = [entry["loss"] for entry in log(model.parents[1] / stage / "model")]
        assert len(losses) == 60
        assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    entries = log(model.parents[1] / "reconstruct" / "model")
    assert {"held_out_q2d", "held_out_d2q", "gain_q2d", "gain_d2q"} <= entries[-1].keys()
    assert entries[-1]["gain_d2q"] > 0.01, "the vector carries something of its own text"
    metadata = read_metadata(model)
    assert metadata is not None
    assert str(metadata.history["start"]).endswith("reconstruct/model")
    assert any("starting from" in line and "reconstruct/model" in line for line in said)


@pytest.fixture
def deaf_folder(tmp_path: Path) -> Path:
    """A tiny model whose tokenizer makes no token of a snowman."""
    folder = save_tiny(tmp_path / "deaf")
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "\N{SNOWMAN}"}, "content": ""}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def of_rows(recipe: Recipe, rows: list[dict[str, str]], model: Path | None = None) -> Recipe:
    path = recipe.output.with_name("rows.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = recipe.data.sources[0].model_copy(update={"path": str(path)})
    changes: dict[str, Any] = {"data": recipe.data.model_copy(update={"sources": [source], "held_out": 0})}
    if model is not None:
        changes["model"] = recipe.model.model_copy(update={"name": str(model)})
    return recipe.model_copy(update=changes)


SAME = [{"query": f"read file {n}", "positive": "yes"} for n in range(20)]
NO_TOKENS = [{"query": f"read file {n}", "positive": "\N{SNOWMAN}" * (n + 1)} for n in range(20)]


@pytest.mark.parametrize("stages", [{"contrast": None}, {"reconstruct": None}])
@pytest.mark.parametrize("rows", [SAME, NO_TOKENS])
def test_a_source_that_teaches_nothing_is_refused_before_training(
    recipe: Make, deaf_folder: Path, rows: list[dict[str, str]], stages: dict[str, None]
) -> None:
    refused = of_rows(recipe(**stages), rows, deaf_folder)
    with pytest.raises(InputError, match=r"no step of source p has two usable pairs, .*: p:\d+, .*Correct its texts"):
        train(refused)
    assert not refused.output.exists()


def test_a_stage_one_that_stage_two_would_not_start_from_is_refused(recipe: Make) -> None:
    refused = recipe(contrast={"from": "elsewhere"})
    with pytest.raises(InputError, match=r"contrast\.from: .* from elsewhere .* Set reconstruct=null, or leave"):
        train(refused)
    assert not refused.output.exists()


@pytest.mark.parametrize("hard_negatives", [0, 1])
def test_one_pair_a_step_needs_hard_negatives(recipe: Make, hard_negatives: int) -> None:
    refused = recipe(contrast={"batch_size": 1, "hard_negatives": hard_negatives})
    with pytest.raises(InputError, match=r"contrast\.batch_size: 1, which leaves a query no negative.* Set it to 2"):
        train(refused)


def test_what_stage_two_would_refuse_is_refused_before_stage_one(recipe: Make, deaf_folder: Path) -> None:
    rows = [{"query": "\N{SNOWMAN}" * (n % 2) + "why", "positive": f"file {n}"} for n in range(2)]
    with pytest.raises(InputError, match="contrast: no step of source p"):
        train(of_rows(recipe(), rows, deaf_folder))


def test_a_finished_stage_leaves_no_weights_in_memory(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of compiled layers, which refer to themselves."""
    models: list[weakref.ref[Embedder]] = []

    def compiled(*given: Any) -> Any:
        prepared = prepare(*given)
        prepared.embedder.itself = [prepared.embedder]  # type: ignore[assignment]
        models.append(weakref.ref(prepared.embedder))
        return prepared

    monkeypatch.setattr(training, "prepare", compiled)
    gc.disable()
    try:
        contrast(recipe(reconstruct=None, contrast={"steps": 1}))
        assert [model() for model in models] == [None]
    finally:
        gc.enable()


def test_the_peak_in_the_log_is_of_the_card_that_trains(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def reset(device: torch.device) -> None:
        raise AssertionError(device)

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(training, "find_device", lambda _: torch.device("cuda:1"))
    with pytest.raises(AssertionError, match="cuda:1"):
        contrast(recipe(reconstruct=None))


def test_a_run_is_not_written_into_its_pairs(tmp_path: Path, tiny_folder: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(InputError, match=f"{tmp_path / 'run'}: it is in {tmp_path}, all of which is read"):
        train(parse_recipe(recipe_values(tmp_path, tiny_folder, tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["reconstruct", "contrast"])
def test_steps_that_teach_nothing_are_counted(recipe: Make, deaf_folder: Path, stage: str, said: list[str]) -> None:
    other = {"reconstruct": "contrast", "contrast": "reconstruct"}[stage]
    changes: dict[str, Any] = {stage: {"batch_size": 2, "steps": 10}, other: None}
    rows = NO_TOKENS[4:] + [{"query": f"open {n}", "positive": f"row {n}"} for n in range(4)]
    model = train(of_rows(recipe(**changes), rows, deaf_folder))
    empty = sum("teaches_nothing" in entry for entry in log(model))
    assert 3 <= empty < 10
    assert any(f"{stage}: {empty} of 10 steps taught nothing: they have no two usable pairs" in line for line in said)


def test_finished_stages_are_skipped_and_a_changed_recipe_is_refused(recipe: Make, said: list[str]) -> None:
    model = train(recipe())
    before = model.stat().st_mtime_ns
    verdict = said[next(place for place, line in enumerate(said) if line.startswith("verdict")) :]
    said.clear()
    assert train(recipe()) == model
    assert model.stat().st_mtime_ns == before
    assert [line for line in said if "finished before" in line] == said[:2]
    assert said[2:] == verdict
    with pytest.raises(InputError, match=r"contrast\.learning_rate was 0\.003, is 0\.1 now"):
        train(recipe(contrast={"learning_rate": 0.1}))


def test_a_finished_run_is_extended_as_its_message_says(recipe: Make) -> None:
    short = {"steps": 2}
    model = train(recipe(reconstruct=short, contrast=short))
    with pytest.raises(InputError, match=r"contrast\.steps was 2, is 4 now") as caught:
        train(recipe(reconstruct=short, contrast={"steps": 4}))
    assert f"choose another output and set contrast.from={model} and reconstruct=null." in str(caught.value)
    extended = train(recipe("more", reconstruct=None, contrast=short | {"from": str(model)}))
    metadata = read_metadata(extended)
    assert metadata is not None
    assert metadata.history["start"] == str(model)
    anchored = model.parents[1] / "reconstruct" / "model"
    for run in (reconstruct, contrast):
        with pytest.raises(InputError, match=rf"choose another output and set model\.name={anchored}\."):
            run(recipe(reconstruct={"steps": 4}, contrast=short))


@pytest.mark.parametrize("stage", ["reconstruct", "contrast"])
def test_resumed_equals_uninterrupted(
    recipe: Make, stage: str, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    run = {"reconstruct": reconstruct, "contrast": contrast}[stage]
    alone: dict[str, Any] = {"reconstruct": None} if stage == "contrast" else {}
    expected = run(recipe("whole", **alone))
    real, steps = loop.save_checkpoint, []

    def save_then_interrupt(*args: Any) -> None:
        real(*args)
        steps.append(args[1])
        if args[1] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "save_checkpoint", save_then_interrupt)
    with pytest.raises(Interrupted, match="Stopped after step 4") as caught:
        run(recipe("cut", **alone))
    assert caught.value.signal == signal.SIGTERM
    finished = run(recipe("cut", **alone))
    assert any("resumed after step 4 of 8" in line for line in said)
    assert [entry["step"] for entry in log(finished)] == list(range(1, 9))
    assert log(finished) == log(expected)
    for name, tensor in weights(expected).items():
        assert torch.equal(tensor, weights(finished)[name]), name


def test_a_signal_while_the_model_is_written_loses_nothing(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Embedder.save

    def interrupted(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        real(*args)

    monkeypatch.setattr(Embedder, "save", interrupted)
    with pytest.raises(Interrupted) as caught:
        train(recipe())
    assert caught.value.signal == signal.SIGINT
    assert read_metadata(recipe().output / "reconstruct" / "model") is not None
    assert not (recipe().output / "contrast" / "model").exists(), "the next stage does not begin"


def test_contrast_starts_from_the_model_if_stage_one_was_not_run(
    recipe: Make, tiny_folder: Path, said: list[str]
) -> None:
    contrast(recipe())
    assert f"contrast: starting from {tiny_folder}" in said


@pytest.mark.slow
def test_the_token_budget_changes_memory_not_result(recipe: Make) -> None:
    dropout = {"lora": {"dropout": 0.0, "targets": ["q_proj", "v_proj"]}}
    big = train(recipe("big", contrast=dropout))
    small = train(
        recipe("small", reconstruct={"tokens_per_micro_batch": 200}, contrast=dropout | {"tokens_per_micro_batch": 100})
    )
    for name, tensor in weights(big).items():
        torch.testing.assert_close(weights(small)[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["llama", "llama-untied"])
def test_every_weight_that_trains_gets_a_gradient(name: str, tmp_path: Path) -> None:
    """What waits for the gradients of all weights, as DDP does, would wait forever for a head that is not used."""
    embedder = Embedder.load(save_tiny(tmp_path / name, name), precision="float32", lengths=Lengths(24, 48))
    stage = ready(embedder, Contrast(lora=None))
    module = stage.module
    step(stage, 0, embedder.pairs.tokenize([TextPair("sort", "x y"), TextPair("open", "z")], ["", ""]))
    assert all(weight.grad is not None for weight in module.parameters() if weight.requires_grad)
    assert embedder.backbone.head.weight.requires_grad == (name == "llama")


def test_given_scores_teach_and_a_guide_masks(tiny_folder: Path) -> None:
    """Scores that are the model's own change nothing, others do; a model that is its own guide masks as without one."""
    embedder = Embedder.load(tiny_folder, precision="float32", lengths=Lengths(24, 48))
    texts = [("sort", "x y", ("x z", "left out")), ("open", "y", ()), ("read a row", "rows", ("a table",))]

    def loss(scores: list[tuple[float, ...]], guide: Embedder | None = None, **options: Any) -> float:
        pairs = [TextPair(*text, "s", 1, given) for text, given in zip(texts, scores, strict=True)]
        stage = Contrastive(Contrast(scale=5.0, **options), embedder, embedder, 40, guide=guide)
        value = step(stage, 0, embedder.pairs.tokenize(pairs, [""] * len(pairs)))["loss"]
        gradients.append(torch.cat([p.grad.flatten() for p in embedder.parameters() if p.grad is not None]))
        embedder.zero_grad()
        return value

    gradients: list[torch.Tensor] = []
    own: list[tuple[float, ...]] = []
    for query, positive, negatives in texts:
        q, *documents = embedder.encode([query, positive, *negatives])
        own.append(tuple(5.0 * float(q @ document) for document in documents) if negatives else ())
    plain = loss([(), (), ()])
    assert loss(own, distill=2.0) == pytest.approx(plain, abs=1e-5)
    assert loss([(9.0, -9.0, 0.0), (), own[2]], distill=2.0) > plain + 0.1
    masked = loss([(), (), ()], mask_above=-0.01)
    assert masked < plain - 1e-3
    assert loss([(), (), ()], mask_above=-0.01, guide=embedder) == pytest.approx(masked, abs=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradients[4], gradients[3], rtol=1e-3, atol=1e-6)


def test_a_recipe_with_a_guide_and_given_scores(recipe: Make, tiny_folder: Path, tmp_path: Path) -> None:
    changes = {"guide": str(tiny_folder), "mask_above": 0.0, "distill": 1.0}
    with pytest.raises(InputError, match=r"contrast\.distill: no pair has given scores"):
        contrast(recipe(contrast=changes))
    pairs = tmp_path / "pairs.jsonl"
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    rows[0] |= {"negative": ["far away"], "scores": [3, -1.5]}
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert len(log(contrast(recipe("scored", contrast=changes)))) == 8


def test_a_duplicate_positive_never_counts_as_a_negative(tiny_folder: Path) -> None:
    embedder = Embedder.load(tiny_folder, precision="float32", lengths=Lengths(24, 48))

    def loss(*pairs: TextPair) -> float:
        tokens = embedder.pairs.tokenize(pairs, [""] * len(pairs))
        return step(Contrastive.build(embedder, Contrast(lora=None), budget=1000), 0, tokens)["loss"]

    assert loss(TextPair("sort", "x y", ("x y",)), TextPair("open", "x y")) == pytest.approx(0.0, abs=1e-6)
    assert loss(TextPair("sort", "x y", ("x z",)), TextPair("open", "x y")) > 1e-3


def test_updates_smaller_than_bfloat16_are_not_lost(recipe: Make, tiny_folder: Path) -> None:
    """At a learning rate of 1e-6, weights near 0.2 move by less than bfloat16's step of 0.0008: they must move."""
    small = {"learning_rate": 1e-6, "steps": 2}
    made = recipe("tiny", reconstruct=small)
    model = reconstruct(made.model_copy(update={"model": made.model.model_copy(update={"precision": "bfloat16"})}))
    name = "model.layers.0.mlp.up_proj.weight"
    before, after = weights(tiny_folder)[name], weights(model)[name]
    moved = (after - before).abs()
    assert after.dtype == torch.float32
    assert (moved > 0).float().mean() > 0.9
    assert (before.bfloat16() == after.bfloat16()).float().mean() > 0.9, "bfloat16 weights would have stood still"


def test_training_encoding_and_templates_agree_on_the_instruction(recipe: Make) -> None:
    made = recipe()
    data = made.data.model_copy(update={"instruction": "find", "query_tokens": 48})
    prepared = prepare(made.model_copy(update={"data": data}), made.model.name)
    (tokens,) = prepared.tokens([0])
    text = instruct("find") + prepared.store[0].query
    assert [tokens.query] == prepared.embedder.pairs.templated([text], 48)
    np.testing.assert_allclose(
        prepared.embedder.encode([prepared.store[0].query], side="query"),
        prepared.embedder.encode([text], side="query", instruction=""),
    )


@pytest.mark.parametrize(
    ("common", "own", "kept"),
    [("", ["find", "find"], "find"), ("", ["find", None], ""), ("seek", ["find", None], "seek"), ("", ["", None], "")],
)
def test_the_model_keeps_the_instruction_that_all_sources_share(
    recipe: Make, common: str, own: list[str | None], kept: str, said: list[str]
) -> None:
    made = recipe()
    sources = [
        made.data.sources[0].model_copy(update={"name": str(number), "instruction": task})
        for number, task in enumerate(own)
    ]
    data = made.data.model_copy(update={"instruction": common, "sources": sources, "query_tokens": 48})
    prepared = prepare(made.model_copy(update={"data": data}), made.model.name)
    assert prepared.embedder.metadata.prompts.query == instruct(kept)
    assert any("instructions differ" in line for line in said) == (len(set(own)) > 1 and own[0] != "" and not common)


def test_what_a_schedule_or_repeated_texts_take_away_is_said(recipe: Make, tmp_path: Path, said: list[str]) -> None:
    rows = [{"query": f"q{n}", "positive": f"p{n if n < 100 else 0}"} for n in range(200)]
    (tmp_path / "repeating.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = recipe("said", contrast=None, reconstruct={"steps": 2, "warmup_steps": 4})
    source = made.data.sources[0].model_copy(update={"path": str(tmp_path / "repeating.jsonl")})
    reconstruct(made.model_copy(update={"data": made.data.model_copy(update={"sources": [source], "held_out": 0})}))
    assert "reconstruct: warm-up takes 4 steps of 2; the learning rate ends at 0.0015" in "\n".join(said)
    assert any("of the pairs in steps of 8; the rest repeat texts" in line for line in said)


def test_a_batch_of_more_pairs_than_there_are_is_said(recipe: Make, said: list[str]) -> None:
    reconstruct(recipe("few", contrast=None, reconstruct={"steps": 1, "warmup_steps": 0, "batch_size": 500}))
    assert "reconstruct: batch_size is 500, and a step has at most the 72 pairs there are" in said


def test_what_lora_leaves_out_is_said(recipe: Make, said: list[str]) -> None:
    contrast(recipe("all", reconstruct=None))
    assert not any("does not adapt" in line for line in said)
    contrast(recipe("some", reconstruct=None, contrast={"lora": {"targets": ["q_proj", "v_proj", "qkv"]}}))
    assert "contrast: LoRA does not adapt down_proj, gate_proj, k_proj, o_proj, up_proj; contrast" in "\n".join(said)


def test_what_a_killed_stage_left_beside_its_model_is_cleared(recipe: Make) -> None:
    model = contrast(recipe("left", reconstruct=None))
    for name in (".model.123", "checkpoints", "best"):
        (model.parent / name).mkdir()
    contrast(recipe("left", reconstruct=None))
    assert {path.name for path in model.parent.iterdir()} == {"model", "log.jsonl", "data.json"}


def test_a_quality_is_compared_as_the_log_has_it() -> None:
    assert _rounded(161 / 256) == 0.628906
    assert _rounded(1.3e-7) == 1.3e-7
    assert _rounded(467183075328.0) == 467183075328.0
    assert _rounded(-2.12345678) == -2.123457


def test_an_instruction_that_leaves_no_room_is_refused(recipe: Make) -> None:
    made = recipe()
    data = made.data.model_copy(update={"instruction": "given a question, retrieve what answers it"})
    with pytest.raises(InputError, match="24 tokens leaves no room for text"):
        contrast(made.model_copy(update={"data": data}))


@pytest.mark.slow
def test_changed_data_and_a_changed_first_stage_are_refused(recipe: Make, tmp_path: Path) -> None:
    train(recipe())
    with pytest.raises(InputError, match=r"reconstruct\.learning_rate was"):
        contrast(recipe(reconstruct={"learning_rate": 1e-5}))
    shutil.rmtree(tmp_path / "run" / "reconstruct")
    with pytest.raises(InputError, match="start was"):
        train(recipe(reconstruct={"learning_rate": 1e-5}))
    write_pairs(tmp_path / "pairs.jsonl", 81)
    with pytest.raises(InputError, match="the pairs of p changed since training began"):
        train(recipe())


def test_an_unfinished_first_stage_is_not_passed_over(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe()
    monkeypatch.setattr(training, "fit", lambda *_, **__: (_ for _ in ()).throw(Interrupted(2, "Stopped")))
    with pytest.raises(Interrupted):
        reconstruct(made)
    with pytest.raises(InputError, match="reconstruct: Stage I is not complete"):
        contrast(made)


@pytest.mark.slow
def test_what_was_moved_goes_on(recipe: Make, tmp_path: Path, said: list[str]) -> None:
    """Run folder, data and base model, by what they hold; a recipe's file is as good as the recipe."""
    made = recipe()
    values = made.model_dump(mode="json", by_alias=True)
    values["model"]["name"] = str(shutil.copytree(made.model.name, tmp_path / "base"))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    before = train(tmp_path / "r.yaml")
    for name in ("run", "base", "pairs.jsonl"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    text = yaml.safe_dump(values)
    for name in ("run", "base", "pairs.jsonl"):
        text = text.replace(str(tmp_path / name), str(tmp_path / f"moved-{name}"))
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    said.clear()
    assert train(str(tmp_path / "r.yaml")) == tmp_path / "moved-run" / before.relative_to(tmp_path / "run")
    assert [line.split(":")[1] for line in said[:2]] == [" finished before, kept"] * 2


def test_a_changed_local_base_model_is_refused(recipe: Make, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    made = recipe(reconstruct=None)
    made = made.model_copy(update={"model": made.model.model_copy(update={"name": str(base)})})
    contrast(made)
    save_tiny(base, "llama-untied")
    with pytest.raises(InputError, match="start was"):
        contrast(made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dimensions": [9999]}, r"contrast\.dimensions: 9999 is above"),
        ({"lora": {"targets": ["nothing"]}}, r"contrast\.lora\.targets: the model has none of nothing"),
        ({"lora": {"targets": ["lm_head"]}}, r"contrast\.lora\.targets: the model has none of lm_head"),
        ({"distill": 1.0}, r"contrast\.distill: no pair has given scores"),
        ({"mask_above": 0.0, "guide": "./no/such/model"}, "'./no/such/model': no such folder"),
        pytest.param({"evaluate_on": ["./none_test.jsonl"]}, "none_test.jsonl", marks=pytest.mark.slow),
        ({"keep_best": True, "evaluate_every": 0}, "keep_best: nothing is evaluated"),
        ({"patience": 2, "evaluate_every": 0}, "patience: nothing is evaluated"),
    ],
)
def test_what_the_second_stage_cannot_do_is_said_before_the_first(
    recipe: Make, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(recipe(contrast=change))
    assert not (tmp_path / "run" / "reconstruct" / "log.jsonl").exists()


def test_a_guide_that_is_no_embedder_of_ours_is_refused_before_the_first_stage(recipe: Make, tmp_path: Path) -> None:
    guide = save_tiny(tmp_path / "guide")
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    listed = [{"idx": n, "name": str(n), "type": f"x.{kind}", "path": path} for n, (kind, path) in enumerate(modules)]
    (guide / "modules.json").write_text(json.dumps(listed), encoding="utf-8")
    (guide / "1_Pooling").mkdir()
    (guide / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}', encoding="utf-8")
    with pytest.raises(InputError, match="pools by mean"):
        train(recipe(contrast={"mask_above": 0.0, "guide": str(guide)}))
    assert not (tmp_path / "run" / "reconstruct" / "log.jsonl").exists()


@pytest.mark.parametrize(("temperature", "steps"), [(1.0, 4), (2.0, 1)])
def test_an_epoch_has_each_source(recipe: Make, tmp_path: Path, temperature: float, steps: int) -> None:
    """Two epochs of two sources are four steps, though 64 pairs would fill one."""
    made = recipe(reconstruct=None, contrast={"epochs": 2, "batch_size": 64})
    paths = [write_pairs(tmp_path / f"{number}.jsonl", 12, number) for number in range(2)]
    sources = [{"name": path.stem, "path": str(path)} for path in paths]
    values = made.model_dump(mode="json", by_alias=True)
    values["data"] |= {"sources": sources, "temperature": temperature, "held_out": 0}
    prepared = prepare(parse_recipe(values), made.model.name)
    assert made.contrast is not None
    assert prepared.in_steps(made.contrast, 0).steps == steps
    without = made.contrast.model_copy(update={"epochs": None, "steps": 7})
    assert prepared.in_steps(without, 0).steps == 7


def test_a_tracker_that_is_not_installed(recipe: Make) -> None:
    with pytest.raises(InputError, match="trackers: 'foo'"):
        contrast(recipe().model_copy(update={"trackers": ["foo"]}))


def test_a_loss_that_is_not_finite_stops(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "info_nce", lambda queries, *rest: queries.sum() * float("nan"))
    with pytest.raises(InputError, match=r"step 1 has loss nan .* its pairs: p:\d+, p:\d+"):
        contrast(recipe())


def test_some_steps_may_be_left_out(recipe: Make, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """Steps 2 and 5 give no finite loss: with two allowed the run goes on, also after a stop; with one it ends."""
    real, calls = steps.info_nce, iter(range(1, 100))

    def sometimes(queries: torch.Tensor, *rest: Any) -> torch.Tensor:
        bad = torch.is_grad_enabled() and next(calls) in (2, 5)
        return queries.sum() * float("nan") if bad else real(queries, *rest)

    monkeypatch.setattr(steps, "info_nce", sometimes)
    model = contrast(recipe("two", reconstruct=None, contrast={"skip_steps": 2}))
    assert [entry["step"] for entry in log(model) if "skipped" in entry] == [2, 5]
    assert all(torch.isfinite(tensor).all() for tensor in weights(model).values())
    assert sum("Left out" in line for line in said) == 2
    calls = iter(range(1, 100))
    with pytest.raises(InputError, match="step 5 has loss nan"):
        contrast(recipe("one", reconstruct=None, contrast={"skip_steps": 1, "save_every": 1}))
    calls = iter([5, *range(6, 100)])  # as the message says
    assert (contrast(recipe("one", reconstruct=None, contrast={"skip_steps": 2, "save_every": 1}))).exists()


def test_no_pair_held_out(recipe: Make) -> None:
    made = recipe()
    data = made.data.model_copy(update={"held_out": 0})
    assert train(made.model_copy(update={"data": data})).exists()


@pytest.mark.parametrize("stage", ["reconstruct", "contrast"])
def test_a_stage_that_the_recipe_leaves_out(recipe: Make, stage: str) -> None:
    with pytest.raises(InputError, match=f"{stage} is null"):
        getattr(training, stage)(recipe(**{stage: None}))


def test_the_best_evaluation_is_kept(recipe: Make, tmp_path: Path, said: list[str]) -> None:
    """A learning rate that destroys the model: the best evaluation is not the last; resumed or not, it is the same."""
    rows = [{"sentence1": f"sort {n}", "sentence2": f"list {n % 5}", "score": n % 4} for n in range(16)]
    (tmp_path / "s_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changes = {
        "contrast": {"learning_rate": 0.3, "evaluate_every": 2, "save_every": 2, "keep_best": True},
        "reconstruct": None,
    }
    changes["contrast"] |= {"evaluate_on": [str(tmp_path / "s_test.jsonl")], "steps": 8}
    model = contrast(recipe("best", **changes))
    entries = log(model)
    qualities = {entry["step"]: entry["quality"] for entry in entries if "quality" in entry}
    assert list(qualities) == [2, 4, 6, 8]
    assert all(entry["s_test Spearman"] == entry["quality"] for entry in entries if "quality" in entry)
    best = max(qualities, key=lambda step: qualities[step])
    assert any(f"kept step {best}" in line for line in said)
    assert not (model.parent / "best").exists()
    measured = measure_on([str(tmp_path / "s_test.jsonl")])(Embedder.load(model, precision="float32"))
    assert measured["s_test Spearman"] == pytest.approx(qualities[best], abs=1e-4)
    with pytest.raises(InputError, match="nothing is evaluated"):
        contrast(recipe("never", reconstruct=None, contrast={"keep_best": True, "evaluate_every": 0}))


def test_scalar_buffers_are_hashed_and_tell_models_apart() -> None:
    one, two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    two.load_state_dict(one.state_dict())
    for model, value in ((one, 1.0), (two, 2.0)):
        model.register_buffer("beta", torch.tensor(value))
    assert weights_sha256(one) != weights_sha256(two)


PAIRS = [
    TextPair("sort", "x y", ("x z", "left out"), scores=(2.0, 1.0, 0.0)),
    TextPair("open", "y", ("a z",), scores=(1.0, 3.0)),
    TextPair("read a row", "rows", ("a table",), scores=(0.0, 1.0)),
]


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (Reconstruct(), {"directions": "q2d"}),
        (ControlReconstruct(), {"directions": "d2d"}),
        (ControlReconstruct(), {"directions": "next_token"}),
        (Reconstruct(), {"directions": "alternate"}),
        (Reconstruct(), {"d2q_weight": 0.3}),
        (Reconstruct(), {"sink": False}),
        (Reconstruct(), {"bag_weight": 0.5}),
        (Reconstruct(bag_weight=0.5), {"bag_weight": 1.0}),
        (ControlReconstruct(bag_weight=0.5), {"decode": False}),
        (Contrast(lora=None), {"scale": 20.0}),
        (Contrast(lora=None, scale=1.0), {"hard_negatives": 2}),
        (Contrast(lora=None), {"mask_above": -0.5}),
        (Contrast(lora=None, mask_above=-0.01), {"guide": "other"}),
        (Contrast(lora=None), {"distill": 0.5}),
        (Contrast(lora=None, distill=0.5), {"distill": 1.0}),
        (Contrast(lora=None), {"dimensions": [8]}),
    ],
)
def test_every_setting_reaches_its_loss(
    settings: Schedule, changes: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    if "guide" in changes:
        torch.manual_seed(3)
        other = Embedder.load(tiny_folder, precision="float32")
        with torch.no_grad():
            for weight in other.parameters():
                weight.add_(0.2 * torch.randn_like(weight))
        other.save(tmp_path / "other")
        changes = {"guide": str(tmp_path / "other")}
    losses = []
    for each in (settings, settings.model_copy(update=changes)):
        embedder = Embedder.load(tiny_folder, precision="float32", lengths=Lengths(24, 48))
        stage = ready(embedder, each)
        losses.append(step(stage, 0, embedder.pairs.tokenize(PAIRS, [""] * len(PAIRS)))["loss"])
    assert abs(losses[1] - losses[0]) > 1e-3


def test_lora_s_settings_reach_its_adapters(tiny_folder: Path) -> None:
    embedder = Embedder.load(tiny_folder, precision="float32")
    ready(embedder, Contrast(lora=Lora(rank=3, alpha=7, dropout=0.25, targets=["q_proj", "up_proj"])))
    (config,) = embedder.backbone.peft[-1].peft_config.values()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 7, 0.25)
    assert set(config.target_modules) == {"q_proj", "up_proj"}


def test_held_out_figures_are_those_of_the_saved_model(recipe: Make) -> None:
    """Cross-entropy and accuracy of finding its own document among all held out, from the vectors of `encode`."""
    made = recipe(reconstruct=None, contrast={"lora": {"dropout": 0.3, "rank": 2, "alpha": 4}})
    model = contrast(made)
    prepared = prepare(made, str(model))
    pairs = [prepared.store[index] for index in prepared.split.held_out.tolist()]
    queries = torch.from_numpy(prepared.embedder.encode([pair.query for pair in pairs], "query"))
    documents = torch.from_numpy(prepared.embedder.encode([pair.positive for pair in pairs]))
    assert len({pair.positive for pair in pairs}) == len({pair.query for pair in pairs}) == len(pairs) == 8
    scores = 50 * queries @ documents.T
    own = torch.arange(len(pairs))
    last = log(model)[-1]
    assert last["held_out_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(scores, own)), rel=1e-3)
    assert last["held_out_accuracy"] == pytest.approx(float((scores.argmax(1) == own).float().mean()))
    assert last["quality"] == last["held_out_accuracy"]


@pytest.mark.parametrize(
    ("settings", "judged"),
    [
        (Contrast(), ["held_out_accuracy"]),
        (Reconstruct(), ["gain_q2d", "gain_d2q"]),
        (Reconstruct(bag_weight=1.0), ["gain_q2d", "gain_d2q", "gain_bag_q2d", "gain_bag_d2q"]),
        (ControlReconstruct(bag_weight=1.0, decode=False), ["gain_bag_q2d", "gain_bag_d2q"]),
    ],
)
def test_what_the_best_is_judged_by(settings: Schedule, judged: list[str], embedder: Embedder) -> None:
    names = ["held_out_accuracy", *(f"gain{bag}_{side}" for bag in ("", "_bag") for side in ("q2d", "d2q"))]
    metrics = {name: 2.0**place for place, name in enumerate(names)}
    stage = ready(embedder, settings)
    assert stage.quality(metrics) == sum(metrics[name] for name in judged)
    assert stage.quality({}) is None


def test_hard_negatives_that_are_not_used_are_said_and_not_tokenised(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    made = recipe()
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    text = "".join(json.dumps(row | {"negatives": ["a", "b", "c"]}) + "\n" for row in rows)
    (tmp_path / "pairs.jsonl").write_text(text, encoding="utf-8")
    real, counts = PairTokenizer.tokenize, []

    def spy(self: PairTokenizer, *given: Any) -> list[TokenPair]:
        found = real(self, *given)
        counts.extend(len(pair.negatives) for pair in found)
        return found

    monkeypatch.setattr(PairTokenizer, "tokenize", spy)
    reconstruct(made)
    assert set(counts) == {0}
    assert not any("hard negatives" in line for line in said)
    counts.clear()
    contrast(made.model_copy(update={"contrast": made.contrast.model_copy(update={"hard_negatives": 2})}))
    assert set(counts) == {2}
    assert "contrast: of up to 3 hard negatives a pair, 2 used: contrast.hard_negatives" in said
