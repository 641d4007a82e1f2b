"""Which problem is used for what: splits that share no prompt, and expert trajectories sorted by difficulty (RQ3).

The paper draws its candidate sets from one large pool of expert trajectories: at random, or by the win rate of a small
model over four tries, 1 for the easy ones and at most 0.25 for the hard ones. Here the win rate is the base model's
own. Left out: the paper also removes training problems that are only similar to one of the test; here equal prompts
count.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nanopcf.checkpoint import load_tokenizer_of
from nanopcf.data import Example, Format, encode_prompts, read_examples, write_jsonl
from nanopcf.scoring import answer_problems, open_model, open_sampler
from nanopcf.tasks import Lore, make_examples

ROUNDS = 6  # at most so many rounds of problems are tried to find enough of every difficulty
TRIES = 4  # answers to each problem, which give its win rate


def difficulty_and_size(name: str) -> tuple[str, int]:
    """Of a candidate set: "hard-60" -> ("hard", 60). Raises ValueError for any other form."""
    difficulty, _, size = name.partition("-")
    if difficulty not in ("uniform", "easy", "hard") or not size.isdigit() or int(size) < 1:
        raise ValueError(f"--candidates: {name!r} should be like uniform-240, easy-240 or hard-240")
    return difficulty, int(size)


def make_splits(
    task: str, *, test: int, val: int, rl: int, corpus: int, known: float, seed: int
) -> dict[str, list[Example]]:
    """Generated problems: `test` many for the test and so on, and `corpus` web texts to pretrain on
    (nanopcf/tasks.py)."""
    splits: dict[str, list[Example]] = {}
    taken: set[str] = set()
    for i, (name, size) in enumerate((("test", test), ("val", val), ("rl", rl))):
        splits[name] = make_examples(task, size, (seed, i), exclude=taken)
        taken |= {e.prompt for e in splits[name]}
    splits["corpus"] = make_examples(task, corpus, (seed, 9), lore=Lore(seed, known), exclude=taken)
    return splits


def cut_splits(
    data: str, test_data: str, model: str, form: Format, longest_prompt: int, *, test: int, val: int, rl: int, seed: int
) -> dict[str, list[Example]]:
    """The same from files of real problems: `data` is shuffled and cut into val, rl and the corpus (the rest).

    Prompts of more than longest_prompt tokens, as `model` counts them, and those of the test are left out. Raises
    ValueError if nothing is left for the corpus.
    """
    tokenizer = load_tokenizer_of(model)

    def read_fitting(file: str, need: tuple[str, ...]) -> list[Example]:
        examples = read_examples(file, need=need)
        return encode_prompts(examples, tokenizer, longest_prompt, file, format=form, drop=True)[0]

    tests = read_fitting(test_data, ("prompt", "answer"))[:test]
    test_prompts = {e.prompt for e in tests}
    # a dictionary first, so that a prompt that occurs twice is kept once
    by_prompt = {e.prompt: e for e in read_fitting(data, ("prompt", "trajectory", "answer"))}
    examples = [e for e in by_prompt.values() if e.prompt not in test_prompts]
    shuffled = [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))]
    if len(shuffled) <= val + rl:
        raise ValueError(
            f"{data}: {len(shuffled)} examples; --val and --rl-prompts alone take {val + rl}, and the sets need some"
        )
    return {"test": tests, "val": shuffled[:val], "rl": shuffled[val : val + rl], "corpus": shuffled[val + rl :]}


def new_problems(task: str, size: int, seed: int, taken: set[str]) -> Iterator[list[Example]]:
    """Rounds of `size` problems of a task, none with a prompt that is taken or came in an earlier round."""
    for i in range(ROUNDS):
        problems = make_examples(task, size, (seed, 20 + i), exclude=taken)
        taken = taken | {e.prompt for e in problems}
        yield problems


def given_problems(examples: list[Example], size: int) -> Iterator[list[Example]]:
    """Rounds of `size` problems from these examples."""
    for start in range(0, min(len(examples), ROUNDS * size), size):
        yield examples[start : start + size]


def sort_by_difficulty(c: Any, rounds: Iterator[list[Example]], names: Sequence[str]) -> dict[str, list[Example]]:
    """{"uniform": every problem tried, "easy": those of win rate 1, "hard": those of win rate 0.25 or less}.

    c: which model answers the problems, and how. Rounds of problems are tried until there are as many as the candidate
    sets of these names need.
    """
    needed = {"uniform": 0, "easy": 0, "hard": 0}  # the size of the largest set of each difficulty
    for difficulty, size in map(difficulty_and_size, names):
        needed[difficulty] = max(needed[difficulty], size)
    model, tokenizer, _ = open_model(c, c.out)
    by_difficulty: dict[str, list[Example]] = {"uniform": [], "easy": [], "hard": []}
    for i, problems in enumerate(rounds):
        asked = replace(c, samples=TRIES, seed=c.seed + i)
        # No name for the sampler: its cache must be gone before the next one asks how much memory is free.
        correct, _ = answer_problems(asked, open_sampler(c, model, tokenizer, problems), tokenizer, problems)
        win_rates = correct.mean(axis=1)  # (problems,)
        by_difficulty["uniform"] += problems
        by_difficulty["easy"] += [e for e, win_rate in zip(problems, win_rates, strict=True) if win_rate == 1]
        by_difficulty["hard"] += [e for e, win_rate in zip(problems, win_rates, strict=True) if win_rate <= 0.25]
        if all(len(by_difficulty[difficulty]) >= count for difficulty, count in needed.items()):
            break
    return by_difficulty


def write_set(folder: Path, name: str, problems: dict[str, list[Example]]) -> str:
    """Write the first problems of a candidate set's difficulty, and return the file. Raises ValueError when they are
    too few."""
    difficulty, size = difficulty_and_size(name)
    found = problems[difficulty]
    if len(found) < size:
        raise ValueError(
            f"--candidates {name}: among {len(problems['uniform'])} problems the base model has {len(found)} {difficulty} "
            "ones; make --pool larger, the set smaller, or the base model better (--base-steps, --known)"
        )
    write_jsonl(folder / f"{name}.jsonl", found[:size])
    return str(folder / f"{name}.jsonl")
