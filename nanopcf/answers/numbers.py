"""Plain numbers with their units, read exactly. Of 2,000 characters at most, by patterns that no text can slow down.

Integers, decimals, thousands ("1,234", "1 234", "1'234"), fractions, mixed numbers ("3 1/2"), percent, scientific
notation ("2.75 \\times 10^{11}", "1e5"), repeating decimals, degrees and currencies. What has to be computed is no
plain number: "47 * 36".
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

THOUSANDS = r"\d{1,3}(?:,\d{3}){1,20}|\d{1,3}(?:[ ']\d{3}){1,20}|\d{1,2}(?:,\d\d){1,9},\d{3}"  # the last as in India
DIGITS = rf"\d{{1,3}}(?:\.\d{{3}}){{2,20}}(?![.\d])|(?:{THOUSANDS}|\d{{1,400}})(?:\.\d{{0,400}})?|\.\d{{1,400}}"
NUMBER = re.compile(
    rf"(?=[-+ ＄]{{0,4}}[\d\\.])(?P<sign>[-+]?)\s?(?:(?P<currency>＄)\s?(?P<sign2>-?))?(?:"
    rf"(?P<whole>\d{{1,100}})(?P<gap>\s?)\\frac\{{(?P<num>\d{{1,100}})\}}\s?\{{(?P<den>\d{{1,100}})\}}"  # 3\frac{1}{2}
    rf"|(?P<whole2>\d{{1,100}})[ +]{{1,3}}(?P<num2>\d{{1,100}})/(?P<den2>\d{{1,100}})"  # 3 1/2
    rf"|\\frac\{{\s?(?P<top>-?(?:{DIGITS}))\s?\}}\s?\{{\s?(?P<bottom>-?(?:{DIGITS}))\s?\}}"
    rf"|(?P<top2>{DIGITS})\s?/\s?(?P<bottom2>-?(?:{DIGITS}))"
    rf"|(?P<mantissa>{DIGITS})\s?(?:[eE]|[*x]\s?10\s?\^)\s?\{{?(?P<exponent>[-+]?\d{{1,4}})\}}?"
    rf"|10\s?\^\s?\{{?(?P<power>[-+]?\d{{1,4}})\}}?"
    rf"|(?P<start>\d{{0,50}}\.\d{{0,50}})\\overline\{{(?P<cycle>\d{{1,50}})\}}"  # 0.1\overline{6}
    rf"|(?P<decimal>{DIGITS}))"
)
# Words that change a number, or say something about it: none of them is a unit.
CHANGING = set(
    "hundred thousand lakh million crore billion trillion dozen gross score k bn mln half halves third fifth tenth "
    "hundredth twice squared cubed times multiplied divided plus minus negative over mod modulo factorial choose is isn't "
    "are was not no wrong incorrect right and or but maybe if than less more fewer greater smaller least most to below "
    "above zero quadrillion permille either versus vs except cannot false remainder".split()
)
UNIT_PART = re.compile(r"[^\W\d_]{1,30}|[%＄]|\^\s?\{?-?\d\}?|[/*.]|\S")  # of "cm^2", "miles per hour", "kg*m/s^2"

# Units of which one is never the other, each with its other names; a plural s counts for nothing.
MEASURES = """
% percent, ＄ dollar usd buck, cent ¢, degree deg, radian rad, mm millimeter millimetre, cm centimeter centimetre,
km kilometer kilometre, m meter metre, in inch inche, ft foot feet, mi mile, yd yard, s second sec, min minute, h hour hr,
day, week wk, month, year yr, mg milligram, kg kilogram, g gram, lb pound, oz ounce, ml milliliter millilitre mL,
l liter litre L, mph, am AM, pm PM, K kelvin, J joule, N newton, W watt, V volt, A ampere, Hz hertz, C celsius, F fahrenheit
"""
MEASURES = {word: names.split()[0] for names in MEASURES.split(",") for word in names.split()}
OF_UNITS = {*MEASURES.values(), "per", "square", "cubic", "/", "*"}


class Number(NamedTuple):
    value: Fraction  # as it is written: 50 for "50%"
    unit: str  # "" for none
    places: int  # digits after the point of a decimal, -1 for any other

    @property
    def share(self) -> Fraction:
        return self.value / 100 if self.unit == "%" else self.value


def exact(text: str) -> Fraction:
    return Fraction(re.sub(r"[ ,']" if text.count(".") < 2 else r"\.", "", text))  # 5.000.000


@lru_cache(maxsize=10_000)
def read_number(text: str) -> Number | None:
    """The number that a whole tidy text is, or None. Raises nothing."""
    text = text.strip()
    if text.startswith("«") and text.endswith("»"):
        text = text.strip("«» ")  # \text{3 apples}
    while text[:1] + text[-1:] in ("()", "{}") and "," not in text:
        text = text[1:-1].strip()
    m = NUMBER.match(text)
    unit = read_unit(text[m.end() :], bool(m["currency"])) if m else None
    if unit is None:
        return None
    try:
        value = value_of(m)
    except (ValueError, ZeroDivisionError):
        return None
    decimal = m["decimal"]
    places = len(decimal.partition(".")[2]) if decimal and "." in decimal else -1
    negative = (m["sign"] == "-") != (m["sign2"] == "-")
    return Number(-value if negative else value, unit, places)


def value_of(m: re.Match) -> Fraction:
    whole, num, den = m["whole"] or m["whole2"], m["num"] or m["num2"], m["den"] or m["den2"]
    if whole:
        return int(whole) + Fraction(int(num), int(den))
    if top := m["top"] or m["top2"]:
        return exact(top) / exact(m["bottom"] or m["bottom2"])
    if m["mantissa"]:
        return exact(m["mantissa"]) * Fraction(10) ** int(m["exponent"])
    if m["power"]:
        return Fraction(10) ** int(m["power"])
    if m["cycle"]:
        places, cycle = len(m["start"].partition(".")[2]), m["cycle"]
        return Fraction("0" + m["start"] + "0") + Fraction(int(cycle), (10 ** len(cycle) - 1) * 10**places)
    return exact(m["decimal"])


def read_unit(text: str, currency: bool) -> str | None:
    """The unit that follows a number, in one spelling; "" for none, None where the text is something else.

    A word is a unit where LaTeX marks it as text. Without that it must be one that we know or stand apart and have four
    letters: "2ab" is a product, and so may be "2 m".
    """
    if not text.strip():
        return "＄" if currency else ""
    if base := re.fullmatch(r"\s?_\{?(\d{1,2})\}?\s?", text):
        return "_" + base[1]  # the base of a numeral
    marked, parts = "«" in text, UNIT_PART.findall(re.sub(r"[«»()]", " ", text))
    if len(parts) > 8 or not all(re.match(r"[^\W\d_]|[%＄^/*.]", part) for part in parts):
        return None
    words = [measure(part) for part in parts if part != "."]
    if not words or any(map(changes_number, parts)):
        return None
    first = parts[0]
    known = (len(first) > 1 and words[0] in MEASURES.values()) or first in ("%", "＄", "per")
    apart = (text.startswith(" ") and len(first) > 3 and first.isalpha()) or not first.isascii()
    if not (marked or known or apart) or (marked and first in "^/*"):
        return None
    return "＄" if currency and set(words) == {"＄"} else " ".join(words)


def changes_number(word: str) -> bool:
    lower = word.lower()
    if word == "K" or word[:2] in ("千克", "千米", "千瓦"):  # kelvin; kilogram, kilometre, kilowatt
        return False
    return word[:1] in "十百千万萬亿億" or lower in CHANGING or lower.removesuffix("s") in CHANGING


def measure(word: str) -> str:
    """One spelling of a unit's word. Capitals count in symbols: T is no t."""
    word = re.sub(r"[ {}]", "", word)
    if word in MEASURES or len(word) < 3:
        return MEASURES.get(word, word)
    lower = word.lower()
    return MEASURES.get(lower) or MEASURES.get(lower.removesuffix("s"), lower)


