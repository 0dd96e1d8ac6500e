"""Faults of servers, simulated with our own model, and the search for the faults that explain served vectors.

A fault changes the tokens that a server runs, or how it pools. Faults of different kinds combine. The result is the
smallest set of faults that explains the vectors; a larger set must explain them clearly better.

Axes: P probes, T tokens of a text, H hidden size.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from itertools import combinations, product

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from anchorembed.model.embedder import Embedder
from anchorembed.model.packing import micro_batches, pack
from anchorembed.model.tokens import own_backend
from anchorembed.model.vectors import Floats, Side, unit_rows
from anchorembed.system.device import autocast

Tokens = tuple[int, ...]
Errors = NDArray[np.float64]
_MOST_FAULTS = 3  # beyond those that the search starts from
_TOKENS_AT_ONCE = 8192
_OFFSETS = (0, -1, 1, -2, 2, -3, 3)  # in tokens: where a part of a text is cut, its tokens may differ from the text's


class Fault(StrEnum):
    """A deviation from how this model embeds a text."""

    NO_END = "EOS missing"
    NO_SUFFIX = "suffix and EOS missing"
    END_TWICE = "EOS twice"
    NO_HEADER = "header missing"
    ONLY_BOS = "header missing, BOS alone there"
    NO_BOS = "BOS missing"
    ANOTHER_BOS = "one BOS too many"
    HEADER_TWICE = "header twice"
    MEAN = "mean pooling instead of last-token pooling"
    FIRST = "first-token (CLS) pooling instead of last-token pooling"
    NO_PROMPT = "query prompt missing"
    PROMPT_TWICE = "query prompt twice"
    PROMPT_ON_DOCUMENTS = "query prompt on documents, too"
    NO_DOCUMENT_PROMPT = "document prompt missing"
    NEWLINES = "newlines replaced by spaces"
    NEWLINES_OF_TEXT = "newlines of the text, not of the prompt, replaced by spaces"
    STRIPPED = "white space around the text removed"
    SPECIAL_TOKENS = "names of special tokens in a text become those tokens"
    ONE_TEXT = "header and text tokenised as one, with names of special tokens as those tokens"


_KINDS: tuple[tuple[Fault, ...], ...] = (  # at most one fault of each kind at a time, the likelier first
    (Fault.NO_END, Fault.NO_SUFFIX, Fault.END_TWICE),
    (Fault.NO_HEADER, Fault.ONLY_BOS, Fault.NO_BOS, Fault.ANOTHER_BOS, Fault.HEADER_TWICE),
    (Fault.MEAN, Fault.FIRST),
    (Fault.NO_PROMPT, Fault.PROMPT_TWICE, Fault.PROMPT_ON_DOCUMENTS, Fault.NO_DOCUMENT_PROMPT),
    (Fault.NEWLINES, Fault.NEWLINES_OF_TEXT),
    (Fault.STRIPPED,),
    (Fault.SPECIAL_TOKENS, Fault.ONE_TEXT),
)
_OF_SIDE: dict[Fault, Side] = {
    Fault.NO_PROMPT: "query",
    Fault.PROMPT_TWICE: "query",
    Fault.NEWLINES_OF_TEXT: "query",
    Fault.PROMPT_ON_DOCUMENTS: "document",
    Fault.NO_DOCUMENT_PROMPT: "document",
}
Faults = frozenset[Fault]
NO_FAULTS: Faults = frozenset()


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a server cuts to ``tokens``: the ``text`` within its template, or all at the ``end`` or the ``start``."""

    tokens: int
    kept: str = "text"


