"""The last \\boxed{...} of a LaTeX text, where solutions and responses put their answer."""

import re

from nanopcf.interop.formulas import MAX_LENGTH

# The answer is looked for near the end. This bounds the time that a long text can take.
BOX_TAIL = 20_000  # characters searched for boxes

MAX_BOXES = 50  # boxes looked into, when the last ones are not closed

# The start of a box: "\boxed{", "\fbox {".
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def last_boxed(text: str) -> str | None:
    """What the last complete \\boxed{...} or \\fbox{...} holds, or None. Braces nest, as in \\boxed{\\frac{1}{2}}."""
    text = text[-BOX_TAIL:]
    starts = [match.end() for match in BOX.finditer(text)]
    for start in reversed(starts[-MAX_BOXES:]):
        depth = 1
        for i in range(start, min(len(text), start + 4 * MAX_LENGTH)):
            # \{ and \} are braces of the answer, such as those of a set, and not of LaTeX's grouping.
            if text[i - 1] != "\\":
                depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[start:i]
    return None
