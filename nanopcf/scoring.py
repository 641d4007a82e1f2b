"""Responses of a model to problems with known answers, and what their verdicts say: pass@1, avg@k, pass@k."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import comb, isfinite
from typing import Any

import numpy as np

from nanopcf import checkpoint
from nanopcf.answers.mathematics import verifier
from nanopcf.data import PLAIN, Example, Format, read_examples
from nanopcf.model import Transformer
from nanopcf.rewards import verify
from nanopcf.run import machine, signals
from nanopcf.run.folder import kept
from nanopcf.run.machine import slots_that_fit
from nanopcf.sampler import Completion, Sampler
from nanopcf.stopping import StopStrings
from nanopcf.tokenizer import TextTokenizer


def complete(
    sampler: Sampler,
    tokenizer: TextTokenizer,
    examples: list[Example],
    *,
    format: Format = PLAIN,
    samples: int = 1,
    temperature: float = 0.7,
    top_p: float = 1.0,
    max_new_tokens: int,
    seed: int = 0,
    places: Sequence[int] | None = None,
    judge: Callable[[str, str], float] = verify,
) -> tuple[np.ndarray, list[str]]:
    """(correct [problems, samples] of 0/1, responses as text, problem by problem).

    A response begins with the tag of the thoughts that its prompt has opened.
    """
    stops = sampler.stop or StopStrings((), tokenizer.decode)
    prompts = [format.prompt(e, tokenizer) for e in examples]
    completions = sampler.generate(
        prompts,
        n=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_ids=tokenizer.stop_ids,
        seed=seed,
        places=places,
    )
    check_finite(completions)
    texts = [stops.response(prompts[c.prompt_index], c.tokens) for c in completions]
    judge = signals.impatient(judge)
    correct = [judge(text, examples[c.prompt_index].answer) for text, c in zip(texts, completions, strict=True)]
    return np.array(correct).reshape(len(examples), samples), texts


def check_finite(completions: list[Completion]) -> None:
    """Raises ValueError when a model drew from a distribution that is none: its responses would only seem wrong."""
    if not all(isfinite(logprob) for c in completions for logprob in c.logprobs):
        raise ValueError("the model's log-probs are not finite: its numbers overflow, or a weight is not a number")


def pass_at_k(correct: np.ndarray, k: int) -> float:
    """The chance that k random ones of a problem's n samples hold a right one, averaged over the problems.

    With c right samples it is 1 - C(n-c, k) / C(n, k), an unbiased estimate (Chen et al., 2021). correct: (problems, n)
    of 0 and 1. Raises ValueError if k is above n.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples per problem, there are {n}")
    return float(np.mean([1 - comb(n - int(c), k) / comb(n, k) for c in correct.sum(axis=1)]))


def standard_error(correct: np.ndarray) -> float:
    """The standard error of the mean of correct (problems, samples) over problems; nan if there is only one."""
    return float(correct.mean(axis=1).std(ddof=1) / len(correct) ** 0.5) if len(correct) > 1 else float("nan")


# ---- one checkpoint; c: an EvaluateConfig, which says how it is asked ----


def open_model(c: Any, out: str = "") -> tuple[Transformer, TextTokenizer, int]:
    """(model, tokenizer, number of CPU threads, which is set here). Raises ValueError when that can't be had, or when
    memory can't hold --samples answers.

    out: a folder that keeps the number of threads that was chosen.
    """
    device = machine.choose_device(c.device)
    model, tokenizer = checkpoint.load(c.model, device, machine.choose_dtype(c.dtype, device), chat=c.chat)
    machine.check_room(c.samples, min(c.max_new_tokens, model.config.max_length))
    threads = c.threads or kept(out, "threads", lambda: machine.set_threads(0, model))
    return model, tokenizer, machine.set_threads(threads, model)


def open_sampler(c: Any, model: Transformer, tokenizer: TextTokenizer, examples: list[Example]) -> Sampler:
    """A sampler for these problems, with --slots sequences at a time, or as many as memory holds of the longest.

    The folder `out`, if there is one, keeps the number: with other free memory it would be another one.
    """
    form = Format(c.chat, c.template)
    longest = max(len(form.prompt(e, tokenizer)) for e in examples) + c.max_new_tokens
    longest = min(model.config.max_length, longest)
    slots = c.slots or kept(c.out, f"slots for {longest} tokens", lambda: slots_that_fit(model, longest))
    return Sampler(model, slots=slots, max_length=longest, stop=StopStrings(c.stop, tokenizer.decode))


def answer_problems(
    c: Any, sampler: Sampler, tokenizer: TextTokenizer, examples: list[Example], *, places: Sequence[int] | None = None
) -> tuple[np.ndarray, list[str]]:
    """(correct (problems, samples) of 0 and 1, responses problem by problem), generated as the config says.

    places: the problems' positions in their file, which with --seed decide what is sampled; default 0, 1, 2, ...
    """
    return complete(
        sampler,
        tokenizer,
        examples,
        format=Format(c.chat, c.template),
        samples=c.samples,
        temperature=c.temperature,
        top_p=c.top_p,
        max_new_tokens=c.max_new_tokens,
        seed=c.seed,
        places=places,
        judge=verifier(c.verifier),
    )


def score_checkpoint(c: Any) -> dict:
    """The score of a checkpoint in the pipeline, on the first file of --data: pass@1, and pass@k with k = --samples.

    pass@1 is the paper's score and takes one sample per problem. pass@k costs k times as much: a quarter of the
    problems must do.
    """
    model, tokenizer, _ = open_model(c, c.out)
    examples = read_examples(c.data[0], need=("prompt", "answer"))
    sampler, quarter = open_sampler(c, model, tokenizer, examples), examples[: max(1, len(examples) // 4)]
    one_sample, _ = answer_problems(replace(c, samples=1), sampler, tokenizer, examples)
    k_samples, _ = answer_problems(replace(c, seed=c.seed + 1), sampler, tokenizer, quarter)
    return {
        "score": float(one_sample.mean()),
        "pass_at_k": pass_at_k(k_samples, c.samples),
        "k": c.samples,
        "parameters": model.parameter_count(),
    }


def greedy_answers(c: Any, examples: list[Example]) -> list[tuple[str, bool]]:
    """(response, is it right) of a checkpoint's greedy answer to each problem."""
    model, tokenizer, _ = open_model(c, c.out)
    sampler = open_sampler(c, model, tokenizer, examples)
    correct, texts = answer_problems(replace(c, samples=1, temperature=0.0), sampler, tokenizer, examples)
    return [(text, bool(right)) for text, right in zip(texts, correct[:, 0], strict=True)]
