"""From what is finished of a comparison to what its report is made from; nothing is trained or measured here."""

import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from anchorembed.compare import analysis as analysing
from anchorembed.compare import report as reporting
from anchorembed.compare.arms import Arm, Values, seeds_of
from anchorembed.compare.results import OWN, Run
from anchorembed.compare.run import Comparison, best_choice, choice_name, tried, untried


def report(comparison: Comparison, command: str) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md`` of what there is; returns their paths."""
    return reporting.write(_gather(comparison, command), comparison.results.folder)


def _gather(comparison: Comparison, command: str) -> analysing.Evidence:
    results, compare = comparison.results, comparison.settings
    lines = [line for one in comparison.runs() for line in results.of(one)]
    payloads = {(one.arm.name, one.setting, one.seed): results.payload(one.name) for one in comparison.runs()}
    cells = [
        analysing.Cell(
            line["arm"],
            line["setting"],
            line["seed"],
            line["collection"],
            line["metric"],
            line["value"],
            _items(payloads[line["arm"], line["setting"], line["seed"]], line),
        )
        for line in lines
    ]
    return analysing.Evidence(
        title=f"With and without Stage I: {comparison.recipe.model.name}",
        arms=[_described(comparison, arm) for arm in comparison.arms],
        cells=cells,
        costs={
            (one.arm.name, one.setting, one.seed): {name: _stage_cost(cost) for name, cost in results.cost(one).items()}
            for one in comparison.runs()
        }
        | _grid_costs(comparison),
        curves=[curve for key, payload in payloads.items() for curve in _curves(key, payload)],
        isotropy=[
            (*key, checkpoint, measured)
            for key, payload in payloads.items()
            for checkpoint, measured in payload.get("isotropy", {}).items()
        ],
        primary=compare.primary,
        declared=compare.declared,
        explore=compare.explore,
        notes=compare.notes,
        recipe=_portable(yaml.safe_dump(comparison.recipe.model_dump(mode="json", by_alias=True), sort_keys=False)),
        command=_portable(command),
        made_with=list(
            dict.fromkeys(
                ", ".join(f"{name} {value}" for name, value in payload["made_with"].items())
                for payload in payloads.values()
                if "made_with" in payload
            )
        ),
        tables={title: [task.name for task in tasks] for title, tasks in comparison.tasks.items()},
    )


def _items(payload: Values, line: Values) -> dict[str, float]:
    """Scores of a cell's items; none if those kept are of other data than its line."""
    name = line["collection"]
    same = payload.get("revisions", {}).get(name, line["revision"]) == line["revision"]
    found: dict[str, float] = payload.get("items", {}).get(name, {}) if same else {}
    return found


def _portable(text: str) -> str:
    """Text with the folder of ``$ANCHOREMBED_DATA`` named by that, so that it is true on other machines, too."""
    folder = os.environ.get("ANCHOREMBED_DATA")
    return text.replace(folder.rstrip("/") + "/", "$ANCHOREMBED_DATA/") if folder else text


def _described(comparison: Comparison, arm: Arm) -> analysing.ArmShown:
    steps = comparison.matched[arm.name]
    planned = seeds_of(comparison.settings, arm)
    done = [seed for seed in planned if comparison.results.of(Run(arm, seed, OWN))]
    settings = {"seeds run": ", ".join(map(str, done)) or "none", "planned": ", ".join(map(str, planned))}
    if steps:
        settings["Stage II's additional steps" if arm.longer else "steps before Stage II"] = str(steps)
    settings |= {f"before Stage II: {key}": str(value) for key, value in arm.first_keys.items()}
    settings |= {f"Stage II: {key}": str(value) for key, value in arm.contrast_keys.items()}
    accuracy = tried(comparison, arm)
    if accuracy:
        if not untried(comparison, arm):
            settings["chosen for Stage II"] = choice_name(best_choice(comparison, arm))
        settings["held-out accuracy of the choices"] = ", ".join(
            f"{name}: {accuracy[name]:.3f}" for name in sorted(accuracy)
        )
    return analysing.ArmShown(arm.name, arm.title, arm.what, settings)


def _grid_costs(comparison: Comparison) -> dict[tuple[str, str, int], dict[str, analysing.Cost]]:
    """What choosing Stage II's settings cost each arm."""
    costs: dict[tuple[str, str, int], dict[str, analysing.Cost]] = {}
    digests = {arm.name: arm.digest for arm in comparison.arms}
    for line in comparison.results.lines:
        if line["kind"] == "grid" and line["digest"] == digests.get(line["arm"]):
            costs.setdefault((line["arm"], "grid", line["seed"]), {})[line["choice"]] = _stage_cost(line["cost"])
    return costs


def _stage_cost(cost: dict[str, float]) -> analysing.Cost:
    return analysing.Cost(
        seconds=cost["seconds"],
        tokens=int(cost.get("tokens", 0)),
        flops=cost.get("flops", 0.0),
        peak_gb=cost.get("peak_gb", 0.0),
    )


def _curves(key: tuple[str, str, int], payload: Values) -> Iterator[analysing.Curve]:
    for stage, entries in payload.get("curves", {}).items():
        for name in dict.fromkeys(name for entry in entries for name in entry if name != "step"):
            points = [(entry["step"], entry[name]) for entry in entries if name in entry]
            yield analysing.Curve(*key, stage, name, [step for step, _ in points], [value for _, value in points])
