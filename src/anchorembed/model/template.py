"""The template: [BOS] header, text, suffix, EOS, baked into the tokenizer so that no caller can forget it.

"EOS" is the template's end token. It is always the last, and the state there is the text's embedding. The same
tokenizer serves training, encoding and the exported folder; truncation cuts the text, never the template.

A special token's name in a text is read as text: only the template has special tokens. The tokenizer's setting
``split_special_tokens`` asks for that, and transformers and sentence-transformers follow it. Engines that read
``tokenizer.json`` alone (text-embeddings-inference, llama.cpp) turn such names into special tokens. Added tokens that
the tokenizer does not call special become tokens in every engine.
"""

import re
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from anchorembed.errors import InputError

_TEXT, _REPLY, _NEXT = "ANCHORTEXT", "ANCHORREPLY", "ANCHORNEXT"  # turns of a conversation to find in its rendering


@dataclass(frozen=True, slots=True)
class Template:
    """What surrounds a text: ``bos + header + text + suffix + end``, each a string of the tokenizer's vocabulary."""

    bos: str
    header: str
    suffix: str
    end: str


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prefixes of each query and of each document; empty for none."""

    query: str = ""
    document: str = ""

    def of_pairs(self, instruction: str | None, symmetric: bool) -> "Prompts":
        """The prompts of training pairs: an instruction, if there is one, instead of the query's own."""
        query = self.query if instruction is None else instruct(instruction)
        return Prompts(query, query if symmetric else self.document)


def instruct(task: str) -> str:
    """Return the prefix of a query whose task is described by ``task``; empty for an empty task."""
    return f"Instruct: {task}\nQuery: " if task else ""


def derive_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """Derive the template of a model from its chat template, or from BOS and EOS if it has none.

    The header is the chat template's part before a user's text, from the user marker on. It is read from the *second*
    user turn of a conversation, because a default system turn or a date may precede the first. The end token is the
    first special token after the user's text that also closes the assistant's turn, else ``eos_token``.

    Raises:
        InputError: if the tokenizer has no ``eos_token``, or its chat template cannot be understood.
    """
    eos, bos = (str(token or "") for token in (tokenizer.eos_token, tokenizer.bos_token))
    if not tokenizer.chat_template:
        if not eos:
            raise InputError("model: its tokenizer has no chat template and no eos_token. Set model.template.end.")
        return Template(bos=bos, header="", suffix="", end=eos)
    before_text, after_text = _render(tokenizer, [_TEXT]).split(_TEXT)
    after_reply = _render(tokenizer, [_TEXT, _REPLY]).split(_REPLY)[1]
    before_next = _render(tokenizer, [_TEXT, _REPLY, _NEXT]).split(_REPLY)[1].split(_NEXT)[0]
    specials = special_pieces(tokenizer)
    header = _without_common_start(before_next, after_reply, specials)
    # SmolLM2's bos_token is the user marker, with which the header begins.
    separate_bos = bool(bos) and before_text.startswith(bos) and not header.startswith(bos)
    closers = [piece for piece in _split(after_reply, specials) if piece in specials]
    end = next((piece for piece in _split(after_text, specials) if piece in closers), "")
    suffix = after_text[: after_text.index(end)] if end else after_text.rstrip()
    if not (end or eos):
        raise InputError("model: no end token found in its chat template. Set model.template.end.")
    return Template(bos=bos if separate_bos else "", header=header, suffix=suffix, end=end or eos)


def bake(tokenizer: PreTrainedTokenizerBase, template: Template) -> PreTrainedTokenizerFast:
    """Return a copy of a tokenizer that surrounds every text with ``template``, and reads special tokens in it as text.

    It pads on the right, with the end token if it has no padding token.

    Raises:
        InputError: if the end token is not one token of the vocabulary, or the tokenizer has no fast form.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("model: its tokenizer has no tokenizer.json form. Convert it with transformers first.")
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    end_id = backend.token_to_id(template.end)
    if end_id is None:
        raise InputError(f"model.template.end: {template.end!r} is not one token of the vocabulary. Name one that is.")
    parts = {
        "<anchor-bos>": _ids(backend, template.bos),
        "<anchor-header>": _leading_ids(backend, template.header),
        "$A": [],
        "<anchor-suffix>": _ids(backend, template.suffix),
        "<anchor-end>": [end_id],
    }
    around = {token_id for ids in parts.values() for token_id in ids}
    for token_id, token in backend.get_added_tokens_decoder().items():
        if token_id in around and token.content.strip():  # some tokenizers call none special, not even the end token
            token.special = True
            backend.add_special_tokens([token])
    special = [
        {"id": name, "ids": ids, "tokens": [backend.id_to_token(i) for i in ids]} for name, ids in parts.items() if ids
    ]
    single = " ".join(name for name, ids in parts.items() if ids or name == "$A")
    backend.post_processor = TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=special)
    names = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    names["pad_token"] = names.get("pad_token") or template.end
    return PreTrainedTokenizerFast(tokenizer_object=backend, split_special_tokens=True, **names)


def _render(tokenizer: PreTrainedTokenizerBase, contents: list[str]) -> str:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    try:
        rendered = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False))
    except Exception as error:  # a chat template is a program of the model's author: it can raise anything
        raise InputError(
            f"model: its chat template fails on a plain conversation ({error}). Set model.template."
        ) from error
    if any(rendered.count(content) != 1 for content in contents):
        raise InputError("model: its chat template does not show each turn's text once. Set model.template.")
    return rendered


def special_pieces(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Names of a tokenizer's special tokens, with or without a role such as ``eos_token``."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | {str(token) for token in tokenizer.all_special_tokens}


def _split(text: str, specials: set[str]) -> list[str]:
    """Cut a text into special tokens and the parts between them."""
    if not specials:
        return [text] if text else []
    longest_first = sorted(specials, key=len, reverse=True)
    return [piece for piece in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text) if piece]


def _without_common_start(text: str, start: str, specials: set[str]) -> str:
    """Cut ``start`` off the beginning of ``text``, or as many leading pieces of it as the text has."""
    if text.startswith(start):
        return text[len(start) :]
    pieces, start_pieces = _split(text, specials), _split(start, specials)
    shared = 0
    while shared < min(len(pieces), len(start_pieces)) and pieces[shared] == start_pieces[shared]:
        shared += 1
    return "".join(pieces[shared:])


def _ids(backend: Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids if text else []


def _leading_ids(backend: Tokenizer, header: str) -> list[int]:
    """Token ids of the header before a text; a token that also holds the start of the text is left out."""
    if not header:
        return []
    encoding = backend.encode(header + _TEXT, add_special_tokens=False)
    return [token for token, (_, stop) in zip(encoding.ids, encoding.offsets, strict=True) if stop <= len(header)]
