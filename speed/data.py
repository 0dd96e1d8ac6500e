"""Millions of pairs: time and anonymous memory until the first batch, with the cache empty (cold) and filled (warm).

Pairs are random words, about 400 bytes each; 5 million are 2 GB. Each size runs in a process of its own, which loads no
model. Anonymous memory (``RssAnon``) cannot be dropped by the kernel; file-backed pages can.
"""

import json
import multiprocessing
import random
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

from common import Option, arguments, print_machine, print_result, print_table, run_benchmark

from anchorembed.data.sampling import batches
from anchorembed.data.split import split
from anchorembed.data.store import SourceFile, open_store

_WORDS = 50_000
_BATCHES = 200


def main() -> None:
    """Measure each size and report."""
    args = arguments(
        "Time and memory to the first batch, by the number of pairs.",
        batch=512,
        steps=Option(None, "not used", int),
        warmup=Option(None, "not used", int),
        most=Option(5_000_000, "pairs of the largest source"),
        folder=Option(None, "where to write the pairs (default: a temporary folder)", Path),
    )
    print_machine(args)
    sizes = sorted({min(size, args.most) for size in (500_000, 1_000_000, 5_000_000)})
    measured = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for size in sizes:
            source = write_pairs(Path(folder) / f"{size}.jsonl", size)
            cold, warm = (_in_new_process(source, Path(folder) / "cache", args.batch) for _ in range(2))
            measured.append((size, source.stat().st_size, cold, warm))
            print(f"{size} pairs: {cold['seconds']:.1f} s cold, {warm['seconds']:.1f} s warm", flush=True)
            source.unlink()
    seconds_a_pair = measured[0][2]["seconds"] / measured[0][0]  # of the smallest size, cold
    print_table(
        f"To the first of {_BATCHES} batches of {args.batch}",
        ["pairs", "file", "cold", "of linear", "warm", "RssAnon cold", "RssAnon warm", f"{_BATCHES} batches"],
        [
            [
                f"{size:,}",
                f"{file_size / 1e9:.2f} GB",
                f"{cold['seconds']:.1f} s",
                f"{cold['seconds'] / (seconds_a_pair * size):.2f}",
                f"{warm['seconds']:.1f} s",
                f"{cold['anonymous'] / 1e9:.2f} GB",
                f"{warm['anonymous'] / 1e9:.2f} GB",
                f"{warm['batches']:.1f} s",
            ]
            for size, file_size, cold, warm in measured
        ],
    )
    print_result(
        benchmark="data",
        pairs=sizes,
        cold_seconds=[cold["seconds"] for _, _, cold, _ in measured],
        warm_seconds=[warm["seconds"] for _, _, _, warm in measured],
        away_from_line=max(abs(cold["seconds"] / (seconds_a_pair * size) - 1) for size, _, cold, _ in measured),
        anonymous_gb=[max(cold["anonymous"], warm["anonymous"]) / 1e9 for _, _, cold, warm in measured],
    )


def write_pairs(path: Path, count: int) -> Path:
    """Write pairs of random words; no text is there twice."""
    rng = random.Random(0)
    words = [f"w{number:05d}" for number in range(_WORDS)]
    with path.open("w", encoding="utf-8") as sink:
        for number in range(count):
            query, positive = (" ".join(rng.choices(words, k=length)) for length in (8, 40))
            sink.write(json.dumps({"query": f"{query} {number}", "positive": f"{positive} {number}"}) + "\n")
    return path


def _in_new_process(source: Path, cache: Path, batch: int) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, source, cache, batch).result()


def _measure(source: Path, cache: Path, batch: int) -> dict[str, float]:
    """Seconds to the first batch and of all batches, and bytes of anonymous memory beyond those at the start."""
    before, peak = _anonymous(), [0]
    threading.Thread(target=_watch, args=(peak,), daemon=True).start()
    started = time.perf_counter()
    store = open_store([SourceFile("made", source)], cache)
    order = batches(store, split(store, 256, 0).train, batch, 0)
    [store[index] for index in next(order)]
    first_read = time.perf_counter()
    for indices in islice(order, _BATCHES - 1):
        [store[index] for index in indices]
    all_read = time.perf_counter()
    return {"seconds": first_read - started, "batches": all_read - first_read, "anonymous": peak[0] - before}


def _watch(peak: list[int]) -> None:
    """Record the largest anonymous memory, read 20 times a second."""
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
    run_benchmark(main)
