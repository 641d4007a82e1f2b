"""nanopcf.rewards: answers found where people and models put them, compared by value, whatever is thrown at it."""

import json
import random
import time
from pathlib import Path

import pytest

from nanopcf.interop.formulas import equal, value
from nanopcf.rewards import final_answer, last_boxed, verify

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{\frac{1}{\sqrt{2}}} and done", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1} no, \boxed{2} and \boxed{3", "2"),  # the last complete one
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{7}", "7"),
        ("a = 3\n#### 1,234\nbye", "1,234"),
        ("The answer is 42. I am sure.", "42"),
        ("Final answer: $3.50", "$3.50"),
        ("47+85=132", "132"),
        ("She has 3 apples and then 12 more apples.", "12"),
        ("12 04", "12 04"),
        ("nothing here at all, sorry", "nothing here at all, sorry"),
        ("", ""),
    ],
)
def test_final_answer(response, answer):
    assert final_answer(response) == answer


def test_strict_takes_only_marked_answers():
    assert verify("She has 3 apples and then 12 more apples.", "12") == 1
    assert verify("She has 3 apples and then 12 more apples.", "12", strict=True) == 0
    assert verify(r"Thus \boxed{12}.", "12", strict=True) == 1


def gold(path: Path) -> list[str]:
    """The answers of a benchmark file as it gives them."""
    answers = []
    for line in path.read_text(encoding="utf-8").splitlines():
        r = json.loads(line)
        if "final_answer" in r:
            answers.append(r["final_answer"][0])
        elif "solution" in r and "answer" not in r:
            answers.append(last_boxed(r["solution"]))
        else:
            answers.append(str(r.get("answer", r.get("Answer"))).rpartition("####")[2].strip())
    return answers


@pytest.mark.skipif(not DATA.exists(), reason="the benchmark files are not beside the repository")
def test_gold_answers_are_right_and_others_wrong():
    """Each of 10,809 gold answers against itself, in a box, both ways; and pairs of different ones, equal only in
    value."""
    files = sorted(DATA.glob("*.jsonl"))
    answers = {f.name: gold(f) for f in files}
    for name, mine in answers.items():
        for strict in (True, False):
            missed = [a for a in mine if verify(rf"So it is \boxed{{{a}}}.", a, strict) != 1]
            assert not missed, (name, missed)
    rng = random.Random()
    for mine in answers.values():
        for _ in range(2000):
            a, b = rng.choice(mine), rng.choice(mine)
            if equal(a, b, strict=True) and a != b:  # then they are the same number, or the same after "k ="
                plain = [t.replace("$", "").rpartition("=")[2].strip() for t in (a, b)]
                assert value(plain[0], 0) == value(plain[1], 0), (a, b)
    assert sum(map(len, answers.values())) == 10_809


def test_nothing_thrown_at_it_raises_or_hangs():
    """Text that blows up a symbolic checker, a thousand boxes, broken brackets, random bytes: an answer within a
    second."""
    hostile = [
        "9^9^9^9^9",
        "((((" * 100 + "1",
        "-" * 399 + "1",
        r"\frac" * 100,
        r"\boxed{" * 20_000,
        r"\boxed{1}" * 20_000,
        "1/0",
        "0^{-1}",
        "(500!)!",
        "500!" * 80,
        r"\sqrt{-1}",
        r"\log 0",
        r"\binom{1e9}{5}",
        "2^{2^{2^{2^{9}}}}",
        "{" * 300,
        "answer is " * 5000,
        "5 " + "aaaa " * 90 + "1+",
        "1," * 199,
        "(1,2)," * 60,
        "\ud800\x00\uffff",
        "\\" * 400,
        "|" * 399,
        "__import__('os').system('true')",
        "[" + "x=" * 100,
        "٣",
        "²",
        "1" * 100_000,
        "=" * 100_000,
        "1_000",
        "\\text{" * 100,
    ]
    rng = random.Random()
    pieces = [
        "1",
        "23",
        ".5",
        "x",
        "n",
        "+",
        "-",
        "*",
        "/",
        "^",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        ",",
        "=",
        "<",
        "%",
        "!",
        " ",
        "\\frac",
        "\\sqrt",
        "\\pi",
        "\\log",
        "_",
        "\\{",
        "\\}",
        "\\cup",
        "\\text{a}",
        "and",
        "|",
        "\\lfloor",
        "\x00",
    ]
    hostile += ["".join(rng.choices(pieces, k=rng.randint(1, 40))) for _ in range(3000)]
    for text in hostile:
        start = time.process_time()
        for answer in ("5", "2n-1", "(1,2)", text[:300]):
            assert verify(text, answer) in (0.0, 1.0) and verify(answer, text, strict=True) in (0.0, 1.0)
        assert time.process_time() - start < 1, text[:80]
    assert verify(None, "5") == 0 and verify("5", None) == 0


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("47 22=22", "22", 1.0),
        ("47 22=2", "22", 0.0),
        ("47 22=222", "22", 0.0),
        ("1=2=22 ", "22", 1.0),
        ("12 04", "12 04", 1.0),
        ("", "", 0.0),
        ("=", "", 0.0),
        ("\ud800=\x007", "7", 0.0),
    ],
)
def test_verify(response, answer, reward):
    assert verify(response, answer) == reward
    assert isinstance(final_answer(response), str)
