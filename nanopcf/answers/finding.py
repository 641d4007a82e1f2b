"""Where is the answer of a response? What counts as its end, and which mark wins, in the order of `final_answer`.

Nothing here knows the right answer. Every pattern is bounded, so that no text takes long: less than 50 ms for 20,000
characters of what is known to hurt such patterns (tested).
"""

import contextlib
import json
import re

TAIL = 20_000  # characters at the end that are searched: the answer stands there
PROSE_TAIL = 2_000  # characters searched for the last number of prose
LONGEST = 400  # characters of an answer

# ---- boxes ----

BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])[ \t]{0,3}(?:\n[ \t]{0,3}(?=\{))?")
GROUP_EDGE = re.compile(r"\\.|[{}]", re.DOTALL)  # a brace, or a pair such as \{, which is no edge of a group
# What may stand between two boxes that hold the parts of one answer: "$\boxed{3}, \boxed{4}$"
BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;&]|\\q?quad|\\[()]|\\text\s?\{\s?(?:and|or|,)\s?\}|and|or|[A-Za-z]_?\d?\s?=){0,12}"
)
# A box without braces: "\boxed\frac{3}{4}", "\boxed 42".
BARE_BOX = re.compile(r"\\[a-z]+(?:\{[^{}]{0,100}\}){1,2}|[^\s${}\\]{1,100}")


def group_end(text: str, start: int) -> int:
    """The place of the brace that closes the group whose content begins at `start`, or -1 where it is cut off."""
    depth = 1
    for edge in GROUP_EDGE.finditer(text, start):
        depth += (edge[0] == "{") - (edge[0] == "}")
        if depth == 0:
            return edge.start()
    return -1


def boxes(text: str) -> list[tuple[int, int, str | None]]:
    """(start, end, content) of each box near the end of a text. The content of a box that is cut off is None. A box
    inside of a box replaces it: "\\boxed{\\boxed{7}}" is one box with 7."""
    found: list[tuple[int, int, str | None]] = []
    for mark in list(BOX.finditer(text))[-20:]:
        start = mark.start()
        if text[mark.end() : mark.end() + 1] == "{":
            end = group_end(text, mark.end() + 1)
            content = text[mark.end() + 1 : end] if end >= 0 else None
            end = end + 1 if end >= 0 else len(text)
        elif bare := BARE_BOX.match(text, mark.end()):
            end, content = bare.end(), bare[0].rstrip(".,;:")
        else:
            continue
        if found and found[-1][1] > start and content is not None:
            start = found.pop()[0]
        found.append((start, end, content))
    return found


def last_boxed(text: str) -> str | None:
    """What the last box holds, and with it the boxes that it forms a list with: "\\boxed{3}, \\boxed{4}" is "3, 4".

    None where there is no box, "" where the last one is cut off or empty.
    """
    text = text[-TAIL:]
    found = boxes(text) if "box" in text else []
    if not found:
        return None
    start, _, content = found.pop()
    contents = [content or ""]
    while contents[0] and found and found[-1][2] and BETWEEN_BOXES.fullmatch(text, found[-1][1], start):
        start, _, content = found.pop()
        contents.insert(0, content)
    return ", ".join(dict.fromkeys(c.strip() for c in contents))  # one that is said twice is one answer


# ---- words that announce an answer ----

# "The answer is", "**Answer**:", "Final Answer:", "The correct choice is", "The answer to the problem is therefore"
ANNOUNCED = re.compile(
    r"(?:\b(?:answer|choice|option)|答案)[*_ \t]{0,4}"
    r"(?:(?:[a-z' ]{0,40}? )??(?:is|are|be)\b(?![*_]{0,3} (?:in|correct|right|wrong)\b)|[:：=]|是|为)"
    r"[ \t]{0,4}(?:therefore|thus|indeed|then|simply|clearly|definitely|for sure|just|about|approximately|roughly|exactly)?"
    r"[*_ \t:：]{0,6}",
    re.IGNORECASE,
)
# "### Answer" and "**Final Answer**" on a line of their own
HEADING = re.compile(r"^[#*_ \t]{1,9}(?:final )?answer[*_: \t]{0,6}$", re.IGNORECASE | re.MULTILINE)

