"""Compare a served model with the model itself, and name the cause where their vectors differ.

Short texts are compared first. The faults that explain their vectors are then assumed for long texts, whose remaining
differences are cuts at another length. Short texts sent in one request must have the same vectors as alone.

Axes: P probes, H hidden size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from anchorembed.errors import InputError, nearest
from anchorembed.export.check import SIDES
from anchorembed.export.clients import Client, Library, Refused, open_endpoint, open_library, with_prompts
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
from anchorembed.export.probes import LONG, OVER_LONG, PROBES, SHORT
from anchorembed.export.served import Served
from anchorembed.model.embedder import Embedder
from anchorembed.model.vectors import Side, unit_rows

_SAME = 1e-3  # largest 1 - cosine of vectors that are the same
_OF_SPREAD = 0.02  # of the median 1 - cosine of different texts: the limit where that is smaller
_PRECISION = 20  # times the limit: the largest 1 - cosine that bfloat16 or quantised weights explain


@dataclass(frozen=True, slots=True)
class Probe:
    """A text of a side, and the cosine of its served vector and ours; NaN without a vector, as ``refused`` explains."""

    name: str
    side: Side
    cosine: float
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Cause:
    """Why served vectors differ, details, on which side (documents, queries or both), and what to do."""

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
    prompts: Path | None = None,
) -> Report:
    """Compare a model's own vectors, in float32, with those of an endpoint or a library for the same texts.

    Args:
        model: as in `Embedder.load`.
        target: URL of an OpenAI-compatible endpoint; with ``library`` an exported folder.
        library: that loads the folder, with its defaults.
        served_name: as in `open_endpoint`.
        api_key_env: as in `open_endpoint`.
        timeout: as in `open_endpoint`.
        skip: names of probes to leave out.
        prompts: ``prompts.json`` of an export to GGUF, to send with each text; only for an endpoint.

    Raises:
        InputError: if the model or the target cannot be used, or the reply holds no vectors.
    """
    for name in skip:
        if name not in PROBES:
            raise InputError(f"--skip: {name!r} is no probe.{nearest(name, PROBES)} There are: {', '.join(PROBES)}.")
    if not set(SHORT) - set(skip):
        raise InputError("--skip: no short text is left to compare. Skip fewer.")
    for option, value in (("--prompts", prompts), ("--served-name", served_name)):
        if library and value:
            raise InputError(
                f"{option}: for a URL, not for a folder that a library loads. Leave out {option} or --with."
            )
    client = open_library(library, target) if library else open_endpoint(target, served_name, api_key_env, timeout)
    client = with_prompts(client, prompts) if prompts else client
    return compare(Embedder.load(model, precision="float32"), client, skip)


def compare(embedder: Embedder, client: Client, skip: Sequence[str] = ()) -> Report:
    """Compare a model's vectors with those of a client, as `verify` does."""
    return _Comparison(Served(Simulation(embedder), client, skip)).report()


