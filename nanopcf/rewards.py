"""Rewards: is the final answer right? 1.0 or 0.0, as in the paper.

The final answer is what follows the last "=" of the response, or the whole response when it has none. The comparison
is exact, up to spaces at the ends. Text is only ever compared, never run.
"""


def final_answer(response: str) -> str:
    return response.rpartition("=")[2].strip()


def verify(response: str, answer: str) -> float:
    """1.0 when the response's final answer is `answer`, else 0.0. Never raises. An empty answer is never right."""
    return float(bool(answer) and final_answer(response) == answer)
