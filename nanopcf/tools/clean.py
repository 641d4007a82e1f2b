"""Training data without repetitions, and without the problems that a model will be scored on.

    python -m nanopcf.tools.clean TRAIN.jsonl --out CLEAN.jsonl --against gsm8k_test.jsonl aime24_test.jsonl

Three rules, in this order; each drops whole examples and prints how many:
1. the same prompt again, up to case, punctuation and spaces;
2. a prompt that is nearly the same as an earlier one: their word 5-grams have a Jaccard similarity of at least
`--near`;
3. a prompt that an evaluation file contains: a share of at least `--overlap` of its word 8-grams is in one evaluation
prompt.
   The paper drops a prompt when the cosine of its embedding with that of an evaluation prompt is above 0.8. With
   embeddings of your own (`--embeddings TRAIN.npy`, `--against-embeddings A.npy B.npy`, one row per example) that is
   done as well.

A prompt shorter than an n-gram counts as one n-gram. Numbers are words. So a short problem with other numbers is a
different problem, and a long one is nearly the same.
"""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanopcf.data import read_examples, write_jsonl
from nanopcf.run import config
from nanopcf.run.config import Argument, PositiveShare

NEAR_GRAM, EVAL_GRAM = 5, 8


@dataclass(frozen=True)
class CleanConfig(config.Config):
    train: Argument  # JSONL of the examples to clean
    out: str  # JSONL for the examples that stay
    against: tuple[str, ...] = ()  # JSONL files of evaluation problems
    near: PositiveShare = 0.8  # Jaccard similarity of near-duplicates
    overlap: PositiveShare = 0.5  # share of known 8-grams
    embeddings: str = ""  # .npy with one row per example of TRAIN
    against_embeddings: tuple[str, ...] = ()  # the same of evaluations
    cosine: PositiveShare = 0.8  # of embeddings; above it is the same

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.embeddings) != bool(self.against_embeddings):
            raise ValueError("--embeddings and --against-embeddings need each other")


# ---- the rules ----


def words(text: str) -> list[str]:
    """Lower-case words and numbers; punctuation only where a prompt has nothing else."""
    return re.findall(r"\w+", text.lower()) or text.split()


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    w = words(text)
    return {tuple(w[i : i + n]) for i in range(max(1, len(w) - n + 1))}


def repeated(texts: list[str]) -> list[int]:
    """Indices of texts with the same words as an earlier one."""
    seen: set[str] = set()
    dropped = []
    for i, text in enumerate(texts):
        key = " ".join(words(text))
        if key in seen:
            dropped.append(i)
        seen.add(key)
    return dropped


def near_duplicates(texts: list[str], threshold: float) -> list[int]:
    """Indices of texts whose 5-grams have a Jaccard similarity >= threshold (0 to 1) with an earlier text that is kept.

    Exact, by prefix filtering (Bayardo et al., 2007). Let the n-grams of each text be ordered from rare to common. Two
    texts that similar share at least one of the first |A| - ceil(threshold |A|) + 1, so only those are looked up.
    """
    sets = [ngrams(text, NEAR_GRAM) for text in texts]
    frequency = Counter(gram for grams in sets for gram in grams)
    kept_with: dict[tuple[str, ...], list[int]] = defaultdict(list)  # n-gram -> the kept texts that it is rare in
    dropped = []
    for i, grams in enumerate(sets):
        rare = sorted(grams, key=lambda gram: (frequency[gram], gram))
        rare = rare[: len(grams) - int(np.ceil(threshold * len(grams))) + 1]
        candidates = {j for gram in rare for j in kept_with[gram]}
        if any(len(grams & sets[j]) >= threshold * len(grams | sets[j]) for j in candidates):
            dropped.append(i)
        else:
            for gram in rare:
                kept_with[gram].append(i)
    return dropped


def contaminated(texts: list[str], evaluation: list[str], threshold: float) -> list[int]:
    """Indices of texts with a share >= threshold (above 0, to 1) of their 8-grams in one text of `evaluation`."""
    texts_with: dict[tuple[str, ...], list[int]] = defaultdict(list)  # n-gram -> evaluation texts
    for j, text in enumerate(evaluation):
        for gram in ngrams(text, EVAL_GRAM):
            texts_with[gram].append(j)
    dropped = []
    for i, text in enumerate(texts):
        grams = ngrams(text, EVAL_GRAM)
        shared = Counter(j for gram in grams for j in texts_with.get(gram, ()))
        if shared and max(shared.values()) >= threshold * len(grams):
            dropped.append(i)
    return dropped


def similar(embeddings: np.ndarray, evaluation: np.ndarray, cosine: float) -> list[int]:
    """Rows of embeddings [n, d] whose cosine with a row of evaluation [m, d] is above `cosine` (the paper: 0.8)."""
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (embeddings, evaluation))
    # 1024 rows at a time: all n x m products at once may not fit in memory
    best = [(a[i : i + 1024] @ b.T).max(axis=1) for i in range(0, len(a), 1024)]
    return np.flatnonzero(np.concatenate(best) > cosine).tolist()


# ---- the command ----


def read_embeddings(path: str, rows: int | None) -> np.ndarray:
    """A float array [rows, d] from an .npy file. Raises ValueError when it is something else or has another length."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not an .npy file of numbers ({error})") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        raise ValueError(f"{path}: expected floating-point numbers [examples, dimensions]")
    if rows is not None and len(array) != rows:
        raise ValueError(f"{path}: {len(array)} rows for {rows} examples; one row an example, in their order")
    return array.astype(np.float32)


def clean(c: CleanConfig) -> None:
    examples = read_examples(c.train)
    embeddings = read_embeddings(c.embeddings, len(examples)) if c.embeddings else None
    # every file is read before anything is printed or written
    evaluations = {path: [e.prompt for e in read_examples(path)] for path in c.against}
    evaluation_embeddings = {path: read_embeddings(path, None) for path in c.against_embeddings}
    kept = list(range(len(examples)))  # indices of the examples that are left

    def prompts() -> list[str]:
        return [examples[i].prompt for i in kept]

    def drop(reason: str, places: list[int]) -> None:
        """`places` are places in `kept`."""
        dropped = set(places)
        kept[:] = [i for place, i in enumerate(kept) if place not in dropped]
        print(f"{len(dropped):>8,}  {reason}")

    print(f"{len(examples):>8,}  examples in {c.train}; dropped:")
    drop("the same prompt again", repeated(prompts()))
    drop(f"nearly the same as an earlier one (Jaccard >= {c.near:g})", near_duplicates(prompts(), c.near))
    for path, evaluation in evaluations.items():
        drop(f"known to {path} (overlap >= {c.overlap:g})", contaminated(prompts(), evaluation, c.overlap))
    for path, theirs in evaluation_embeddings.items():
        if theirs.shape[1] != embeddings.shape[1]:
            raise ValueError(f"{path}: {theirs.shape[1]} dimensions, {c.embeddings} has {embeddings.shape[1]}")
        drop(f"known to {path} (cosine > {c.cosine:g})", similar(embeddings[kept], theirs, c.cosine))
    if not kept:
        raise ValueError(f"{c.train}: nothing is left")
    write_jsonl(Path(c.out), [examples[i] for i in kept])
    print(f"{len(kept):>8,}  left, in {c.out}")


def main() -> None:
    clean(config.parse(CleanConfig, __doc__))


if __name__ == "__main__":
    config.run_cli(main)
