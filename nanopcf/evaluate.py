"""Scores of a model on problems with answers: pass@1, avg@k and the unbiased pass@k, a line a file.

    python -m nanopcf.evaluate --model DIR --data gsm8k.jsonl svamp.jsonl --ood aime24.jsonl --samples 8 --out runs/scores

The paper's setting is the default: temperature 0.7, top-p 1.0, the mean over the samples of each problem. A response is
judged twice: strict takes a marked answer with its units, lenient is what counts (`nanopcf/rewards.py`). With --out the
completions are kept, a JSONL file a data file, and --resume goes on where it stopped.
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from nanopcf import checkpoint, rewards
from nanopcf.data import Format, encode_prompts, read_examples
from nanopcf.interop.mathematics import verifier
from nanopcf.model import Transformer
from nanopcf.rollouts import complete
from nanopcf.run import config, files, log, machine
from nanopcf.run.config import Count, Device, DType, Natural
from nanopcf.run.folder import open_run, read_metrics
from nanopcf.sampler import slots_that_fit
from nanopcf.tokenizer import TextTokenizer


@dataclass(frozen=True)
class EvaluateConfig(config.Config):
    model: str  # model folder
    data: tuple[str, ...]  # files of problems with answers
    ood: tuple[str, ...] = ()  # more, unlike the training data; averaged apart
    out: str = ""  # folder for completions and scores
    chat: bool = False  # put each prompt into the model's chat template
    template: str = "{prompt}"  # text around each prompt
    samples: Count = 1  # completions per problem
    temperature: float = 0.7  # of the sampling; 0 is greedy
    top_p: float = 1.0  # probability mass to sample from (nucleus)
    max_new_tokens: Count = 512  # longest answer, in tokens
    limit: Natural = 0  # problems of a file at most (0: all)
    drop_long: bool = False  # leave out prompts that fill the context, and count them
    verifier: Literal["ours", "math-verify", "either"] = "ours"  # ours, math-verify or either
    slots: Natural = 0  # sequences generated at a time (0: what memory holds)
    seed: int = 0  # of the sampling
    threads: Natural = 0  # CPU threads (0: found by a probe)
    device: Device = "auto"  # auto, cpu, cuda or mps
    dtype: DType = "auto"  # float32 or bfloat16; auto: bfloat16 on CUDA
    show: Natural = 3  # completions to print
    resume: bool = False  # continue the evaluation in --out

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [Path(f).stem for f in (*self.data, *self.ood)]
        if len(set(names)) < len(names):
            raise ValueError(f"--data, --ood: two files of the same name, {max(names, key=names.count)}")
        if self.resume and not self.out:
            raise ValueError("--resume needs --out, the folder to go on in")


def pass_at_k(correct: np.ndarray, k: int) -> float:
    """Mean over problems of the chance that k of the n samples hold a right one: 1 - C(n-c, k) / C(n, k)
    (Chen et al., 2021), unbiased. correct: [problems, n], n >= k."""
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem, there are {n}")
    return float(np.mean([1 - comb(n - int(c), k) / comb(n, k) for c in correct.sum(axis=1)]))


def standard_error(correct: np.ndarray) -> float:
    """Of the mean of correct [problems, samples], problems being the sample: nan with one problem."""
    return float(correct.mean(axis=1).std(ddof=1) / len(correct) ** 0.5) if len(correct) > 1 else float("nan")


def kept_rows(path: Path, chunk: int, count: int) -> list[dict]:
    """The rows of an interrupted file that are whole chunks, or all of them when it is complete."""
    rows = read_metrics(path) if path.exists() else []
    return rows[:count] if len(rows) >= count else rows[: len(rows) // chunk * chunk]


def evaluate_file(c: EvaluateConfig, file: str, model: Transformer, tokenizer: TextTokenizer, judge) -> list[dict]:
    """One row a problem: line, prompt, answer, and the completions with what both judges say of each."""
    form = Format(c.chat, c.template)
    examples = read_examples(file, need=("prompt", "answer"))[: c.limit or None]
    context = model.config.max_length
    examples, ids = encode_prompts(examples, tokenizer, context - 1, file, format=form, drop=c.drop_long)
    longest = min(context, max(map(len, ids)) + c.max_new_tokens)
    slots = c.slots or slots_that_fit(model, longest)
    chunk = max(1, 2 * slots // c.samples)  # problems between two writes
    path = Path(c.out) / f"{Path(file).stem}.jsonl" if c.out else None
    rows = kept_rows(path, chunk, len(examples)) if path else []
    if path:
        files.write_text(path, "".join(json.dumps(r) + "\n" for r in rows))
    bar = tqdm(total=len(examples), initial=len(rows), desc=Path(file).stem, leave=False, mininterval=1)
    for first in range(len(rows), len(examples), chunk):
        part = examples[first : first + chunk]
        correct, texts = complete(
            model,
            tokenizer,
            part,
            format=form,
            samples=c.samples,
            temperature=c.temperature,
            top_p=c.top_p,
            max_new_tokens=c.max_new_tokens,
            slots=slots,
            seed=c.seed,
            places=range(first, first + len(part)),
            judge=judge,
        )
        done = []
        for i, e in enumerate(part):
            own = texts[i * c.samples : (i + 1) * c.samples]
            strict = [int(rewards.verify(t, e.answer, strict=True)) for t in own]
            done.append(
                {
                    "line": e.line,
                    "prompt": e.prompt,
                    "answer": e.answer,
                    "completions": own,
                    "correct": [int(v) for v in correct[i]],
                    "strict": strict,
                }
            )
        rows += done
        if path:
            with path.open("a", encoding="utf-8") as out:
                out.write("".join(json.dumps(r) + "\n" for r in done))
        bar.update(len(part))
    bar.close()
    return rows


def summary(name: str, ood: bool, rows: list[dict]) -> dict:
    correct, strict = (np.array([r[k] for r in rows], dtype=float) for k in ("correct", "strict"))
    return {
        "file": name,
        "ood": ood,
        "problems": len(rows),
        "samples": correct.shape[1],
        "pass_at_1": float(correct.mean()),
        "standard_error": standard_error(correct),
        "pass_at_k": pass_at_k(correct, correct.shape[1]),
        "right": int(correct.sum()),
        "right_strict": int(strict.sum()),
    }


def table(scores: list[dict]) -> str:
    """A line a file, then the means weighted by problems: of --data, and of --ood apart."""
    k = scores[0]["samples"]
    width = max(24, *(len(s["file"]) + 6 for s in scores))
    one = "pass@1" if k == 1 else f"avg@{k}"
    head = f"{'file':<{width}} {'problems':>9} {one:>8} {'± s.e.':>8} {f'pass@{k}':>9} {'right: lenient':>15} {'strict':>8}"
    lines = [head, "─" * len(head)]
    for s in scores:
        lines.append(
            f"{s['file'] + (' (OOD)' if s['ood'] else ''):<{width}} {s['problems']:>9} {s['pass_at_1']:>8.1%} "
            f"{s['standard_error']:>8.1%} {s['pass_at_k']:>9.1%} {s['right']:>15} {s['right_strict']:>8}"
        )
    for ood, name in ((False, "weighted mean"), (True, "weighted mean (OOD)")):
        part = [s for s in scores if s["ood"] == ood]
        if len(part) > 1:
            n = sum(s["problems"] for s in part)
            mean, best = (sum(s[key] * s["problems"] for s in part) / n for key in ("pass_at_1", "pass_at_k"))
            error = sum((s["standard_error"] * s["problems"] / n) ** 2 for s in part) ** 0.5
            right, strict = (sum(s[key] for s in part) for key in ("right", "right_strict"))
            lines.append(f"{name:<{width}} {n:>9} {mean:>8.1%} {error:>8.1%} {best:>9.1%} {right:>15} {strict:>8}")
    return "\n".join(lines)


def main(c: EvaluateConfig) -> list[dict]:
    device = machine.choose_device(c.device)
    model, tokenizer = checkpoint.load(c.model, device, machine.choose_dtype(c.dtype, device))
    threads = machine.set_threads(c.threads, model)
    judge = verifier(c.verifier)
    for file in (*c.data, *c.ood):  # all of them, before hours go into the first
        read_examples(file, need=("prompt", "answer"))
    keeping = open_run(c.out, c, c.resume, free=("device", "threads", "show")) if c.out else nullcontext()
    with keeping:
        log.announce(log.header(device, threads, model.head_weight.dtype))
        if not c.out:
            log.announce("completions aren't saved; --out DIR keeps them")
        scores = []
        for file in (*c.data, *c.ood):
            rows = evaluate_file(c, file, model, tokenizer, judge)
            for r in rows[: c.show]:
                said = "right" if r["correct"][0] else "wrong"
                print(f"{r['prompt']}\n  -> {r['completions'][0]!r}  answer {r['answer']!r}: {said}")
            scores.append(summary(Path(file).stem, file in c.ood, rows))
        print(table(scores))
        if c.out:
            files.write_json(Path(c.out) / "scores.json", {"scores": scores, "environment": log.environment(device)})
        return scores


if __name__ == "__main__":
    config.run_cli(lambda: main(config.parse(EvaluateConfig, __doc__)))
