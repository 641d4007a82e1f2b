"""Formulas compared by value."""

import pytest

from nanopcf.interop.formulas import equal

EQUAL = [
    ("5", "5.0"),
    ("1,234", "1234"),
    ("1{,}000", "1000"),
    ("-3", "−3"),
    ("+2", "2"),
    (".5", "0.5"),
    ("007", "7"),
    (r"\frac{1}{2}", "1/2"),
    (r"\dfrac12", "0.5"),
    (r"3\frac{1}{2}", "3.5"),
    (r"\frac{-1}{3}", r"-\frac13"),
    ("50%", "1/2"),
    (r"50\%", "0.5"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\sqrt[3]{27}", "3"),
    (r"2^{10}", "1024"),
    (r"\pi/2", r"\frac{\pi}{2}"),
    (r"\left(1, 2\right)", "(1,2)"),
    ("[0, 1)", r"\left[0,1\right)"),
    ("2n-2", "2(n-1)"),
    (r"\frac{n(n+1)}{2}", r"\binom{n+1}{2}"),
    (r"(x+1)^2", r"x^2+2x+1"),
    ("x=5", "5"),
    ("5", r"$k = 5$"),
    ("f(x)=2x", "2x"),
    ("1, 3, 5", "5,3,1"),
    (r"$69$,$84$", "84 and 69"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"(1,2),(3,4)", "(3,4), (1,2)"),
    (r"\text{Friday}", "friday"),
    ("(B)", "B"),
    (r"\text{(B)}", "b"),
    ("y = 2x - 1", "2x = y + 1"),
    ("x < 3", "x<3"),
    (r"\log_2 8", "3"),
    (r"\ln e", r"\ln{e}"),
    ("5!", "120"),
    (r"\lfloor 3.7 \rfloor", "3"),
    ("|-4|", "4"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"90^\circ", r"90^{\circ}"),
    ("π", r"\pi"),
]
DIFFERENT = [
    ("5", "6"),
    ("1/2", "1/3"),
    ("12 04", "04 12"),
    ("12 04", "48"),
    ("(1,2)", "(2,1)"),
    ("(0,1)", "[0,1]"),
    ("1,2", "1,2,3"),
    ("1,1,2", "1,2,2"),
    ("n", "m"),
    ("3n", "3"),
    ("2n-1", "2n+1"),
    (r"\sqrt{2}", "1.5"),
    ("x=5", "x=6"),
    ("A", "B"),
    ("", "5"),
    ("5", ""),
    (r"\lfloor\sqrt{n}\rfloor", "1"),
    (".", "0"),
    ("x<3", "x>3"),
    ("1e5", "5"),
    ("np.arcsin(0)", "0"),
    ("[1,2)", "(1,2)"),
    (r"\{1,2\}", "(1,2)"),
    ("yes", "no"),
    (r"2^{1009}", r"2^{1010}"),
    ("0.33", "1/3.1"),
    ("1.41", "1.414"),
]


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_equal_by_value(a, b):
    assert equal(a, b) and equal(b, a) and equal(a, b, strict=True)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different(a, b):
    assert not equal(a, b) and not equal(b, a) and not equal(a, b, strict=True)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("5 apples", "5"),
        (r"5 \mathrm{~cm}", "5"),
        (r"12\text{ square feet}", "12"),
        ("5km", "5"),
        ("$18", "18"),
        ("50", "50%"),
        ("1.414", r"\sqrt{2}"),
        ("3.1416", r"\pi"),
        ("90 degrees", "90"),
        (r"6 \mathrm{~m}", "6"),
        ("0.333", r"\frac{1}{3}"),
    ],
)
def test_lenient_only(a, b):
    """Units, percent signs and rounding: what the paper's two verifiers differ on."""
    assert equal(a, b) and equal(b, a)
    assert a.startswith("$") or not equal(a, b, strict=True)