# Where an announced answer ends. A decimal point is no end: "3.5" stays whole.
SENTENCE_END = re.compile(
    r"(?<=[^\d\s])\.\s"  # a full stop and a space, not after a digit, as in "x + y. so it is"
    r"|\.\s{1,3}[A-Z]"  # a full stop, spaces and a capital letter, as in "42. I am sure"
    r"|[.!?]['\"*)]{0,3}$|。|[!?]\s|\.?\s?<\|"  # at the end, as in "42." and "42!"
    r"|,?\s(?:because|since|as|so|which|where|when|hence|thus|therefore|but|i\.e\.)\s"
)
IS = re.compile(r"\s(?:is|are|equals)\s")
NOT_THIS_BUT_THAT = re.compile(r"not\s.{1,60}?\bbut\s")


def after_mark(text: str) -> str:
    """The answer at the start of what follows an announcement: a formula on lines of its own, or a sentence's rest."""
    text = text.lstrip(" \t\r\n*_:").removeprefix("：")
    for opening, closing in (("\\[", "\\]"), ("$$", "$$")):
        if text.startswith(opening) and (end := text.find(closing, 2, LONGEST)) > 0:
            return text[2:end].strip()
    line = NOT_THIS_BUT_THAT.sub("", text.partition("\n")[0][:LONGEST], count=1)
    # A formula may hold what would end a sentence.
    first = 0
    if line.startswith("\\(") or (line.startswith("$") and line.count("$") % 2 == 0):
        first = max(line.find("$", 1), line.find("\\)"))
    end = SENTENCE_END.search(line, first)
    line = line[: end.start()] if end else line
    if (len(line.split()) > 3 or line[:1].islower()) and (
        said := IS.split(line)[-1].strip()
    ):  # "The largest n is 34" after "Final Answer:"
        line = said
    return line.strip(" \t*_")


# ---- the parts of a response ----

RUN_ON = re.compile(r"\n\s{0,3}Question\b[ \d]{0,4}:")  # where a base model goes on with a problem of its own


THOUGHT = r"think|thinking|thoughts?|reasoning"
OPENS_THOUGHTS = re.compile(rf"<(?:{THOUGHT})>|\[THINK\]|<\|begin_of_thought\|>", re.IGNORECASE)
CLOSES_THOUGHTS = re.compile(rf"</(?:{THOUGHT})>|\[/THINK\]|<\|end_of_thought\|>", re.IGNORECASE)


def after_thoughts(text: str) -> str:
    """The response without what stands in <think>...</think>; "" when the thoughts have no end."""
    return OPENS_THOUGHTS.split(CLOSES_THOUGHTS.split(text)[-1], maxsplit=1)[0]


def opened_thoughts(prompt_end: str) -> str:
    """The tag that opens the thoughts at the end of a prompt, as some chat templates put it there; "" for none. The
    response then goes on with thoughts, and without this tag nobody could tell that one cut off holds no answer."""
    prompt_end = prompt_end.rstrip()
    tag = next((m for m in OPENS_THOUGHTS.finditer(prompt_end) if m.end() == len(prompt_end)), None)
    return tag[0] + "\n" if tag else ""


def first_solution(text: str) -> str:
    """The response up to a "Question:" that it goes on with, unless it begins with that one."""
    end = RUN_ON.search(text)
    return text[: end.start()] if end and text[: end.start()].strip() else text


OPENS_ANSWER, CLOSES_ANSWER = (re.compile(tag, re.IGNORECASE) for tag in ("<answer>", "</answer>"))


