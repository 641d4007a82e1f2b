"""The process that math-verify runs in: a question a line comes in as JSON, true or false goes out.

`mathematics.py` starts this file and kills it when a question takes too long. It stands alone: nothing of nanopcf is
imported here. A question is [kind, said, gold, places]:

value      two formulas. math-verify decides, but first their values at four points must agree to 20 digits: it
           calls sqrt(2)e-15 and 0 equal. `places` is the number of digits after the point where one of them is a
           decimal that may stand for the rounded value of the other, and -1 where none may.
relation   two equations or inequalities, [left, sign, right] each: the difference of the sides of one is a multiple of
           the other's, and neither is the same on both sides, as 0=0 and x=x are.
whole      a response and an answer, found and compared by math-verify alone
"""

import contextlib
import json
import logging
import re
import signal
import sys

TURNED = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq"}
TINY = 1e-15
WARM_UP = (  # the parser fills its tables as it reads: the first formulas take a second each, later ones hundredths
    r"-\frac{8x_{1}^2}{9(x_{1}^{2}-2)^{5/3}}+\frac{\sqrt{2 x_{2}}}{3(x_{1}+1)(2 x_{3}-1)}",
    r"2\sin(2x_{1})\cos ^{2} x_{2}+\frac{1}{2}\pi e^{-3x_{1}t}-5\ln 2+\log_{2}(x_{1}+1)",
    r"\frac{-1+3\sqrt[3]{5}}{4}\cdot 10^{-3}+0.25x_{1}-x_{2}!+|x_{1}-3|",
    r"(2x_{1}-1)(2x_{1}+1)(x_{2}+3)-x_{1}-2x_{2}",
    r"\lfloor x_{1}/2\rfloor+\binom{x_{1}}{2}-\tan\frac{\pi}{5}",
)
MEMORY_BYTES = 4 << 30
POINTS = ((2, 7), (-3, 11), (5, 3), (-1, 13))  # of the letters: letter k is a + k * b / 17 + 1/9


def main() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows and macOS have no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.WARNING)  # math-verify warns that its own time limit is off
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever the libraries print is no answer
    import math_verify

    for latex in WARM_UP:
        read(f"\\boxed{{{latex}}}")
    print("ready", file=answers, flush=True)
    limit_s = float(sys.argv[1])
    clock = getattr(signal, "setitimer", None)  # Windows has none: there a question that takes too long is killed
    if clock:
        signal.signal(signal.SIGPROF, give_up)
    for line in sys.stdin:
        kind, said, gold, places = json.loads(line)
        equal = False
        with contextlib.suppress(Exception, TooLong):  # whatever sympy raises, the worker goes on
            if clock:
                clock(signal.ITIMER_PROF, limit_s)
            if kind == "whole":
                equal = bool(math_verify.verify(read(f"\\boxed{{{gold}}}"), read(said), timeout_seconds=None))
            elif kind == "relation":
                equal = same_relation(said, gold)
            else:
                equal = same_value(said, gold, places)
        if clock:
            clock(signal.ITIMER_PROF, 0)
        print(json.dumps(equal), file=answers, flush=True)


class TooLong(BaseException):
    """No Exception: sympy catches those, and goes on."""


def give_up(*_: object) -> None:
    raise TooLong


def read(text: str) -> list:
    from math_verify import parse

    return parse(text, parsing_timeout=None)


def formula(latex: str):
    """A sympy expression. Raises ValueError where math-verify reads none."""
    from sympy import Expr, I

    found = read(f"\\boxed{{{latex}}}")
    if not found or not isinstance(found[0], Expr):
        raise ValueError(f"not read: {latex}")
    imaginary = [s for s in found[0].free_symbols if s.name == "i"]
    return found[0].subs(dict.fromkeys(imaginary, I)) if imaginary else found[0]


def values(expression, letters: list) -> list:
    """The values at POINTS, to 30 digits. The letters are those of both formulas, in one order."""
    from sympy import Rational

    found = []
    for a, b in POINTS:
        point = {s: Rational(a) + Rational(k * b, 17) + Rational(1, 9) for k, s in enumerate(letters, 1)}
        found.append(expression.subs(point).doit().evalf(30))
        if not letters:
            break
    return found


def same_value(said: str, gold: str, places: int) -> bool:
    from math_verify import verify
    from sympy import Float, Rational

    a, b = formula(said), formula(gold)
    letters = sorted(a.free_symbols | b.free_symbols, key=str)
    if places > 0 and not letters:
        exact = [Rational(t) if re.fullmatch(r"-?\d*\.\d+", t) else values(f, [])[0] for t, f in ((said, a), (gold, b))]
        step = Rational(1, 10**places)
        return bool(abs(exact[0]) >= 100 * step and abs(exact[0] - exact[1]) <= step / 2)
    if a.is_infinite or b.is_infinite:
        return bool(a == b)
    # A decimal is read as a float of 15 digits. Anything else has to agree to 20.
    tolerance = Float("1e-12") if a.has(Float) or b.has(Float) else Float("1e-20")
    for x, y in zip(values(a, letters), values(b, letters), strict=True):
        if not (x.is_number and y.is_number and x.is_finite and y.is_finite):
            return bool(verify([b], [a], timeout_seconds=None))  # a sum without an end, 1/0
        if abs(x - y) > tolerance * max(abs(x), abs(y)):
            return False
    return True


def same_relation(said: list[str], gold: list[str]) -> bool:
    """[left, sign, right] each."""
    ours, theirs = (formula(left) - formula(right) for left, _, right in (said, gold))
    letters = sorted(ours.free_symbols, key=str)
    if not letters or set(letters) != theirs.free_symbols:
        return False
    ratios = []
    for x, y in zip(values(ours, letters), values(theirs, letters), strict=True):
        if not (x.is_number and y.is_number and x.is_finite and y.is_finite and abs(x) > TINY and abs(y) > TINY):
            return False
        ratios.append(x / y)
    if any(abs(ratio - ratios[0]) > 1e-12 * abs(ratios[0]) for ratio in ratios):
        return False
    return said[1] == gold[1] == "=" or bool(said[1] == (gold[1] if ratios[0] > 0 else TURNED.get(gold[1])))


if __name__ == "__main__":
    main()
