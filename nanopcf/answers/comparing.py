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

from nanopcf.answers import numbers, spelling
from nanopcf.answers.finding import ANNOUNCED, LONGEST, after_mark, bare
from nanopcf.answers.numbers import read_number
from nanopcf.answers.spelling import squeeze, tidy

WHOLE = re.compile(r"0|[1-9][0-9]{0,14}")
DECIMAL_COMMA = re.compile(r"-?\d{1,9},(?:\d{1,2}|\d{4,9})|-?0,\d{3}")


@dataclass
class How:
    """How two answers are compared, and what that may still cost."""

    strict: bool  # units must agree, and nothing is rounded
    by_value: Callable[[str, str, "How"], bool] | None  # (said, gold, how): formulas in LaTeX; None: by text alone
    questions: int = 8  # for math-verify; a list of n formulas could ask n * n
    seconds: float = 2.0  # of its time


def equal(said: str, gold: str, strict: bool = False, by_value: Callable[[str, str, How], bool] | None = None) -> bool:
    """Is the answer `said` the right answer `gold`? Never raises, whatever the two hold."""
    if WHOLE.fullmatch(said) and WHOLE.fullmatch(gold):
        return said == gold  # most of RL's answers; what follows would say the same in ten times the time
    gold = bare(gold)
    if said.strip() == gold != "":
        return True
    if max(len(said), len(gold)) > LONGEST:
        return False
    said, gold = (  # \boxed{\text{The answer is } 72}
        tidy(after_mark(t[m.end() :].lstrip("}")) if (m := ANNOUNCED.search(t)) else t) for t in (said, gold)
    )
    if not squeeze(said) or not squeeze(gold):
        return False
    if choice := re.fullmatch(r"\(?([A-J])[).]?|\(([A-J])\)\s?«?[A-Za-z ]{2,}»?", re.sub(r"^«|»$", "", gold)):
        return chosen(said) == (choice[1] or choice[2])
    try:
        return same(said, gold, How(strict, by_value))
    except RecursionError:  # hundreds of brackets in brackets
        return False


# ---- taking answers apart ----


def splitter(pattern: str) -> re.Pattern:
    """Matches the pattern, or a bracket: group 1 where one opens, group 2 where one closes."""
    return re.compile(rf"{pattern}|(\\?\{{|[(\[])|(\\?\}}|[)\]])")


# A comma between digits may separate thousands.
COMMA = splitter(r"(?<!\d),|,(?!\d{3}(?!\d))|;|(?<![A-Za-z«\\])(?:and|or)(?![A-Za-z»])|«\s?,?\s?(?:and|or)\s?»")
COMMA_WITHIN = splitter(r"[,;]")
CUP = splitter(r"\\cup(?![A-Za-z])")
RELATION = splitter(r"\\(?:leq|geq|neq|in|equiv|approx|to|rightarrow|subset)(?![A-Za-z])|[<>=]")
NOTHING = splitter(r"(?!)")


def split(text: str, pattern: re.Pattern) -> list[str]:
    """[part, separator, part, ...] at every match of a splitter outside of brackets."""
    parts, last, depth = [], 0, 0
    for m in pattern.finditer(text):
        if m.lastindex:
            depth = max(0, depth + (1 if m.lastindex == 1 else -1))
        elif depth == 0:
            parts += [text[last : m.start()].strip(), m[0]]
            last = m.end()
    return [*parts, text[last:].strip()]


PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")


def members(text: str, comma: re.Pattern = COMMA) -> list[str]:
    """The members of a list. One with \\pm is two."""
    found = [part for part in split(text, comma)[::2] if squeeze(part)]
    if not PLUS_MINUS.search(text):
        return found
    signs = [dict(pm="+", mp="-"), dict(pm="-", mp="+")]
    return list(dict.fromkeys(PLUS_MINUS.sub(lambda m, s=s: s[m[1]], part) for part in found for s in signs))


MATRIX = re.compile(r"\\begin\{([pbB]?(?:small)?matrix|array)\}(.{0,400})\\end\{\1\}", re.DOTALL)