def same_unit(a: str, b: str) -> bool:
    """Could two units be one? "5 apples" and "5 red apples" could, "5 cm" and "5 m" couldn't."""
    known = [all(word in OF_UNITS or word[0] in "_^" or len(word) == 1 for word in unit.split()) for unit in (a, b)]
    return a == b or not all(known)


def equal_numbers(said: Number, gold: Number, strict: bool) -> bool:
    """The same value, and units that agree. Strict: both have the unit, or neither. Lenient: either may leave it out,
    "50" stands for "50 %", and a decimal of three places or more for the fraction that it rounds."""
    if strict:
        units = said.unit == gold.unit or {said.unit, gold.unit} == {"%", ""} or {said.unit, gold.unit} == {"＄", ""}
        return units and said.share == gold.share
    if said.unit.startswith("_") and said.unit != gold.unit:  # 111_2 is no 111
        return False
    if said.unit and gold.unit and not same_unit(said.unit, gold.unit):
        return False
    if said.share == gold.share or (said.value == gold.value and "" in (said.unit, gold.unit)):
        return True
    rounded, other = (said, gold) if said.places > 2 else (gold, said)
    if rounded.places <= 2 or other.places >= 0 or rounded.unit != other.unit:
        return False
    step, endless = Fraction(1, 10**rounded.places), 10**400 % other.value.denominator != 0
    # at least three digits that count
    return endless and abs(rounded.value) >= 100 * step and abs(other.value - rounded.value) <= step / 2