def tagged(text: str) -> str | None:
    """What the last <answer>...</answer> holds, or None. One that is cut off holds ""."""
    parts = OPENS_ANSWER.split(text)
    if len(parts) == 1:
        return None
    content, *closed = CLOSES_ANSWER.split(parts[-1], maxsplit=1)
    return content.strip() if closed else ""


def after_hashes(text: str) -> str | None:
    """What follows the last "####" of GSM8K on its line, without a sum before it ("30+42=72"); None where none is."""
    if "####" not in text:
        return None
    marks = [m for m in re.finditer(r"####[ \t]*", text) if not HEADING.match(text, m.start())]
    if not marks:
        return None
    lines = text[marks[-1].end() :].strip().splitlines()
    return re.sub(r"^[\d\s.,+*/()-]{1,100}=\s*", "", lines[0].strip(" \t*_")[:LONGEST]) if lines else ""


def announced(text: str) -> str | None:
    """What is announced as the answer, by the last of the words that do; None where there are none."""
    ends = [m.end() for pattern in (ANNOUNCED, HEADING) for m in pattern.finditer(text)]
    return after_mark(text[max(ends) :]) if ends else None


EQUALS = re.compile(r"(?<![<>!:])=")
# "x = 1 or x = 2": a list, of which the last member is not the answer.
EQUATION = r"\s?[A-Za-z](?:_?\d)?\s?=[^=,;\n]{1,50}"
EQUATIONS = re.compile(rf"{EQUATION}(?:(?:[,;]|\bor\b|\band\b){{1,2}}{EQUATION}){{1,9}}")


def after_equals(text: str) -> str | None:
    """What follows the last "=", if it is short and on one line; None else, and in a text with formulas of LaTeX."""
    if "=" not in text or "$" in text or "\\" in text:
        return None
    if EQUATIONS.fullmatch(text.strip()):
        return text.strip()
    result = EQUALS.split(text)[-1].strip()
    short = len(result.split()) <= 6 and not re.search(r"\n|。.|，", result)
    return result if result and result != text.strip() and short else None


def bare(answer: str) -> str:
    """A right answer as a data file has it, without a box, the delimiters of a formula, or a list around it."""
    answer = answer.strip()
    if answer.startswith('["'):
        with contextlib.suppress(ValueError, RecursionError):  # no JSON after all
            return ", ".join(bare(str(part)) for part in json.loads(answer))
    if BOX.search(answer):
        answer = (last_boxed(answer) or answer).strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = answer[len(opening) : len(answer) - len(closing)].strip()
        if answer.startswith(opening) and answer.endswith(closing) and inner and opening not in inner:
            answer = inner
    return answer


# A number as prose has it: "-3", "$1,234.50", "3/4", "12%", ".5", "3:4".
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:[/:]\d+)?%?|-?\.\d+")
FORMULA = re.compile(r"\$([^$\n]{1,300})\$|\\[(\[]((?:[^\\]|\\[^()\[\]]){1,300})\\[)\]]")


def last_of_prose(text: str) -> str | None:
    """The last formula or number of a text, or None where it is no prose: of three words or fewer, or without two
    letters side by side near its end. "12 04" and "x = 3" are no prose."""
    if (len(text.split()) <= 3 and text.isascii()) or not re.search(r"(?<![\\\w])[^\W\d_]{2}", text[-PROSE_TAIL:]):
        return None
    text = text[-PROSE_TAIL:]
    numbers = list(NUMBER.finditer(text))
    # "$3 and then $" holds words, so it is no formula but lies between two prices.
    formulas = [
        (m.end(), content)
        for m in FORMULA.finditer(text)
        if not re.search(r"(?<![\\A-Za-z{])[A-Za-z]{3}", re.sub(r"\\text\s?\{[^{}]*\}", "", content := m[1] or m[2]))
    ]
    if formulas and not (numbers and numbers[-1].start() > formulas[-1][0]):
        return formulas[-1][1].strip()
    return numbers[-1][0].rstrip(",") if numbers else None
