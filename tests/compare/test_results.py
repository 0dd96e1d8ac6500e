"""Results are read as they were written, and damaged ones are reported; the report needs nothing else."""

import errno
import gzip
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from anchorembed.compare.plan import open_comparison
from anchorembed.compare.records import Cell, Cost, ItemScores, Run, RunRecord, parse
from anchorembed.compare.report import write_report
from anchorembed.compare.results import Results, write_comparison
from anchorembed.errors import InputError
from anchorembed.evaluate.isotropy import Isotropy
from anchorembed.recipe_schema import Recipe

Make = Callable[..., Recipe]


RUN = Run("both", "d", "own", 0)
CELL = {
    "kind": "cell",
    "key": "k",
    "arm": "both",
    "digest": "d",
    "setting": "own",
    "seed": 0,
    "choice": "",
    "value": 0.5,
}
CELL |= {"collection": "one", "revision": "r", "metric": "AP"}


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = RunRecord(
        costs={"before": Cost(1.5, 7, 2e15, 0.5), "evaluate": Cost(2.0)},
        curves={"before": [{"step": 1, "loss": 2.5}, {"step": 2, "loss": float("nan")}]},
        isotropy={"base": Isotropy(0.9, 2.5, 0.1, -0.3)},
        made_with={"torch": "1"},
        items={"one": ItemScores("r", {"q1": 0.25, "q2": 1.0})},
    )
    results = Results(tmp_path, "k", {})
    assert results.record(RUN) == RunRecord()
    results.write_record(RUN, record)
    (path,) = (tmp_path / "results").iterdir()
    written = path.read_bytes()
    assert b" " not in gzip.decompress(written), "of many scores, spaces make up a part of the file"
    results.write_record(RUN, results.record(RUN))
    assert path.read_bytes() == written
    assert repr(results.record(RUN)) == repr(record)  # as no nan is equal to itself


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "high"}, "damaged .value: Input should be a valid number"),
        ({"setting": "other"}, "damaged .setting: Input should be 'own' or 'common'"),
        ({"kind": "row"}, "damaged .'row'"),
    ],
)
def test_an_invalid_line_is_reported_by_its_number(tmp_path: Path, change: dict[str, object], message: str) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps(CELL) + "\n" + json.dumps(CELL | change), encoding="utf-8")
    with pytest.raises(InputError, match=rf"results\.jsonl:2: {message}.*Remove the line"):
        Results(tmp_path, "k", {"one": "r"})
    assert len(Results(tmp_path, "another", {"one": "r"}).cells) == 0  # whose lines may have any form


def test_a_full_disk_leaves_the_lines_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {name: value for name, value in CELL.items() if name not in ("key", "kind")}
    results, first, second = Results(tmp_path, "k", {}), parse(Cell, values), parse(Cell, values | {"seed": 7})
    results.append(first)
    kept = (tmp_path / "results.jsonl").read_bytes()
    write_bytes = Path.write_bytes

    def half(path: Path, content: bytes) -> int:
        write_bytes(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(InputError, match="No space left"):
        results.append(second)
    monkeypatch.undo()
    assert (tmp_path / "results.jsonl").read_bytes() == kept
    results.append(second)
    revisions = {first.collection: first.revision}
    assert Results(tmp_path, "k", revisions).cells == [first, second]


def test_a_folder_without_a_comparison_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"comparison\.json: no such file. Name a results folder"):
        write_report(tmp_path)
    (tmp_path / "comparison.json").write_text('{"key": "k"}', encoding="utf-8")
    with pytest.raises(InputError, match=r"comparison\.json: damaged \(title: Field required\)"):
        write_report(tmp_path)


@pytest.mark.parametrize("key", ["arms", "choices", "arms.0.seeds"])
def test_a_comparison_without_arms_choices_or_seeds_is_damaged(make: Make, tmp_path: Path, key: str) -> None:
    values = asdict(open_comparison(make(), tmp_path).record)
    (values if "." not in key else values["arms"][0])[key.rpartition(".")[2]] = []
    (tmp_path / "comparison.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(InputError, match=rf"comparison\.json: damaged \({key}: List should have at least 1 item"):
        write_report(tmp_path)


def test_item_scores_of_other_data_are_ignored(make: Make, tmp_path: Path) -> None:
    comparison = open_comparison(make(), tmp_path)
    run, (task,) = comparison.arm_record("base").run("own", 0), comparison.tasks
    write_comparison(tmp_path, comparison.record)
    cell = Cell(**asdict(run), choice="", collection=task.name, revision=task.revision, metric="Spearman", value=0.5)
    comparison.results.append(cell)
    for revision in (task.revision, "other"):
        items = {task.name: ItemScores(revision, {"0": 0.4, "1": 0.6})}
        comparison.results.write_record(run, RunRecord(items=items))
        write_report(tmp_path)
        assert ("0.500 \\[" in (tmp_path / "report.md").read_text(encoding="utf-8")) == (revision == task.revision)


@pytest.mark.parametrize("damaged", [b'{"cut sho', b'{"key": "\xff"}'])
def test_damaged_lines_are_reported(make: Make, tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "results.jsonl").write_bytes(b'{"key": "x"}\n' + damaged)
    with pytest.raises(InputError, match=r"results\.jsonl:2: damaged"):
        open_comparison(make(), tmp_path)


@pytest.mark.parametrize("damage", [lambda packed: packed[:-9], lambda packed: b"x" + packed, lambda _: b"", None])
def test_damaged_and_missing_records_are_reported(
    make: Make, tmp_path: Path, damage: Callable[[bytes], bytes] | None
) -> None:
    comparison = open_comparison(make(), tmp_path)
    write_comparison(tmp_path, comparison.record)
    run, (task,) = comparison.arm_record("base").run("own", 0), comparison.tasks
    comparison.results.write_record(run, RunRecord())
    comparison.results.append(
        Cell(**asdict(run), choice="", collection=task.name, revision=task.revision, metric="Spearman", value=0.5)
    )
    (path,) = (tmp_path / "results").iterdir()
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    with pytest.raises(InputError, match=rf"{path.name}: missing or damaged .* remove it and its run's lines"):
        write_report(tmp_path)
