"""Generated mathematics at nano scale: problems with expert trajectories and answers, all of it modulo 61.

`modular`     a chain of operations, worked out from left to right.
              prompt "17 *3 +6 _ _ ="    trajectory "51 57 = 57"          answer "57"
`equations`   the same chain, given its end and asked for its beginning: x * 3 + 6 = 57. The operations are undone, the
              last one first, which takes subtraction and division modulo 61.
              prompt "_ _ x *3 +6 = 57"  trajectory "-6 51 /3 17 = 17"    answer "17"

A problem has two to four operations, its *level*. All prompts are padded to one width, so that a model of 0.1M
parameters learns the procedure in seconds. What takes time are the *facts*: what an operation makes of a number. Either
family has 610 of them. A result is one token out of 61, and all facts of a problem must be right.

The base model is pretrained on "web text" (`Lore`): its authors know half of the facts, disagree about a quarter, and
are all wrong about the last quarter. So it knows the procedure, and the facts decide how far it can go.

Built in, and to be said with any result: a trajectory teaches the facts that stand in it, so more trajectories and
longer ones teach more. RL finds a fact that some authors state rightly by trying, but next to never one that none does:
that would take a lucky guess, one in 61 at best, against a mistake that the model is sure of. Pure RL therefore has a
ceiling that can be counted (`countable_ceiling`), which checks the fitted one.

Not built in: how difficult a problem is, which is measured as the base model's win rate, as in the paper; how well SFT
teaches a fact and what it damages elsewhere; how fast RL is; whether overfitting costs anything.
"""

from collections.abc import Callable

import numpy as np

from nanopcf.data import Example
from nanopcf.tokenizer import TextTokenizer, word_tokenizer

MODULUS = 61  # a prime, so that every multiplication can be undone
OPERATIONS = [f"{sign}{n}" for sign in "+*" for n in range(2, 7)]
UNDO = {"+": "-", "*": "/"}
LEVELS = (2, 3, 4)
FAMILIES = ("modular", "equations")

Fact = tuple[str, int]  # an operation such as "+6", "*3", "-6" or "/3", and the number that it is applied to


def undo(operation: str) -> str:
    """The operation that takes it back: "-6" for "+6", "/3" for "*3"."""
    return UNDO[operation[0]] + operation[1:]


def nano_tokenizer() -> TextTokenizer:
    """One token per number, operation and sign, and the end token: a vocabulary of 85."""
    return word_tokenizer([*map(str, range(MODULUS)), *OPERATIONS, *map(undo, OPERATIONS), "=", "_", "x"])


def true_result(fact: Fact) -> int:
    """The right result of an operation, modulo 61."""
    operation, value = fact
    sign, n = operation[0], int(operation[1:])
    return {"+": value + n, "-": value - n, "*": value * n, "/": value * pow(n, -1, MODULUS)}[sign] % MODULUS


class Lore:
    """What the authors of the base model's "web text" believe.

    About a share `known` of the facts is stated rightly by all of them. For each other fact there is one popular
    mistake. For one half of these facts all authors make it; for the other half 20 to 50 % of the authors are right.
    All of that follows from the seed.
    """

    def __init__(self, seed: int, known: float = 0.5) -> None:
        rng = np.random.default_rng((seed, 10))
        self.belief: dict[Fact, tuple[float, int]] = {}  # fact -> (share of authors who are right, the others' result)
        for operation in [*OPERATIONS, *map(undo, OPERATIONS)]:
            for value in range(MODULUS):
                # all three are drawn for every fact, so that `known` changes which facts have a mistake but not what
                # the mistake is
                place, right_share, shift = rng.random(), rng.uniform(0.2, 0.5), int(rng.integers(1, MODULUS))
                if place < known:
                    right_share = 1.0
                elif place < (1 + known) / 2:
                    right_share = 0.0
                fact = (operation, value)
                self.belief[fact] = right_share, (true_result(fact) + shift) % MODULUS

    def statement(self, fact: Fact, rng: np.random.Generator) -> int:
        """The result that a random author writes down for the fact."""
        right_share, mistake = self.belief[fact]
        return true_result(fact) if rng.random() < right_share else mistake

    def findable(self, fact: Fact) -> bool:
        """Whether some author states it rightly: then the base model does too at times, and RL can reward it."""
        return self.belief[fact][0] > 0


