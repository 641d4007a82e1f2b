"""Do two mathematical answers have the same value? `equal` is the only function that others use.

Nobody needs to read this file to understand the paper: `nanopcf/rewards.py` finds the answer in a response and asks
here whether it equals the right one. Compared by value are integers, decimals, thousands separators, fractions,
percent, roots and powers, in LaTeX or plain; lists and sets in any order, tuples and intervals in their own; equations;
and formulas with variables, by their values at three points.

An answer is read by a small recursive-descent parser of a fixed grammar. Nothing is ever run or evaluated as code, and
lengths, depths and powers are bounded, so `equal` ends soon and never raises. What cannot be read is compared as text.

Strict wants units to agree. Lenient (the default) drops units, reads "50" for "50 %", and takes a decimal for the exact
value that it rounds.
"""

import math
import re
from fractions import Fraction

MAX_LENGTH = 400  # characters of an answer: longer ones are compared as text
MAX_DEPTH = 40
MAX_BITS = 20_000  # of an integer power
SCALES = [1.7, 4.3, 9.1]  # of variables, at the points where formulas are compared: apart, so that floors differ
POINTS = len(SCALES)

Number = Fraction | float


# ---- are two answers equal? ----


def equal(a: str, b: str, strict: bool = False) -> bool:
    """Whether two answers have the same value. Never raises."""
    a, b = tidy(a), tidy(b)
    if not a or not b:
        return False
    if squeeze(a) == squeeze(b):
        return True
    if max(len(a), len(b)) > MAX_LENGTH:
        return False
    try:
        return same(a, b, strict)
    except (ValueError, ArithmeticError, RecursionError):  # not in the grammar, or no number: then only equal as text
        return False


REPLACED = [
    (r"\\(?:left|right|displaystyle|limits|bigl?|bigr?|Bigl?|Bigr?)(?![A-Za-z])", ""),
    (r"\\[!,;:> ]|~|\\q?quad", " "),
    (r"\\[dtc]frac", r"\\frac"),
    (r"(?<=[\d~\s}])\\(?:text|mathrm)\s*\{\s*([A-Za-z])\s*\}", r" \1unit "),  # m alone would be a variable
    (r"\\(?:text|mathrm|textbf|mathbf|operatorname|mbox|textit)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\(?:cdot|times)(?![A-Za-z])|[×·]", "*"),
    (r"\\div(?![A-Za-z])|÷", "/"),
    (r"\\(?:leq?|leqslant)(?![A-Za-z])|≤", "<="),
    (r"\\(?:geq?|geqslant)(?![A-Za-z])|≥", ">="),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", " degrees "),
    (r"\\%", "%"),
    (r"\\?\$", ""),
    (r"[−–]", "-"),
    (r"π", r"\\pi "),
    (r"√\s*(\d+)", r"\\sqrt{\1}"),
    (r"\{,\}", ","),
    (r"\\ldots|\\dots|…", "..."),
]
REPLACED = [(re.compile(pattern), by) for pattern, by in REPLACED]


def tidy(text: str) -> str:
    """One spelling for what LaTeX and people write in several ways."""
    text = text[: 4 * MAX_LENGTH]
    for pattern, by in REPLACED:
        text = pattern.sub(by, text)
    return text.strip().strip("*").rstrip(".,;:").strip()


def squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text).casefold()


def same(a: str, b: str, strict: bool) -> bool:
    """Of two tidy texts. Raises ValueError where one isn't in the grammar."""
    choice = [re.fullmatch(r"\(?([A-Ja-j])\)?", t) for t in (a, b)]
    if all(choice):
        return choice[0][1].upper() == choice[1][1].upper()
    parts = [split(t, ",") for t in (a, b)]
    if len(parts[0]) > 1 or len(parts[1]) > 1:  # a list of answers: any order
        return same_in_any_order(*parts, strict)
    union = [re.split(r"\\cup|∪", t) for t in (a, b)]
    if len(union[0]) > 1 or len(union[1]) > 1:
        return same_in_any_order(*union, strict)
    if bracketed(a) and bracketed(b) and ("," in a or "," in b):
        left, right = ([p for p in split(inside(t), ",")] for t in (a, b))
        if a.startswith("\\{") or b.startswith("\\{"):
            return a.startswith("\\{") == b.startswith("\\{") and same_in_any_order(left, right, strict)
        ends = (a[0], a[-1]) == (b[0], b[-1])
        return ends and len(left) == len(right) and all(equal(*p, strict) for p in zip(left, right, strict=True))
    sides = [re.split(r"(<=|>=|<|>|=|\\in(?![A-Za-z])|\\neq?(?![A-Za-z]))", t) for t in (a, b)]
    if len(sides[0]) > 1 or len(sides[1]) > 1:
        return same_relation(*sides, strict)
    return same_value(a, b, strict)


