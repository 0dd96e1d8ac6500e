"""The results folder of a comparison: what is finished is kept at once and whole, and never run again.

``results.jsonl`` has a line a cell, ``results/`` each run's per-item scores and curves, gzipped. Copied to another
machine, what it holds is skipped there.
"""

import gzip
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorembed.compare.arms import Arm, Values
from anchorembed.errors import InputError
from anchorembed.system.files import write_file

OWN, COMMON = "own", "common"


@dataclass(frozen=True, slots=True)
class Run:
    """One trained model to evaluate: an arm, a seed, and whose Stage II settings."""

    arm: Arm
    seed: int
    setting: str

    @property
    def name(self) -> str:
        """Arm, its digest, setting and seed."""
        return f"{self.arm.name}-{self.arm.digest}-{self.setting}-{self.seed}"


class Results:
    """The results folder; only lines of the same comparison (``key``) on the same collections are read.

    ``revisions`` are of the collections' data, by name: results on other data, or other collections, are left alone.
    """

    def __init__(self, folder: Path, key: str, revisions: Mapping[str, str]) -> None:
        self.folder, self.key, self.revisions = folder, key, revisions
        self.path = folder / "results.jsonl"
        self.read()

    def read(self) -> None:
        """Take what the folder has now."""
        self.lines: list[Values] = []
        self.others = 0
        if self.path.exists():
            for number, text in enumerate(self.path.read_bytes().splitlines(), 1):
                self._take(number, text)

    def _take(self, number: int, text: bytes) -> None:
        try:
            line = json.loads(text)
            mine = line["key"] == self.key
            if mine and line["kind"] == "cell":
                mine = self.revisions.get(line["collection"]) == line["revision"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path}:{number}: damaged ({error}). Remove the line.") from error
        if mine and _names(line) in map(_names, self.lines):
            raise InputError(f"{self.path}:{number}: this was run before, too. Remove one of the two lines.")
        if mine:
            self.lines.append(line)
        else:
            self.others += 1

    def cells(self, run: Run) -> set[str]:
        """Collections that a run has results for."""
        return {line["collection"] for line in self.of(run)}

    def of(self, run: Run) -> list[Values]:
        """Lines of a run's cells."""
        wanted: Values = {"kind": "cell", "arm": run.arm.name, "digest": run.arm.digest}
        wanted |= {"seed": run.seed, "setting": run.setting}
        return [line for line in self.lines if wanted.items() <= line.items()]

    def cost(self, run: Run) -> dict[str, dict[str, float]]:
        """What a run cost by stage; cells evaluated in one go name the same seconds, others add up."""
        every = [line["cost"] for line in self.of(run)]
        stages: dict[str, dict[str, float]] = {name: cost[name] for cost in reversed(every) for name in cost}
        if "evaluate" in stages:
            stages["evaluate"] = {"seconds": sum({cost["evaluate"]["seconds"] for cost in every if cost})}
        return stages

    def tried(self, arm: Arm, seed: int) -> dict[str, float]:
        """Held-out accuracy of each grid choice of an arm with a seed, by its name."""
        wanted = {"kind": "grid", "arm": arm.name, "digest": arm.digest, "seed": seed}
        return {line["choice"]: line["value"] for line in self.lines if wanted.items() <= line.items()}

    def payload(self, name: str) -> Values:
        """Items, curves and isotropy of a run."""
        path = self._payload(name)
        if not path.exists():
            return {}
        try:
            found: Values = json.loads(gzip.decompress(path.read_bytes()))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise InputError(
                f"{path}: damaged ({error}). Take it from a copy, or remove it and its run's lines in {self.path}."
            ) from error
        return found

    def keep(self, lines: Sequence[Values], name: str = "", payload: Values | None = None) -> None:
        """Append lines, after what belongs to them; what is written is written whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if payload is not None:
            path = self._payload(name)
            path.parent.mkdir(exist_ok=True)
            write_file(path, gzip.compress(json.dumps(payload).encode(), mtime=0))
        kept = [{"key": self.key, **line, **self._revision(line)} for line in lines]
        with self.path.open("a", encoding="utf-8") as sink:
            sink.write("".join(json.dumps(line) + "\n" for line in kept))
            sink.flush()
            os.fsync(sink.fileno())
        self.lines += kept

    def _revision(self, line: Values) -> Values:
        return {"revision": self.revisions[line["collection"]]} if line["kind"] == "cell" else {}

    def _payload(self, name: str) -> Path:
        return self.folder / "results" / f"{self.key[:8]}-{name}.json.gz"


def _names(line: Values) -> list[Any]:
    """What names a line: no two of a comparison agree in all of it."""
    choice = line["choice"] if line["kind"] == "grid" else None
    return [choice, *map(line.get, ("kind", "arm", "digest", "seed", "setting", "collection"))]
