"""Do mined hard negatives help? Stage II on SciFact's training claims, in-batch negatives alone against mined ones.

The claims of ``train/scifact_train.jsonl.gz`` are split by document: no document of a held-out claim is trained on.
Held-out claims are queries over documents of ``test/scifact/corpus.jsonl.gz``; SciFact's test queries are never read.
Negatives are mined from these documents, less the answers to held-out claims, and from the training pairs. Both arms
have the same pairs, order, steps and settings; the mined arm computes one more document a pair. The metric is nDCG@10
of each held-out claim with each seed; the test flips signs over claims.
"""

import argparse
import random
import re
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import Option, arguments, print_machine, print_result, print_table, run_benchmark

from anchorembed.curate.mine import Mined, Rules, by_bm25, by_embedder, gather, mine
from anchorembed.data.beir import Collection
from anchorembed.data.documents import Document, read_corpus
from anchorembed.data.pairs import TextPair, read_pairs
from anchorembed.errors import InputError
from anchorembed.evaluate.statistics import paired_interval, sign_flip_p
from anchorembed.evaluate.task_types import retrieval
from anchorembed.model.embedder import Embedder
from anchorembed.model.tokens import Lengths
from anchorembed.recipe_file import parse_recipe
from anchorembed.system.files import write_jsonl
from anchorembed.train.run import contrast

_METRIC = "nDCG@10"
_HELD_OUT = 3  # one document in so many is held out
Arm = dict[str, list[float]]  # claim -> its score with each seed


@dataclass(frozen=True)
class Task:
    """Pairs to train on, and the held-out claims with the documents that are searched for them."""

    train: list[TextPair]
    test: Collection


def main() -> None:
    """Train both arms with each seed, and report."""
    args = arguments(
        "Mined hard negatives against in-batch ones alone.",
        warmup=Option(8, "warm-up steps of the learning rate"),
        steps=Option(72, "steps of Stage II"),
        batch=16,
        cut=64,
        by=Option("bm25", "what scores texts to mine: bm25, or model, the one trained with in-batch negatives"),
        seeds=Option(3, "number of seeds of each arm"),
        documents=Option(1000, "documents searched: the answers to held-out claims, and others"),
        learning_rate=Option(5e-4, "learning rate of Stage II; not tuned"),
        margin=Option(0.95, "as in anchorembed mine"),
    )
    if args.by not in ("bm25", "model"):
        raise InputError(f"--by: {args.by!r} is neither bm25 nor model. Choose one of them.")
    print_machine(args)
    task = split(args)
    base = score(args.model, args, task)
    print(f"{len(task.train)} pairs to train on, {len(task.test.queries)} held-out claims, base {mean(base):.4f}")
    arms: dict[str, Arm] = {"in-batch": defaultdict(list), "mined": defaultdict(list)}
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            run_seed(args, task, seed, Path(folder), arms)
    report(args, task, base, arms)


def run_seed(args: argparse.Namespace, task: Task, seed: int, folder: Path, arms: dict[str, Arm]) -> None:
    """Train and score both arms; each claim's score is added to its arm."""
    in_batch_model = train(args, task.train, seed, 0, folder / "in-batch")
    answers = set().union(*task.test.qrels.values())
    pool = gather(task.train, (document.text for document in task.test.documents if document.id not in answers))
    scorer = by_bm25(pool.texts) if args.by == "bm25" else by_embedder(Embedder.load(in_batch_model).encode, pool.texts)
    counts = Mined()
    pairs = list(mine(task.train, pool, scorer, Rules(margin=args.margin), counts))
    print(
        f"seed {seed}: pairs by negatives mined {dict(counts.by_negatives)}, texts dropped {dict(counts.dropped)}",
        flush=True,
    )
    mined_model = train(args, pairs, seed, 1, folder / "mined")
    for name, model in (("in-batch", in_batch_model), ("mined", mined_model)):
        scores = score(str(model), args, task)
        for claim, value in scores.items():
            arms[name][claim].append(value)
        print(f"seed {seed}: {name} {mean(scores):.4f}", flush=True)


