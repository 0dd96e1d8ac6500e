"""The first tokens of long texts, without tokenising all of them: time and memory grow with the tokens kept.

A text is cut between a letter and a mark: a space or a punctuation mark. If its tokens are too few, a later cut is
taken. The tokens kept are exactly the first tokens of the whole text, because no part of the tokenizer looks across a
cut:

- Normalizers work character by character, or are NFC or NFKC, which join none of these marks to a letter.
- Added tokens: a mark that follows a letter inside an added token, both in NFKC, is not used for cuts.
- Pre-tokenizers with a regex made of known alternatives: each letter is in a match, no alternative matches a letter
  and a mark after it, and none looks further than one character past its match. So a match always ends at the cut.
- BPE without such a regex: merges give entries of the vocabulary only. A mark that follows a letter in no entry is
  never merged with it.

A text without a cut is tokenised whole, and so is every text if the tokenizer has any other part.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from anchorembed.model.packing import micro_batches

_LETTERS = "A-Za-z\u4e00-\u9fa5\u3041-\u3096\u30a1-\u30fa\uac00-\ud7a3"  # stable in NFC and NFKC
_MARKS = " \n\t.,;:!?\u3002\u3001\uff0c\uff01\uff1f\uff1b\uff1a"
_CHARACTERS_A_TOKEN = 8  # for the first cut; most texts have fewer
_LOOK_BACK = 512  # characters in which to look for a cut
_AT_ONCE = 2**21  # characters tokenised at once; each takes about 150 bytes

# Top-level alternatives of the regexes of GPT-2, Llama 3, Qwen, GPT-4o and Tekken; the first sets are of letters.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{a}{_LOWER}{b}" for a, b in (("*", "+"), ("+", "*"))]
_ANY_LETTER = (  # each of these sets matches every letter
    {r" ?\p{L}+"},
    {r"[^\r\n\p{L}\p{N}]?\p{L}+"},
    {r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"},
    set(_CASED),
    {f"{alternative}{_CONTRACTION}?" for alternative in _CASED},
)
_OTHERS = {
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _CONTRACTION),
    *(r" ?\p{N}+", r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"),
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    *(r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"),
}
# Settings of BPE with which a word's tokens do not follow from merges alone.
_NOT_MERGES = ("dropout", "ignore_merges", "end_of_word_suffix", "continuing_subword_prefix")


def find_cuts(backend: Tokenizer) -> re.Pattern[str] | None:
    """A pattern of the letter before a cut and the mark after it; None if no cut is known to be safe."""
    rules: dict[str, Any] = json.loads(backend.to_str())
    stages = _parts(rules["pre_tokenizer"], "pretokenizers")
    splits = [_splits_after_letters(stage) for stage in stages]
    maps_characters = [stage["type"] in ("ByteLevel", "Metaspace") for stage in stages]  # before a later regex
    if not all(map(_is_local_normalizer, _parts(rules["normalizer"], "normalizers"))) or any(maps_characters[:-1]):
        return None
    if None in splits:
        return None
    pieces = {token["content"] for token in rules["added_tokens"]}
    marks = _MARKS
    if not any(splits):
        model = rules["model"]
        if model["type"] != "BPE" or any(map(model.get, _NOT_MERGES)):
            return None
        if any(stage["type"] == "ByteLevel" for stage in stages):
            return None
        vocabulary = {entry.replace("\u2581", " ") for entry in model["vocab"]}
        # Marks outside the vocabulary are unknown tokens, which may fuse.
        marks = "".join(mark for mark in marks if {mark, _normal(mark)} <= vocabulary)
        pieces |= vocabulary
    behind_letters = re.compile(f"[{_LETTERS}](?=([{re.escape(_MARKS)}]))")
    held = {match[1] for piece in pieces for match in behind_letters.finditer(_normal(piece))}
    marks = "".join(mark for mark in marks if _normal(mark) not in held)
    return re.compile(f"[{_LETTERS}][{re.escape(marks)}]") if marks else None


def _normal(text: str) -> str:
    """A text in NFKC, with spaces in place of Metaspace's character for them."""
    return unicodedata.normalize("NFKC", text).replace("\u2581", " ")


def first_ids(backend: Tokenizer, cuts: re.Pattern[str] | None, texts: Sequence[str], most: int) -> list[list[int]]:
    """The first ``most`` token ids of each text, without template.

    ``backend`` is without truncation and padding, and is not changed; ``cuts`` are as `find_cuts` gives them.
    """
    ids: list[list[int]] = [[] for _ in texts]
    waiting, size = list(range(len(texts))), _CHARACTERS_A_TOKEN * most
    while waiting:
        pieces = [_beginning(texts[index], size, cuts) for index in waiting]
        shorter = []
        for index, piece, tokens in zip(waiting, pieces, all_ids(backend, pieces), strict=True):
            if len(tokens) >= most or len(piece) == len(texts[index]):
                ids[index] = tokens[:most]
            else:
                shorter.append(index)
        waiting, size = shorter, 2 * size
    return ids


def all_ids(backend: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """All token ids of each text, without template; few characters are tokenised at once."""
    for run in micro_batches([len(text) for text in texts], _AT_ONCE):
        for encoding in backend.encode_batch_fast(list(texts[run.start : run.stop]), add_special_tokens=False):
            yield encoding.ids


def _beginning(text: str, size: int, cuts: re.Pattern[str] | None) -> str:
    """A text up to its last cut within ``size`` characters; empty if there is none near."""
    if cuts is None or len(text) <= size:
        return text
    last = 0
    for match in cuts.finditer(text, max(0, size - _LOOK_BACK), size):
        last = match.start() + 1
    return text[:last]


def _parts(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, with nested sequences flattened."""
    if part is None:
        return []
    return [inner for outer in part[key] for inner in _parts(outer, key)] if part["type"] == "Sequence" else [part]


def _is_local_normalizer(part: dict[str, Any]) -> bool:
    if part["type"] == "Replace":
        return bool(part["pattern"] == {"String": " "} and part["content"] == "\u2581")
    return part["type"] in ("NFC", "NFKC", "Lowercase", "Prepend")


def _splits_after_letters(stage: dict[str, Any]) -> bool | None:
    """Whether a pre-tokenizer splits between a letter and a mark; None if the mark may change what is before it."""
    kind = stage["type"]
    if kind == "ByteLevel":
        return bool(stage.get("use_regex", True))
    if kind == "Digits" or (kind == "Metaspace" and stage["replacement"] == "\u2581"):
        return False
    if kind == "Split" and stage["pattern"] == {"String": " "}:
        return False
    if kind == "Split" and "Regex" in stage["pattern"] and stage["behavior"] == "Isolated" and not stage["invert"]:
        alternatives = set(_alternatives(stage["pattern"]["Regex"]))
        if alternatives <= _OTHERS.union(*_ANY_LETTER):
            return any(some <= alternatives for some in _ANY_LETTER)
    return None


def _alternatives(pattern: str) -> list[str]:
    """The alternatives of a regex at its top level."""
    parts, depth = [""], 0
    for character in pattern:
        depth += (character in "([") - (character in ")]")
        if character == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