def split(text: str, mark: str) -> list[str]:
    """At every comma (or " and ", " or ", ";") outside of brackets; thousands separators are none."""
    text = re.sub(
        r"(?<![\d,.])(\d{1,3}(?:,\d{3})+)(?![\d,])",
        lambda m: m[1].replace(",", "") if not bracketed(text) else m[1],
        text,
    )
    parts, depth, start = [], 0, 0
    for m in re.finditer(r"[()\[\]{}]|,|;|\band\b|\bor\b", text):
        if m[0] in "([{":
            depth += 1
        elif m[0] in ")]}":
            depth -= 1
        elif depth == 0:
            parts.append(text[start : m.start()])
            start = m.end()
    parts.append(text[start:])
    return [p.strip() for p in parts if p.strip()]


def bracketed(text: str) -> bool:
    """One pair of brackets around all of it: a tuple, an interval, a set."""
    body = text[1:] if text.startswith("\\{") else text
    if not body or body[0] not in "([{" or body[-1] not in ")]}":
        return False
    depth = 0
    for i, c in enumerate(body):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0:
            return i == len(body) - 1
    return False


def inside(text: str) -> str:
    return text[2:-2] if text.startswith("\\{") else text[1:-1]


def same_in_any_order(left: list[str], right: list[str], strict: bool) -> bool:
    if len(left) != len(right) or len(left) > 30:
        return False
    rest = list(right)
    for part in left:
        match = next((r for r in rest if equal(part, r, strict)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


def same_relation(a: list[str], b: list[str], strict: bool) -> bool:
    """Equations and inequalities, split at their signs. x = 5 is 5; 2x = y + 1 is y = 2x - 1."""
    if len(a) == len(b) == 3 and a[1] == b[1] == "=":
        if equal(a[0], b[0], strict) and equal(a[2], b[2], strict):
            return True
        factors = [one_difference(a, at) / one_difference(b, at) for at in range(POINTS)]
        return all(math.isclose(f, factors[0], rel_tol=1e-7) for f in factors)
    if len(a) == len(b):
        return all(x == y if i % 2 else equal(x, y, strict) for i, (x, y) in enumerate(zip(a, b, strict=True)))
    full, bare = (a, b) if len(a) > len(b) else (b, a)
    if len(bare) == 1 and len(full) == 3 and full[1] in ("=", "\\in"):
        name = re.fullmatch(r"\s*\\?[A-Za-z]\w*(?:_\{?[\w\\ ]+\}?)?\s*(?:\(\s*\w+\s*\))?\s*", full[0])
        return bool(name) and equal(full[2], bare[0], strict)
    return False


def one_difference(sides: list[str], at: int) -> float:
    return float(value(sides[0], at)) - float(value(sides[2], at))


UNIT = re.compile(r"[A-Za-z]{2,}(?:\^?\{?-?\d\}?)?[*/]?|[*/]")


def without_unit(text: str) -> str:
    """5 for "5 square feet", "5 cm/s" and "5km". One letter alone is no unit but a variable."""
    words = text.split()
    while len(words) > 1 and UNIT.fullmatch(words[-1]):
        words.pop()
    return re.sub(r"(?<=\d)[A-Za-z]{2,}$", "", " ".join(words))


def same_value(a: str, b: str, strict: bool) -> bool:
    percent = ["%" in t for t in (a, b)]
    texts = [a.replace("%", ""), b.replace("%", "")] if not strict and percent[0] != percent[1] else [a, b]
    if not strict:
        texts = [without_unit(t) for t in texts]
        if any(equal_at_all_points(t, u) for t, u in {tuple(texts), (a, b)}):
            return True
        return rounds_to(*texts) or rounds_to(*reversed(texts))
    return equal_at_all_points(*texts)


def equal_at_all_points(a: str, b: str) -> bool:
    try:
        for at in range(POINTS):
            x, y = value(a, at), value(b, at)
            if isinstance(x, Fraction) and isinstance(y, Fraction):
                if x != y:
                    return False
            elif not math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12):
                return False
    except (ValueError, ArithmeticError, RecursionError):
        return False
    return True


def rounds_to(decimal: str, exact: str) -> bool:
    """1.414 for \\sqrt{2}: a decimal of at least three digits for a value written exactly."""
    if not re.fullmatch(r"-?\d*\.\d+", decimal) or re.fullmatch(r"-?\d*\.?\d*", exact):
        return False
    places = len(decimal.partition(".")[2])
    if len(decimal.replace(".", "").lstrip("-0")) < 3:
        return False
    try:
        return abs(float(decimal) - float(value(exact, 0))) <= 0.5000001 * 10.0**-places and not re.search(
            r"[a-z]", re.sub(r"\\[a-z]+", "", exact)
        )
    except (ValueError, ArithmeticError, RecursionError):
        return False


# ---- the value of an expression ----

TOKEN = re.compile(r"\s*(\d+(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+\.?\d*|\.\d+|\\[A-Za-z]+|\\[{}|]|[A-Za-z]|\S)")
FUNCTIONS = {
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "ln": math.log,
    "exp": math.exp,
    "arctan": math.atan,
    "arcsin": math.asin,
    "arccos": math.acos,
    "cot": lambda v: 1 / math.tan(v),
    "sec": lambda v: 1 / math.cos(v),
    "csc": lambda v: 1 / math.sin(v),
    "sinh": math.sinh,
    "cosh": math.cosh,
}
CLOSING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "|": "|", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}


