"""How much memory mining with a cross-encoder takes, by the number of pairs: `anchorembed mine --rerank` at each size.

Pairs are random words, about 600 characters a positive; the cross-encoder is a tiny one with random weights, so that
the pairs and what search needs of them are what grows.
"""

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from common import result, run, table
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from anchorembed.model.load import default_model_folder
from anchorembed.system.files import write_jsonl

_WORDS = 50_000  # different ones, drawn evenly
# A small process between, as a process's peak begins with that of the one it was forked from.
_RUN = """
import resource, subprocess, sys
main = "from anchorembed.cli.main import main; main()"
subprocess.run([sys.executable, "-c", main, *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def main() -> None:
    """Mine at each size, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5_000, 20_000, 80_000], help="numbers of pairs")
    parser.add_argument("--ranks", type=int, default=4, help="texts of each query that are scored anew")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_cross_encoder(folder / "reranker")
        rows = [measure(folder, size, args.ranks) for size in args.sizes]
    shown = [[f"{size:,}", f"{text / 1e6:.0f}", f"{peak / 1e6:.0f}"] for size, text, peak in rows]
    table("anchorembed mine --rerank", ["pairs", "MB of text", "peak MB"], shown)
    for size, text, peak in rows:
        result(benchmark="mining_memory", pairs=size, text_bytes=text, peak_bytes=peak)


def save_cross_encoder(folder: Path) -> None:
    """Write a cross-encoder of one small layer with the default model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(default_model_folder())
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer.model_max_length = 64
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        num_key_value_heads=2,
        **sizes,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(folder: Path, size: int, ranks: int) -> tuple[int, int, int]:
    """Pairs, bytes of their file, and the peak of the resident memory of mining them, in bytes."""
    pairs = folder / f"{size}.jsonl"
    write_jsonl(pairs, (pair(number) for number in range(size)))
    command = ["mine", str(pairs), "--out", str(folder / "mined.jsonl")]
    command += ["--rerank", str(folder / "reranker"), "--ranks", "1", str(ranks)]
    ran = subprocess.run([sys.executable, "-c", _RUN, *command], check=True, stdout=subprocess.PIPE)  # noqa: S603
    return size, pairs.stat().st_size, int(ran.stdout) * 1024


def pair(number: int) -> dict[str, str]:
    """A query of words of its positive."""
    rng = random.Random(number)
    words = [f"word{rng.randrange(_WORDS)}" for _ in range(64)]
    return {"query": " ".join(words[:8]), "positive": " ".join(words)}


if __name__ == "__main__":
    run(main)
