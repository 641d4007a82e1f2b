"""The nano tasks against Python's own arithmetic."""

import numpy as np
import pytest

from nanopcf.data import check_disjoint
from nanopcf.rewards import verify
from nanopcf.tasks import FAMILIES, LEVELS, Lore, make_examples, true_fact


@pytest.mark.parametrize("family", FAMILIES)
def test_tasks_are_right_by_python_arithmetic(family):
    """Answers and every step of the working, recomputed from the prompt's text by another route."""
    for e in make_examples(family, 300, seed=1):
        if family == "digits":
            text = e.prompt.rstrip("= ")
            value, working = text[:2], [text[:2]]
            for i in range(2, len(text), 3):
                op = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[text[i]]
                value = "".join(str(op(int(a), int(b)) % 10) for a, b in zip(value, text[i + 1 : i + 3], strict=True))
                working.append(value)
            assert e.trajectory == " ".join(working) + "=" + value and e.answer == value
        else:
            pairs = e.prompt[1:].rstrip("= ").split(" ")
            top, bottom = (int("".join(p[i] for p in reversed(pairs))) for i in (0, 1))
            total = top + bottom if e.prompt[0] == "+" else top - bottom
            digits = "".join(g[1] for g in reversed(e.answer.split(" ")))
            assert int(digits) == total % 10 ** len(pairs)
            assert int(e.answer.split(" ")[-1][0]) == (total // 10 ** len(pairs)) * (1 if total >= 0 else -1)
        assert verify(e.trajectory, e.answer) == 1.0
        assert len(e.prompt) == len(make_examples(family, 1, seed=2)[0].prompt)  # one width


def test_levels_and_splits():
    examples = make_examples("digits", 1000, seed=0)
    counts = np.bincount([e.meta["level"] for e in examples])[1:]
    assert len(counts) == len(LEVELS) and counts.min() > 140
    rest = make_examples("digits", 500, seed=0, exclude={e.prompt for e in examples})
    check_disjoint(a=examples, b=rest)
    with pytest.raises(ValueError, match="in both 'a' and 'b'"):
        check_disjoint(a=examples, b=[*rest, examples[3]])
    with pytest.raises(ValueError, match="too few"):
        make_examples("columns", 500, seed=0, levels=(1,))


def test_lore_states_known_facts_rightly_and_others_as_often_as_it_says():
    lore = Lore(0, known=0.5)
    assert 220 < len(lore.mistake) < 380  # of 600
    rng = np.random.default_rng(0)
    fact, (share, wrong) = next((f, m) for f, m in lore.mistake.items() if 0.85 < m[0] < 0.95)
    stated = [lore.statement(fact, rng)[1] for _ in range(2000)]
    assert set(stated) == {wrong, true_fact(fact)[1]}
    assert abs(np.mean([s == wrong for s in stated]) - share) < 0.05
    assert Lore(0).mistake != Lore(1).mistake
