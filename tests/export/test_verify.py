"""The right server agrees; each fault of a broken one is named, alone and beside others."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchorembed.errors import InputError
from anchorembed.export.clients import Client, open_endpoint, open_library
from anchorembed.export.run import export
from anchorembed.export.verify import Report, compare, verify
from anchorembed.model.embedder import Embedder
from anchorembed.model.template import Prompts, Template, instruct
from anchorembed.model.tokens import Lengths
from embeddings_server import Broken, Refusal, serving
from tiny import save_tiny

INSTRUCTION = "find code"
PROMPT = instruct(INSTRUCTION)
LIMIT = 160  # tokens of documents and of queries
Check = Callable[..., Report]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    template = Template("<s>", "Text: ", "", "</s>")
    return Embedder.load(
        folder, precision="float32", lengths=Lengths(LIMIT, LIMIT), instruction=INSTRUCTION, template=template
    )


@pytest.fixture
def check(model: Embedder) -> Check:
    def run(**broken: Any) -> Report:
        skip = broken.pop("skip", ())
        with serving(Broken(model, **({"limit": LIMIT} | broken))) as url:
            return compare(model, open_endpoint(url), skip)

    return run


def found(report: Report) -> set[tuple[str, str]]:
    """Each cause and where it is."""
    return {(cause.what, cause.where) for cause in report.causes}


def test_the_right_server_agrees(model: Embedder) -> None:
    server = Broken(model, LIMIT)
    with serving(server) as url:
        report = compare(model, open_endpoint(url))
    assert report.agrees, report.causes
    assert len(report.probes) == 18
    assert min(probe.cosine for probe in report.probes) > 0.99999
    assert "Queries were sent with" in report.note
    assert "." in server.asked
    assert PROMPT + "." in server.asked


BOTH = "documents and queries"
NEWLINES = "newlines replaced by spaces"


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ({"after": ""}, {("EOS missing", BOTH)}),
        ({"after": "</s></s>"}, {("EOS twice", BOTH)}),
        ({"before": ""}, {("header missing", BOTH)}),
        ({"before": "<s>"}, {("header missing, BOS alone there", BOTH)}),
        ({"before": "Text: "}, {("BOS missing", BOTH)}),
        ({"before": "<s><s>Text: "}, {("one BOS too many", BOTH)}),
        ({"before": "", "after": ""}, {("header missing", BOTH), ("EOS missing", BOTH)}),
        ({"before": "<s>Text: <s>Text: ", "after": "</s></s>"}, {("header twice", BOTH), ("EOS twice", BOTH)}),
        ({"pooling": "mean"}, {("mean pooling instead of last-token pooling", BOTH)}),
        ({"pooling": "first"}, {("first-token (CLS) pooling instead of last-token pooling", BOTH)}),
        ({"rewrite": lambda text: text.removeprefix(PROMPT)}, {("query prompt missing", "queries")}),
        (
            {"rewrite": lambda text: PROMPT + text},
            {("query prompt on documents, too", "documents"), ("query prompt twice", "queries")},
        ),
        ({"rewrite": lambda text: text.replace("\n", " ")}, {(NEWLINES, BOTH)}),
        ({"rewrite": str.strip}, {("white space around the text removed", BOTH)}),
        ({"specials_are_text": False}, {("names of special tokens in a text become those tokens", BOTH)}),
        (
            {"pooling": "mean", "rewrite": lambda text: text.replace("\n", " "), "norm": False},
            {("mean pooling instead of last-token pooling", BOTH), (NEWLINES, BOTH), ("not normalised", BOTH)},
        ),
        (
            {"before": "", "pooling": "mean", "rewrite": lambda text: text.removeprefix(PROMPT)},
            {
                ("header missing", BOTH),
                ("mean pooling instead of last-token pooling", BOTH),
                ("query prompt missing", "queries"),
            },
        ),
        ({"norm": False}, {("not normalised", BOTH)}),
        pytest.param({"limit": 64}, {("cut at 64 tokens instead of 160", BOTH)}, marks=pytest.mark.slow),
        pytest.param({"limit": 77}, {("cut at 77 tokens instead of 160", BOTH)}, marks=pytest.mark.slow),
        pytest.param({"limit": 200}, {("cut at 200 tokens instead of 160", BOTH)}, marks=pytest.mark.slow),
        ({"limit": 10_000}, {("not cut at 160 tokens", BOTH)}),
        (
            {"cut": "end"},
            {("cut at 160 tokens with the template, so that the EOS is lost", BOTH)},
        ),
        ({"cut": "start"}, {("the last 160 tokens kept instead of the first 160", BOTH)}),
        pytest.param(
            {"limit": 64, "after": "", "cut": "end"},
            {("EOS missing", BOTH), ("cut at 64 tokens instead of 160", BOTH)},
            marks=pytest.mark.slow,
        ),
        ({"cut": "refuse"}, {("refuses over-long text", BOTH)}),
        ({"cut": "refuse", "limit": 120}, {("refuses over-long text", BOTH), ("refuses long text", BOTH)}),
        ({"padding": 3}, {("a text's vector changes with the texts sent along with it", "documents")}),
    ],
    ids=lambda value: None if isinstance(value, set) else "-".join(value),
)
def test_a_fault_is_named(check: Check, broken: dict[str, Any], named: set[tuple[str, str]]) -> None:
    report = check(**broken)
    assert found(report) == named
    assert not report.agrees
    assert all(cause.cure for cause in report.causes)


def test_fewer_dimensions_are_said_and_agree(check: Check) -> None:
    report = check(dimensions=16)
    assert report.agrees
    assert "first 16 of 32 dimensions" in report.note


def test_a_fault_is_named_in_fewer_dimensions(check: Check) -> None:
    assert found(check(dimensions=16, after="")) == {("EOS missing", BOTH)}


@pytest.mark.slow
def test_precision_is_no_fault(check: Check) -> None:
    report = check(noise=0.08)
    assert report.agrees, report.causes
    assert 0.99 < min(probe.cosine for probe in report.probes) < 0.999
    assert "up to precision" in report.note


@pytest.mark.slow
def test_a_fault_is_named_at_low_precision(check: Check) -> None:
    assert found(check(noise=0.08, after="")) == {("EOS missing", BOTH)}


@pytest.mark.slow
def test_what_no_known_fault_explains_is_called_so(check: Check) -> None:
    report = check(rewrite=str.upper)
    assert {what for what, _ in found(report)} == {"no known cause"}
    assert "short" in report.causes[0].detail


@pytest.mark.slow
@pytest.mark.parametrize("dimension", [32, 48])
def test_vectors_of_another_model_are_called_so(model: Embedder, dimension: int) -> None:
    def other(texts: list[str]) -> list[list[float]]:
        return [np.random.default_rng(list(text.encode())).standard_normal(dimension).tolist() for text in texts]

    with serving(other) as url:
        report = compare(model, open_endpoint(url))
    assert {what for what, _ in found(report)} == {"vectors of another model"}


def test_a_probe_that_is_skipped_is_no_cause(check: Check) -> None:
    report = check(cut="refuse", skip=["over-long"])
    assert report.agrees
    assert "over-long" not in {probe.name for probe in report.probes}


@pytest.mark.slow
def test_other_limits_of_queries_are_named(model: Embedder, tmp_path: Path) -> None:
    model.save(tmp_path / "saved")
    embedder = Embedder.load(tmp_path / "saved", precision="float32", lengths=Lengths(80, LIMIT))
    with serving(Broken(embedder, LIMIT)) as url:
        report = compare(embedder, open_endpoint(url))
    assert found(report) == {("cut at 160 tokens instead of 80", "queries")}


def test_a_server_that_refuses_everything_is_an_error(model: Embedder) -> None:
    def refuse(texts: list[str]) -> None:
        raise Refusal(500, "Model is overloaded")

    with serving(refuse) as url, pytest.raises(InputError, match="refuses all texts: 500: Model is overloaded"):
        compare(model, open_endpoint(url))


def test_options_that_have_no_effect_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'overlong' is no probe\. Did you mean 'over-long'"):
        verify(tmp_path, "http://127.0.0.1:1", skip=["overlong"])
    for settings, option in ({"prompts": tmp_path}, "--prompts"), ({"served_name": "m"}, "--served-name"):
        with pytest.raises(InputError, match=f"{option}: for a URL, not for a folder"):
            verify(tmp_path, str(tmp_path), library="sentence-transformers", **settings)


@pytest.fixture
def exported(model: Embedder, tmp_path: Path) -> Path:
    model.save(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "exported")
    return tmp_path / "exported"


@pytest.mark.slow
def test_an_exported_folder_agrees_in_sentence_transformers(model: Embedder, exported: Path) -> None:
    report = compare(model, open_library("sentence-transformers", str(exported)))
    assert report.agrees, report.causes


@pytest.mark.slow
def test_what_langchain_does_by_default_is_named_and_cured(model: Embedder, exported: Path) -> None:
    module = pytest.importorskip("langchain_huggingface")
    report = compare(model, open_library("langchain", str(exported)))
    assert found(report) == {("query prompt missing", "queries"), (NEWLINES, BOTH)}
    assert any('query_encode_kwargs={"prompt_name": "query"}' in cause.cure for cause in report.causes)
    cured = module.HuggingFaceEmbeddings(model_name=str(exported), query_encode_kwargs={"prompt_name": "query"})
    assert float(np.dot(cured.embed_query("sort"), model.encode(["sort"], side="query")[0])) > 0.9999


@pytest.mark.slow
def test_what_llamaindex_does_by_default_is_named_and_cured(model: Embedder, exported: Path) -> None:
    module = pytest.importorskip("llama_index.embeddings.huggingface")
    report = compare(model, open_library("llamaindex", str(exported)))
    assert found(report) == {("query prompt missing", "queries")}
    assert f"query_instruction={PROMPT!r}" in report.causes[0].cure
    cured = module.HuggingFaceEmbedding(model_name=str(exported), query_instruction=PROMPT)
    assert float(np.dot(cured.get_query_embedding("sort"), model.encode(["sort"], side="query")[0])) > 0.9999


def test_a_model_that_does_not_normalise_is_served_as_it_is(model: Embedder) -> None:
    metadata = replace(model.metadata, normalize=False)
    unscaled = Embedder(model.backbone, model.tokenizer, metadata, model.dtype).eval()
    client = Client("itself", unscaled.encode, True)
    report = compare(unscaled, client)
    assert report.agrees, report.causes


def test_how_texts_were_sent_tells_of_a_document_prompt(model: Embedder, prompted: Embedder) -> None:
    client = Client("itself", lambda texts, side: model.encode(texts, side, ""), False)
    assert "documents with 'passage: ' before them" in compare(prompted, client).note


@pytest.fixture
def prompted(model: Embedder) -> Embedder:
    """A model with a prompt before documents, too."""
    metadata = replace(model.metadata, prompts=Prompts("query: ", "passage: "))
    return Embedder(model.backbone, model.tokenizer, metadata, model.dtype).eval()


@pytest.mark.parametrize(
    ("rewrite", "named"),
    [
        (lambda text: text.removeprefix("passage: "), {("document prompt missing", "documents")}),
        (
            lambda text: text.removeprefix("passage: ").removeprefix("query: "),
            {("document prompt missing", "documents"), ("query prompt missing", "queries")},
        ),
    ],
)
def test_a_missing_document_prompt_is_named(
    prompted: Embedder, rewrite: Callable[[str], str], named: set[tuple[str, str]]
) -> None:
    with serving(Broken(prompted, LIMIT, rewrite=rewrite)) as url:
        report = compare(prompted, open_endpoint(url))
    assert found(report) == named
    assert any("sent with 'passage: '" in cause.cure for cause in report.causes)


@pytest.mark.slow
def test_libraries_that_put_no_document_prompt_are_named(prompted: Embedder, tmp_path: Path) -> None:
    pytest.importorskip("langchain_huggingface")
    prompted.save(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "exported")
    report = compare(prompted, open_library("langchain", str(tmp_path / "exported")))
    assert ("document prompt missing", "documents") in found(report)
    assert any('encode_kwargs={"prompt_name": "document"}' in cause.cure for cause in report.causes)
