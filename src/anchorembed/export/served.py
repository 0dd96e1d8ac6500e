"""The probes as a client serves them: texts and prompts that are sent, and the vectors that come back.

Each text is sent alone, except by `together`.

Axes: P probes, H dimension of the served vectors.
"""

from collections.abc import Collection, Sequence

import numpy as np

from anchorembed.errors import InputError
from anchorembed.export.check import SIDES
from anchorembed.export.clients import Client, Refused
from anchorembed.export.faults import NO_FAULTS, Cut, Simulation, differences
from anchorembed.export.probes import SHORT, probe_texts
from anchorembed.model.vectors import Floats, Side

_IDENTICAL = 1e-5  # 1 - cosine of one server's vectors of the same tokens


class Served:
    """Probes sent to a client: by side and name, ``texts`` and ``vectors``, or in ``refused`` why there is no vector.

    Raises:
        InputError: if the client refuses all texts, or its vectors differ in dimension.
    """

    def __init__(self, model: Simulation, client: Client, skip: Collection[str]) -> None:
        self.model, self.client = model, client
        self.texts: dict[Side, dict[str, str]] = {}
        self.vectors: dict[Side, dict[str, Floats]] = {side: {} for side in SIDES}
        self.refused: dict[Side, dict[str, str]] = {side: {} for side in SIDES}
        for side in SIDES:
            self.texts[side] = {name: text for name, text in probe_texts(model, side).items() if name not in skip}
            for name, text in self.texts[side].items():
                try:
                    (self.vectors[side][name],) = client.embed([self._prompt(side) + text], side)
                except Refused as refusal:
                    self.refused[side][name] = str(refusal)
        sizes = {len(vector_H) for side in SIDES for vector_H in self.vectors[side].values()}
        if not sizes:
            reason = next(reason for side in SIDES for reason in self.refused[side].values())
            raise InputError(f"{client.name}: refuses all texts: {reason}")
        if len(sizes) > 1:
            raise InputError(f"{client.name}: vectors of different dimensions: {sorted(sizes)}.")
        (self.dimension,) = sizes

    def short(self, side: Side) -> list[str]:
        """Names of the short probes that have vectors."""
        return [name for name in self.vectors[side] if name in SHORT]

    def short_vectors(self, side: Side) -> Floats:
        """Served vectors of the short probes, [P, H]."""
        vectors = [self.vectors[side][name] for name in self.short(side)]
        return np.stack(vectors) if vectors else np.zeros((0, self.dimension), np.float32)

    def short_texts(self, side: Side) -> list[str]:
        """Raw texts of the short probes that have vectors."""
        return [self.texts[side][name] for name in self.short(side)]

    def together(self, side: Side) -> Floats:
        """Vectors of the short probes sent in one request, [P, H]; raises `Refused` as the client does."""
        return self.client.embed([self._prompt(side) + text for text in self.short_texts(side)], side)

    def is_same(self, name: str, side: Side, part: str) -> bool:
        """Whether the client gives a probe's vector for a part of its text, too."""
        try:
            part_1H = self.client.embed([self._prompt(side) + part], side)
        except Refused:
            return False
        return bool(differences(part_1H, self.vectors[side][name][None])[0] <= _IDENTICAL)

    def limit(self, side: Side) -> Cut:
        """The model's own length limit."""
        lengths = self.model.embedder.metadata.lengths
        return Cut(lengths.query if side == "query" else lengths.document)

    def own_vectors(self, side: Side, names: Sequence[str]) -> Floats:
        """The model's own vectors of probes, not normalised."""
        return self.model.vectors([self.texts[side][name] for name in names], side, NO_FAULTS, self.limit(side))

    def _prompt(self, side: Side) -> str:
        """The prompt that is sent before a text of a side."""
        return "" if self.client.prompts_from else self.model.prompt_of(side)

    def note(self) -> str:
        """A sentence on how texts were sent."""
        if self.client.prompts_from:
            return self.client.prompts_from
        prompts = {side: self.model.prompt_of(side) for side in SIDES}
        if not any(prompts.values()):
            return "Texts were sent as they are: the model has no instruction."
        queries, documents = (
            f"with {prompts[side]!r} before them, as clients have to" if prompts[side] else "as they are"
            for side in ("query", "document")
        )
        return f"Queries were sent {queries}, documents {documents}."
