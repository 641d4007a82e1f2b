"""Generated mathematics at nano scale: problems with expert trajectories, answers and levels of difficulty.

There are two families, each with five levels, which are numbers of steps or columns. A model of 0.1M parameters learns
the *procedure* of either in seconds, for two reasons: all problems are padded to one width, and the working takes one
step for each step of the problem, so that every token of it looks back by a constant distance. What takes time is the
*facts*, the tables of one-digit operations.

`digits`   arithmetic on two digits without carries: + - * act on tens and on units, modulo 10.
           prompt "47+85*36         ="   trajectory "47 22 62=62"   answer "62"   (level: number of operators)
           300 facts, one for each pair of digits and operator. A blind guess is right once in 100.
`columns`  written addition and subtraction with carries, column by column from the right.
           prompt "+78 56 12       ="    trajectory "15 12 04"      answer "15 12 04"   (level: number of columns)
           Each group is carry and digit of a column: 7+8=15, 5+6+1=12, 1+2+1=04. 400 facts. All columns must be right.

The base model is pretrained on "web text" (`Lore`) that states some facts wrongly. So it knows the procedure and part
of the facts, and the difficulty of a problem is then *measured* as the base model's win rate, as in the paper, and not
set. One effect is built in, and the report says so: an expert trajectory teaches exactly the facts that occur in it.
"""

from collections.abc import Callable

import numpy as np

from nanopcf.data import Example

LEVELS = (1, 2, 3, 4, 5)
OPERATORS = "+-*"

Fact = tuple[str, int, int, int]  # operator, two digits, carry in
Result = tuple[int, int]  # carry out, digit


def true_fact(fact: Fact) -> Result:
    """The right result of an operation on two digits. The family `digits` uses no carries."""
    operator, a, b, carry = fact
    value = {"+": a + b + carry, "-": a - b - carry, "*": a * b + carry}[operator]
    return (value // 10 if operator != "-" else int(value < 0)), value % 10


class Lore:
    """What the authors of the base model's "web text" believe.

    About a share `known` of the facts is stated rightly by all of them. For each other fact there is one popular
    mistake, and between 80 and 100 % of the authors make it. All of that follows from the seed.
    """

    def __init__(self, seed: int, known: float = 0.5) -> None:
        rng = np.random.default_rng((seed, 10))
        self.mistake: dict[Fact, tuple[float, int]] = {}  # fact -> (share of mistaken authors, their digit)
        for operator in OPERATORS:
            for a in range(10):
                for b in range(10):
                    for carry in (0, 1):
                        # all three are drawn for every fact, so that `known` changes which facts have a mistake
                        # but not what the mistake is
                        unknown, share, shift = rng.random() >= known, rng.uniform(0.8, 1), rng.integers(1, 10)
                        if unknown:
                            fact = (operator, a, b, carry)
                            self.mistake[fact] = (share, (true_fact(fact)[1] + int(shift)) % 10)

    def statement(self, fact: Fact, rng: np.random.Generator) -> Result:
        """The result that a random author writes down for the fact."""
        carry, digit = true_fact(fact)
        share, wrong = self.mistake.get(fact, (0.0, digit))
        return (carry, wrong) if rng.random() < share else (carry, digit)


def digits_problem(rng: np.random.Generator, level: int, result_of: Callable[[Fact], Result]) -> Example:
    """A problem with `level` operators. result_of(fact): what is believed to be the result of an operation."""
    tens, units = (int(d) for d in rng.integers(0, 10, 2))
    problem = f"{tens}{units}"
    working = [problem]
    for _ in range(level):
        operator = OPERATORS[rng.integers(3)]
        operand = [int(d) for d in rng.integers(0, 10, 2)]
        _, tens = result_of((operator, tens, operand[0], 0))
        _, units = result_of((operator, units, operand[1], 0))
        problem += f"{operator}{operand[0]}{operand[1]}"
        working.append(f"{tens}{units}")
    answer = working[-1]
    width = 2 + 3 * LEVELS[-1]
    return Example(problem.ljust(width) + "=", " ".join(working) + "=" + answer, answer)


def columns_problem(rng: np.random.Generator, level: int, result_of: Callable[[Fact], Result]) -> Example:
    """A problem with `level` columns. result_of(fact): what is believed to be the result of a column."""
    operator = "+-"[rng.integers(2)]
    carry = 0
    pairs, groups = [], []
    for _ in range(level):
        a, b = (int(d) for d in rng.integers(0, 10, 2))
        carry, digit = result_of((operator, a, b, carry))
        pairs.append(f"{a}{b}")
        groups.append(f"{carry}{digit}")
    answer = " ".join(groups)
    width = 3 * LEVELS[-1]
    return Example((operator + " ".join(pairs)).ljust(width) + "=", answer, answer)


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
    """`count` different problems with expert trajectories, of evenly drawn levels and without the prompts in `exclude`.

    With `lore` they are web text instead: the trajectory states each fact as some author would, and the answer is what
    follows from that. Raises ValueError if the family is unknown or has too few problems left.
    """
    if family not in FAMILIES:
        raise ValueError(f"task: no family {family!r}; there are {', '.join(FAMILIES)}")
    rng = np.random.default_rng(seed)
    result_of = true_fact if lore is None else lambda fact: lore.statement(fact, rng)
    examples: dict[str, Example] = {}
    # a limit for the draws, since a family may have fewer than `count` different problems
    for _ in range(20 * count + 1000):
        if len(examples) == count:
            break
        level = int(rng.choice(levels))
        e = FAMILIES[family](rng, level, result_of)
        if e.prompt not in exclude and e.prompt not in examples:
            examples[e.prompt] = Example(e.prompt, e.trajectory, e.answer, {"family": family, "level": level})
    if len(examples) < count:
        raise ValueError(f"task: {family} at levels {levels} has too few different problems for {count} more")
    return list(examples.values())
