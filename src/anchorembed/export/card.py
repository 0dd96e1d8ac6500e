"""The model card of a trained or exported folder: README.md, made from the folder's own metadata and results.

The card's metadata are made by sentence-transformers for a folder that it loads, and by huggingface_hub for others. The
text gives the base model, how to use the vectors in other software, the training data and settings, and results.
"""

import json
import logging
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CardData, ModelCard, ModelCardData

from anchorembed.errors import InputError, first_line
from anchorembed.model.default_model import DEFAULT_MODEL
from anchorembed.model.load import HUB_ID, file_beside
from anchorembed.model.metadata import METADATA, Metadata, read_metadata
from anchorembed.model.template import Prompts

_log = logging.getLogger(__name__)

RESULTS = "results.json"  # in a model folder: rows of a table, each a dictionary with the same keys
_DEFAULT = ("HuggingFaceTB/SmolLM2-135M-Instruct", {"license": "apache-2.0"})  # the default model's hub id and licence
_LICENCE = ("license", "license_name", "license_link")  # keys of a card's metadata
_GRAPHS = {"openvino": ("OpenVINO", "openvino/openvino_model.xml"), "onnx": ("ONNX Runtime", "onnx/model.onnx")}
_TAGS = ["sentence-similarity", "feature-extraction", "anchorembed"]
Kind = Literal["native", "folder", "gguf", "openvino", "onnx"]  # native is this package's; others as in `run.To`


def write_card(folder: Path, title: str, dimension: int, kind: Kind = "native") -> None:
    """Write the README.md of a model folder of some kind, which has ``anchorembed.json``.

    ``title`` is the name by which examples load the model, ``dimension`` that of its vectors.
    """
    metadata = read_metadata(folder)
    if metadata is None:
        raise InputError(f"{folder / METADATA}: no such file. Name a folder that AnchorEmbed trained or exported.")
    base, licence = _base(metadata.history)
    data = _card_data(kind, title, base if "/" in base else None)
    header = [data.to_yaml(), *(f"{key}: {json.dumps(text, ensure_ascii=False)}" for key, text in licence.items())]
    parts = [
        f"# {title}",
        _introduction(base, licence, metadata, dimension),
        *_usage(kind, title, metadata),
        *_vectors(metadata),
        *_training(metadata.stages),
        *_results(folder / RESULTS),
    ]
    ModelCard("\n".join(["---", *header, "---\n\n"]) + "\n\n".join(parts) + "\n").save(folder / "README.md")


def published(metadata: Metadata) -> Metadata:
    """Metadata without paths of this machine: the base has the name that cards show, beside its licence."""
    base, licence = _base(metadata.history)
    history = {key: value for key, value in metadata.history.items() if key != "start"}
    return replace(metadata, history=history | {"base": base, "licence": licence})


def _card_data(kind: Kind, title: str, base: str | None) -> CardData:
    """The card's metadata without licence, by classes of the library that loads the folder; ``base`` is a hub id."""
    if kind != "folder":
        library = "transformers" if kind == "native" else kind
        return ModelCardData(base_model=base, library_name=library, pipeline_tag="sentence-similarity", tags=_TAGS)
    from sentence_transformers.base.model_card import (  # noqa: PLC0415 - takes a second, and only exports need it
        BaseModelCardData,
    )

    data = BaseModelCardData(model_name=title, local_files_only=True, generate_widget_examples=False)
    data.add_tags(_TAGS)
    data.base_model = base
    return data


