"""Compare a served model with the model itself, and name the cause where their vectors differ.

Short texts come first: the faults that explain their vectors are then assumed for long texts, whose differences are
cuts at another length. Texts are sent one at a time. At last the short ones are sent in one request, which must give
the same vectors.

Axes: P probes, H hidden size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from anchorembed.errors import InputError, nearest
from anchorembed.export.clients import Client, Library, Refused, open_endpoint, open_library
from anchorembed.export.cures import BATCH, CUT, OTHER_MODEL, REFUSED, SCALE, TOO_LONG, UNKNOWN, cure
from anchorembed.export.faults import (
    NO_FAULTS,
    Cut,
    Explanation,
    Fault,
    Faults,
    Simulation,
    differences,
    explain,
    find_cut,
)
from anchorembed.export.probes import LONG, OVER_LONG, PROBES, SHORT, probe_texts
from anchorembed.model.embedder import Embedder
from anchorembed.model.vectors import Floats, Side, unit_rows

SIDES: tuple[Side, Side] = ("document", "query")
_SAME = 1e-3  # 1 - cosine of vectors that are the same
_IDENTICAL = 1e-5  # 1 - cosine of one server's vectors of the same tokens
_OF_SPREAD = 0.02  # limit instead of _SAME, as a share of the median 1 - cosine of different texts, where it is smaller
_PRECISION = 20  # times the limit: the largest 1 - cosine that bfloat16 or quantised weights explain


@dataclass(frozen=True, slots=True)
class Probe:
    """A text of a side: the cosine of its served vector and ours; NaN if none was served, then ``refused`` says why."""

    name: str
    side: Side
    cosine: float
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Cause:
    """Why served vectors differ, with details, on which side (documents, queries or both), and what to do."""

    what: str
    detail: str
    where: str
    cure: str


@dataclass(frozen=True, slots=True)
class Report:
    """Cosines of all probes and the causes of differences; ``note`` says how queries were sent, and other remarks."""

    served: str
    probes: list[Probe]
    causes: list[Cause]
    note: str

    @property
    def agrees(self) -> bool:
        """Whether the served vectors are the model's own, up to precision."""
        return not self.causes


def verify(
    model: str | Path,
    target: str,
    *,
    library: Library | None = None,
    served_name: str | None = None,
    api_key_env: str = "OPENAI_API_KEY",
    timeout: float = 60.0,
    skip: Sequence[str] = (),
) -> Report:
    """Compare a model's own vectors, in float32, with those that an endpoint or a library gives for the same texts.

    Args:
        model: as in `Embedder.load`.
        target: URL of an OpenAI-compatible endpoint; with ``library`` an exported folder.
        library: that loads the folder, with its defaults.
        served_name: as in `open_endpoint`.
        api_key_env: as in `open_endpoint`.
        timeout: as in `open_endpoint`.
        skip: names of probes to leave out.

    Raises:
        InputError: if the model or the target cannot be used, or the reply holds no vectors.
    """
    for name in skip:
        if name not in PROBES:
            raise InputError(f"--skip: {name!r} is no probe.{nearest(name, PROBES)} There are: {', '.join(PROBES)}.")
    if not set(SHORT) - set(skip):
        raise InputError("--skip: no short text is left to compare. Skip fewer.")
    client = open_library(library, target) if library else open_endpoint(target, served_name, api_key_env, timeout)
    return compare(Embedder.load(model, precision="float32"), client, skip)


def compare(embedder: Embedder, client: Client, skip: Sequence[str] = ()) -> Report:
    """Compare a model's vectors with those of a client, as `verify` does."""
    return _Comparison(Simulation(embedder), client, [name for name in PROBES if name not in skip]).report()


