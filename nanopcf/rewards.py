"""Rewards: is the final answer right? 1.0 or 0.0, as in the paper."""

import re

from nanopcf.interop.formulas import MAX_LENGTH, equal

# ---- where is the answer? ----

MARKED = re.compile(r"(?:final\s+)?answer\s*(?:is|:|=)\s*:?\s*(.+)", re.IGNORECASE)
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?|-?\.\d+")


def final_answer(response: str, strict: bool = False) -> str:
    """The answer a response gives, as written; "" if there is none. strict: only where it is marked as the answer."""
    boxed = last_boxed(response)
    if boxed is not None:
        return boxed.strip()
    if "####" in response:
        lines = response.rpartition("####")[2].strip().splitlines()
        return lines[0].strip() if lines else ""
    marked = MARKED.findall(response[-2000:])
    if marked:
        return re.split(r"(?<=[^\d])\.\s|\.\s+[A-Z]|\.$", marked[-1].strip())[0].strip()
    after = response.rpartition("=")[2].strip() if "=" in response else ""
    if after and "\n" not in after and len(after.split()) <= 6:
        return after
    numbers = [] if strict else NUMBER.findall(response[-2000:])
    if numbers and len(response.split()) > 3 and re.search(r"[A-Za-z]{2}", response[-2000:]):  # prose
        return numbers[-1].rstrip(",")
    return response.strip() if len(response) <= MAX_LENGTH else ""


def last_boxed(text: str) -> str | None:
    """Contents of the last complete \\boxed{...} or \\fbox{...}, braces nested; looked for near the end."""
    text = text[-20_000:]
    for start in [m.end() for m in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)][: -50 - 1 : -1]:
        depth = 1
        for i in range(start, min(len(text), start + 4 * MAX_LENGTH)):
            if text[i - 1] != "\\":  # \{ and \} are no braces of the box
                depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[start:i]
    return None


def verify(response: str, answer: str, strict: bool = False) -> float:
    """1.0 when the response's final answer equals `answer`, else 0.0. Never raises. An empty answer is never right."""
    if not (isinstance(response, str) and isinstance(answer, str) and answer.strip()):
        return 0.0
    return float(equal(final_answer(response, strict), answer, strict))