def split(args: argparse.Namespace) -> Task:
    """Split SciFact's training claims by document."""
    if args.data is None:
        raise InputError("--data: needed; a folder with train/scifact_train.jsonl.gz and test/scifact.")
    corpus = {words(document.text): document for document in read_corpus(args.data / "test/scifact/corpus.jsonl.gz")}
    pairs = [pair for pair in read_pairs(args.data / "train/scifact_train.jsonl.gz") if words(pair.positive) in corpus]
    answers: dict[str, set[str]] = defaultdict(set)  # claim -> ids of its documents
    for pair in pairs:
        answers[pair.query].add(corpus[words(pair.positive)].id)
    rng = random.Random(args.seed)
    ids = sorted(set().union(*answers.values()))
    held_out = set(rng.sample(ids, len(ids) // _HELD_OUT))
    held_out_claims = {claim: ids for claim, ids in answers.items() if ids & held_out}
    relevant = set().union(*held_out_claims.values())
    train = [
        pair for pair in pairs if pair.query not in held_out_claims and corpus[words(pair.positive)].id not in relevant
    ]
    others = sorted(document.id for document in corpus.values() if document.id not in relevant)
    searched = relevant | set(rng.sample(others, max(0, min(len(others), args.documents - len(relevant)))))
    documents = tuple(document for document in corpus.values() if document.id in searched)
    queries = tuple(Document(claim, claim) for claim in sorted(held_out_claims))
    qrels = {claim: dict.fromkeys(sorted(ids), 1) for claim, ids in held_out_claims.items()}
    return Task(train, Collection("held-out claims", documents, queries, qrels))


def words(text: str) -> str:
    """A text's letters and digits alone, as the two files join titles to texts in different ways."""
    return "".join(re.findall(r"\w+", text.casefold()))


def train(args: argparse.Namespace, pairs: list[TextPair], seed: int, negatives: int, folder: Path) -> Path:
    """Run Stage II with LoRA from the base model; returns the model's folder."""
    path = folder / "pairs.jsonl"
    write_jsonl(path, ({"query": p.query, "positive": p.positive, "negative": list(p.negatives)} for p in pairs))
    stage: dict[str, Any] = {
        "steps": args.steps,
        "batch_size": args.batch,
        "learning_rate": args.learning_rate,
        "warmup_steps": args.warmup,
        "scale": 20,
        "hard_negatives": negatives,
        "tokens_per_micro_batch": 4096,
        "evaluate_every": 0,
    }
    data = {"sources": [{"name": "scifact", "path": str(path)}], "held_out": 0}
    recipe = {
        "data": data | {"query_tokens": args.cut, "document_tokens": args.cut},
        "model": {"name": args.model},
        "reconstruct": None,
        "contrast": stage,
        "output": str(folder / "run"),
        "seed": seed,
    }
    return contrast(parse_recipe(recipe))


def score(model: str, args: argparse.Namespace, task: Task) -> dict[str, float]:
    """Each held-out claim's nDCG@10."""
    embedder = Embedder.load(model, lengths=Lengths(args.cut, args.cut))
    return retrieval(task.test, embedder.encode).items


def mean(scores: dict[str, float]) -> float:
    """Mean score over claims."""
    return float(np.mean(list(scores.values())))


def report(args: argparse.Namespace, task: Task, base: dict[str, float], arms: dict[str, Arm]) -> None:
    """Print the table and the result."""
    by_seed = {name: np.array([arm[claim] for claim in sorted(arm)]).T for name, arm in arms.items()}
    low, high = paired_interval(by_seed["mined"], by_seed["in-batch"])
    p = sign_flip_p(arms["mined"], arms["in-batch"])
    difference = float(by_seed["mined"].mean() - by_seed["in-batch"].mean())
    print_table(
        f"{_METRIC} of {len(base)} held-out claims among {len(task.test.documents)} documents, {args.steps} steps of "
        f"{args.batch}, mined by {args.by}",
        ["", "mean", "seeds"],
        [
            ["base model", f"{mean(base):.4f}", ""],
            *(
                [name, f"{scores.mean():.4f}", ", ".join(f"{value:.4f}" for value in scores.mean(axis=1))]
                for name, scores in by_seed.items()
            ),
            ["mined less in-batch", f"{difference:+.4f}", f"95 % {low:+.4f} to {high:+.4f}, p {p:.4f}"],
        ],
    )
    print_result(
        benchmark="mining",
        by=args.by,
        claims=len(base),
        documents=len(task.test.documents),
        steps=args.steps,
        batch=args.batch,
        base=mean(base),
        **{name.replace("-", "_"): scores.mean(axis=1).tolist() for name, scores in by_seed.items()},
        difference=difference,
        interval=[low, high],
        p=p,
    )


if __name__ == "__main__":
    run_benchmark(main)
