"""One spelling for what LaTeX and people write in several ways. It leaves out what rarely means anything: bold
letters (\\mathbf{x} is x), which currency it is, a text beyond 2,000 characters.

`tidy` gives the text that numbers, lists and formulas are read from. Words, which LaTeX puts into \\text{...}, stand
there between the marks « and », and the sign of a currency is ＄, apart from the $ that encloses formulas. `squeeze`
takes marks and spaces out: two answers that are then the same are equal as text.
"""

import re
from functools import lru_cache

FUNCTIONS = "arcsin arccos arctan arccot sinh cosh tanh coth sin cos tan cot sec csc ln log lg exp max min gcd lcm det"

WORD_SIGNS = str.maketrans(
    {"−": "-", "–": "-", "—": "-", "，": ",", "：": ":", "（": "(", "）": ")", "；": ";", "％": "%", "’": "'", "′": "'"}
    | {"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt "}
    | {"≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm "}
    | {"∅": r"\emptyset ", "°": " degrees ", "≈": r"\approx ", "≡": r"\equiv ", "²": "^2", "³": "^3", "∠": r"\angle "}
    | {"½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "…": "...", "ℝ": r"\mathbb{R}"}
    | dict.fromkeys("\u00a0\u2009\u202f\t\n\r", " ")
    | dict.fromkeys("\x00«»＄", "?")
)

COMMANDS = dict.fromkeys("displaystyle textstyle limits tiny small large Large LARGE huge Huge rm bf it".split(), "")
COMMANDS |= dict.fromkeys(("cdot", "times", "ast"), "*") | dict.fromkeys(("ldots", "cdots", "dots"), "...")
COMMANDS |= dict.fromkeys(("lvert", "rvert", "vert", "mid"), "|") | dict.fromkeys(
    ("textdollar", "pounds", "euro"), "＄"
)
COMMANDS |= dict.fromkeys(("dfrac", "tfrac", "cfrac"), r"\frac") | {"div": "/", "lt": "<", "gt": ">", "colon": ":"}
COMMANDS |= {"le": r"\leq ", "ge": r"\geq ", "ne": r"\neq ", "leqslant": r"\leq ", "geqslant": r"\geq "}
COMMANDS |= {"lbrace": r"\{", "rbrace": r"\}", "varnothing": r"\emptyset "}

# (pattern, what it becomes), from top to bottom
SPELLINGS = [
    (r"\*\*", "^"),
    (r"\\([A-Za-z]+)", lambda m: COMMANDS.get(m[1], m[0])),
    (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?", ""),
    (r"\\(?:text)?color\s?\{[^{}]{0,20}\}", ""),
    (r"\\[hv]space\*?\{[^{}]{0,20}\}|\\phantom\{[^{}]{0,20}\}", " "),
    (r"\\begin\{array\}\{[^{}]{0,30}\}", r"\\begin{array}"),
    (r",\s?\\!\s?", ","),
    (r"\\!", ""),
    (r"\\[,;:> ]|~|\\q?quad", " "),
    (r"\{\s?,\s?\}", ","),
    (r"\bUSD\b", "＄"),
    (r"_\s?\{\s?\\(?:text|mathrm|rm|textrm)\s?\{([^{}]{1,20})\}\s?\}", r"_{\1}"),
    (r"\^\s?\{?\s?\\prime(?![A-Za-z])\s?\}?", "'"),
    (r"\\(?:text|textrm|textnormal|mbox|mathrm|operatorname|textup)\s?\*?\{\s?([eidx])\s?\}", r" \1 "),
    (rf"\\(?:text|mathrm|operatorname)\s?\*?\{{\s?({FUNCTIONS.replace(' ', '|')})\s?\}}", r"\\\1 "),
    (r"\\(?:mathbf|mathit|boldsymbol|bm|textbf|textit|emph|mathsf|underline|mathcal)\s?\{([^{}]{1,400})\}", r"\1"),
    (r"\\(?:text|textrm|textnormal|mbox|mathrm|operatorname|textup|texttt)\s?\*?\{([^{}]{0,400})\}", r" «\1» "),
    (r"\^\s?(?:\\circ(?![A-Za-z])|\{\s?\\circ\s?\})|\\(?:degree|deg)s?(?![A-Za-z])", " degrees "),
    (r"\\%", "%"),
    (r"\s?(?:\bpercent\b|\bpct\b|\bper cent\b|\bpercentage\b)", "%"),
    (r"\\frac\s{0,3}([0-9A-Za-z])\s{0,3}([0-9A-Za-z])", r"\\frac{\1}{\2}"),
    (r"\\frac\s{0,3}([0-9A-Za-z])\s{0,3}\{", r"\\frac{\1}{"),
    (r"\\frac\s{0,3}(\{[^{}]{1,200}\})\s{0,3}([0-9A-Za-z])", r"\\frac\1{\2}"),
    (r"\\frac\s{1,3}\{", r"\\frac{"),
    (r"\\sqrt\s{0,3}([0-9A-Za-z])", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])sqrt\s?\(([^()]{1,200})\)", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])sqrt\s?([0-9]{1,20})", r"\\sqrt{\1}"),
    (rf"(?<![\\A-Za-z])({FUNCTIONS.replace(' ', '|')}|pi)(?![A-Za-z])", r"\\\1"),
    (r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
    (r"(?<=\d)_(?=\d{3}(?!\d))", ","),  # 1_000
    (r"(?<=\d)\s?:\s?00(?=\s?«?\s?[AaPp]\.?\s?[Mm])", ""),  # 6:00 PM is 6 PM
    (r"<=", r"\\leq "),
    (r">=", r"\\geq "),
    (r"!=", r"\\neq "),
    (r"\\\{\s?\\\}", r"\\emptyset "),
    (r"\\mathbb\s?([A-Z])|\\mathbb\{\s?([A-Z])\s?\}", r"\\mathbb{\1\2}"),
    (r"([\^_])\s?(\d{2,20})", r"\1{\2}"),  # 2^10 is meant as 2^{10}
    (r"([\^_])\s{0,3}\{\s?(\\?[A-Za-z]|\d)\s?\}", r"\1\2 "),
    (r"\\ln\s?\(?\s?e\s?\^(?:(\d)|\{(-?\d{1,9})\})\s?\)?$", r"\1\2"),  # ln(e^2) is 2: nothing is computed
    (r"(\^(?:\w|\{[^{}]{1,20}\}))\s?(_(?:\w|\{[^{}]{1,20}\}))", r"\2\1"),
    (r"\s{2,}", " "),
]
SPELLINGS = [(re.compile(pattern), by) for pattern, by in SPELLINGS]

DELIMITERS = re.compile(r"\\[()\[\]]|\$\$")


WRAPPED = re.compile(r"(\*{1,3}|__|`|['\"])([^*`_'\"]{1,400})\1\.?")  # **72**, `72`, "72", as in Markdown and in prose


PLAIN = re.compile(r"-?[\d., ]{1,400}%?|[A-Za-z]{1,2}")  # these have one spelling


@lru_cache(maxsize=10_000)
def tidy(text: str) -> str:
    """One spelling. A text of any length; what is beyond 2,000 characters is cut off."""
    if PLAIN.fullmatch(text):
        return text.strip().rstrip("., ")
    if "\\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # a backslash that was escaped twice
    text = DELIMITERS.sub(" ", text.translate(WORD_SIGNS).replace("\\\\", "\x00")[:2000])
    if wrapped := WRAPPED.fullmatch(text.strip()):
        text = wrapped[2]
    text = text.replace(r"\$", "＄")
    if text.count("$") % 2:  # one that encloses nothing is a currency
        text = re.sub(r"\$(?=\s?-?[\d.])", "＄", text, count=1)
    text = text.replace("$", " ").replace("€", "＄").replace("£", "＄")
    for pattern, by in SPELLINGS:
        text = pattern.sub(by, text)
    text = text.strip(" *").rstrip(",;:\\。 ")
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    if text.endswith(")") and text.count(")") > len(re.findall(r"[(\[]", text)):  # "(35 + 70 = 105)." after the "="
        text = text[:-1]
    return text.replace("\x00", "\\\\")


# A space between two digits stays: "1 20 415" is not "12 04 15".
MARKS = re.compile(r"(?<![\s«»\d])[\s«»]{1,400}|(?<![\s«»])[\s«»]{1,400}(?![\s«»\d])")
BETWEEN_DIGITS = re.compile(r"[\s«»]{1,400}")


def squeeze(text: str) -> str:
    """A tidy text without marks, and without spaces but for one between digits: LaTeX prints "x y" and "xy" alike."""
    return BETWEEN_DIGITS.sub(" ", MARKS.sub("", text))