def value(text: str, at: int) -> Number:
    """The number an expression stands for, variables at the at-th point. Raises ValueError outside of the grammar."""
    tokens = TOKEN.findall(text)
    parser = Parser(tokens, at)
    result = parser.sum(0)
    if parser.i != len(tokens):
        raise ValueError(f"can't read {tokens[parser.i]!r}")
    if isinstance(result, float) and not math.isfinite(result):
        raise ValueError("not a finite number")
    return result


class Parser:
    """Recursive descent: sum of products of powers of atoms. Exact fractions as long as it goes, then floats."""

    def __init__(self, tokens: list[str], at: int) -> None:
        self.tokens, self.at, self.i = tokens, at, 0

    @property
    def next(self) -> str:
        return self.tokens[self.i] if self.i < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.next
        if not token or (expected and token != expected):
            raise ValueError(f"expected {expected or 'more'}, got {token!r}")
        self.i += 1
        return token

    def sum(self, depth: int) -> Number:
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        total = self.product(depth)
        while self.next in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            total = total + sign * self.product(depth)
        return total

    def product(self, depth: int) -> Number:
        result = self.signed(depth)
        while self.next and self.next not in ("+", "-", ")", "]", "}", "\\}", "\\rfloor", "\\rceil", "|", ","):
            divide = self.next == "/"
            if self.next in ("*", "/"):
                self.take()
            elif self.next[0].isdigit() and self.tokens[self.i - 1][0].isdigit():
                raise ValueError("two numbers side by side are no product")
            factor = self.signed(depth)
            result = result / factor if divide else result * factor
        return result

    def signed(self, depth: int) -> Number:
        if self.next in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            if depth > MAX_DEPTH:
                raise ValueError("nested too deeply")
            return sign * self.signed(depth + 1)
        return self.power(depth)

    def power(self, depth: int) -> Number:
        base = self.atom(depth)
        while self.next in ("!", "%"):
            base = factorial(base) if self.take() == "!" else base / 100
        if self.next == "^":
            self.take()
            exponent = self.signed(depth + 1)
            return raised(base, exponent)
        return base

    def atom(self, depth: int) -> Number:
        token = self.take()
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            number = Fraction(token.replace(",", "").rstrip(".") or "0")
            if self.next == "\\frac" and number.denominator == 1:  # 3\frac{1}{2}: a mixed number, if of two integers
                start = self.i
                part = self.atom(depth + 1)
                if all(t.isdigit() or t in "{}" for t in self.tokens[start + 1 : self.i]):
                    return number + part
                self.i = start
            return number
        if token in CLOSING:
            inner = self.sum(depth + 1)
            self.take(CLOSING[token])
            rounded = {"\\lfloor": math.floor, "\\lceil": math.ceil}.get(token)
            return abs(inner) if token == "|" else Fraction(rounded(inner)) if rounded else inner
        name = token.removeprefix("\\")
        if token == "\\frac":
            top = self.argument(depth)
            return top / self.argument(depth)
        if token == "\\binom":
            n = self.argument(depth)
            return binomial(float(n), float(self.argument(depth)))
        if token == "\\sqrt":
            order = Fraction(2)
            if self.next == "[":
                self.take()
                order = self.sum(depth + 1)
                self.take("]")
            return raised(self.argument(depth), 1 / order)
        if name == "pi" and token != name:
            return math.pi
        if token != name and name in (*FUNCTIONS, "log"):
            return self.function(name, depth)
        if token != name or token.isalpha():
            return self.variable(token)
        raise ValueError(f"can't read {token!r}")

    def argument(self, depth: int) -> Number:
        """{...}, or one digit: \\frac12."""
        if self.next.isdigit() and len(self.next) > 1:
            token = self.tokens[self.i]
            self.tokens[self.i : self.i + 1] = [token[0], token[1:]]
        return self.atom(depth + 1)

    def function(self, name: str, depth: int) -> float:
        base = math.e if name != "log" else 10.0
        exponent: Number = Fraction(1)
        while self.next in ("_", "^"):
            if self.take() == "_":
                base = float(self.argument(depth))
            else:
                exponent = self.argument(depth)
        inner = float(self.power(depth + 1))
        result = math.log(inner) / math.log(base) if name == "log" else FUNCTIONS[name](inner)
        return float(raised(result, exponent))

    def variable(self, name: str) -> float:
        """A number for each name and point, the same in both texts; a subscript belongs to the name."""
        if self.next == "_":
            self.take()
            if self.next == "{":
                while self.next and self.next != "}":
                    name += self.take()
                self.take("}")
            else:
                name += self.take()
        seed = sum((i + 1) * ord(c) for i, c in enumerate(name))
        return SCALES[self.at] * (1 + math.modf(seed * 0.618034 + self.at * 0.754878)[0])


