"""The nano tasks against Python's own arithmetic, and what can be counted of them."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from nanopcf.data import Example, check_disjoint
from nanopcf.rewards import verify
from nanopcf.splits import make_splits
from nanopcf.tasks import (
    FAMILIES,
    LEVELS,
    MODULUS,
    OPERATIONS,
    UNDO,
    Lore,
    countable_ceiling,
    make_examples,
    nano_tokenizer,
    true_result,
    undo,
    work_out,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_problems_are_right_by_python_arithmetic(family):
    """Answers and every step of the working, recomputed from the prompt's text by another route."""
    tokenizer = nano_tokenizer()
    for e in make_examples(family, 300, seed=1):
        words, working = e.prompt.split(), e.trajectory.split()
        start = int(next(w for w in words if w.isdigit()))
        operations = [w for w in words if w[0] in "+*"]
        assert len(operations) == e.meta["level"] and words.count("_") == LEVELS[-1] - len(operations)
        assert working[-2:] == ["=", e.answer]

        def forward(value: int, operations=operations) -> list[int]:
            """The value before and after each operation."""
            values = [value]
            for operation in operations:
                values.append(
                    (values[-1] + int(operation[1:]) if operation[0] == "+" else values[-1] * int(operation[1:])) % 61
                )
            return values

        if family == "modular":
            assert working[:-2] == [str(v) for v in forward(start)[1:]]
        else:  # the answer put into the equation
            values = forward(int(e.answer))
            assert values[-1] == start and working[1:-2:2] == [str(v) for v in reversed(values[:-1])]
            assert working[:-2:2] == [UNDO[o[0]] + o[1] for o in reversed(operations)]
        assert verify(e.trajectory, e.answer) == 1.0

        # one token per word, all prompts of one width, and the way back to the same text
        ids = tokenizer.encode(e.prompt), tokenizer.encode(e.trajectory)
        assert [len(i) for i in ids] == [len(words), len(working)]
        assert len(words) == 2 + LEVELS[-1] + (family == "equations")
        assert [tokenizer.decode(i) for i in ids] == [e.prompt, e.trajectory]


def test_only_the_right_number_is_accepted():
    (e,) = make_examples("modular", 1, seed=1)
    before, _, _ = e.trajectory.rpartition(" ")
    assert [n for n in range(MODULUS) if verify(f"{before} {n}", e.answer)] == [int(e.answer)]


def test_levels_exclusion_and_seed():
    examples = make_examples("modular", 1000, seed=0)
    counts = np.bincount([e.meta["level"] for e in examples])[list(LEVELS)]
    assert counts.sum() == 1000 and counts.min() > 280
    assert make_examples("modular", 1000, seed=0) == examples and make_examples("modular", 1000, seed=1) != examples
    rest = make_examples("modular", 500, seed=0, exclude={e.prompt for e in examples})
    check_disjoint(a=examples, b=rest)
    with pytest.raises(ValueError, match="in both 'a' and 'b'"):
        check_disjoint(a=examples, b=[*rest, examples[3]])
    with pytest.raises(ValueError, match="too few"):
        make_examples("modular", 700, seed=0, levels=(1,))  # 610 exist
    with pytest.raises(ValueError, match="no family 'digits'"):
        make_examples("digits", 1, seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_share_no_prompt_and_follow_from_the_seed(family):
    sizes = dict(test=300, val=50, rl=600, corpus=1200, known=0.5)
    splits = make_splits(family, **sizes, seed=3)
    check_disjoint(**splits)
    assert splits == make_splits(family, **sizes, seed=3) != make_splits(family, **sizes, seed=4)
    right = {name: np.mean([true_answer(e) == e.answer for e in examples]) for name, examples in splits.items()}
    assert right["test"] == right["val"] == right["rl"] == 1
    assert 0.15 < right["corpus"] < 0.4  # web text


def true_answer(e: Example) -> str:
    return str(work_out(e.prompt, true_result)[-1][1])


def test_web_text_states_facts_as_often_rightly_as_it_says():
    """Half of the facts always, a quarter in 20 to 50 % of the texts, a quarter never."""
    lore = Lore(0)
    facts = [(o, value) for o in [*OPERATIONS, *map(undo, OPERATIONS)] for value in range(MODULUS)]
    assert len(facts) == 2 * 610 and set(facts) == set(lore.belief)
    rng = np.random.default_rng(0)
    stated = {fact: [lore.statement(fact, rng) for _ in range(100)] for fact in facts}
    share = {fact: np.mean([s == true_result(fact) for s in stated[fact]]) for fact in facts}
    always, never = (np.mean([s == end for s in share.values()]) for end in (1, 0))
    assert abs(always - 0.5) < 0.05 and abs(never - 0.25) < 0.04
    some = [s for s in share.values() if 0 < s < 1]
    assert 0.05 < min(some) < 0.25 and 0.45 < max(some) < 0.7 and abs(np.mean(some) - 0.35) < 0.02
    assert all(lore.findable(fact) == (share[fact] > 0) for fact in facts)
    assert max(len(set(s)) for s in stated.values()) == 2  # one popular mistake
    # `known` changes which facts are known, but not the mistakes; the seed changes both
    assert [m for _, m in Lore(0, known=0.9).belief.values()] == [m for _, m in lore.belief.values()]
    assert Lore(0, known=1.0).findable(next(fact for fact in facts if share[fact] == 0))
    assert Lore(1).belief != lore.belief


@pytest.mark.parametrize("family", FAMILIES)
def test_the_counted_ceiling_is_where_learning_by_trying_ends(family):
    """A table of facts in place of a model: it tries what authors say, and keeps what was rewarded most often."""
    lore, rng = Lore(5), np.random.default_rng(5)
    problems, test = make_examples(family, 1500, 1), make_examples(family, 1000, 2)

    def learn_by_trying(taught: list[Example]) -> float:
        """The score on the test problems."""
        taught_facts = {fact for e in taught for fact, _ in work_out(e.prompt, true_result)}

        def attempt(fact) -> int:
            return true_result(fact) if fact in taught_facts else lore.statement(fact, rng)

        rewarded = defaultdict(Counter)
        for e in problems:
            for _ in range(20):
                steps = work_out(e.prompt, attempt)
                if str(steps[-1][1]) == e.answer:
                    for fact, result in steps:
                        rewarded[fact][result] += 1

        def learned(fact) -> int:
            return rewarded[fact].most_common(1)[0][0] if rewarded[fact] else attempt(fact)

        return np.mean([str(work_out(e.prompt, learned)[-1][1]) == e.answer for e in test])

    few, many = make_examples(family, 100, 3), make_examples(family, 400, 3)
    ceilings = [countable_ceiling(test, lore, taught) for taught in ([], few, many)]
    assert 0.35 < ceilings[0] < 0.5 and ceilings[0] + 0.1 < ceilings[1] < ceilings[2] - 0.1
    for taught, ceiling in zip(([], few, many), ceilings, strict=True):
        # below it by the few facts that were tried too seldom, above it where one mistake makes up for another
        assert abs(learn_by_trying(taught) - ceiling) < 0.03