def take_apart(text: str) -> tuple[str, list[str]]:
    """(kind, parts). The kinds: "{}" a list or a set; "cup" a union; "()", "[)" and so on a tuple or an interval; "2x2"
    a matrix, its cells row by row; "" anything else, one part."""
    if len(found := members(text)) > 1:
        return "{}", found
    text = found[0] if found else text
    if len(union := split(text, CUP)) > 1:
        return "cup", union[::2]
    if (m := MATRIX.fullmatch(text)) and "\\begin" not in m[2]:
        rows = [[c.strip() for c in row.split("&")] for row in m[2].strip().removesuffix("\\\\").split("\\\\")]
        return "x".join(str(len(r)) for r in rows), [c for row in rows for c in row]
    kind = text[:2].lstrip("\\")[:1] + text[-1:]
    if kind in ("()", "[]", "(]", "[)", "{}") and closes_at_the_end(text):
        found = members(re.sub(r"^\\?.|\\?.$", "", text), COMMA_WITHIN)
        return take_apart(found[0]) if kind in ("()", "[]") and len(found) == 1 else (kind, found)
    return "", [text]


def closes_at_the_end(text: str) -> bool:
    """Does the bracket at the start enclose the whole text?"""
    depth = 0
    for m in NOTHING.finditer(text):
        depth += 1 if m.lastindex == 1 else -1
        if depth == 0:
            return m.end() == len(text)
    return False


# ---- comparing ----


def same(said: str, gold: str, how: How) -> bool:
    """Of two tidy texts."""
    said, gold = said.strip(), gold.strip()
    if SIGN.search(gold):  # +x is x
        said, gold = said.removeprefix("+"), gold.removeprefix("+")
    said, gold = decimal_comma(said, gold), decimal_comma(gold, said)
    ours, theirs = read_number(said), read_number(gold)
    if ours and theirs:
        return numbers.equal_numbers(ours, theirs, how.strict)
    if squeeze(said) == squeeze(gold):
        return True
    if is_words(gold) or squeeze(said).lower() in YES_OR_NO:
        return is_words(said) and is_words(gold) and words(said) == words(gold)
    sides = [split(t, RELATION) if len(members(t)) == 1 else [t] for t in (said, gold)]
    if max(map(len, sides)) > 1:
        return same_relation(*sides, how)
    (kind, ours), (gold_kind, theirs) = take_apart(said), take_apart(gold)
    if (gold_kind == "{}" and kind in ("", "[]")) or (kind == "{}" and not gold_kind):  # a set of one is its member
        kind = gold_kind = "{}"
    if kind or gold_kind:
        return kind == gold_kind and (in_any_order if kind in ("{}", "cup") else in_order)(ours, theirs, how)
    # A plain number takes no formula.
    return not read_number(gold) and bool(SIGN.search(gold)) and same_formula(*ours, *theirs, how)


def decimal_comma(text: str, other: str) -> str:
    """2,74 as 2.74, where the other answer has a point."""
    return text.replace(",", ".") if "." in other and DECIMAL_COMMA.fullmatch(text) else text


def in_order(ours: list[str], theirs: list[str], how: How) -> bool:
    return len(ours) == len(theirs) and all(same(a, b, how) for a, b in zip(ours, theirs, strict=True))


def in_any_order(ours: list[str], theirs: list[str], how: How) -> bool:
    texts = [squeeze(g) for g in theirs]
    if len(set(texts)) == len(texts):  # then what is said twice counts once
        ours = list({squeeze(part): part for part in ours}.values())
    if len(ours) != len(theirs) or len(ours) > 50:
        return False
    left = list(theirs)
    for part in sorted(ours, key=lambda part: squeeze(part) not in texts):  # the same text first: it asks no questions
        match = next((g for g in left if squeeze(g) == squeeze(part)), None)
        match = match or next((g for g in left if same(part, g, how)), None)
        if match is None:
            return False
        left.remove(match)
    return True


# ---- equations and inequalities: [side, sign, side, sign, side] ----


def same_relation(ours: list[str], theirs: list[str], how: How) -> bool:
    """One of the two holds =, <, ..."""
    rounded = not how.strict and read_number(theirs[-1]) is not None
    ours, theirs = relation(ours, rounded), relation(theirs, False)
    (name, value), (gold_name, gold_value) = named(ours), named(theirs)
    if value and gold_value:
        if not (name and gold_name):  # "x = 5" for "5", and "5" for "x = 5"
            name, of = (name, value) if name else (gold_name, gold_value)
            return (not name or is_name(name) or is_sum(name, of, how)) and same(value, gold_value, how)
        if squeeze(name) == squeeze(gold_name) or {name, gold_name} in ({"y", "f(x)"}, {"y", "g(x)"}):
            return same(value, gold_value, how)
    if ours[1::2] == theirs[1::2] and in_order(ours[::2], theirs[::2], how):
        return True
    if len(ours) != 3 or len(theirs) != 3 or not {ours[1], theirs[1]} <= {"=", *TURNED}:
        return False
    return ask(" ".join(ours), " ".join(theirs), how)


