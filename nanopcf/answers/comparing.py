"""Are two answers equal? As texts, as plain numbers, part by part; what is left are formulas, for math-verify.

`equal` tidies both answers and takes them apart: lists and sets (any order), tuples, intervals and matrices (cell by
cell), equations ("x = 5" answers "5"). A part that both write as a plain number is compared exactly, and words are
compared as text. For a right answer that is a plain number only a plain number counts, since "47 * 36" computes
nothing. Two formulas with the same letters are asked of math-verify, and so are two equations or inequalities. Nothing
else is: it can be cheated with commas, words and names, and takes the letters R and r for one.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from nanopcf.answers import numbers, spelling
from nanopcf.answers.finding import ANNOUNCED, LONGEST, after_mark, bare
from nanopcf.answers.numbers import read_number
from nanopcf.answers.spelling import squeeze, tidy

DIGITS = re.compile(r"\d[\d ]*")  # the answers of the nano tasks, for which there is no need to look further


@dataclass
class How:
    """How two answers are compared, and what that may still cost."""

    strict: bool  # units must agree, and nothing is rounded
    by_value: Callable[[str, str, "How"], bool]  # compares two formulas in LaTeX: (said, gold, how) -> are they equal
    questions: int = 8  # for math-verify; a list of n formulas could ask n * n
    seconds: float = 2.0  # of its time


def by_text(said: str, gold: str, how: How) -> bool:
    """Formulas count by text alone, and these two are different texts."""
    return False


def equal(said: str, gold: str, strict: bool = False, by_value: Callable[[str, str, How], bool] = by_text) -> bool:
    """Is the answer `said` the right answer `gold`? Never raises, whatever the two hold."""
    gold = bare(gold)
    if said.strip() == gold != "":
        return True
    if max(len(said), len(gold)) > LONGEST:
        return False
    if DIGITS.fullmatch(said) and DIGITS.fullmatch(gold):
        return squeeze(said) == squeeze(gold) or (" " not in said + gold and int(said) == int(gold))
    if "\\text" in said and (phrase := ANNOUNCED.search(said)):  # \boxed{\text{The answer is } 72}
        said = after_mark(said[phrase.end() :].lstrip("}"))
    said, gold = tidy(said), tidy(gold)
    if not squeeze(said) or not squeeze(gold):
        return False
    if choice := re.fullmatch(r"\(?([A-J])[).]?|\(([A-J])\)\s?«?[A-Za-z ]{2,}»?", re.sub(r"^«|»$", "", gold)):
        return chosen(said) == (choice[1] or choice[2])
    try:
        return same(both_signs(said), both_signs(gold), How(strict, by_value))
    except RecursionError:  # hundreds of brackets in brackets
        return False


# ---- taking answers apart ----

EDGES = re.compile(r"\\[{}]|\\.|[()\[\]{}]")


def split(text: str, pattern: str) -> list[str]:
    """At every match of the pattern outside of brackets. Thousands separators are no commas."""
    depth, inside = 0, []  # inside: stretches within brackets
    start = 0
    for edge in EDGES.finditer(text):
        if edge[0] in ("(", "[", "{", r"\{"):
            if depth == 0:
                start = edge.start()
            depth += 1
        elif edge[0] in (")", "]", "}", r"\}"):
            depth = max(0, depth - 1)
            if depth == 0:
                inside.append((start, edge.end()))
    parts, last, k = [], 0, 0
    for m in re.finditer(pattern, text):
        while k < len(inside) and inside[k][1] <= m.start():
            k += 1
        if k < len(inside) and inside[k][0] <= m.start():
            continue
        parts += [text[last : m.start()], m[0]]
        last = m.end()
    return [*parts, text[last:]]


COMMA = r"(?<!\d),|,(?!\d{3}(?!\d))|;|(?<![A-Za-z«\\])(?:and|or)(?![A-Za-z»])|«\s?,?\s?(?:and|or)\s?»"
COMMA_WITHIN = r",|;"
RELATION = r"\\(?:leq|geq|neq|in|equiv|approx|to|rightarrow|subset)(?![A-Za-z])|[<>=]"
TURNED = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq"}


def members(text: str, comma: str = COMMA) -> list[str]:
    return [p.strip() for p in split(text, comma)[::2] if squeeze(p)]


PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")


def both_signs(text: str) -> str:
    """An answer with its two signs written out: "1 \\pm a" is the list "1 + a, 1 - a"."""
    if not PLUS_MINUS.search(text):
        return text
    written = []
    for part in members(text):
        signs = ("+-", "-+") if PLUS_MINUS.search(part) else ("+-",)
        written += [PLUS_MINUS.sub(lambda m, s=s: s[m[1] == "mp"], part).strip().removeprefix("+") for s in signs]
    return ", ".join(written)


def bracketed(text: str) -> str | None:
    """The kind of brackets that enclose the whole text, as two characters: "()", "[)", "{}"; None for none."""
    for opening, closing in (("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"), (r"\{", r"\}"), ("{", "}")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > 2:
            depth = 0
            for edge in EDGES.finditer(text):
                depth += edge[0] in ("(", "[", "{", r"\{")
                depth -= edge[0] in (")", "]", "}", r"\}")
                if depth == 0:
                    return opening[-1] + closing[-1] if edge.end() == len(text) else None
    return None


def inside(text: str) -> str:
    return re.sub(r"^\\?.|\\?.$", "", text)


MATRIX = re.compile(r"\\begin\{([pbBvV]?(?:small)?matrix|array)\}(.{0,400})\\end\{\1\}", re.DOTALL)


def cells(text: str) -> list[list[str]] | None:
    """The rows of a matrix or of a column, or None for any other text."""
    m = MATRIX.fullmatch(text)
    if m is None or "\\begin" in m[2] or m[1][0] in "vV":
        return None
    return [[c.strip() for c in row.split("&")] for row in m[2].strip().removesuffix("\\\\").split("\\\\")]


# ---- comparing ----


def same(said: str, gold: str, how: How) -> bool:
    """Of two tidy texts."""
    said, gold = said.strip(), gold.strip()
    if SIGN.search(gold):  # +x is x
        said, gold = said.removeprefix("+"), gold.removeprefix("+")
    if "." in gold and (comma := re.fullmatch(r"(-?\d{1,9}),(\d{1,2}|\d{4,9})", said)):  # 2,74 for 2.74
        said = f"{comma[1]}.{comma[2]}"
    ours, theirs = read_number(said), read_number(gold)
    if ours and theirs:
        return numbers.equal_numbers(ours, theirs, how.strict)
    if squeeze(said) == squeeze(gold):
        return True
    if is_words(gold) or squeeze(said).lower() in YES_OR_NO:
        return is_words(said) and is_words(gold) and words(said) == words(gold)
    lists = [members(t) for t in (said, gold)]
    if max(map(len, lists)) > 1:
        return same_list(said, gold, *lists, how)
    said, gold = (p[0] if p else t for p, t in zip(lists, (said, gold), strict=True))
    sides = [split(t, RELATION) for t in (said, gold)]
    if max(map(len, sides)) > 1:
        return same_relation(*sides, how)
    said, gold = (inside(t).strip() if bracketed(t) and cells(inside(t).strip()) else t for t in (said, gold))
    kinds = bracketed(said), bracketed(gold)
    if "{}" in kinds or (kinds[0] and kinds[1]):
        return same_brackets(said, gold, kinds, how)
    unions = [split(t, r"\\cup(?![A-Za-z])")[::2] for t in (said, gold)]
    if max(map(len, unions)) > 1:
        return in_any_order(*unions, how)
    matrices = cells(said), cells(gold)
    if matrices[0] and matrices[1]:
        return [len(r) for r in matrices[0]] == [len(r) for r in matrices[1]] and all(
            same(a, b, how) for p, q in zip(*matrices, strict=True) for a, b in zip(p, q, strict=True)
        )
    return not theirs and bool(SIGN.search(gold)) and same_formula(said, gold, how)  # a plain number takes no formula


def same_list(said: str, gold: str, ours: list[str], theirs: list[str], how: How) -> bool:
    """One of the two is a list. A list and a set with the same members are equal, but not a tuple."""
    ours, theirs = (without_name(parts) for parts in (ours, theirs))
    if len(ours) == 1 and bracketed(ours[0]) in ("{}", "[]"):
        ours = members(inside(ours[0]), COMMA_WITHIN)
    if len(theirs) == 1 and bracketed(theirs[0]) == "{}":
        theirs = members(inside(theirs[0]), COMMA_WITHIN)
    return in_any_order(ours, theirs, how)


def without_name(parts: list[str]) -> list[str]:
    """x \\in \\{2,3\\} is a name for a set; a list stays as it is."""
    sides = split(parts[0], RELATION) if len(parts) == 1 else []
    return (
        [sides[2].strip()] if len(sides) == 3 and sides[1] in ("=", "\\in") and is_name(sides[0], sides[2]) else parts
    )


def in_any_order(ours: list[str], theirs: list[str], how: How) -> bool:
    if len(ours) != len(theirs) or len(ours) > 50:
        return False
    left, rest = list(theirs), []
    for part in ours:  # what is the same text first: it asks no questions
        if part in left:
            left.remove(part)
        else:
            rest.append(part)
    for part in rest:
        match = next((g for g in left if same(part, g, how)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def same_brackets(said: str, gold: str, kinds: tuple[str | None, str | None], how: How) -> bool:
    """Sets in any order; tuples and intervals in their own, with the same brackets."""
    if "{}" in kinds:
        ours, theirs = (
            members(inside(t), COMMA_WITHIN) if kind in ("{}", "[]") else [t]
            for t, kind in zip((said, gold), kinds, strict=True)
        )
        return (ours, theirs) != ([said], [gold]) and in_any_order(ours, theirs, how)
    ours, theirs = (members(inside(t), COMMA_WITHIN) for t in (said, gold))
    if kinds[0] != kinds[1] or len(ours) != len(theirs):
        return False
    return all(same(a, b, how) for a, b in zip(ours, theirs, strict=True))


KNOWN = set(spelling.FUNCTIONS.split()) | set("frac sqrt pi infty lfloor rfloor lceil rceil binom leq geq".split())
GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon "
    "phi varphi chi psi omega hbar Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell".split()
)

POINT = r"[A-Z](?:_\w|_\{\w{1,5}\})?'{0,2}"  # A, A_1, A'
SYMBOL = rf"(?:[A-Za-z]|\\(?:{'|'.join(GREEK)}))(?:_\w|_\{{[^{{}}]{{1,20}}\}})?'{{0,3}}"  # x, x_1, \alpha, f'
NAMES = "|".join(
    [
        rf"(?:\\Delta)?{SYMBOL}",
        r"(?:\\frac\{)?[A-Z][\w'{}]{0,12}(?:\}\{|[:/])[A-Z][\w'{}]{0,12}",  # AB:BC, a ratio
        rf"(?:{POINT}){{1,4}}|\|{POINT}{POINT}\|",  # AB and |AB|
        rf"m?\\(?:angle|triangle)(?:{POINT}){{1,3}}|\\(?:overline|overrightarrow|vec|bar|hat)\{{[A-Za-z]{{1,2}}\}}",
        rf"(?:[A-Zf-hpqruvy]|\\(?:{'|'.join(GREEK)}))(?:_\w|'{{1,3}}|\^\{{-1\}})?\([^()=+*/^]{{1,20}}\)",  # f(2), P(A)
        rf"\({SYMBOL}(?:,{SYMBOL}){{1,9}}\)",  # (x, y)
    ]
)
NAMES = re.compile(NAMES)
FUNCTION_OF = re.compile(rf"(?:{spelling.FUNCTIONS.replace(' ', '|')}|sqrt)[xyz]")
SUM = re.compile(r"-?\d[\d.,]{0,20}(?:[-+*/]\d[\d.,]{0,20}){1,20}")


def is_name(side: str, value: str) -> bool:
    """May `side` stand before "=" and the answer `value`? A name, or a computation with this result: 30 + 42 = 72."""
    words = re.sub("[«»]", " ", side).split()
    if words and all(re.fullmatch("[A-Za-z]{2,20}", word) for word in words) and max(map(len, words)) > 3:  # total cost
        return not any(numbers.changes_number(word) or FUNCTION_OF.fullmatch(word) for word in words)
    side = squeeze(side)
    if NAMES.fullmatch(side):
        return True
    result, number = computed(side), read_number(value)
    return result is not None and number is not None and result == number.share


def computed(side: str) -> Fraction | None:
    """The value of sums and products of plain numbers, such as "30+6*7"; None for anything else."""
    if number := read_number(side):
        return number.share
    if not SUM.fullmatch(side):
        return None
    total = Fraction(0)
    try:
        for term in re.findall(r"[-+]?[^-+]+", side):
            first, *rest = re.split(r"([*/])", term)
            value = numbers.exact(first)
            for sign, factor in zip(rest[::2], rest[1::2], strict=True):
                value = value * numbers.exact(factor) if sign == "*" else value / numbers.exact(factor)
            total += value
    except (ValueError, ZeroDivisionError):
        return None
    return total


def same_relation(ours: list[str], theirs: list[str], how: How) -> bool:
    """One of the two holds =, <, ... Each: [side, sign, side, sign, side]."""
    ours, theirs = ([p.strip() for p in sides] for sides in (ours, theirs))
    if ours[1::2] == theirs[1::2] and len(ours) != 3:  # every side of a chain counts
        return all(same(a, b, how) for a, b in zip(ours[::2], theirs[::2], strict=True))
    if not how.strict and ours[1:2] == ["\\approx"] and not letters(ours[0]) and read_number(theirs[-1]):
        ours = ours[-1:]  # \sqrt{2} \approx 1.414 for 1.414
    ours, theirs = (plain_relation(sides) for sides in (ours, theirs))
    if len(ours) == len(theirs) == 3:
        return same_sides(ours, theirs, how)
    if len(ours) == len(theirs) and all(sign in TURNED for sign in ours[1::2] + theirs[1::2]):
        ours = [TURNED.get(p, p) for p in reversed(ours)]
        return ours[1::2] == theirs[1::2] and all(same(a, b, how) for a, b in zip(ours[::2], theirs[::2], strict=True))
    ours, theirs = ([t] if len(sides) > 1 and (t := interval(sides)) else sides for sides in (ours, theirs))
    for sides in (ours, theirs):
        # "x = 5" for "5", and "5" for "x = 5": what stands before the last sign is a name for the answer.
        if not set(sides[1::2]) <= {"=", "\\in", "\\approx"} or not all(is_name(n, sides[-1]) for n in sides[:-1:2]):
            return False
    return same(ours[-1], theirs[-1], how)


def same_sides(ours: list[str], theirs: list[str], how: How) -> bool:
    """Both are [left, sign, right]."""
    (left, sign, right), (gold_left, gold_sign, gold_right) = ours, theirs
    if {sign, gold_sign} <= {"=", "\\approx"} or sign == gold_sign:
        if squeeze(left) == squeeze(gold_left):
            return same(right, gold_right, how)
        if sign == "=" and "y" in (names := {squeeze(left), squeeze(gold_left)}) and names <= {"y", "f(x)", "g(x)"}:
            return same(right, gold_right, how)
    if "\\in" in (sign, gold_sign) and sign != gold_sign:  # x \in (1,2) for 1 < x < 2
        return same(interval(ours) or right, interval(theirs) or gold_right, how)
    turned = TURNED.get(sign) == gold_sign or sign == gold_sign == "="
    if turned and squeeze(left) == squeeze(gold_right) and same(right, gold_left, how):
        return True
    if not {sign, gold_sign} <= {"=", *TURNED}:
        return False
    said, gold = " ".join(ours), " ".join(theirs)
    return formulas(said, gold) and letters(said) == letters(gold) and how.by_value(said, gold, how)


def plain_relation(sides: list[str]) -> list[str]:
    """n \\equiv 5 \\pmod{17} says that n is 5; of 1/3 \\approx 0.33 the first is exact; a chain has two ends."""
    if len(sides) == 3 and sides[1] == "\\equiv":
        return [sides[0], "=", re.sub(r"\(?\s?(?:\\[pb]?mod|«\s?mod|mod)(?![a-z]).*$", "", sides[2]).strip()]
    if len(sides) > 1 and not sides[0] and sides[1] in ("=", "\\approx"):  # \approx 17.1
        return plain_relation(sides[2:])
    if len(sides) > 3 and set(sides[1::2]) == {"="}:
        return [sides[0], "=", sides[-1]]
    if "\\approx" in sides and (len(sides) > 3 or not re.search(r"[A-Za-z]", re.sub(r"\\\w+", "", sides[0]))):
        return plain_relation(sides[: sides.index("\\approx")])
    return sides


def interval(sides: list[str]) -> str:
    """-2 < x \\leq 7 as the interval (-2,7]; "" for what is none."""
    if len(sides) > 1 and sides[1] in (">", "\\geq"):
        sides = [TURNED.get(p, p) for p in reversed(sides)]
    if not set(sides[1::2]) <= {"<", "\\leq"}:
        return ""
    if len(sides) == 3:
        named = [bool(re.fullmatch(r"[a-z]", p)) for p in sides[::2]]
        if named[0] == named[1]:
            return ""
        sides = ["-\\infty", "<", *sides] if named[0] else [*sides, "<", "\\infty"]
    if len(sides) != 5 or not re.fullmatch(r"[a-z](?:\([a-z]\))?", sides[2]):
        return ""
    return f"{'[('[sides[1] == '<']}{sides[0]},{sides[4]}{'])'[sides[3] == '<']}"


# ---- words and choices ----


YES_OR_NO = ("yes", "no", "true", "false")


def is_words(text: str) -> bool:
    """Words alone, no formula: a word has three letters, or is marked as text, or is written as No and AB are."""
    plain = re.sub(r"[«»]", " ", text)
    if plain.strip(" .!").lower() in YES_OR_NO:
        return True
    if not re.fullmatch(r"[A-Za-z' .,!?\-]+", plain):
        return False
    return bool(re.search(r"[A-Za-z]{3}|[A-Z][A-Za-z]", plain) or re.search(r"«[^»]*[A-Za-z]{2}", text))


def words(text: str) -> str:
    """Words with small letters, where their capitals mean nothing: "Friday" is friday, but CAB is not cab."""
    found = re.sub(r"[«».!?]", " ", text).split()
    if len(found) == 1 and found[0].lower() in YES_OR_NO:
        return found[0].lower()
    if len(found) > 1 and found[0].lower() in ("the", "a", "an"):
        found = found[1:]
    folded = [w.lower() if re.fullmatch(r"[A-Z]?[a-z',-]{2,}|[A-Z]{5,}", w) else w for w in found]
    return " ".join(folded)


CHOICE = re.compile(r"\(?\s?([A-Ja-j])\s?(?:\)|[.:](?=\s|$)|$|(?=\s*[).:])|,\s[a-z]|(?=[^\x00-\x7f]))")
SECOND = re.compile(r"[\s,.;/&)(]{0,6}(?:(?:and|or)\b)?[\s(]{0,3}[A-Ja-j]\s?(?:[.),;/]|$)")


def chosen(said: str) -> str:
    """The letter of a multiple choice, which may stand before its text: "B", "(b)", "B. 12", "(E) 72". Of two letters
    neither is chosen: "A. or B"."""
    said = re.sub(r"[«»\\{}]|^(?:[Oo]ption|[Cc]hoice)\s", "", said).strip()
    letter = CHOICE.match(said)
    return letter[1].upper() if letter and not SECOND.match(said, letter.end(1)) else ""


# ---- formulas ----

NAMED = r"\\(?:overrightarrow|overline|vec|hat|bar|tilde|widehat)\{[^{}]{1,20}\}|\\mathbb\{[A-Z]\}"
LETTER = re.compile(rf"(?:{NAMED}|\\([A-Za-z]+)|[A-Za-z])(?:_(?:\{{[^{{}}]{{1,20}}\}}|\w))?'{{0,3}}")


SIGN = re.compile(r"[A-Za-z\\^+*/!|]|\d\s?-")  # what a formula has: "15 12 04" is none


# Towers of powers, and factorials of thousands: no answer, and nobody can compute them.
TOO_LARGE = re.compile(r"\^[\s{(]{0,3}\w{1,20}\s?\^[\s{(]{0,3}\w{1,20}\s?\^|\^\s?\{?-?\d{5}|\d{4}\s?!|!\s?[)}]?\s?!")


def formulas(*texts: str) -> bool:
    """Can these be read as formulas, without anything that math-verify would guess at?"""
    for text in texts:
        commands = set(re.findall(r"\\([A-Za-z]+)", re.sub(NAMED, "", text)))
        if not commands <= KNOWN | GREEK:
            return False
        if (
            not text.strip()
            or TOO_LARGE.search(text)
            or re.search(r"[«»,;&]|\.\.\.|\\[^A-Za-z]|[A-Za-z]{4}", re.sub(r"\\[A-Za-z]+", " ", text))
        ):
            return False
    return True


def same_formula(said: str, gold: str, how: How) -> bool:
    """Two formulas, once their units are off."""
    parts = [re.fullmatch(r"(.*?[^\s«])\s?(«[^«»]*»\s?(?:\^\s?\d)?|%|＄| degrees)?", t) for t in (said, gold)]
    if not all(parts):
        return False
    (said, gold), units = (p[1] for p in parts), [numbers.read_unit(p[2] or "", False) for p in parts]
    if None in units or (units[0] != units[1] and (how.strict or "" not in units)):
        return False
    if not formulas(said, gold) or letters(said) != letters(gold):
        return False
    return how.by_value(said.strip("＄ "), gold.strip("＄ "), how)


def letters(text: str) -> set[str]:
    """The variables of a formula: one that is equal to another for all their values has the same ones."""
    found = {re.sub(r"[\s{}]", "", m[0]) for m in LETTER.finditer(text) if m[1] not in KNOWN}
    return found - {"e", "i"}


def is_formula(gold: str) -> bool:
    """Does it hold a part that only math-verify compares by value?"""
    plain = tidy(gold)
    sides = split(plain, RELATION)
    if len(sides) > 1:  # x = 5 and x < 5 are compared side by side
        return any(is_formula(side) for side in sides[::2])
    if read_number(plain) or is_words(plain) or re.fullmatch(rf"\([A-J]\)|{SYMBOL}", squeeze(plain)):
        return False
    plain = re.sub(
        r"\\frac\{-?\d+\}\{\d+\}|\\(?:infty|cup|emptyset|[{}\\])|\\(?:begin|end)\{\w+\}|«[^»]*»| degrees", " ", plain
    )
    return bool(SIGN.search(plain))
