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
import sys

TURNED = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq"}
MEMORY_BYTES = 4 << 30
POINTS = ((2, 7), (-3, 11), (5, 3), (-1, 13))  # of the letters: letter k is a + k * b / 17 + 1/9


def main() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows and macOS have no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.WARNING)  # math-verify warns that its own time limit is off
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever the libraries print is no answer
    import math_verify

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        kind, said, gold, places = json.loads(line)
        equal = False
        with contextlib.suppress(Exception):  # whatever sympy raises, the worker goes on
            if kind == "whole":
                equal = bool(math_verify.verify(read(f"\\boxed{{{gold}}}"), read(said), timeout_seconds=None))
            elif kind == "relation":
                equal = same_relation(said, gold)
            else:
                equal = same_value(said, gold, places)
        print(json.dumps(equal), file=answers, flush=True)


def read(text: str) -> list:
    from math_verify import parse

    return parse(text, parsing_timeout=None)


def formula(latex: str):
    """A sympy expression. Raises ValueError where math-verify reads none."""
    from sympy import Expr, I, Symbol

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
    for x, y in zip(values(a, letters), values(b, letters), strict=True):
        if not x.is_number or not y.is_number or not x.is_finite or not y.is_finite:
            return x == y and bool(verify([b], [a], timeout_seconds=None))
        size = max(abs(x), abs(y))
        if abs(x - y) > size * Float("1e-12"):  # 12 digits: decimals are read as floats of 15
            return False
    return bool(verify([b], [a], timeout_seconds=None)) or bool(letters) or a.equals(b) is True


def same_relation(said: list[str], gold: list[str]) -> bool:
    """[left, sign, right] each."""
    from sympy import simplify

    ours, theirs = (formula(left) - formula(right) for left, _, right in (said, gold))
    if simplify(ours) == 0 or simplify(theirs) == 0 or ours.free_symbols != theirs.free_symbols:
        return False
    ratio = simplify(ours / theirs)
    if not (ratio.is_number and ratio.is_finite and ratio != 0):
        return False
    if said[1] == gold[1]:
        return said[1] == "=" or bool(ratio > 0)
    return TURNED.get(said[1]) == gold[1] and bool(ratio < 0)


if __name__ == "__main__":
    main()