@dataclass
class _Comparison:
    model: Simulation
    client: Client
    names: list[str]
    served: dict[tuple[str, Side], Floats] = field(default_factory=dict)
    refused: dict[tuple[str, Side], str] = field(default_factory=dict)
    causes: dict[str, tuple[set[Side], list[str], str]] = field(default_factory=dict)  # what: where, details, cure

    def __post_init__(self) -> None:
        self.texts = {side: probe_texts(self.model, side) for side in SIDES}
        own_PH = unit_rows(self._own("document", [name for name in self._of_side("document") if name in SHORT]))
        spread = float(np.median(1.0 - own_PH @ own_PH.T)) if len(own_PH) > 1 else 1.0
        self.tolerance = max(1e-5, min(_SAME, _OF_SPREAD * spread))
        self.most = _PRECISION * self.tolerance

    def report(self) -> Report:
        self._ask()
        served = next(iter(self.served.values()))
        note = self._how_sent()
        if len(served) > self.model.embedder.dimension:
            self._add_other_model(f"{len(served)} dimensions, this model has {self.model.embedder.dimension}")
            return self._report(note)
        explained = {"document": self._explain("document", NO_FAULTS)}
        explained["query"] = self._explain("query", explained["document"].faults)
        if self._is_other_model(explained["document"]):
            self._add_other_model("no nearer to their own texts than to others")
            return self._report(note)
        for side in SIDES:
            self._judge(side, explained[side])
        self._judge_scale()
        self._judge_batch(explained["document"])
        if len(served) < self.model.embedder.dimension:
            note += f" Only the first {len(served)} of {self.model.embedder.dimension} dimensions are served."
        largest = max((1.0 - probe.cosine for probe in self._probes() if not math.isnan(probe.cosine)), default=0.0)
        if not self.causes and largest > self.tolerance:
            note += f" The same up to precision: bfloat16 or quantised weights explain 1 - cosine of {largest:.4f}."
        return self._report(note)

    # --- Served vectors ---

    def _of_side(self, side: Side) -> list[str]:
        return [name for name in self.names if name in self.texts[side]]

    def _ask(self) -> None:
        for side in SIDES:
            for name in self._of_side(side):
                try:
                    (vector,) = self.client.embed([self._sent(side, name)], side)
                except Refused as refusal:
                    self.refused[name, side] = str(refusal)
                else:
                    self.served[name, side] = vector
        if not self.served:
            raise InputError(f"{self.client.name}: refuses all texts: {next(iter(self.refused.values()))}")
        if len(sizes := {len(vector) for vector in self.served.values()}) > 1:
            raise InputError(f"{self.client.name}: vectors of different dimensions: {sorted(sizes)}.")

    def _sent(self, side: Side, name: str) -> str:
        return self._prompt(side) + self.texts[side][name]

    def _prompt(self, side: Side) -> str:
        """The prompt that is sent before a text of a side."""
        return "" if self.client.puts_prompt else self.model.prompt_of(side)

    def _how_sent(self) -> str:
        prompts = {side: self.model.prompt_of(side) for side in SIDES}
        if not any(prompts.values()):
            return "Texts were sent as they are: the model has no instruction."
        if self.client.puts_prompt:
            return "Queries were given to the query method as they are, documents to the document method."
        queries, documents = (
            f"with {prompts[side]!r} before them, as clients have to" if prompts[side] else "as they are"
            for side in ("query", "document")
        )
        return f"Queries were sent {queries}, documents {documents}."

    def _own(self, side: Side, names: Sequence[str]) -> Floats:
        return self.model.vectors([self.texts[side][name] for name in names], side, NO_FAULTS, self._limit(side))

    def _limit(self, side: Side) -> Cut:
        lengths = self.model.embedder.metadata.lengths
        return Cut(lengths.query if side == "query" else lengths.document)

    # --- Causes of differences ---

    def _short(self, side: Side) -> list[str]:
        return [name for name in self.names if name in SHORT and (name, side) in self.served]

    def _explain(self, side: Side, start: Faults) -> Explanation:
        names = self._short(side)
        if not names:
            return Explanation(start, np.zeros(0))
        served_PH = np.stack([self.served[name, side] for name in names])
        texts = [self.texts[side][name] for name in names]
        return explain(self.model, served_PH, texts, side, start, self.tolerance)

    def _is_other_model(self, explained: Explanation) -> bool:
        """Whether, even with the best explanation, served vectors are no nearer to their own texts than to others."""
        names = self._short("document")
        if len(names) < 3 or np.median(explained.left) <= self.most:
            return False
        texts = [self.texts["document"][name] for name in names]
        own_PH = self.model.vectors(texts, "document", explained.faults, self._limit("document"))
        served_PH = unit_rows(np.stack([self.served[name, "document"] for name in names]))
        scores_PP = served_PH @ unit_rows(own_PH[:, : served_PH.shape[1]]).T
        return bool((scores_PP.argmax(axis=1) == np.arange(len(names))).mean() <= 0.5)

    def _add_other_model(self, detail: str) -> None:
        for side in SIDES:
            self._add_cause(OTHER_MODEL, side, OTHER_MODEL, detail)

    def _enough(self, explained: Explanation) -> float:
        """The largest 1 - cosine of vectors that are the same, given the typical difference of this server."""
        noise = float(np.median(explained.left)) if len(explained.left) else 0.0
        return min(max(self.tolerance, 4 * noise), self.most)

    def _judge(self, side: Side, explained: Explanation) -> None:
        for fault in [fault for fault in Fault if fault in explained.faults]:
            self._add_cause(fault, side, fault, self._detail(fault))
        enough, faults = self._enough(explained), explained.faults
        for name in [name for name in self.names if (name, side) in self.refused]:
            kind = REFUSED if name in SHORT else TOO_LONG
            self._add_cause(f"refuses {name} text", side, kind, self.refused[name, side])
        cuts = [self._limit(side)]
        unknown = []
        for name in (OVER_LONG, LONG, *self._short(side)):
            if any(self._left(name, side, faults, known) <= enough for known in cuts):
                continue
            cut = None if name in SHORT else self._find_cut(name, side, faults, enough)
            if cut is None:
                unknown.append(name)
            else:
                cuts.append(cut)
                self._add_cut(cut, name, side, faults)
        if unknown:
            self._add_cause(UNKNOWN, side, UNKNOWN, f"probes: {', '.join(unknown)}")

    def _detail(self, fault: Fault) -> str:
        if fault in (Fault.NO_HEADER, Fault.HEADER_TWICE, Fault.ONLY_BOS):
            return repr(self.model.header)
        return repr(self.model.embedder.metadata.template.end) if fault in (Fault.NO_END, Fault.END_TWICE) else ""

    def _left(self, name: str, side: Side, faults: Faults, cut: Cut) -> float:
        """1 - cosine of a served vector and that of a server with these faults; 0 if none is served."""
        served_H = self.served.get((name, side))
        if served_H is None:
            return 0.0
        expected_1H = self.model.vectors([self.texts[side][name]], side, faults, cut)
        return float(differences(served_H[None], expected_1H)[0])

    def _find_cut(self, name: str, side: Side, faults: Faults, enough: float) -> Cut | None:
        served_H, prompt = self.served[name, side], self._prompt(side)

        def is_same(part: str) -> bool:
            try:
                return bool(differences(self.client.embed([prompt + part], side), served_H[None])[0] <= _IDENTICAL)
            except Refused:
                return False

        return find_cut(self.model, served_H, self.texts[side][name], side, faults, is_same, enough)

    def _add_cut(self, cut: Cut, name: str, side: Side, faults: Faults) -> None:
        limit = self._limit(side).tokens
        whole = sum(map(len, self.model.around(faults))) + len(
            self.model.text_ids(self.texts[side][name], side, faults)
        )
        if cut.tokens >= whole:
            self._add_cause(f"not cut at {limit} tokens", side, CUT, f"a text of {whole} is embedded whole")
        elif cut.kept == "end":
            self._add_cause(f"cut at {cut.tokens} tokens with the template, so that the EOS is lost", side, CUT)
        elif cut.kept == "start":
            self._add_cause(f"the last {cut.tokens} tokens kept instead of the first {limit}", side, CUT)
        else:
            self._add_cause(f"cut at {cut.tokens} tokens instead of {limit}", side, CUT)

    def _judge_scale(self) -> None:
        if not self.model.embedder.metadata.normalize:
            return
        for side in SIDES:
            norms = [float(np.linalg.norm(vector)) for (_, its), vector in self.served.items() if its == side]
            if norms and max(abs(norm - 1.0) for norm in norms) > 0.01:
                self._add_cause(SCALE, side, SCALE, f"lengths {min(norms):.3g} to {max(norms):.3g}")

    def _judge_batch(self, explained: Explanation) -> None:
        names = self._short("document")
        if len(names) < 2:
            return
        alone_PH = np.stack([self.served[name, "document"] for name in names])
        try:
            together_PH = self.client.embed([self._sent("document", name) for name in names], "document")
        except Refused as refusal:
            self._add_cause(f"refuses {len(names)} texts in one request", "document", BATCH, str(refusal))
            return
        if together_PH.shape != alone_PH.shape or differences(together_PH, alone_PH).max() > self._enough(explained):
            self._add_cause(BATCH, "document", BATCH)

    # --- The report ---

    def _add_cause(self, what: str, side: Side, kind: str, detail: str = "") -> None:
        """Add a cause, or a side and detail to one that is known; ``kind`` is a key of `cures`."""
        advice = cure(kind, self.client.name, self.model.prompt, self._limit(side).tokens)
        sides, details, _ = self.causes.setdefault(what, (set(), [], advice))
        sides.add(side)
        if detail and detail not in details:
            details.append(detail)

    def _probes(self) -> Iterator[Probe]:
        for name in self.names:
            for side in [side for side in SIDES if name in self.texts[side]]:
                served_H = self.served.get((name, side))
                if served_H is None or len(served_H) > self.model.embedder.dimension:
                    yield Probe(name, side, math.nan, self.refused.get((name, side), ""))
                else:
                    left = differences(served_H[None], self._own(side, [name]))[0]
                    yield Probe(name, side, 1.0 - float(left))

    def _report(self, note: str) -> Report:
        where = {frozenset(SIDES): "documents and queries", frozenset(["query"]): "queries"}
        causes = [
            Cause(what, "; ".join(details), where.get(frozenset(sides), "documents"), advice)
            for what, (sides, details, advice) in self.causes.items()
        ]
        return Report(self.client.name, list(self._probes()), causes, note)


def table(report: Report) -> str:
    """A report as text: cosines by probe and side, notes, causes and cures."""
    lines = [report.served, f"{'probe':<16}{'documents':>12}{'queries':>12}"]
    cells = {(probe.name, probe.side): _cell(probe) for probe in report.probes}
    for name in dict.fromkeys(probe.name for probe in report.probes):
        lines.append(f"{name:<16}" + "".join(f"{cells.get((name, side), '-'):>12}" for side in SIDES))
    lines.append(report.note)
    for cause in report.causes:
        lines.append(f"cause: {cause.what}{f' ({cause.detail})' if cause.detail else ''}, in {cause.where}")
        lines.append(f"cure:  {cause.cure}")
    return "\n".join([*lines, "The vectors agree." if report.agrees else "The vectors differ."])


def _cell(probe: Probe) -> str:
    return "refused" if probe.refused else "-" if math.isnan(probe.cosine) else f"{probe.cosine:.6f}"