def relation(sides: list[str], rounded: bool) -> list[str]:
    """n \\equiv 5 \\pmod{17} says that n is 5; of 1/3 \\approx 0.33 the first is exact; a chain has two ends.
    `rounded`: a rounded value is asked for."""
    if not sides[0] and sides[1:2] in (["="], ["\\approx"]):  # \approx 17.1
        return relation(sides[2:], rounded)
    if sides[1:2] == ["\\equiv"] and len(sides) == 3:
        return [sides[0], "=", re.sub(r"\(?\s?(?:\\[pb]?mod|«\s?mod|mod)(?![a-z]).*$", "", sides[2]).strip()]
    if "\\approx" in sides and (len(sides) > 3 or not letters(sides[0])):
        i = sides.index("\\approx")
        return relation(sides[i + 1 :] if rounded and not read_number(sides[i - 1]) else sides[:i], rounded)
    return [sides[0], "=", sides[-1]] if len(sides) > 3 and set(sides[1::2]) == {"="} else sides


VARIABLE = re.compile(r"[a-z](?:\([a-z]\))?")
TURNED = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq"}


def named(sides: list[str]) -> tuple[str, str]:
    """(a name, its value). An interval for -2 < x \\leq 7; no name for a text alone, no value for other relations."""
    if len(sides) == 1:
        return "", sides[0]
    if len(sides) == 3 and sides[1] in ("=", "\\in", "\\approx"):
        return sides[0], sides[2]
    if sides[1] in (">", "\\geq"):
        sides = [TURNED.get(p, p) for p in reversed(sides)]
    if len(sides) == 3:
        sides = ["-\\infty", "<", *sides] if VARIABLE.fullmatch(sides[0]) else [*sides, "<", "\\infty"]
    if len(sides) != 5 or not VARIABLE.fullmatch(sides[2]) or not {sides[1], sides[3]} <= {"<", "\\leq"}:
        return "", ""
    return sides[2], f"{'[('[sides[1] == '<']}{sides[0]},{sides[4]}{'])'[sides[3] == '<']}"


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
        rf"({SYMBOL})(?:[-+](?!\1){SYMBOL}){{1,5}}",  # m + n
        rf"\\(?:sin|cos|tan|cot)(?:[A-Z]|\\(?:{'|'.join(GREEK)}))",  # \tan A
    ]
)
NAMES = re.compile(NAMES)
FUNCTION_OF = re.compile(rf"(?:{spelling.FUNCTIONS.replace(' ', '|')}|sqrt)[xyz]")


def is_name(side: str) -> bool:
    """May `side` stand before "=" and the answer? A name says nothing about the value."""
    words = re.sub("[«»]", " ", side).split()
    if words and all(re.fullmatch("[A-Za-z]{2,20}", word) for word in words) and max(map(len, words)) > 3:  # total cost
        return not any(numbers.changes_number(word) or FUNCTION_OF.fullmatch(word) for word in words)
    return bool(NAMES.fullmatch(squeeze(side)))


def is_sum(side: str, value: str, how: How) -> bool:
    """Is `side` a computation with the result `value`, as in 30 + 42 = 72?"""
    return not letters(side) and bool(read_number(value)) and ask(side, value, how)


# ---- words and choices ----


YES_OR_NO = ("yes", "no", "true", "false")


def is_words(text: str) -> bool:
    """Words alone, no formula: a word has three letters, or is marked as text, or is written as No and AB are."""
    plain = re.sub(r"[«»]", " ", text)
    if plain.strip(" .!").lower() in YES_OR_NO:
        return True
    found = re.search(r"[A-Za-z]{3}|[A-Z][A-Za-z]", plain) or re.search(r"«[^»]*[A-Za-z]{2}", text)
    return bool(found and re.fullmatch(r"[A-Za-z' .,!?\-]+", plain))


def words(text: str) -> str:
    """Words with small letters, where their capitals mean nothing: "Friday" is friday, but CAB is not cab."""
    found = re.sub(r"[«».,!?]", " ", text).split()
    if len(found) > 1 and found[0].lower() in ("the", "a", "an"):
        found = found[1:]
    plain = re.compile(r"[A-Z]?[a-z'-]{2,}|[A-Z]{5,}")
    return " ".join(w.lower() if plain.fullmatch(w) or w.lower() in YES_OR_NO else w for w in found)


