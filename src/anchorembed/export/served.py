"""The probes as a client serves them: texts and prompts that are sent, and the vectors that come back.

Each text is sent alone, except by `together`.

Axes: P probes, H dimension of the served vectors.
"""

from collections.abc import Sequence

import numpy as np

from anchorembed.errors import InputError
from anchorembed.export.check import SIDES
from anchorembed.export.clients import Client, Refused
from anchorembed.export.faults import NO_FAULTS, Cut, Simulation, differences
from anchorembed.export.probes import SHORT, probe_texts
from anchorembed.model.vectors import Floats, Side

_IDENTICAL = 1e-5  # 1 - cosine of one server's vectors of the same tokens


class Served:
    """Probes sent to a client: ``vectors`` by name and side, or in ``refused`` why the client gave none.

    Raises:
        InputError: if the client refuses all texts, or its vectors differ in dimension.
    """

    def __init__(self, model: Simulation, client: Client, names: Sequence[str]) -> None:
        self.model, self.client, self.names = model, client, names
        self.texts = {side: probe_texts(model, side) for side in SIDES}
        self.vectors: dict[tuple[str, Side], Floats] = {}
        self.refused: dict[tuple[str, Side], str] = {}
        for side in SIDES:
            for name in self.probes(side):
                try:
                    (self.vectors[name, side],) = client.embed([self._prompt(side) + self.texts[side][name]], side)
                except Refused as refusal:
                    self.refused[name, side] = str(refusal)
        sizes = {len(vector_H) for vector_H in self.vectors.values()}
        if not sizes:
            raise InputError(f"{client.name}: refuses all texts: {next(iter(self.refused.values()))}")
        if len(sizes) > 1:
            raise InputError(f"{client.name}: vectors of different dimensions: {sorted(sizes)}.")
        (self.dimension,) = sizes

    def probes(self, side: Side) -> list[str]:
        """Names of a side's probes."""
        return [name for name in self.names if name in self.texts[side]]

    def short(self, side: Side) -> list[str]:
        """Names of the short probes that have vectors."""
        return [name for name in self.names if name in SHORT and (name, side) in self.vectors]

    def short_vectors(self, side: Side) -> Floats:
        """Served vectors of the short probes, [P, H]."""
        vectors = [self.vectors[name, side] for name in self.short(side)]
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
        return bool(differences(part_1H, self.vectors[name, side][None])[0] <= _IDENTICAL)

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
