"""The process that math-verify runs in: a question a line comes in as JSON; true, false or (out of time) null goes out.

`mathematics.py` starts this file and kills it when a question takes too long. It stands alone: nothing of nanopcf is
imported here. A question is [kind, said, gold, places]:

formula    two formulas, equations or inequalities. math-verify decides, and is asked only where it is not surely wrong:
           two formulas need the same values at a few points, since it calls sqrt(2)e-15 and 0 equal, and the sides of
           two relations must differ by multiples of each other, since it calls 0=0 right for any equation. `places` is
           the number of digits of a decimal that may stand for the rounded value of the other formula; -1: none may.
whole      a response and an answer, found and compared by math-verify alone
"""

import contextlib
import json
import logging
import re
import signal
import sys

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
        right: bool | None = False
        try:
            if clock:
                clock(signal.ITIMER_PROF, limit_s)
                # In a long call of a C library Python notices no signal. If nobody is left to kill this process, the
                # system does: it ends those that don't handle this one.
                clock(signal.ITIMER_VIRTUAL, limit_s + 1)
            if kind == "whole":
                right = bool(math_verify.verify(read(f"\\boxed{{{gold}}}"), read(said), timeout_seconds=None))
            else:
                right = equal(said, gold, places)
        except TooLong:
            right = None
        except Exception:  # whatever sympy raises, the worker goes on
            right = False
        if clock:
            clock(signal.ITIMER_PROF, 0)
            clock(signal.ITIMER_VIRTUAL, 0)
        print(json.dumps(right), file=answers, flush=True)


class TooLong(BaseException):
    """No Exception: sympy catches those, and goes on."""


def give_up(*_: object) -> None:
    raise TooLong


def read(text: str) -> list:
    from math_verify import parse

    return parse(text, parsing_timeout=None)


def formula(latex: str):
    """A sympy expression or relation. Raises ValueError where math-verify reads none."""
    from sympy import Expr, I
    from sympy.core.relational import Relational

    found = read(f"\\boxed{{{latex}}}")
    if not found or not isinstance(found[0], Expr | Relational):
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


def equal(said: str, gold: str, places: int) -> bool:
    """math-verify decides, and the values can only veto."""
    from math_verify import verify
    from sympy.core.relational import Relational

    ours, theirs = formula(said), formula(gold)
    if isinstance(ours, Relational) != isinstance(theirs, Relational):
        return False
    if isinstance(ours, Relational):
        possible = same_ratio(ours.lhs - ours.rhs, theirs.lhs - theirs.rhs)
    elif places > 0 and not ours.free_symbols | theirs.free_symbols:
        return rounds_to((said, ours), (gold, theirs), places)
    else:
        possible = same_values(ours, theirs)
    return possible and bool(verify([theirs], [ours], timeout_seconds=None))


def rounds_to(said: tuple, gold: tuple, places: int) -> bool:
    """One of the two is a decimal, which is the value of the other rounded to `places`. Each: (latex, formula)."""
    from sympy import Rational

    x, y = (Rational(t) if re.fullmatch(r"-?\d*\.\d+", t) else values(f, [])[0] for t, f in (said, gold))
    step = Rational(1, 10**places)
    return bool(abs(x) >= 100 * step and abs(x - y) <= step / 2)


def same_values(ours, theirs) -> bool:
    """Of two expressions at POINTS, to 20 digits, or to 12 where one holds a decimal, which is read as a float."""
    from sympy import Float, nan, zoo

    tolerance = Float("1e-12") if ours.has(Float) or theirs.has(Float) else Float("1e-20")
    letters = sorted(ours.free_symbols | theirs.free_symbols, key=str)
    for x, y in zip(values(ours, letters), values(theirs, letters), strict=True):
        if x.has(nan, zoo) or y.has(nan, zoo):  # 1/0
            return False
        finite = x.is_number and y.is_number and x.is_finite and y.is_finite
        if finite and abs(x - y) > tolerance * max(abs(x), abs(y)):
            return False
    return True


def same_ratio(ours, theirs) -> bool:
    """Is the difference of the sides of one relation a multiple of the other's? For 0=0 and x=x it is none."""
    letters = sorted(ours.free_symbols, key=str)
    if not letters or set(letters) != theirs.free_symbols:
        return False
    ratios = []
    for x, y in zip(values(ours, letters), values(theirs, letters), strict=True):
        if not (x.is_number and y.is_number and x.is_finite and y.is_finite and abs(x) > TINY and abs(y) > TINY):
            return False
        ratios.append(x / y)
    return all(abs(ratio - ratios[0]) <= 1e-12 * abs(ratios[0]) for ratio in ratios)


if __name__ == "__main__":
    main()