CHOICE = re.compile(r"\(?\s?([A-Ja-j])\s?(?:\)|[.:](?=\s|$)|$|(?=\s*[).:])|,\s[a-z]|(?=[^\x00-\x7f]))")
SECOND = re.compile(r"[\s,.;/&)(]{0,6}(?:(?:and|or)\b)?[\s(]{0,3}[A-Ja-j]\s?(?:[.),;/]|$)")


LISTED = re.compile(r"[\s,;(](?!A\.M\.)[A-J](?:[.:](?=\s)|\))")  # the mark of another choice: "A. 4 B. 9"


def chosen(said: str) -> str:
    """The letter of a multiple choice, which may stand before its text: "B", "(b)", "B. 12", "(E) 72". Of two letters
    neither is chosen: "A. or B"."""
    said = re.sub(r"^\s?(?:[Oo]ption|[Cc]hoice)\s", "", re.sub(r"[«»\\{}]", "", said)).strip()
    letter = CHOICE.match(said)
    second = letter and (SECOND.match(said, letter.end(1)) or LISTED.search(said, letter.end(1)))
    return letter[1].upper() if letter and not second else ""


# ---- formulas ----

NAMED = r"\\(?:overrightarrow|overline|vec|hat|bar|tilde|widehat)\{[^{}]{1,20}\}|\\mathbb\{[A-Z]\}"
LETTER = re.compile(rf"(?:{NAMED}|\\([A-Za-z]+)|[A-Za-z])(?:_(?:\{{[^{{}}]{{1,20}}\}}|\w))?'{{0,3}}")


SIGN = re.compile(r"[A-Za-z\\^+*/!|]|\d\s?-")  # what a formula has: "15 12 04" is none


# Towers of powers, and factorials of thousands: no answer, and nobody can compute them.
TOO_LARGE = re.compile(r"\^[\s{(]{0,3}\w{1,20}\s?\^[\s{(]{0,3}\w{1,20}\s?\^|\^\s?\{?-?\d{5}|\d{4}\s?!|!\s?[)}]?\s?!")


GUESSED = re.compile(r"[«»,;&]|\.\.\.|\\[^A-Za-z]|[A-Za-z]{4}|^\s*$")


def formulas(*texts: str) -> bool:
    """Can these be read as formulas, without anything that math-verify would guess at?"""
    commands = re.findall(r"\\([A-Za-z]+)", re.sub(NAMED + r"|_\{[^{}]{1,20}\}", "", " ".join(texts)))
    if not KNOWN | GREEK >= set(commands):
        return False
    return not any(TOO_LARGE.search(t) or GUESSED.search(re.sub(r"\\[A-Za-z]+", "1", t)) for t in texts)


def same_formula(said: str, gold: str, how: How) -> bool:
    """Two formulas, once their units are off."""
    parts = [re.fullmatch(r"(.*?)\s?(«[^«»]*»\s?(?:\^\s?\d)?|%|＄| degrees)?", t) for t in (said, gold)]
    (said, gold), units = (p[1] for p in parts), [numbers.read_unit(p[2] or "", False) for p in parts]
    if None in units or (units[0] != units[1] and (how.strict or "" not in units)):
        return False
    return ask(said.strip("＄ "), gold.strip("＄ "), how)


def ask(said: str, gold: str, how: How) -> bool:
    """math-verify, if it would not guess."""
    possible = how.by_value and formulas(said, gold) and letters(said) == letters(gold)
    return bool(possible and how.by_value(said, gold, how))


def letters(text: str) -> set[str]:
    """The variables of a formula: one that is equal to another for all their values has the same ones."""
    found = {re.sub(r"[\s{}]", "", m[0]) for m in LETTER.finditer(text) if m[1] not in KNOWN}
    return found - {"e", "i"}


def is_formula(gold: str) -> bool:
    """Does it hold a part that only math-verify compares by value?"""
    plain = tidy(gold)
    if read_number(plain) or is_words(plain) or re.fullmatch(rf"\([A-J]\)|{SYMBOL}", squeeze(plain)):
        return False
    kind, parts = take_apart(plain)
    parts = parts if kind else split(plain, RELATION)[::2]
    if len(parts) > 1:
        return any(map(is_formula, parts))
    return bool(SIGN.search(re.sub(r"-?\\(?:infty|emptyset)|«[^»]*»| degrees", " ", parts[0])))
