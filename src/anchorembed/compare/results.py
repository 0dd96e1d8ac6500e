"""The results folder of a comparison: each finished result is written at once, and never computed twice.

``results.jsonl`` has a line for each cell or grid score, ``results/`` a gzipped record for each run, and
``comparison.json`` the comparison's record. The folder can be copied to another machine and continued there.
"""

import gzip
import json
import zlib
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from anchorembed.compare.records import Cell, ComparisonRecord, GridScore, Run, RunRecord, parse
from anchorembed.errors import InputError
from anchorembed.system.files import write_file

_LINE_TYPES: dict[str, type[Cell] | type[GridScore]] = {"cell": Cell, "grid": GridScore}
_KIND_OF_TYPE = {line_type: kind for kind, line_type in _LINE_TYPES.items()}


class Results:
    """The results folder; only lines of the same comparison (``key``) on the same collections are read.

    ``revisions`` are hashes of the collections' data, by name. Lines of other comparisons, data or collections are
    ignored, and counted in ``ignored_lines``.
    """

    def __init__(self, folder: Path, key: str, revisions: Mapping[str, str]) -> None:
        self.folder, self.key, self.revisions = folder, key, revisions
        self.path = folder / "results.jsonl"
        self.read()

    def read(self) -> None:
        """Read ``results.jsonl`` anew."""
        self.cells: list[Cell] = []
        self.grid: list[GridScore] = []
        self.ignored_lines = 0
        self._identities: set[Hashable] = set()
        if self.path.exists():
            for number, text in enumerate(self.path.read_bytes().splitlines(), 1):
                self._read_line(number, text)

    def _read_line(self, number: int, text: bytes) -> None:
        try:
            values = json.loads(text)
            line = parse(_LINE_TYPES[values["kind"]], values) if values["key"] == self.key else None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path}:{number}: damaged ({error}). Remove the line.") from error
        if line is None or (isinstance(line, Cell) and self.revisions.get(line.collection) != line.revision):
            self.ignored_lines += 1
            return
        if line.identity in self._identities:
            raise InputError(f"{self.path}:{number}: an earlier line has the same result. Remove one of the two.")
        self._add(line)

    def cells_of(self, run: Run) -> list[Cell]:
        """Cells of a run."""
        return [cell for cell in self.cells if cell.run == run]

    def record(self, run: Run) -> RunRecord:
        """Costs, curves, isotropy and items of a run; an empty record before it is run.

        Raises:
            InputError: if the file is damaged, or is missing though the run has cells.
        """
        path = self._record_path(run)
        if not path.exists() and not self.cells_of(run):
            return RunRecord()
        try:
            return parse(RunRecord, json.loads(gzip.decompress(path.read_bytes())))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise InputError(
                f"{path}: missing or damaged ({error}). Restore it from a copy, or remove it and its run's lines in "
                f"{self.path}."
            ) from error

    def write_record(self, run: Run, record: RunRecord) -> None:
        """Write a run's record; called before its cells are appended, so that each cell has its record."""
        compact = json.dumps(asdict(record), separators=(",", ":"))
        write_file(self._record_path(run), gzip.compress(compact.encode(), mtime=0))

    def append(self, *lines: Cell | GridScore) -> None:
        """Append lines to ``results.jsonl``, all or none; raises InputError as `write_file` does."""
        values = [{"key": self.key, "kind": _KIND_OF_TYPE[type(line)], **asdict(line)} for line in lines]
        added = "".join(json.dumps(line, allow_nan=False) + "\n" for line in values)
        present = self.path.read_bytes() if self.path.exists() else b""
        write_file(self.path, present + b"\n" * (present[-1:] not in (b"", b"\n")) + added.encode())
        for line in lines:
            self._add(line)

    def _add(self, line: Cell | GridScore) -> None:
        self._identities.add(line.identity)
        if isinstance(line, Cell):
            self.cells.append(line)
        else:
            self.grid.append(line)

    def _record_path(self, run: Run) -> Path:
        return self.folder / "results" / f"{self.key[:8]}-{run.name}.json.gz"


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that a report is made from: the comparison's record, and its results in the order of its runs."""

    comparison: ComparisonRecord
    cells: list[Cell]
    grid: list[GridScore]
    runs: dict[Run, RunRecord]


def write_comparison(folder: Path, comparison: ComparisonRecord) -> None:
    """Write ``comparison.json``."""
    write_file(folder / "comparison.json", json.dumps(asdict(comparison), indent=2, allow_nan=False) + "\n")


def read_evidence(folder: Path) -> Evidence:
    """The results in a folder of the comparison in its ``comparison.json``.

    Raises:
        InputError: if a file is missing or damaged.
    """
    path = folder / "comparison.json"
    try:
        comparison = parse(ComparisonRecord, json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file. Name a results folder in which a comparison was run.") from error
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}). Run the comparison, which writes it again.") from error
    results = Results(folder, comparison.key, comparison.revisions)
    runs = list(comparison.runs())
    return Evidence(
        comparison,
        [cell for run in runs for cell in results.cells_of(run)],
        [
            score
            for arm in comparison.arms
            for score in results.grid
            if (score.arm, score.digest) == (arm.name, arm.digest)
        ],
        {run: results.record(run) for run in runs},
    )
