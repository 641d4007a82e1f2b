"""Training data without repetitions, and without the problems that it will be scored on.

    python -m nanopcf.tools.clean TRAIN.jsonl --out CLEAN.jsonl --against gsm8k_test.jsonl aime24_test.jsonl

Three rules, in this order; each drops whole examples and says how many:
1. the same prompt again, up to case, punctuation and spaces;
2. a prompt nearly the same as an earlier one: Jaccard similarity of their word 5-grams of `--near` or more;
3. a prompt that an evaluation file knows: `--overlap` or more of its word 8-grams stand in one evaluation prompt.
   The paper drops a prompt whose embedding has a cosine above 0.8 with one of an evaluation; with embeddings of your own
   (`--embeddings TRAIN.npy`, `--against-embeddings A.npy B.npy`, a row an example) rule 3 is that one too.

A prompt shorter than an n-gram counts as one n-gram. Numbers are words: a problem with other numbers is another problem
where it is short, and nearly the same one where it is long.
"""

import argparse
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from nanopcf.data import Example, read_examples, write_jsonl
from nanopcf.run import config

NEAR_GRAM, EVAL_GRAM = 5, 8


def words(text: str) -> list[str]:
    """Lower-case words and numbers; punctuation only where a prompt has nothing else."""
    return re.findall(r"\w+", text.lower()) or text.split()


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    w = words(text)
    return {tuple(w[i : i + n]) for i in range(max(1, len(w) - n + 1))}


def near_duplicates(texts: list[str], threshold: float) -> list[int]:
    """Indices of texts whose 5-grams have a Jaccard similarity >= threshold (0 to 1) with an earlier text that is kept.

    Exact, by prefix filtering (Bayardo et al., 2007): with the n-grams of a text ordered from rare to common, two texts
    that similar share one among the first |A| - ceil(threshold |A|) + 1. Only those are looked up.
    """
    sets = [ngrams(t, NEAR_GRAM) for t in texts]
    often = Counter(g for s in sets for g in s)
    kept_with: dict[tuple[str, ...], list[int]] = defaultdict(list)
    dropped = []
    for i, own in enumerate(sets):
        rare = sorted(own, key=lambda g: (often[g], g))
        rare = rare[: len(own) - int(np.ceil(threshold * len(own))) + 1]
        candidates = {j for g in rare for j in kept_with[g]}
        if any(len(own & sets[j]) >= threshold * len(own | sets[j]) for j in candidates):
            dropped.append(i)
        else:
            for g in rare:
                kept_with[g].append(i)
    return dropped


def contaminated(texts: list[str], evaluation: list[str], threshold: float) -> list[int]:
    """Indices of texts with a share >= threshold (above 0, to 1) of their 8-grams in one text of `evaluation`."""
    where: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for j, text in enumerate(evaluation):
        for g in ngrams(text, EVAL_GRAM):
            where[g].append(j)
    found = []
    for i, text in enumerate(texts):
        own = ngrams(text, EVAL_GRAM)
        shared = Counter(j for g in own for j in where.get(g, ()))
        if shared and max(shared.values()) >= threshold * len(own):
            found.append(i)
    return found


def similar(embeddings: np.ndarray, evaluation: np.ndarray, cosine: float) -> list[int]:
    """Rows of embeddings [n, d] whose cosine with a row of evaluation [m, d] is above `cosine`: the paper's rule, 0.8."""
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (embeddings, evaluation))
    best = [(a[i : i + 1024] @ b.T).max(axis=1) for i in range(0, len(a), 1024)]  # never all n x m at once
    return np.flatnonzero(np.concatenate(best) > cosine).tolist()


def read_embeddings(path: str, rows: int | None) -> np.ndarray:
    """A float array [rows, d] from an .npy file. Raises ValueError when it isn't one, or of another length."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not an .npy file of numbers ({error})") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        raise ValueError(f"{path}: expected floating-point numbers [examples, dimensions]")
    if rows is not None and len(array) != rows:
        raise ValueError(f"{path}: {len(array)} rows for {rows} examples; one row an example, in their order")
    return array.astype(np.float32)


def clean(args: argparse.Namespace) -> None:
    if bool(args.embeddings) != bool(args.against_embeddings):
        raise ValueError("--embeddings and --against-embeddings need each other")
    for name in ("near", "overlap", "cosine"):
        if not 0 < getattr(args, name) <= 1:
            raise ValueError(f"--{name} must be above 0 and at most 1, got {getattr(args, name)}")
    examples = read_examples(args.train)
    vectors = read_embeddings(args.embeddings, len(examples)) if args.embeddings else None
    evaluations = {f: [e.prompt for e in read_examples(f)] for f in args.against}
    their_vectors = {f: read_embeddings(f, None) for f in args.against_embeddings}
    left = list(range(len(examples)))

    def drop(what: str, places: list[int]) -> None:
        """places: in `left`."""
        gone = set(places)
        left[:] = [i for place, i in enumerate(left) if place not in gone]
        print(f"{len(gone):>8,}  {what}")

    first: dict[str, int] = {}
    print(f"{len(examples):>8,}  examples in {args.train}; dropped:")
    drop("the same prompt again", [i for i in left if first.setdefault(" ".join(words(examples[i].prompt)), i) != i])
    texts = [examples[i].prompt for i in left]
    drop(f"nearly the same as an earlier one (Jaccard >= {args.near:g})", near_duplicates(texts, args.near))
    for file, prompts in evaluations.items():
        texts = [examples[i].prompt for i in left]
        drop(f"known to {file} (overlap >= {args.overlap:g})", contaminated(texts, prompts, args.overlap))
    for file, theirs in their_vectors.items():
        if theirs.shape[1] != vectors.shape[1]:
            raise ValueError(f"{file}: {theirs.shape[1]} dimensions, {args.embeddings} has {vectors.shape[1]}")
        drop(f"known to {file} (cosine > {args.cosine:g})", similar(vectors[left], theirs, args.cosine))
    kept: list[Example] = [examples[i] for i in left]
    if not kept:
        raise ValueError(f"{args.train}: nothing is left")
    write_jsonl(Path(args.out), kept)
    print(f"{len(kept):>8,}  left, in {args.out}")


def main() -> None:
    parser = config.Parser(prog="nanopcf.tools.clean", description=__doc__.splitlines()[0])
    parser.add_argument("train", metavar="TRAIN.jsonl", help="the examples to clean")
    parser.add_argument("--out", required=True, metavar="F.jsonl", help="where to write those that stay")
    parser.add_argument("--against", nargs="+", default=[], metavar="F.jsonl", help="files of evaluation problems")
    parser.add_argument("--near", type=float, default=0.8, help="Jaccard similarity of a near-duplicate (default 0.8)")
    parser.add_argument("--overlap", type=float, default=0.5, help="share of known 8-grams (default 0.5)")
    parser.add_argument("--embeddings", metavar="F.npy", help="a row an example of TRAIN.jsonl, of any model")
    parser.add_argument("--against-embeddings", nargs="+", default=[], metavar="F.npy", help="the same of evaluations")
    parser.add_argument(
        "--cosine", type=float, default=0.8, help="of the embeddings: above it is the same (default 0.8)"
    )
    clean(parser.parse_args())


if __name__ == "__main__":
    config.run_cli(main)