def read(prompt: str) -> tuple[int, list[str]]:
    """The number that the working starts from, and the operations that it applies in turn."""
    words = prompt.split()
    start = next(int(word) for word in words if word.isdigit())
    operations = [word for word in words if word in OPERATIONS]
    return start, [undo(o) for o in reversed(operations)] if "x" in words else operations


def work_out(prompt: str, result_of: Callable[[Fact], int]) -> list[tuple[Fact, int]]:
    """Each step of the working: a fact, and what result_of believes to be its result."""
    value, operations = read(prompt)
    steps = []
    for operation in operations:
        fact = (operation, value)
        value = result_of(fact)
        steps.append((fact, value))
    return steps


def make_problem(family: str, level: int, rng: np.random.Generator, result_of: Callable[[Fact], int]) -> Example:
    """A random problem with `level` operations. result_of(fact): what is believed to be the result of an operation."""
    number = str(rng.integers(MODULUS))
    operations = [OPERATIONS[i] for i in rng.integers(len(OPERATIONS), size=level)]
    padding = ["_"] * (LEVELS[-1] - level)
    if family == "modular":
        prompt = " ".join([number, *operations, *padding, "="])
        working = [str(result) for _, result in work_out(prompt, result_of)]
    else:
        # which operation to undo is written down first: to look that up and to apply it are two things to learn
        prompt = " ".join([*padding, "x", *operations, "=", number])
        working = [f"{operation} {result}" for (operation, _), result in work_out(prompt, result_of)]
    answer = working[-1].split()[-1]
    return Example(prompt, " ".join([*working, "=", answer]), answer, {"family": family, "level": level})


def make_examples(
    family: str,
    count: int,
    seed: int | tuple[int, ...],
    *,
    lore: Lore | None = None,
    exclude: set[str] = frozenset(),
    levels: tuple[int, ...] = LEVELS,
) -> list[Example]:
    """`count` different problems with expert trajectories, of evenly drawn levels and without the prompts in `exclude`.

    With `lore` they are web text instead: the trajectory states each fact as some author would, and the answer is what
    follows from that. Raises ValueError if the family is unknown or has too few problems left.
    """
    if family not in FAMILIES:
        raise ValueError(f"task: no family {family!r}; there are {', '.join(FAMILIES)}")
    rng = np.random.default_rng(seed)
    result_of = true_result if lore is None else lambda fact: lore.statement(fact, rng)
    examples: dict[str, Example] = {}
    # a limit for the draws, since a level may have fewer than `count` different problems
    for _ in range(20 * count + 1000):
        if len(examples) == count:
            break
        e = make_problem(family, int(rng.choice(levels)), rng, result_of)
        if e.prompt not in exclude and e.prompt not in examples:
            examples[e.prompt] = e
    if len(examples) < count:
        raise ValueError(f"task: {family} at levels {levels} has too few different problems for {count} more")
    return list(examples.values())


def countable_ceiling(problems: list[Example], lore: Lore, taught: list[Example] = ()) -> float:
    """The share of the problems all of whose facts are findable or stand in a trajectory of `taught`.

    With nothing taught this is the ceiling of pure RL. With a candidate set it is what RL can reach if SFT has taught
    at least a little of each fact, and loosened none of the beliefs that everybody shares.
    """

    def facts(e: Example) -> set[Fact]:
        return {fact for fact, _ in work_out(e.prompt, true_result)}

    seen = set().union(*map(facts, taught))
    return float(np.mean([all(fact in seen or lore.findable(fact) for fact in facts(e)) for e in problems]))
