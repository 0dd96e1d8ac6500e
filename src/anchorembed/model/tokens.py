"""Text to token ids with one baked tokenizer: pairs for training, lone texts for encoding."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from anchorembed.data.pairs import TextPair
from anchorembed.errors import InputError


@dataclass(frozen=True, slots=True)
class TokenPair:
    """One pair as token ids: the two templated sides, and each side's own tokens, which Stage I predicts.

    ``query_text`` and ``document_text`` hold neither template nor instruction; ``text`` is the pair they are made of.
    """

    query: list[int]
    document: list[int]
    negatives: tuple[list[int], ...]
    query_text: list[int]
    document_text: list[int]
    text: TextPair


@dataclass(frozen=True, slots=True)
class Lengths:
    """The longest templated query and document, in tokens, template and instruction included."""

    query: int
    document: int


class PairTokenizer:
    """Text to tokens with one baked tokenizer: ``TextPair -> TokenPair``, and lone texts for encoding."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, lengths: Lengths) -> None:
        self.tokenizer = tokenizer
        self.lengths = lengths
        self.overhead = tokenizer.num_special_tokens_to_add(pair=False)
        self.end_id: int = tokenizer("")["input_ids"][-1]
        for name, length in (("query", lengths.query), ("document", lengths.document)):
            if length <= self.overhead:
                raise InputError(
                    f"data.{name}_tokens: {length} leaves no room for text; this model's template takes "
                    f"{self.overhead} tokens. Set it to at least {self.overhead + 1}."
                )

    def check_room(self, instruction: str, length: int) -> None:
        """Raise InputError if an instruction leaves no room for the text it precedes, of ``length`` tokens in all."""
        used = self.overhead + len(self.tokenizer(instruction, add_special_tokens=False)["input_ids"])
        if used >= length:
            raise InputError(
                f"a limit of {length} tokens leaves no room for text: template and instruction take {used}. "
                "Shorten the instruction, or train with a larger data.query_tokens or data.document_tokens."
            )

    def templated(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """Token ids of each text within its template, at most ``length`` each, EOS always last."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
        return ids

    def count(self, texts: Sequence[str]) -> NDArray[np.int32]:
        """Tokens of each text within its template, uncut."""
        if not texts:
            return np.zeros(0, np.int32)
        return np.array([len(ids) for ids in self.tokenizer(list(texts))["input_ids"]], np.int32)

    def plain(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """Token ids of each text alone, at most as many as a template of ``length`` tokens leaves room for."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, truncation=True, max_length=length - self.overhead
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def pairs(
        self,
        pairs: Sequence[TextPair],
        instructions: Sequence[str],
        of_documents: Sequence[str] | None = None,
        most_negatives: int | None = None,
    ) -> list[TokenPair]:
        """Tokenise pairs, of each all negatives or the first so many.

        ``instructions[i]`` goes before query i, ``of_documents[i]`` before its documents.
        """
        negatives = [pair.negatives[:most_negatives] for pair in pairs]
        queries = [instruction + pair.query for pair, instruction in zip(pairs, instructions, strict=True)]
        prefixes = of_documents or [""] * len(pairs)
        positives = [prefix + pair.positive for pair, prefix in zip(pairs, prefixes, strict=True)]
        every = [prefix + text for texts, prefix in zip(negatives, prefixes, strict=True) for text in texts]
        rest = iter(self.templated(every, self.lengths.document))
        sides = zip(
            self.templated(queries, self.lengths.query),
            self.templated(positives, self.lengths.document),
            [tuple(next(rest) for _ in texts) for texts in negatives],
            self.plain([pair.query for pair in pairs], self.lengths.query),
            self.plain([pair.positive for pair in pairs], self.lengths.document),
            pairs,
            strict=True,
        )
        return [TokenPair(*side) for side in sides]