class _Comparison:
    """The search for causes of differences; ``causes`` maps their names to sides, details and cure."""

    def __init__(self, served: Served) -> None:
        self.served, self.model = served, served.model
        self.dimension = self.model.embedder.dimension
        self.causes: dict[str, tuple[set[Side], list[str], str]] = {}
        short = [name for name in served.texts["document"] if name in SHORT]
        own_PH = unit_rows(served.own_vectors("document", short))
        spread = float(np.median(1.0 - own_PH @ own_PH.T)) if len(own_PH) > 1 else 1.0
        self.tolerance = max(1e-5, min(_SAME, _OF_SPREAD * spread))
        self.precision_limit = _PRECISION * self.tolerance

    def report(self) -> Report:
        dimension, note = self.served.dimension, self.served.note()
        if dimension > self.dimension:
            self._add_other_model(f"{dimension} dimensions, this model has {self.dimension}")
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
        if dimension < self.dimension:
            note += f" Only the first {dimension} of {self.dimension} dimensions are served."
        largest = max((1.0 - probe.cosine for probe in self._probes() if not math.isnan(probe.cosine)), default=0.0)
        if not self.causes and largest > self.tolerance:
            note += f" The same up to precision: bfloat16 or quantised weights explain 1 - cosine of {largest:.4f}."
        return self._report(note)

    def _explain(self, side: Side, start: Faults) -> Explanation:
        texts = self.served.short_texts(side)
        if not texts:
            return Explanation(start, np.zeros(0))
        return explain(self.model, self.served.short_vectors(side), texts, side, start, self.tolerance)

    def _is_other_model(self, explained: Explanation) -> bool:
        """Whether, even with the best explanation, served vectors are no nearer to their own texts than to others."""
        texts = self.served.short_texts("document")
        if len(texts) < 3 or np.median(explained.unexplained) <= self.precision_limit:
            return False
        own_PH = self.model.vectors(texts, "document", explained.faults, self.served.limit("document"))
        served_PH = unit_rows(self.served.short_vectors("document"))
        scores_PP = served_PH @ unit_rows(own_PH[:, : served_PH.shape[1]]).T
        return bool((scores_PP.argmax(axis=1) == np.arange(len(texts))).mean() <= 0.5)

    def _add_other_model(self, detail: str) -> None:
        for side in SIDES:
            self._add_cause(OTHER_MODEL, side, OTHER_MODEL, detail)

    def _side_tolerance(self, explained: Explanation) -> float:
        """The largest 1 - cosine of vectors that are the same, given this server's typical difference on a side."""
        noise = float(np.median(explained.unexplained)) if len(explained.unexplained) else 0.0
        return min(max(self.tolerance, 4 * noise), self.precision_limit)

    def _judge(self, side: Side, explained: Explanation) -> None:
        """Add the causes of a side: faults, refused texts, and cuts of long ones."""
        for fault in [fault for fault in Fault if fault in explained.faults]:
            self._add_cause(fault, side, fault, self._detail(fault))
        tolerance, faults = self._side_tolerance(explained), explained.faults
        for name, reason in self.served.refused[side].items():
            kind = REFUSED if name in SHORT else TOO_LONG
            self._add_cause(f"refuses {name} text", side, kind, reason)
        cuts = [self.served.limit(side)]
        unknown = []
        for name in (OVER_LONG, LONG, *self.served.short(side)):
            if any(self._difference(name, side, faults, known) <= tolerance for known in cuts):
                continue
            is_same = partial(self.served.is_same, name, side)
            served_H, text = self.served.vectors[side][name], self.served.texts[side][name]
            is_short = name in SHORT
            cut = None if is_short else find_cut(self.model, served_H, text, side, faults, is_same, tolerance)
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

    def _difference(self, name: str, side: Side, faults: Faults, cut: Cut) -> float:
        """1 - cosine of a served vector and that of a server with these faults; 0 if none is served."""
        served_H = self.served.vectors[side].get(name)
        if served_H is None:
            return 0.0
        expected_1H = self.model.vectors([self.served.texts[side][name]], side, faults, cut)
        return float(differences(served_H[None], expected_1H)[0])

    def _add_cut(self, cut: Cut, name: str, side: Side, faults: Faults) -> None:
        limit, text = self.served.limit(side).tokens, self.served.texts[side][name]
        whole = sum(map(len, self.model.around(faults))) + len(self.model.text_ids(text, side, faults))
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
            norms = [float(np.linalg.norm(vector_H)) for vector_H in self.served.vectors[side].values()]
            if norms and max(abs(norm - 1.0) for norm in norms) > 0.01:
                self._add_cause(SCALE, side, SCALE, f"lengths {min(norms):.3g} to {max(norms):.3g}")

    def _judge_batch(self, explained: Explanation) -> None:
        alone_PH = self.served.short_vectors("document")
        if len(alone_PH) < 2:
            return
        try:
            together_PH = self.served.together("document")
        except Refused as refusal:
            self._add_cause(f"refuses {len(alone_PH)} texts in one request", "document", BATCH, str(refusal))
            return
        if together_PH.shape != alone_PH.shape or differences(together_PH, alone_PH).max() > self._side_tolerance(
            explained
        ):
            self._add_cause(BATCH, "document", BATCH)

    def _add_cause(self, what: str, side: Side, kind: str, detail: str = "") -> None:
        """Add a cause, or add a side and detail to a known cause; ``kind`` is a key of `cures`."""
        prompts = self.model.embedder.metadata.prompts
        advice = cure(kind, self.served.client.name, prompts, self.served.limit(side).tokens)
        sides, details, _ = self.causes.setdefault(what, (set(), [], advice))
        sides.add(side)
        if detail and detail not in details:
            details.append(detail)

    def _probes(self) -> Iterator[Probe]:
        for name in PROBES:
            for side in [side for side in SIDES if name in self.served.texts[side]]:
                served_H = self.served.vectors[side].get(name)
                if served_H is None or len(served_H) > self.dimension:
                    yield Probe(name, side, math.nan, self.served.refused[side].get(name, ""))
                else:
                    difference = differences(served_H[None], self.served.own_vectors(side, [name]))[0]
                    yield Probe(name, side, 1.0 - float(difference))

    def _report(self, note: str) -> Report:
        where = {frozenset(SIDES): "documents and queries", frozenset(["query"]): "queries"}
        causes = [
            Cause(what, "; ".join(details), where.get(frozenset(sides), "documents"), advice)
            for what, (sides, details, advice) in self.causes.items()
        ]
        return Report(self.served.client.name, list(self._probes()), causes, note)


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
