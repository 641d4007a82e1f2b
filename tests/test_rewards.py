"""nanopcf.rewards: where people and models put answers, and which are right; whatever is thrown at it."""

import random
import time
from pathlib import Path

import pytest

from nanopcf import rewards
from nanopcf.rewards import final_answer, verify

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        # boxes
        (r"so \boxed{\frac{1}{\sqrt{2}}} and done", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{1} no, \boxed{2} and \boxed{3", ""),  # cut off: no answer, and not an earlier one
        (r"It is 5, so \boxed{}", ""),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\fbox{7}", "7"),
        ("\\boxed\n{7}", "7"),
        ("<ANSWER>7</ANSWER>", "7"),
        ("x = 1 or x = 2", "x = 1 or x = 2"),
        (r"It is $\boxed 42$.", "42"),
        (r"\boxed\frac{3}{4}", r"\frac{3}{4}"),
        (r"$\boxed{x=3}, \boxed{x=4}$", "x=3, x=4"),
        (r"\boxed{3} \quad \text{and} \quad \boxed{4}.", "3, 4"),
        (r"Thus $x = \boxed{5}$ or $y = \boxed{6}$", "5, 6"),
        (r"\boxed{3} is wrong, so \boxed{4}.", "4"),
        ("\\boxed{5}\n\\boxed{5}", "5"),
        # thoughts and tags
        ("<THINK>so \\boxed{12}</THINK> 7", "7"),
        ("<thinking>so \\boxed{12}", ""),
        ("[THINK]so \\boxed{12}[/THINK]\\boxed{7}", "7"),
        ("<|begin_of_thought|>so \\boxed{12}", ""),
        ("<think>\\boxed{3}?</think>\nThe final answer is 8.", "8"),
        ("<think>maybe \\boxed{12}? no", ""),
        ("and so 5 = 5</think> \\boxed{7}", "7"),
        ("<think>3</think><answer>\\frac{3}{4}</answer>", r"\frac{3}{4}"),
        ("<answer> The answer is 7 </answer>", "7"),
        ("<answer>2 x + 3 y + 1</answer>", "2 x + 3 y + 1"),
        ("<answer>7", ""),
        # hashes, and a base model that goes on
        ("a = 3\n#### 1,234\nbye", "1,234"),
        ("#### **72**", "72"),
        ("#### 30+42=72", "72"),
        ("#### x+1=7", "x+1=7"),
        ("4 + 5 = 9\n#### 9\n\nQuestion: What is 3 + 4?\nAnswer: 7\n#### 7", "9"),
        ("The answer is 9.\n\nQuestion: What is 3 + 4?\nAnswer: 7", "9"),
        ("Question: What is 3 + 4?\nAnswer: 7", "7"),
        (" 12\n\nQuestion: 2+2?\nAnswer: 4", "12"),
        # announcements: the last and the innermost
        ("The answer is 42. I am sure.", "42"),
        ("The answer is 71. Wait, no. The answer is 72.", "72"),
        ("Final Answer: The final answer is $12$. I hope it is correct.", "$12$"),
        ("Final Answer: The largest $n$ is 34.", "34"),
        ("Final answer: $3.50", "$3.50"),
        ("The answer is 3.5.", "3.5"),
        ("The answer is 18!", "18"),
        ("The answer is:\n\n72", "72"),
        ("The final answer is:\n\\[\n72\n\\]", "72"),
        ("The answer is \\(18\\).", r"\(18\)"),
        ("The answer is $1,250.50.", "$1,250.50"),
        ("**Answer**: $x. y$", "$x. y$"),
        ("**Answer:** 5", "5"),
        ("### Answer\n$\\frac{1}{2}$", r"$\frac{1}{2}$"),
        ("So 29.\n\n# Answer\n\n29", "29"),
        ("The answer is 72 because 70+2 is 72.", "72"),
        ("The answer is 72, which is even.", "72"),
        ("The answer is C because water is wet.", "C"),
        ("The answer is B because it is", "B"),
        ("The answer is approximately 72 days.", "72 days"),
        ("The answer is for sure D.", "D"),
        ("The answer to what is asked is 5.", "5"),
        ("The answer is not 71 but 72.", "72"),
        ("The correct choice is (C).", "(C)"),
        ("所以答案是72。", "72"),
        ("答案：72", "72"),
        ("My answer is correct, I think: the answer is 5.", "5"),
        # what is short, and what is prose
        ("47+85=132", "132"),
        ("x <= 2", "x <= 2"),
        ("She has 3 apples and then 12 more apples.", "12"),
        ("The ratio is then clearly 3:4.", "3:4"),
        (r"So we get that $x = \frac{3}{4}$.", r"x = \frac{3}{4}"),
        (r"The solutions are then $1 \text{ and } 2$.", r"1 \text{ and } 2"),
        ("5页 - 2页 = 3页 因此，多 **3页**。", "3"),
        ("所以总共有3 + 4 = 7只。一共有7只。", "7"),
        ("It costs $3 and then it is $5 more.", "$5"),
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


PHRASES = [
    r"So it is \boxed{%s}.",
    "so\n\\[ \\boxed{%s} \\]",
    "Some steps.\n#### %s",
    "The answer is $%s$.",
    r"The answer is: \(%s\)",
    "**Answer**: $%s$",
    "Final Answer: The final answer is $%s$. I hope it is correct.",
    "<think>First \\boxed{99}?</think>\n<answer>%s</answer>",
]


@pytest.mark.skipif(not DATA.exists(), reason="the benchmark files are not beside the repository")
def test_right_answers_are_right_in_every_phrase():
    """Every answer of seven test files in a box, also to a strict verifier; 160 of each in eight phrases."""
    from nanopcf.data import read_examples

    rng, some = random.Random(0), []
    for file in sorted(DATA.glob("*.jsonl")):
        answers = [e.answer for e in read_examples(file, need=("prompt", "answer"))]
        for strict in (True, False):
            missed = [a for a in answers if verify(rf"So it is \boxed{{{a}}}.", a, strict) != 1]
            assert not missed, (file.name, missed)
        some += rng.sample(answers, min(160, len(answers)))
    for phrase in PHRASES:
        missed = [a for a in some if verify(phrase % a, a) != 1]
        assert len(missed) <= 0.005 * len(some), (phrase, missed)


def test_nothing_thrown_at_it_raises_or_hangs(monkeypatch):
    """Text that blows up a parser, a thousand boxes, broken brackets, random bytes. What math-verify makes of such
    text is in test_mathematics.py."""
    monkeypatch.setattr(rewards, "by_value", lambda said, gold, how: False)
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
    hostile += ["".join(rng.choices(pieces, k=rng.randint(1, 40))) for _ in range(400)]
    for text in hostile:
        start = time.process_time()
        for answer in ("2n-1", "(1,2)", "B", text[:300]):
            assert verify(text, answer) in (0.0, 1.0) and verify(answer, text, strict=True) in (0.0, 1.0)
        assert time.process_time() - start < 2, text[:80]
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
        ("47 22 6*2=62", "62", 1.0),
        ("60+2", "62", 0.0),  # computes nothing
        ("15 12 0*4", "15 12 04", 0.0),
        ("\ud800=\x007", "7", 0.0),
    ],
)
def test_verify(response, answer, reward):
    assert verify(response, answer) == reward
    assert isinstance(final_answer(response), str)
