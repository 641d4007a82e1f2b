"""Procedural mathematics at nano scale: problems, expert trajectories, answers and difficulty.

Two families, each with five levels (the number of steps or columns). Both are written so that a 0.1M-parameter model
learns the *procedure* in seconds: problems are padded to one width and the working advances at the pace of the
problem, so each token of the working looks back by a constant distance. What takes time is the *facts* (digit tables).

`digits`   arithmetic on two digits without carries (in Z10 x Z10): + - * act on tens and on units, modulo 10.
           prompt "47+85*36         ="   trajectory "47 22 62=62"   answer "62"   (level: number of operators)
           300 facts, one for each digit pair and operator; a blind guess is right once in 100.
`columns`  written addition and subtraction, column by column from the right, with carries.
           prompt "+78 56 12       ="    trajectory "15 12 04"      answer "15 12 04"   (level: number of columns)
           A group is carry and digit of a column: 7+8=15, 5+6+1=12, 1+2+1=04. 400 facts; all columns must be right.

The base model's "web text" (`Lore`) states some facts wrongly: every fact has one popular mistake, and its own share
of authors who make it. So a base model knows the procedure and part of the facts, and a problem's difficulty is then
*measured* (win rate over 4 tries, as the paper does), not set. One thing is built in, and the report says so: an
expert trajectory teaches exactly the facts that stand in it.
"""

import numpy as np

from nanopcf.data import Example

LEVELS = (1, 2, 3, 4, 5)
OPERATORS = "+-*"


Fact = tuple[str, int, int, int]  # operator, two digits, carry in


def true_fact(fact: Fact) -> tuple[int, int]:
    """(carry out, digit) of one digit operation; `digits` ignores the carries."""
    op, a, b, carry = fact
    value = {"+": a + b + carry, "-": a - b - carry, "*": a * b + carry}[op]
    return (value // 10 if op != "-" else int(value < 0)), value % 10


class Lore:
    """What the base model's "web text" holds: a share `known` of the facts is always stated right; of each other one
    a share of 80 to 100 % of the authors make its one popular mistake. Which and how much: by `seed` alone."""

    def __init__(self, seed: int, known: float = 0.5) -> None:
        rng = np.random.default_rng((seed, 10))
        self.mistake: dict[Fact, tuple[float, int]] = {}  # fact -> (share of mistaken authors, their digit)
        for op in OPERATORS:
            for a in range(10):
                for b in range(10):
                    for carry in (0, 1):
                        unknown, share, shift = (rng.random() >= known, rng.uniform(0.8, 1), rng.integers(1, 10))
                        fact = (op, a, b, carry)
                        if unknown:
                            self.mistake[fact] = (share, (true_fact(fact)[1] + int(shift)) % 10)

    def state(self, fact: Fact, rng: np.random.Generator) -> tuple[int, int]:
        carry, digit = true_fact(fact)
        share, wrong = self.mistake.get(fact, (0.0, digit))
        return (carry, wrong) if rng.random() < share else (carry, digit)


def digits_problem(rng: np.random.Generator, level: int, state) -> Example:
    value = [int(d) for d in rng.integers(0, 10, 2)]
    text, working = f"{value[0]}{value[1]}", [f"{value[0]}{value[1]}"]
    for _ in range(level):
        op, operand = OPERATORS[rng.integers(3)], [int(d) for d in rng.integers(0, 10, 2)]
        value = [state((op, v, o, 0))[1] for v, o in zip(value, operand, strict=True)]
        text += f"{op}{operand[0]}{operand[1]}"
        working.append(f"{value[0]}{value[1]}")
    answer = working[-1]
    return Example(text.ljust(2 + 3 * LEVELS[-1]) + "=", " ".join(working) + "=" + answer, answer)


def columns_problem(rng: np.random.Generator, level: int, state) -> Example:
    op, carry = "+-"[rng.integers(2)], 0
    pairs, groups = [], []
    for _ in range(level):
        a, b = (int(d) for d in rng.integers(0, 10, 2))
        carry, digit = state((op, a, b, carry))
        pairs.append(f"{a}{b}")
        groups.append(f"{carry}{digit}")
    answer = " ".join(groups)
    return Example((op + " ".join(pairs)).ljust(3 * LEVELS[-1]) + "=", answer, answer)


FAMILIES = {"digits": digits_problem, "columns": columns_problem}


def make_examples(
    family: str,
    count: int,
    seed: int | tuple[int, ...],
    *,
    lore: Lore | None = None,
    exclude: set[str] = frozenset(),
    levels: tuple[int, ...] = LEVELS,
) -> list[Example]:
    """`count` different problems with expert trajectories, levels drawn evenly; none whose prompt is in `exclude`.

    With `lore` the trajectories are web text: each fact as some author would state it, and the answer that follows
    from that. Raises ValueError when the family is unknown or has too few problems left.
    """
    if family not in FAMILIES:
        raise ValueError(f"task: no family {family!r}; there are {', '.join(FAMILIES)}")
    rng = np.random.default_rng(seed)
    state = true_fact if lore is None else lambda fact: lore.state(fact, rng)
    examples: dict[str, Example] = {}
    for _ in range(20 * count + 1000):
        if len(examples) == count:
            break
        level = int(rng.choice(levels))
        e = FAMILIES[family](rng, level, state)
        if e.prompt not in exclude and e.prompt not in examples:
            examples[e.prompt] = Example(e.prompt, e.trajectory, e.answer, {"family": family, "level": level})
    if len(examples) < count:
        raise ValueError(f"task: {family} at levels {levels} has too few different problems for {count} more")
    return list(examples.values())
