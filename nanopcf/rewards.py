"""Rewards: is the final answer of a response right? 1.0 or 0.0, as in the paper.

There are two steps. `final_answer` finds the answer in a response. `equal`, in `nanopcf/interop/formulas.py`, compares
it with the right answer by value, so that 1/2, 0.5 and \\frac{1}{2} are one answer. `verify` does both.

A strict verifier takes an answer only where the response marks it as one. A lenient one (the default) also takes the
last number of a response in prose: it finds more right answers, but may mistake another number for the answer.

Left out: partial credit, and a reward for the format of a response. The paper has neither.
"""

import re

from nanopcf.interop.boxes import last_boxed
from nanopcf.interop.formulas import MAX_LENGTH, equal

# The answer is looked for near the end. This bounds the time that a long response can take.
TAIL = 2_000  # characters searched for "the answer is" and for numbers


# An announced answer and the rest of its line: "The answer is 42. I am sure." gives "42. I am sure.", and
# "Final Answer: $3.50" gives "$3.50".
ANNOUNCED = re.compile(r"answer\s*(?:is|:|=)\s*:?\s*(.+)", re.IGNORECASE)

# Where an announced answer's sentence ends. A decimal point is no end: "3.5" stays whole.
SENTENCE_END = re.compile(
    r"(?<=[^\d])\.\s"  # a full stop and a space, not after a digit, as in "x + y. so it is"
    r"|\.\s+[A-Z]"  # a full stop, spaces and a capital letter, as in "42. I am sure"
    r"|\.$"  # a full stop at the end, as in "42."
)

# A number as prose has it: "-3", "$1,234.50", "3/4", "12%", ".5".
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?|-?\.\d+")


def verify(response: str, answer: str, strict: bool = False) -> float:
    """1.0 when the response's final answer equals `answer`, else 0.0. Never raises. An empty answer is never right."""
    if not (isinstance(response, str) and isinstance(answer, str) and answer.strip()):
        return 0.0
    return float(equal(final_answer(response, strict), answer, strict))


def final_answer(response: str, strict: bool = False) -> str:
    """The answer that a response gives, as it is written there; "" when there is none. Never raises.

    The first of these that the response has:
        the last box                            "so \\boxed{42}"                 -> 42
        what follows the last "####"            "6 * 7 = 42\\n#### 42"           -> 42     as in GSM8K
        what is announced as the answer         "The answer is 42. Sure."       -> 42
        what follows the last "=", if short     "6*7=42"                        -> 42     as in the nano tasks
        the last number of prose, if lenient    "She has 40 and then 42 eggs."  -> 42
        the whole response, if short            "12 04"                         -> 12 04
    """
    boxed = last_boxed(response)
    if boxed is not None:
        return boxed.strip()
    if "####" in response:
        lines = response.rpartition("####")[2].strip().splitlines()
        return lines[0].strip() if lines else ""
    announced = ANNOUNCED.findall(response[-TAIL:])
    if announced:
        return SENTENCE_END.split(announced[-1].strip())[0].strip()
    result = response.rpartition("=")[2].strip() if "=" in response else ""
    if result and "\n" not in result and len(result.split()) <= 6:
        return result
    if not strict and is_prose(response):
        numbers = NUMBER.findall(response[-TAIL:])
        if numbers:
            return numbers[-1].rstrip(",")
    return response.strip() if len(response) <= MAX_LENGTH else ""


def is_prose(response: str) -> bool:
    """More than three words, with two letters side by side near the end: "12 04" and "x = 3" are not prose."""
    return len(response.split()) > 3 and re.search(r"[A-Za-z]{2}", response[-TAIL:]) is not None
