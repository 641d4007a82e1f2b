"""Scores of a model on problems with answers: pass@1, avg@k and the unbiased pass@k.

    python -m nanopcf.evaluate --model DIR --data F.jsonl --samples 8

The paper's setting is the default: temperature 0.7, top-p 1.0, the mean over the samples of each problem.
"""

from dataclasses import dataclass
from math import comb

import numpy as np

from nanopcf import checkpoint, config, runs
from nanopcf.data import Example, read_jsonl
from nanopcf.model import Transformer
from nanopcf.rewards import verify
from nanopcf.sampler import Sampler
from nanopcf.tokenizer import TextTokenizer


@dataclass(frozen=True)
class EvaluateConfig:
    model: str  # model folder
    data: str  # JSONL with prompt and answer
    chat: bool = False  # put each prompt into the model's chat template
    samples: int = 1  # completions a problem
    temperature: float = 0.7  # 0 is greedy
    top_p: float = 1.0  # nucleus
    max_new_tokens: int = 64  # longest answer
    slots: int = 256  # sequences generated at a time
    seed: int = 0  # of the sampling
    threads: int = 1  # CPU threads; 1 is best for small models
    device: str = "auto"  # auto, cpu, cuda or mps
    show: int = 3  # completions to print


def complete(
    model: Transformer,
    tokenizer: TextTokenizer,
    examples: list[Example],
    *,
    chat: bool = False,
    samples: int = 1,
    temperature: float = 0.7,
    top_p: float = 1.0,
    max_new_tokens: int,
    slots: int = 256,
    seed: int = 0,
) -> tuple[np.ndarray, list[str]]:
    """(correct [problems, samples] of 0/1, responses as text, problem by problem)."""
    sampler = Sampler(model, slots=slots, max_length=model.config.max_length)
    completions = sampler.generate(
        [
            tokenizer.encode(tokenizer.chat([{"role": "user", "content": e.prompt}]) if chat else e.prompt)
            for e in examples
        ],
        n=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_ids=tokenizer.stop_ids,
        seed=seed,
    )
    texts = [tokenizer.decode(c.tokens) for c in completions]
    correct = [verify(t, examples[c.prompt_index].answer) for t, c in zip(texts, completions, strict=True)]
    return np.array(correct).reshape(len(examples), samples), texts


def pass_at_k(correct: np.ndarray, k: int) -> float:
    """Mean over problems of the chance that k of the n samples hold a right one: 1 - C(n-c, k) / C(n, k)
    (Chen et al., 2021), unbiased. correct: [problems, n], n >= k."""
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem, there are {n}")
    return float(np.mean([1 - comb(n - int(c), k) / comb(n, k) for c in correct.sum(axis=1)]))


def main(c: EvaluateConfig) -> None:
    import torch

    torch.set_num_threads(c.threads)
    model, tokenizer = checkpoint.load(c.model, runs.choose_device(c.device))
    examples = read_jsonl(c.data, need=("prompt", "answer"))
    correct, texts = complete(
        model,
        tokenizer,
        examples,
        chat=c.chat,
        samples=c.samples,
        temperature=c.temperature,
        top_p=c.top_p,
        max_new_tokens=c.max_new_tokens,
        slots=c.slots,
        seed=c.seed,
    )
    for e, text in list(zip(examples, texts[:: c.samples], strict=True))[: c.show]:
        print(f"{e.prompt} {text!r}  answer {e.answer!r}  {'right' if verify(text, e.answer) else 'wrong'}")
    error = correct.mean(axis=1).std(ddof=1) / len(examples) ** 0.5 if len(examples) > 1 else float("nan")
    name = "pass@1" if c.samples == 1 else f"avg@{c.samples}"
    print(
        f"{len(examples)} problems, temperature {c.temperature:g}: {name} {correct.mean():.1%} ± {error:.1%}"
    )
    if c.samples > 1:
        print(f"pass@{c.samples} {pass_at_k(correct, c.samples):.1%}")


if __name__ == "__main__":
    config.run_cli(lambda: main(config.parse(EvaluateConfig, __doc__.split("\n\n")[0])))