@dataclass
class Simulation:
    """Our model, run as a server with given faults runs it; vectors of equal tokens are computed once."""

    embedder: Embedder
    _vectors: dict[tuple[Tokens, bool], Floats] = field(default_factory=dict)
    _ids: dict[tuple[str, bool], Tokens] = field(default_factory=dict)

    def prompt_of(self, side: Side) -> str:
        """The prompt of a side."""
        prompts = self.embedder.metadata.prompts
        return prompts.query if side == "query" else prompts.document

    @cached_property
    def _backends(self) -> tuple[Tokenizer, Tokenizer]:
        """Tokenizers that read names of special tokens as text, and as these tokens."""
        as_text, as_tokens = own_backend(self.embedder.tokenizer), own_backend(self.embedder.tokenizer)
        as_tokens.encode_special_tokens = False
        return as_text, as_tokens

    @property
    def header(self) -> str:
        """The template's part before a text."""
        return str(self.embedder.tokenizer.decode(self.embedder.pairs.before))

    def around(self, faults: Faults) -> tuple[Tokens, Tokens]:
        """Token ids before and after a text."""
        before, after = tuple(self.embedder.pairs.before), tuple(self.embedder.pairs.after)
        bos_id = self.embedder.tokenizer.bos_token_id  # which engines may add by themselves
        bos: Tokens = () if bos_id is None else (int(bos_id),)
        has_bos = before[: len(bos)] == bos
        befores = {
            Fault.NO_HEADER: (),
            Fault.ONLY_BOS: bos,
            Fault.NO_BOS: before[len(bos) :] if has_bos else before,
            Fault.ANOTHER_BOS: bos + before,
            Fault.HEADER_TWICE: before + before,
            Fault.ONE_TEXT: (),  # `text_ids` has it
        }
        afters = {Fault.NO_END: after[:-1], Fault.NO_SUFFIX: (), Fault.END_TWICE: (*after, after[-1])}
        before = next((ids for fault, ids in befores.items() if fault in faults), before)
        return before, next((ids for fault, ids in afters.items() if fault in faults), after)

    def text_ids(self, text: str, side: Side, faults: Faults) -> Tokens:
        """Token ids of a raw text with its prompt, not cut."""
        prompt = self.prompt_of(side)
        if Fault.NO_PROMPT in faults or Fault.NO_DOCUMENT_PROMPT in faults:
            prompt = ""
        elif Fault.PROMPT_TWICE in faults or Fault.PROMPT_ON_DOCUMENTS in faults:
            prompt = self.prompt_of("query") + prompt
        if Fault.NEWLINES_OF_TEXT in faults:
            text = text.replace("\n", " ")
        text = prompt + text
        if Fault.NEWLINES in faults:
            text = text.replace("\n", " ")
        text = text.strip() if Fault.STRIPPED in faults else text
        text = self.header + text if Fault.ONE_TEXT in faults else text
        key = text, Fault.SPECIAL_TOKENS in faults or Fault.ONE_TEXT in faults
        if key not in self._ids:
            self._ids[key] = tuple(self._backends[key[1]].encode(text, add_special_tokens=False).ids)
        return self._ids[key]

    def vectors(self, texts: Sequence[str], side: Side, faults: Faults, cut: Cut) -> Floats:
        """Vectors of raw texts by a server with these faults, [P, H], not normalised."""
        sequences, mean = self.signature(texts, side, faults, cut)
        self.compute(sequences)
        return np.stack([self._vectors[ids, mean] for ids in sequences])

    def signature(self, texts: Sequence[str], side: Side, faults: Faults, cut: Cut) -> tuple[tuple[Tokens, ...], bool]:
        """The tokens and pooling of `vectors`: faults with equal signatures give equal vectors."""
        return tuple(self._tokens(text, side, faults, cut) for text in texts), Fault.MEAN in faults

    def _tokens(self, text: str, side: Side, faults: Faults, cut: Cut) -> Tokens:
        before, after = self.around(faults)
        ids = self.text_ids(text, side, faults)
        if cut.kept == "text":
            ids = ids[: max(0, cut.tokens - len(before) - len(after))]
        whole = before + ids + after or (0,)  # without tokens there is no vector; any wrong one will do
        if cut.kept != "text":
            whole = whole[: cut.tokens] if cut.kept == "end" else whole[-cut.tokens :]
        return whole[:1] if Fault.FIRST in faults else whole

    def compute(self, sequences: Iterable[Tokens]) -> None:
        """Compute the vectors of sequences that are not known yet, many at once."""
        new = sorted({ids for ids in sequences if (ids, False) not in self._vectors}, key=len)
        for run in micro_batches([len(ids) for ids in new], _TOKENS_AT_ONCE):
            chosen = new[run.start : run.stop]
            parts = self._states(chosen).split([len(ids) for ids in chosen])
            for ids, text_TH in zip(chosen, parts, strict=True):
                self._vectors[ids, False], self._vectors[ids, True] = text_TH[-1].numpy(), text_TH.mean(dim=0).numpy()

    def prefix_vectors(self, ids: Tokens, mean: bool) -> Floats:
        """Vectors of all prefixes of a sequence, [T, H], from one forward pass: attention is causal."""
        states_TH = self._states([ids])
        if mean:
            states_TH = states_TH.cumsum(dim=0) / torch.arange(1, len(ids) + 1)[:, None]
        vectors_TH: Floats = states_TH.numpy()
        return vectors_TH

    @torch.inference_mode()
    def _states(self, sequences: Sequence[Tokens]) -> torch.Tensor:
        """Final states of sequences, end to end, [T, H], float32, on the CPU."""
        backbone = self.embedder.backbone
        batch = pack(sequences).to(backbone.device)
        with autocast(backbone.device, self.embedder.dtype):
            return backbone.states(backbone.embed(batch.tokens), batch).float().cpu()


def differences(served_PH: Floats, expected_PH: Floats) -> Errors:
    """1 - cosine of each served vector and the expected one, [P]; over the served dimensions where they are fewer."""
    expected_PH = expected_PH[:, : served_PH.shape[1]]
    products = np.multiply(unit_rows(served_PH), unit_rows(expected_PH), dtype=np.float64)
    differences_P: Errors = np.maximum(0.0, 1.0 - products.sum(axis=1))
    return differences_P


