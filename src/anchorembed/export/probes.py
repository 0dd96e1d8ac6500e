"""The probes: texts whose served vectors are compared. Each short text shows some faults and not others."""

from bisect import bisect_left

from anchorembed.export.faults import NO_FAULTS, Simulation
from anchorembed.model.vectors import Side

_SHARE_OF_LIMIT = 0.8  # of the long text
_WORDS = ("river", "stone", "glass", "north", "paper", "light", "seven", "music", "field", "winter", "copper")
LONG, OVER_LONG = "long", "over-long"
SHORT = {
    "short": "How do I read a file line by line?",
    "sentence": "The heart pumps blood through the body, about seventy times a minute.",
    "full stop": ".",
    "space": " ",
    "non-Latin": "向量检索将文本映射到同一空间。 البحث الدلالي 🙂",
    "newlines": "Steps:\n\n1. def area(radius):\n    return 3.14 * radius**2\n2. print(area(2))  # 12",
    "special tokens": "Write {end} at the end of a line, and {end} {end} at the end of a page.",
}
PROBES = (*SHORT, LONG, OVER_LONG)


def probe_texts(model: Simulation, side: Side) -> dict[str, str]:
    """The raw text of each probe; short texts that this side's limit would cut are left out."""
    lengths, end = model.embedder.metadata.lengths, model.embedder.metadata.template.end
    limit = lengths.query if side == "query" else lengths.document
    overhead = sum(map(len, model.around(NO_FAULTS)))
    texts = {name: text.replace("{end}", end) for name, text in SHORT.items()}
    texts = {
        name: text for name, text in texts.items() if overhead + len(model.text_ids(text, side, NO_FAULTS)) <= limit
    }
    texts[LONG] = _of_tokens(model, side, int(_SHARE_OF_LIMIT * limit))
    texts[OVER_LONG] = _of_tokens(model, side, 2 * max(lengths.query, lengths.document))
    return texts


def _of_tokens(model: Simulation, side: Side, tokens: int) -> str:
    """Words that take about ``tokens`` tokens with template and prompt, at least one word."""
    overhead = sum(map(len, model.around(NO_FAULTS)))
    words = [f"{_WORDS[number * number % 7]} {_WORDS[number % 11]} {number}" for number in range(tokens)]

    def is_too_long(count: int) -> bool:
        return overhead + len(model.text_ids(", ".join(words[:count]), side, NO_FAULTS)) > tokens

    return ", ".join(words[: 1 + bisect_left(range(2, len(words) + 1), True, key=is_too_long)])
