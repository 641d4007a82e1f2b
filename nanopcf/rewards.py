"""Rewards: is the final answer of a response right? 1.0 or 0.0, as in the paper.

There are three steps; their details are in `nanopcf/answers`.

find     Where is the answer? `final_answer` tells, in the words of the response.
text     Is it the right one in another spelling? \\dfrac12 is \\frac{1}{2}, $x$ is x, "friday" is Friday.
number   Or the same number? 1,234.50 is 1234.5, 3 1/2 is 3.5, 50 % is 0.5: compared exactly, as fractions.

Lists, sets, pairs and equations are compared part by part. What is neither text nor number is a formula, and goes to
math-verify where that is installed (the extra `math`), in a process that gives up after a second. Nothing that a model
wrote is ever run as code. A right answer that is a number takes a number only: "47 * 36" has computed nothing.

A strict verifier doesn't look for a last number in prose, wants units to agree, and rounds nothing. A lenient one (the
default) takes such a number, an answer without its unit, and a decimal of three places for the value that it rounds.

Left out: partial credit, and a reward for the format of a response. The paper has neither.
"""

from nanopcf.answers import finding
from nanopcf.answers.comparing import equal
from nanopcf.answers.mathematics import by_value, limited


@limited
def verify(response: str, answer: str, strict: bool = False) -> float:
    """1.0 when the response's final answer equals `answer`, else 0.0. Never raises. An empty answer is never right."""
    texts = isinstance(response, str) and isinstance(answer, str)
    return float(texts and equal(final_answer(response, strict), answer, strict, by_value))


def final_answer(response: str, strict: bool = False) -> str:
    """The answer that a response gives, as it is written there; "" when there is none. Never raises.

    Thoughts, as in <think>...</think>, don't count, nor do those without an end. Then the first of these:
        the last <answer>...</answer>           "<answer>42</answer>"           -> 42
        the last box; one cut off is no answer  "so \\boxed{42}"                 -> 42     two as one list are a list
        what follows the last "####"            "6 * 7 = 42\\n#### 42"           -> 42     as in GSM8K
        what is announced last as the answer    "The answer is 42. Sure."       -> 42
        what follows the last "=", if short     "6*7=42"                        -> 42     as in the nano tasks
        the last number of prose, if lenient    "She has 40 and then 42 eggs."  -> 42     or the last formula
        the whole response, if short            "12 04"                         -> 12 04
    """
    text = finding.first_solution(finding.after_thoughts(response)[-finding.TAIL :])
    for place in (finding.tagged, finding.last_boxed, finding.after_hashes, finding.announced, finding.after_equals):
        answer = place(text)
        if answer is not None:
            return answer if place is not finding.tagged else final_answer(answer, strict=True)
    answer = None if strict else finding.last_of_prose(text)
    if answer is None:
        answer = text if len(text) <= finding.LONGEST else ""
    return answer.strip()