def raised(base: Number, exponent: Number) -> Number:
    """base ^ exponent, exact while it is small. Raises ValueError for roots of negative numbers."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent.numerator)
        if bits <= MAX_BITS:
            return base ** int(exponent)
        raise ValueError("a power too large to write out")
    if base < 0:
        if isinstance(exponent, Fraction) and exponent.denominator % 2 == 1:  # a cube root
            return -raised(-base, exponent) if exponent.numerator % 2 else raised(-base, exponent)
        raise ValueError("an even root of a negative number")
    root = float(base) ** float(exponent)
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and math.isfinite(root) and root < 1e9:
        near = Fraction(round(root * base.denominator), base.denominator)  # \sqrt{4} is exactly 2
        if exponent.numerator == 1 and near**exponent.denominator == base:
            return near
    return root


def factorial(n: Number) -> Number:
    if isinstance(n, Fraction) and n.denominator == 1 and 0 <= n <= 500:
        return Fraction(math.factorial(int(n)))
    return math.gamma(float(n) + 1)


def binomial(n: float, k: float) -> Number:
    if n == int(n) and k == int(k) and 0 <= k <= n <= 500:
        return Fraction(math.comb(int(n), int(k)))
    return math.gamma(n + 1) / (math.gamma(k + 1) * math.gamma(n - k + 1))
