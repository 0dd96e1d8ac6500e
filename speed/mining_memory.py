"""Peak memory of `anchorembed mine --rerank` by the number of pairs.

Pairs are random words, about 600 characters a positive. The cross-encoder is tiny and has random weights, so that
memory is that of the pairs and of BM25's index.
"""

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from common import print_result, print_table, run_benchmark
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from anchorembed.model.load import default_model_folder
from anchorembed.system.files import write_jsonl

_WORDS = 50_000  # distinct words, drawn uniformly
# Mining is started by a small process, as the peak of a forked process begins at the memory of its parent.
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
    parser.add_argument("--ranks", type=int, default=4, help="texts of each query that the cross-encoder scores")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_cross_encoder(folder / "reranker")
        rows = [measure(folder, size, args.ranks) for size in args.sizes]
    cells = [[f"{size:,}", f"{text / 1e6:.0f}", f"{peak / 1e6:.0f}"] for size, text, peak in rows]
    print_table("anchorembed mine --rerank", ["pairs", "MB of text", "peak MB"], cells)
    for size, text, peak in rows:
        print_result(benchmark="mining_memory", pairs=size, text_bytes=text, peak_bytes=peak)


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
    """Number of pairs, bytes of their file, and peak resident memory of mining them, in bytes."""
    pairs = folder / f"{size}.jsonl"
    write_jsonl(pairs, (make_pair(number) for number in range(size)))
    command = ["mine", str(pairs), "--out", str(folder / "mined.jsonl")]
    command += ["--rerank", str(folder / "reranker"), "--ranks", "1", str(ranks)]
    done = subprocess.run([sys.executable, "-c", _RUN, *command], check=True, stdout=subprocess.PIPE)  # noqa: S603
    return size, pairs.stat().st_size, int(done.stdout) * 1024


def make_pair(number: int) -> dict[str, str]:
    """A positive of random words, and a query of its first words."""
    rng = random.Random(number)
    words = [f"word{rng.randrange(_WORDS)}" for _ in range(64)]
    return {"query": " ".join(words[:8]), "positive": " ".join(words)}


if __name__ == "__main__":
    run_benchmark(main)
