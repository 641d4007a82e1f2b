"""nanopcf.answers: which answers are equal, as texts, numbers and lists, and which only math-verify can tell."""

import importlib.util
import random
import re
import time

import pytest

from nanopcf.answers import comparing, finding, numbers, spelling
from nanopcf.answers.comparing import equal, is_formula
from nanopcf.answers.finding import bare
from nanopcf.rewards import verify

NEEDS_MATH_VERIFY = pytest.mark.skipif(
    not importlib.util.find_spec("math_verify"), reason="math-verify isn't installed"
)

# By text, number or part by part: without math-verify too.
EQUAL = [
    ("4000千克", "4000"),
    ("5", "5.0"),
    ("1,234", "1234"),
    ("1{,}000", "1000"),
    (r"771,\!400", "771400"),
    (r"12\,000", "12000"),
    ("1'234'567", "1234567"),
    ("1 000", "1000"),
    ("-3", "−3"),
    ("+2", "2"),
    ("(-3)", "-3"),
    (".5", "0.5"),
    ("007", "7"),
    (r"\frac{1}{2}", "1/2"),
    (r"\dfrac12", "0.5"),
    (r"\frac 34", r"\frac{3}{4}"),
    (r"3\frac{1}{2}", "3.5"),
    ("3 1/2", "3.5"),
    (r"\frac{-1}{3}", r"-\frac13"),
    ("50%", "1/2"),
    (r"50\%", "50 percent"),
    ("2.75e11", r"2.75 \times 10^{11}"),
    ("10^3", "1000"),
    (r"0.1\overline{6}", r"\frac{1}{6}"),
    (r"90^\circ", r"90^{\circ}"),
    ("90 degrees", r"90^\circ"),
    (r"10 \text{ cm}", "10 centimeters"),
    (r"\$5", "5 dollars"),
    ("4210_{7}", "4210_7"),
    ("π", r"\pi"),
    (r"\sqrt2", "sqrt(2)"),
    (r"\left(1, 2\right)", "(1,2)"),
    ("[0, 1)", r"\left[0,1\right)"),
    ("1, 3, 5", "5,3,1"),
    (r"$69$,$84$", "84 and 69"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\{1,2\}", "1,2"),
    (r"(1,2),(3,4)", "(3,4), (1,2)"),
    (r"\pm 2", "2, -2"),
    (r"1\pm\sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix}1\\ 2\end{bmatrix}"),
    (r"\begin{pmatrix} 1/2 & 0 \end{pmatrix}", r"\left(\begin{array}{cc} 0.5 & 0 \end{array}\right)"),
    (r"\emptyset", r"\varnothing"),
    (r"\infty", "∞"),
    ("x=5", "5"),
    ("5", r"$k = 5$"),
    ("f(x)=2x", "2x"),
    ("f'(2)=3", "3"),
    ("AB=4", "4"),
    (r"\angle ABC=30^\circ", r"30^\circ"),
    (r"n \equiv 5 \pmod{17}", "5"),
    ("(x,y)=(5,8)", "(5,8)"),
    ("x=1, y=2", "y=2, x=1"),
    (r"x \in \{2,3\}", "2, 3"),
    (r"x = 2 \text{ or } x = 3", "2, 3"),
    ("x < 3", "x<3"),
    ("x<3", "3>x"),
    (r"x \leq 3", "x ≤ 3"),
    (r"x \in [-2,7]", "[-2,7]"),
    ("-2<x<7", "(-2,7)"),
    (r"x \geq 2", r"[2,\infty)"),
    (r"\text{Friday}", "friday"),
    (r"\text{(B)}", "B"),
    ("yes", "Yes"),
    ("5:30 PM", r"5\!:\!30 \text{ PM}"),
    ("12,34,567", "1234567"),
    ("5.000.000", "5000000"),
    ("1_000", "1000"),
    ("6:00 PM", "6 PM"),
    ("no", "No"),
    ("TRUE", "true"),
    (r"\ln(e^2)", "2"),
    ("S_{ABC}=7", "7"),
    ("P(A)=1/2", r"\frac12"),
    (r"\text{Area} = 12", "12"),
    ("expected value = 12", "12"),
    ("|AB|=7", "7"),
    ("m+n=7", "7"),
    (r"\tan A=7", "7"),
    ("1,22", "1.22"),
    ("0,111", "0.111"),
    ("f(x)=2x", "y=2x"),
    ("Hello, world!", "hello world"),
    (r"12 \text{ cm}", "The answer is 12 cm."),
    ("5只。", "5"),
    ("f^{-1}(2)=7", "7"),
    ("**72**", "72"),
    ("`72`", "72"),
    (r"\textcolor{red}{72}", "72"),
]
DIFFERENT = [
    ("5", "6"),
    ("1/2", "1/3"),
    ("12 04", "04 12"),
    ("12 04", "48"),
    ("3 1/2", "31/2"),
    (r"40,\!000", "40,0"),
    ("(3,456)", "3456"),
    ("4210_7", "4210_8"),
    ("5 cents", r"\$5"),
    ("5 cm", "5 m"),
    (r"5\,\mathrm{m}", r"5\,\mathrm{M}"),
    ("2ab", "2"),
    (r"2\mathrm{e}", "2"),
    (r"3+2\mathrm{i}", "5"),
    ("(1,2)", "(2,1)"),
    ("(0,1)", "[0,1]"),
    ("1,2", "1,2,3"),
    ("1,1,2", "1,2,2"),
    (r"\{1,2\}", "(1,2)"),
    ("(1,2),(3,4)", "(2,1),(3,4)"),
    (r"\begin{pmatrix} 2 \\ 3 \end{pmatrix}", r"\begin{pmatrix} 3 \\ 2 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("(3,2)^T", "(2,3)^T"),
    ("n", "m"),
    ("3n", "3"),
    ("x=5", "x=6"),
    ("x=5", "y=5"),
    ("x=1, y=2", "x=2, y=1"),
    ("C=2", "c=2"),
    ("x<3", "x>3"),
    ("x<3", r"x \leq 3"),
    (r"x \approx 17.1", r"x \approx 17.9"),
    (r"\log_8(4)=\frac23", r"\log_8(4)=5"),
    (r"\{x|x=3k, k\in Z\}", r"\{x|x=3k, K\in Z\}"),
    ("A", "B"),
    ("A", "A, B"),
    ("ABC", "CAB"),
    ("ABC", "abc"),
    (r"\overrightarrow{AB}", r"\overrightarrow{BA}"),
    ("|x|", "x"),
    (r"\text{All real numbers}", r"\text{All positive integers}"),
    ("yes", "no"),
    ("", "5"),
    ("5", ""),
    (".", "0"),
    ("1e5", "5"),
    ("0.33", "1/3.1"),
    ("np.arcsin(0)", "0"),
    ("1/0", "2/0"),
    ("g(x)=x+1", "f(x)=x+1"),
    ("no", "on"),
    ("A. or B", "A"),
    ("A. B. C. D.", "A"),
    ("(A) (B)", "A"),
    ("5.000", "5000"),
    ("1 20 415", "12 04 15"),
    ("120415", "12 04 15"),
]
# What math-verify tells. Where it isn't installed they count as different.
BY_VALUE = [
    ("30+42=72", "72"),
    ("6*7+30=72", "72"),
    ("2n-2", "2(n-1)"),
    (r"\frac{n(n+1)}{2}", r"\binom{n+1}{2}"),
    (r"(x+1)^2", r"x^2+2x+1"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\pi/2", r"\frac{\pi}{2}"),
    (r"2^6 3^5 5^4", "2^6 * 3^5 * 5^4"),
    (r"\Delta p = -\frac{\hbar \omega}{c}", r"-\frac{\omega \hbar}{c}"),
    (r"\sin(x)^2", r"\sin^2 x"),
    (r"\sin 2x", r"\sin(2x)"),
    (r"\log_2 3", r"\frac{\ln 3}{\ln 2}"),
    ("y = 2x - 1", "2x = y + 1"),
    ("y = 2x - 1", "2y + 2 = 4x"),
    ("x < 1", "-x > -1"),
    (r"\{x+1, \sqrt{8}\}", r"\{2\sqrt2, 1+x\}"),
    (r"10\pi \text{ cm}", r"\pi*10 \text{ cm}"),
    (r"5\sqrt{2} \text{ cm}", r"5\sqrt2"),
    ("ab+c", "c+ba"),
]
# Cheats, and what math-verify by itself, or the parser that was here, took for equal: said, right answer.
CHEATS = [
    ("0=0", "x=5"),
    ("0=0", "y=2x+3"),
    ("x=x", "y=2x+3"),
    ("y-y=2x-2x", "y=2x+3"),
    ("5=5", "x=5+y"),
    (r"\frac{R}{r}", r"\frac{r}{R}"),
    ("M-m", "m-M"),
    (r"x\sin 2", r"\sin 2x"),
    (r"\sin(x^2)", r"\sin(x)^2"),
    (r"\sqrt{x^2}", "x"),
    (r"\sqrt{2}\cdot 10^{-15}", "0"),
    ("0", r"\sqrt{2}\cdot 10^{-15}"),
    ("47 * 36", "1692"),
    (r"47 \cdot 36", "1692"),
    ("2^{10}-24", "1000"),
    ("12^2", "144"),
    ("5!", "120"),
    ("2x=10", "10"),
    ("A. 4 B. 9 C. 11", "A"),
    ("x^2=4", "4"),
    ("5=12", "12"),
    ("x < 5", "5"),
    (r"\frac{5}{1}x", "5"),
    ("15 1*2 04", "15 12 04"),
    (r"e^{-10t}", r"2e^{-10t}"),
    (r"x_1+x_2", r"x_1-x_2"),
    (r"v_{a}", r"v_{b}"),
    ("your answer", "72"),
    # large numbers that agree in many digits
    ("2^{1007}+1", "2^{1007}-1"),
    ("2^{100}", "2^{100}-1"),
    ("100!", "100!+1"),
    (r"\frac{2^{100}+1}{3}", r"\frac{2^{100}-1}{3}"),
    ("9^9^9", "9^9^9+1"),
    (r"2^{100}\pi", r"(2^{100}+1)\pi"),
    # equations that say something of x, but not what it is
    ("x+1=7", "7"),
    ("-x=7", "7"),
    ("x/2=7", "7"),
    (r"\sqrt{x}=7", "7"),
    (r"\ln x=7", "7"),
    (r"\tan x=7", "7"),
    ("x+x=7", "7"),
    ("m+n+1=7", "7"),
    ("xy=7", "7"),
    ("x(x+1)=7", "7"),
    ("three plus four=7", "7"),
    (r"\text{not } x=7", "7"),
    ("xyz=7", "7"),
    ("|x|=7", "7"),
    (r"\sin x=0", "0"),
    ("1+1=7", "7"),
    ("3+5=7", "7"),
    # computations
    (r"\sqrt{47^2 \cdot 36^2}", "1692"),
    (r"\ln(e^{47*36})", "1692"),
    (r"\sqrt{(3+4)^2}", "7"),
    (r"\log_{2}(128)", "7"),
    # words that change a number
    ("7 million", "7"),
    ("7 thousand", "7"),
    ("7 dozen", "7"),
    ("7 hundredths", "7"),
    ("7 squared", "7"),
    (r"7\text{k}", "7"),
    (r"7\text{ times } x", "7"),
    (r"7 \text{ is wrong}", "7"),
    ("minus 7", "7"),
    ("negative 7", "7"),
    ("not 7", "7"),
    ("less than 7", "7"),
    ("7_8", "7"),
    ("111_2", "111"),
    ("7万", "7"),
    (r"7\text{ cannot be}", "7"),
]


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_equal_without_math_verify(a, b):
    assert equal(a, b) and equal(b, a)


def test_a_member_that_is_said_twice_counts_once():
    assert equal("(1, 2), (3,4), (1,2)", "(3,4), (1,2)") and not equal("(3,4), (1,2)", "(1,2), (3,4), (1,2)")


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different(a, b):
    for said, gold in ((a, b), (b, a)):
        assert verify(rf"\boxed{{{said}}}", gold) == verify(rf"\boxed{{{said}}}", gold, strict=True) == 0


@pytest.mark.parametrize(("said", "gold"), CHEATS)
def test_cheats(said, gold):
    response = rf"\boxed{{{said}}}"
    assert verify(response, gold) == verify(response, gold, strict=True) == 0


@pytest.mark.parametrize(("a", "b"), BY_VALUE)
def test_formulas_by_value(a, b):
    right = float(importlib.util.find_spec("math_verify") is not None)
    assert verify(rf"\boxed{{{a}}}", b) == verify(rf"\boxed{{{b}}}", a) == right
    assert not equal(a, b) and equal(a, a)  # by text


@pytest.mark.parametrize(
    ("said", "gold"),
    [
        ("5 apples", "5"),
        (r"5 \mathrm{~cm}", "5"),
        (r"10\text{ cm}^2", "10"),
        (r"12\text{ square feet}", "12"),
        ("5km", "5"),
        ("50", "50%"),
        ("90", "90 degrees"),
        ("4210", "4210_7"),
        ("0.333", r"\frac{1}{3}"),
        (r"\sqrt{2} \approx 1.414", "1.414"),
        pytest.param("3.142", r"\pi", marks=NEEDS_MATH_VERIFY),
        pytest.param("1.414", r"\sqrt2", marks=NEEDS_MATH_VERIFY),
    ],
)
def test_what_only_a_lenient_verifier_takes(said, gold):
    response = rf"\boxed{{{said}}}"
    assert verify(response, gold) == 1 and verify(response, gold, strict=True) == 0


@pytest.mark.parametrize(
    ("said", "gold", "right"),
    [
        ("B. 12", "B", 1),
        ("(E) 72", "E", 1),
        (r"\textbf{(C)}\ 72", "C", 1),
        ("b", "B", 1),
        ("B", "b", 0),
        ("D, it is not A", "D", 1),
        ("C", "(C) Alina", 1),
        (r"\text{Option B}", "B", 1),
        ("**B**", "B", 1),
        ("Because", "B", 0),
    ],
)
def test_choices(said, gold, right):
    assert equal(said, gold) == right


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        (r"\boxed{42}", "42"),
        (r"$\boxed{48}$", "48"),
        (r"\(54\)", "54"),
        ("$$x$$", "x"),
        ('["30"]', "30"),
        ('["1", "$2$"]', "1, 2"),
        ("$1$, $2$", "$1$, $2$"),
        ("[1, 2]", "[1, 2]"),
        (r"\[x\]", "x"),
        ("$5", "$5"),
        ("$", "$"),
        ('["', '["'),
    ],
)
def test_right_answers_are_read_without_what_encloses_them(answer, read):
    assert bare(answer) == read


def test_which_right_answers_are_formulas():
    plain = [
        "5",
        "1,234",
        r"\frac{1}{2}",
        "12 04",
        r"\{1,2\}",
        r"(-\infty, 3]",
        "x",
        "Friday",
        "(B)",
        "5 cm",
        r"30^\circ",
        "no",
        "a",
        "x=5",
        "x<5",
    ]
    formulas = [r"\sqrt{2}", "2n", r"x^2+1", r"\frac{\pi}{4}", r"(1, \sqrt2)", "3+4", r"\log_2 3"]
    assert not [a for a in plain if is_formula(a)]
    assert all(map(is_formula, formulas))


@pytest.mark.parametrize(("seconds", "most"), [(0.0, 8), (0.9, 3)])
def test_a_list_asks_few_questions(seconds, most):
    """Two answers are compared with eight questions and two seconds of math-verify's time at most, whatever a list
    holds; what is the same text asks nothing."""
    asked = []

    def by_value(said, gold, how):
        if how.questions > 0 and how.seconds > 0:
            asked.append((said, gold))
            how.questions -= 1
            how.seconds -= seconds
        return False

    formulas = [f"{k}x+{k}" for k in range(2, 40)]
    other = ", ".join(f"{text}+1" for text in formulas)
    assert not equal(other, ", ".join(formulas), by_value=by_value) and len(asked) == most
    asked.clear()
    assert equal(", ".join(reversed(formulas)), ", ".join(formulas), by_value=by_value) and not asked


def test_plain_answers_are_quick():
    """RL judges hundreds a step; a plain answer asks no other process and takes 50 microseconds (here: five times
    that, for a busy machine)."""
    began = time.process_time()
    for i in range(1000):
        verify(f"47 22 {i % 90}={i % 90}", "62")
        verify(f"15 12 0{i % 9}", "15 12 04")
    assert time.process_time() - began < 0.5


def test_no_pattern_is_slow():
    """20,000 characters of anything, and every pattern takes less than 50 ms. A pattern that takes the square of the
    length takes a quarter of that for half of them; here six times that, for a busy machine."""
    units = (
        "1|1,|1 |a|a |answer |answer is |is |\nQuestion|####|#|*|_| |\\|\\boxed|\\boxed{|{|}|(|(1,|$|$1|\\(|\\[|-|- |="
    )
    units += "|<|<think>|\\frac|\\frac{|\\frac{1}{|\\sqrt(|\\text{|\\pm|%| %|«|and |or |.|. |!|。|1'000|1 000|1 1/|e|^{|_{|x="
    units = units.split("|")
    rng = random.Random(0)
    texts = [unit * (10_000 // len(unit)) for unit in units]
    texts += ["".join(rng.choices(units, k=3)) * 2000 for _ in range(20)]
    patterns = [p for module in (comparing, finding, numbers, spelling) for p in vars(module).values()]
    patterns = [p for p in patterns if isinstance(p, re.Pattern)] + [p for p, _ in spelling.SPELLINGS]
    for text in texts:
        for pattern in patterns:
            began = time.process_time()
            for _ in pattern.finditer(text[:10_000]):
                pass
            assert time.process_time() - began < 0.075, (pattern.pattern, text[:20])
