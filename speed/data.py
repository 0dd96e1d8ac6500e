"""Pairs at their real size: time and anonymous memory to convert a source, and to the first batch from a warm cache.

Made pairs of about 400 bytes each, 5 million are 2 GB. Each size runs in a process of its own, which loads no model.
Anonymous memory (``RssAnon``) is what the process must hold; file-backed pages the kernel may drop at any time.
"""

import json
import multiprocessing
import random
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

from common import Option, arguments, facts, result, run, table

from anchorembed.data.sampling import batches, split
from anchorembed.data.store import SourceFile, open_store

_WORDS = 50_000
_BATCHES = 200


def main() -> None:
    """Measure each size and report."""
    args = arguments(
        "Pairs at their real size.",
        batch=512,
        steps=Option(None, "not used", int),
        warmup=Option(None, "not used", int),
        most=Option(5_000_000, "pairs of the largest source"),
        folder=Option(None, "where the made pairs go (default: a temporary folder)", Path),
    )
    facts(args)
    sizes = sorted({min(size, args.most) for size in (500_000, 1_000_000, 5_000_000)})
    measured = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for size in sizes:
            source = make(Path(folder) / f"{size}.jsonl", size)
            cold, warm = (_apart(source, Path(folder) / "cache", args.batch) for _ in range(2))
            measured.append((size, source.stat().st_size, cold, warm))
            print(f"{size} pairs: {cold['seconds']:.1f} s cold, {warm['seconds']:.1f} s warm", flush=True)
            source.unlink()
    line = measured[0][2]["seconds"] / measured[0][0]
    table(
        f"To the first of {_BATCHES} batches of {args.batch}",
        ["pairs", "file", "cold", "of the line", "warm", "RssAnon cold", "RssAnon warm", f"{_BATCHES} batches"],
        [
            [
                f"{size:,}",
                f"{length / 1e9:.2f} GB",
                f"{cold['seconds']:.1f} s",
                f"{cold['seconds'] / (line * size):.2f}",
                f"{warm['seconds']:.1f} s",
                f"{cold['anonymous'] / 1e9:.2f} GB",
                f"{warm['anonymous'] / 1e9:.2f} GB",
                f"{warm['batches']:.1f} s",
            ]
            for size, length, cold, warm in measured
        ],
    )
    result(
        benchmark="data",
        pairs=sizes,
        cold_seconds=[cold["seconds"] for _, _, cold, _ in measured],
        warm_seconds=[warm["seconds"] for _, _, _, warm in measured],
        away_from_line=max(abs(cold["seconds"] / (line * size) - 1) for size, _, cold, _ in measured),
        anonymous_gb=[max(cold["anonymous"], warm["anonymous"]) / 1e9 for _, _, cold, warm in measured],
    )


def make(path: Path, count: int) -> Path:
    """Write made pairs, each with texts of its own."""
    rng = random.Random(0)
    words = [f"w{number:05d}" for number in range(_WORDS)]
    with path.open("w", encoding="utf-8") as sink:
        for number in range(count):
            query, positive = (" ".join(rng.choices(words, k=length)) for length in (8, 40))
            sink.write(json.dumps({"query": f"{query} {number}", "positive": f"{positive} {number}"}) + "\n")
    return path


def _apart(source: Path, cache: Path, batch: int) -> dict[str, Any]:
    """Measure in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, source, cache, batch))
    process.start()
    found: dict[str, Any] = ours.recv()
    process.join()
    return found


def _measure(pipe: Any, source: Path, cache: Path, batch: int) -> None:
    before, peak = _anonymous(), [0]
    threading.Thread(target=_watch, args=(peak,), daemon=True).start()
    started = time.perf_counter()
    store = open_store([SourceFile("made", source)], cache)
    order = batches(store, split(store, 256, 0).train, batch, 0)
    [store[index] for index in next(order)]
    first = time.perf_counter()
    for indices in islice(order, _BATCHES - 1):
        [store[index] for index in indices]
    done = time.perf_counter()
    pipe.send({"seconds": first - started, "batches": done - first, "anonymous": peak[0] - before})


def _watch(peak: list[int]) -> None:
    """Keep the most anonymous memory seen, looking 20 times a second."""
    while True:
        peak[0] = max(peak[0], _anonymous())
        time.sleep(0.05)


def _anonymous() -> int:
    """Bytes of anonymous memory now."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    run(main)