def _base(history: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Name and licence of the model that training began with: a hub id, or the last part of a path."""
    name = str(history.get("base", ""))
    if "licence" in history:  # `published`
        return name, history["licence"]
    if name == DEFAULT_MODEL:
        return _DEFAULT
    path = Path(name).expanduser()
    shown = name if re.fullmatch(HUB_ID, name, re.ASCII) and not path.exists() else path.name
    try:
        card = file_beside(name, "README.md") if name else None
        data = ModelCard.load(card).data.to_dict() if card else {}
    except Exception as error:  # of the hub's client or a YAML parser; a card without a licence is better than no model
        _log.warning("model card: the licence of %s is not known (%s)", name, first_line(error))
        data = {}
    return shown, {key: data[key] for key in _LICENCE if isinstance(data.get(key), str)}


def _introduction(base: str, licence: Mapping[str, str], metadata: Metadata, dimension: int) -> str:
    lengths = metadata.lengths
    limit = (
        f"{lengths.document} tokens"
        if lengths.query == lengths.document
        else f"{lengths.query} tokens of a query and {lengths.document} of a document"
    )
    licence_name = licence.get("license_name") or licence.get("license")
    terms = f"that of the base model, {licence_name}" if licence_name else "the base model's"
    return (
        f"A text embedder made from `{base}` with AnchorEmbed. It maps a text "
        f"of up to {limit}, template and prompt included, to a vector of {dimension} numbers"
        f"{' of length 1' if metadata.normalize else ''}: the state of the text's last token. Its licence is {terms}."
    )


def _usage(kind: Kind, title: str, metadata: Metadata) -> Iterable[str]:
    limit = metadata.lengths.document
    if kind == "native":
        yield f"""## Use

```py
from anchorembed import Embedder

model = Embedder.load({title!r})  # or the path of this folder
queries = model.encode(["How do I sort a list?"], side="query")
documents = model.encode(["list.sort() sorts a list in place."])
```

`anchorembed export` writes a folder for sentence-transformers and other software."""
    elif kind == "folder":
        yield from _exported_usage(title, metadata.prompts)
    elif kind == "gguf":
        yield f"""## Use

```
llama-server -m {shlex.quote(f"{title}/model.gguf")} --embedding --pooling last -c {limit} -b {limit} -ub {limit}
```

llama.cpp adds the end token. Send what `prompts.json` says before and after each text: its `query` or `document`, the
text, its `suffix`. Texts longer than `max_tokens` are not cut: cut them before."""
    else:
        engine, file = _GRAPHS[kind]
        yield f"""## Use

`{file}` is a graph for {engine}: `input_ids` and `attention_mask` in, `sentence_embedding` out. Tokens are by
`tokenizer.json`, with the prompts of `config_sentence_transformers.json` before a text, at most {limit} of them."""


def _exported_usage(title: str, prompts: Prompts) -> Iterable[str]:
    yield f"""## Use

With [sentence-transformers](https://sbert.net):

```py
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({title!r})
queries = model.encode_query(["How do I sort a list?"])
documents = model.encode_document(["list.sort() sorts a list in place."])
print(model.similarity(queries, documents))
```"""
    by_name = prompts.query or prompts.document
    langchain = (
        ",\n    encode_kwargs={'prompt_name': 'document'},\n    query_encode_kwargs={'prompt_name': 'query'},\n"
        if by_name
        else ""
    )
    untold = " (it sends no prompts unless told to)" if by_name else ""
    yield f"""With LangChain{untold}, which turns line breaks into spaces:

```py
from langchain_huggingface import HuggingFaceEmbeddings

model = HuggingFaceEmbeddings(
    model_name={title!r}{langchain})
```"""
    prompt = f",\n    query_instruction={prompts.query!r},\n    text_instruction={prompts.document!r},\n"
    yield f"""With LlamaIndex{untold}:

```py
from llama_index.embeddings.huggingface import HuggingFaceEmbedding

model = HuggingFaceEmbedding(
    model_name={title!r}{prompt if by_name else ""})
```"""
    both = (("query", "queries", prompts.query), ("document", "documents", prompts.document))
    named = [f"the {side} prompt before {sides}" for side, sides, prompt in both if prompt]
    if named:
        yield (
            "Servers of `/v1/embeddings` (text-embeddings-inference, vLLM, llama.cpp) embed the text they are sent: "
            f"put {' and '.join(named)} yourself. `anchorembed verify` compares a server with this model."
        )


def _vectors(metadata: Metadata) -> Iterable[str]:
    template = metadata.template
    before, after = f"{template.bos}{template.header}", f"{template.suffix}{template.end}"
    rows = {
        "query prompt": metadata.prompts.query,
        "document prompt": metadata.prompts.document,
        "tokens before a text": before,
        "tokens after it": after,
    }
    lines = [f"| {name} | {_literal(value)} |" for name, value in rows.items()]
    yield "## Prompts and template"
    yield "The tokenizer adds the tokens of the template.\n\n| | |\n|---|---|\n" + "\n".join(lines)


def _training(stages: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    if not stages:
        return
    data = dict.fromkeys(map(_data, stages))  # often the same in all stages
    yield "## Training\n\n" + " Then ".join(counts for counts, _ in data)
    sources = dict.fromkeys(row for _, rows in data for row in rows)
    yield "| source | pairs | content hash |\n|---|---|---|\n" + "\n".join(sources)
    shared = ("data.query_tokens", "data.document_tokens", "seed")
    for stage in stages:
        name = next(key.split(".")[0] for key in stage["plan"] if key.startswith(("reconstruct.", "contrast.")))
        title = {"reconstruct": "Stage I, reconstruction", "contrast": "Stage II, contrastive learning"}[name]
        settings = {key: value for key, value in stage["plan"].items() if key.startswith(f"{name}.") or key in shared}
        lines = [f"| {key.removeprefix(f'{name}.')} | {_literal(value)} |" for key, value in settings.items()]
        yield f"{title}:\n\n| setting | value |\n|---|---|\n" + "\n".join(lines)


def _data(stage: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """How many pairs a stage was trained on, as a sentence, and its sources, as rows of a table."""
    data, plan = stage["data"], stage["plan"]
    names = [source["name"] for source in plan["data.sources"]]
    rows = (
        f"| {_cell(name)} | {data.get('sources', {}).get(name, '')} | `{plan[f'data.sources.{name}.content']}` |"
        for name in names
    )
    return f"{data['train']:,} query-document pairs were trained on, {data['held_out']:,} held out.", tuple(rows)


def _results(path: Path) -> Iterable[str]:
    if not path.is_file():
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        columns = list(rows[0])
        lines = [f"| {' | '.join(map(_cell, columns))} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(_cell(row[column]) for column in columns)} |" for row in rows]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: damaged ({first_line(error)}). Repeat the `anchorembed train` that wrote it, or delete it."
        ) from error
    yield "## Results\n\n" + "\n".join(lines)


def _literal(value: object) -> str:
    """A value in a cell of a table, as code."""
    text = value if isinstance(value, str) else json.dumps(value)
    if not text:
        return "none"
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{text}{space}{fence}".replace("\n", "\\n").replace("|", "\\|")


def _cell(value: object) -> str:
    """A name in a cell of a table, with characters of markup escaped."""
    return re.sub(r"([\\`*_<>|&])", r"\\\1", " ".join(str(value).split()))