@dataclass(frozen=True, slots=True)
class Explanation:
    """Faults that explain served vectors, and what they leave unexplained: 1 - cosine of each probe, [P]."""

    faults: Faults
    unexplained: Errors


def explain(
    model: Simulation, served_PH: Floats, texts: Sequence[str], side: Side, start: Faults, tolerance: float
) -> Explanation:
    """The fewest faults, up to three beyond ``start``, that explain served vectors clearly better than fewer do.

    Args:
        model: simulation of the served model.
        served_PH: served vectors of the texts.
        texts: raw texts, too short to be cut.
        side: side of the texts; queries were served with their prompt.
        start: faults to begin from; faults of the other side only are left out.
        tolerance: largest 1 - cosine of vectors that are the same; the search ends when all are.
    """
    cut = Cut(2**31)
    start = frozenset(fault for fault in start if _OF_SIDE.get(fault, side) == side)
    seen: set[object] = set()

    def judged(level: Iterable[Faults]) -> Iterator[Explanation]:
        new = {}
        for faults in level:
            signature = model.signature(texts, side, faults, cut)
            if signature not in seen:
                seen.add(signature)
                new[faults] = signature
        model.compute(ids for sequences, _ in new.values() for ids in sequences)
        for faults in new:
            yield Explanation(faults, differences(served_PH, model.vectors(texts, side, faults, cut)))

    best = min(judged([NO_FAULTS, start]), key=_mean)
    for count in range(1, _MOST_FAULTS + 1):
        if best.unexplained.max() <= tolerance:
            break
        challenger = min(judged(_changed(start, side, count)), key=_mean, default=best)
        if _clearly_better(challenger.unexplained, best.unexplained, tolerance):
            best = challenger
    return best


def _mean(explanation: Explanation) -> float:
    return float(explanation.unexplained.mean())


def _changed(start: Faults, side: Side, count: int) -> Iterator[Faults]:
    """All sets of faults that differ from ``start`` in ``count`` kinds."""
    for kinds in combinations(_KINDS, count):
        others = start - {fault for kind in kinds for fault in kind}
        values = [[*(fault for fault in kind if _OF_SIDE.get(fault, side) == side), None] for kind in kinds]
        for chosen in product(*values):
            yield others | frozenset(fault for fault in chosen if fault is not None)


def _clearly_better(new: Errors, old: Errors, tolerance: float) -> bool:
    """Whether the probes that tell two explanations apart differ less than half as much, and did differ."""
    changed = np.abs(new - old) > 1e-6
    return bool(changed.any() and old[changed].max() > tolerance and new[changed].mean() < 0.5 * old[changed].mean())


def find_cut(
    model: Simulation,
    served_H: Floats,
    text: str,
    side: Side,
    faults: Faults,
    is_same: Callable[[str], bool],
    tolerance: float,
) -> Cut | None:
    """Where a server with these faults cuts a text; None if no cut explains the text's vector.

    The server is sent parts of the text: a part has the text's vector if it has all tokens that the server keeps.

    Args:
        model: simulation of the served model.
        served_H: served vector of the text.
        text: raw text.
        side: of the text.
        faults: faults of the server.
        is_same: whether the server gives the text's vector for a part of it.
        tolerance: largest 1 - cosine of vectors that are the same.
    """
    before, after = model.around(faults)
    whole = before + model.text_ids(text, side, faults) + after
    prefixes_TH = model.prefix_vectors(whole, Fault.MEAN in faults)
    ends_T = differences(np.broadcast_to(served_H, (len(whole), len(served_H))), prefixes_TH)
    if ends_T.min() <= tolerance:
        tokens = int(ends_T.argmin()) + 1
        return Cut(tokens, "end" if after and tokens < len(whole) else "text")
    prompt = len(model.text_ids("", side, faults))
    size = _smallest(lambda size: is_same(text[:size]), len(text))
    tokens = len(before) + len(model.text_ids(text[:size], side, faults)) + len(after)
    cuts = [Cut(tokens + offset) for offset in _OFFSETS]
    size = _smallest(lambda size: is_same(text[-size:]), len(text))
    tokens = len(model.text_ids(text[-size:], side, faults)) - prompt + len(after)
    cuts += [Cut(max(1, tokens + offset), "start") for offset in _OFFSETS]
    unexplained = [differences(served_H[None], model.vectors([text], side, faults, cut))[0] for cut in cuts]
    best = int(np.argmin(unexplained))
    return cuts[best] if unexplained[best] <= tolerance else None


def _smallest(is_enough: Callable[[int], bool], most: int) -> int:
    """The smallest size from 1 to ``most`` that is enough, where all larger ones are."""
    return 1 + bisect_left(range(1, most), True, key=is_enough)
