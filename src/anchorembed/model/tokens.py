"""Text to token ids with a baked tokenizer: pairs for training, single texts for encoding."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from anchorembed.data.pairs import TextPair
from anchorembed.errors import InputError
from anchorembed.model.first_tokens import all_ids, find_cuts, first_ids


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A pair as token ids: both sides and the negatives in their template, and both sides without it for Stage I.

    ``query_text`` and ``document_text``, which Stage I predicts, hold neither template nor instruction; ``text`` is the
    pair before tokenising.
    """

    query: list[int]
    document: list[int]
    negatives: tuple[list[int], ...]
    query_text: list[int]
    document_text: list[int]
    text: TextPair


@dataclass(frozen=True, slots=True)
class Lengths:
    """Most tokens of a query and of a document, template and instruction included."""

    query: int
    document: int


class PairTokenizer:
    """Text to tokens with a baked tokenizer: ``TextPair -> TokenPair``, and single texts for encoding.

    Threads may share it.

    Attributes:
        before: token ids of the template before a text.
        after: token ids of the template after a text; the last is the end token's.
        overhead: number of tokens of the template.
        end_id: the end token's id.

    Raises:
        InputError: if a length leaves no room for text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, lengths: Lengths) -> None:
        self.tokenizer = tokenizer
        self.lengths = lengths
        self._backend = own_backend(tokenizer)  # never changed: threads share it
        self._cuts = find_cuts(self._backend)
        encoding = self._backend.encode("a")
        text = [index for index, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
        self.before, self.after = encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]
        self.overhead = len(self.before) + len(self.after)
        self.end_id: int = self.after[-1]
        for name, length in (("query", lengths.query), ("document", lengths.document)):
            if length <= self.overhead:
                raise InputError(
                    f"data.{name}_tokens: {length} leaves no room for text; this model's template takes "
                    f"{self.overhead} tokens. Set it to at least {self.overhead + 1}."
                )

    def rules(self) -> str:
        """All that decides the tokens of a text, as JSON: normalizer, vocabulary, added tokens, template."""
        return self._backend.to_str()

    def check_room(self, instruction: str, length: int) -> None:
        """Raise InputError if template and instruction take all of ``length`` tokens."""
        used = self.overhead + sum(map(len, all_ids(self._backend, [instruction])))
        if used >= length:
            raise InputError(
                f"a limit of {length} tokens leaves no room for text: template and instruction take {used}. "
                "Shorten the instruction, or train with a larger data.query_tokens or data.document_tokens."
            )

    def templated(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """Token ids of each text in its template, at most ``length`` each, EOS always last."""
        return [[*self.before, *ids, *self.after] for ids in self.plain(texts, length)]

    def count(self, texts: Sequence[str]) -> NDArray[np.int32]:
        """Number of tokens of each text in its template, not truncated, [N]."""
        return np.array([self.overhead + len(ids) for ids in all_ids(self._backend, texts)], np.int32)

    def plain(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """Token ids of each text without its template, at most as many as `templated` keeps of it."""
        return first_ids(self._backend, self._cuts, texts, length - self.overhead)

    def tokenize(
        self,
        pairs: Sequence[TextPair],
        query_prefixes: Sequence[str],
        document_prefixes: Sequence[str] | None = None,
        most_negatives: int | None = None,
    ) -> list[TokenPair]:
        """Tokenise pairs, each with its prefixes of the query and of the documents; the latter by default empty.

        Of each pair's negatives the first ``most_negatives`` are used, by default all.
        """
        negatives = [pair.negatives[:most_negatives] for pair in pairs]
        queries = [prefix + pair.query for pair, prefix in zip(pairs, query_prefixes, strict=True)]
        prefixes = document_prefixes or [""] * len(pairs)
        positives = [prefix + pair.positive for pair, prefix in zip(pairs, prefixes, strict=True)]
        flat = [prefix + text for texts, prefix in zip(negatives, prefixes, strict=True) for text in texts]
        tokens = iter(self.templated(flat, self.lengths.document))
        sides = zip(
            self.templated(queries, self.lengths.query),
            self.templated(positives, self.lengths.document),
            [tuple(next(tokens) for _ in texts) for texts in negatives],
            self.plain([pair.query for pair in pairs], self.lengths.query),
            self.plain([pair.positive for pair in pairs], self.lengths.document),
            pairs,
            strict=True,
        )
        return [TokenPair(*side) for side in sides]


def own_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of a tokenizer's Rust part, with its reading of special tokens, without truncation and padding."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens
    return backend
