"""Responses of a model to problems with known answers, and what their verdicts say: pass@1, avg@k, pass@k."""

from collections.abc import Callable, Sequence
from math import comb

import numpy as np

from nanopcf.data import PLAIN, Example, Format
from nanopcf.model import Transformer
from nanopcf.rewards import verify
from nanopcf.sampler import Sampler
from nanopcf.tokenizer import TextTokenizer


def complete(
    model: Transformer,
    tokenizer: TextTokenizer,
    examples: list[Example],
    *,
    format: Format = PLAIN,
    samples: int = 1,
    temperature: float = 0.7,
    top_p: float = 1.0,
    max_new_tokens: int,
    slots: int = 256,
    seed: int = 0,
    places: Sequence[int] | None = None,
    judge: Callable[[str, str], float] = verify,
) -> tuple[np.ndarray, list[str]]:
    """(correct [problems, samples] of 0/1, responses as text, problem by problem)."""
    sampler = Sampler(model, slots=slots, max_length=model.config.max_length)
    completions = sampler.generate(
        [format.prompt(e, tokenizer) for e in examples],
        n=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_ids=tokenizer.stop_ids,
        seed=seed,
        places=places,
    )
    texts = [tokenizer.decode(c.tokens) for c in completions]
    correct = [judge(text, examples[c.prompt_index].answer) for text, c in zip(texts, completions, strict=True)]
    return np.array(correct).reshape(len(examples), samples), texts


def pass_at_k(correct: np.ndarray, k: int) -> float:
    """The chance that k random ones of a problem's n samples hold a right one, averaged over the problems.

    With c right samples it is 1 - C(n-c, k) / C(n, k), an unbiased estimate (Chen et al., 2021). correct: (problems, n)
    of 0 and 1. Raises ValueError if k is above n.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem, there are {n}")
    return float(np.mean([1 - comb(n - int(c), k) / comb(n, k) for c in correct.sum(axis=1)]))


def standard_error(correct: np.ndarray) -> float:
    """The standard error of the mean of correct (problems, samples) over problems; nan if there is only one."""
    return float(correct.mean(axis=1).std(ddof=1) / len(correct) ** 0.5) if len(correct) > 1 else float("nan")
