"""Scores of a model on problems with answers: pass@1, avg@k and the unbiased pass@k, one line per file.

    python -m nanopcf.evaluate --model DIR --data gsm8k.jsonl svamp.jsonl --ood aime24.jsonl --samples 8

The defaults are the paper's setting: temperature 0.7, top-p 1.0, the mean over the samples of each problem. Two judges
look at every response: the lenient one decides the score, the strict one also wants the answer marked and its units
right (nanopcf/rewards.py). With --out the completions are saved, one JSONL file per data file, and --resume continues
an interrupted evaluation.
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanopcf.answers.mathematics import take_cut_off, verifier
from nanopcf.data import Example, Format, encode_prompts, read_examples
from nanopcf.model import Transformer
from nanopcf.run import config, files, log, machine
from nanopcf.run.config import Count, Device, DType, Natural, NonNegative, PositiveShare, Text, Threads, Verifier
from nanopcf.run.folder import check_still_ours, kept, open_run, read_metrics
from nanopcf.run.untrusted import printable
from nanopcf.scoring import answer_problems, open_model, open_sampler, pass_at_k, standard_error
from nanopcf.tokenizer import TextTokenizer


@dataclass(frozen=True)
class EvaluateConfig(config.Config):
    model: str  # model folder
    data: tuple[str, ...]  # files of problems with answers
    ood: tuple[str, ...] = ()  # more, unlike the training data; averaged apart
    out: str = ""  # folder for completions and scores
    chat: bool = False  # put each prompt into the model's chat template
    template: Text = "{prompt}"  # text around each prompt
    samples: Count = 1  # completions per problem
    temperature: NonNegative = 0.7  # of the sampling; 0 is greedy
    top_p: PositiveShare = 1.0  # probability mass to sample from (nucleus)
    max_new_tokens: Count = 512  # longest answer, in tokens
    limit: Natural = 0  # at most so many problems per file (0: all)
    drop_long: bool = False  # leave out prompts that fill the context, and count them
    stop: tuple[Text, ...] = ()  # strings that end an answer, such as "Question:"
    verifier: Verifier = "auto"  # auto, ours or math-verify
    slots: Natural = 0  # sequences generated at a time (0: what memory holds)
    seed: Natural = 0  # of the sampling
    threads: Threads = 0  # CPU threads (0: found by a probe)
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


# ---- the command: several files, saved as they grow ----


def kept_rows(path: Path, chunk: int, examples: list[Example], samples: int) -> list[dict]:
    """The saved rows of an interrupted evaluation: whole chunks only, or one per example if the file is complete.

    Raises ValueError when a row is not the one of its example.
    """
    rows = (read_metrics(path) if path.exists() else [])[: len(examples)]
    for number, (row, e) in enumerate(zip(rows, examples, strict=False), 1):
        same = [row.get(name) for name in ("line", "prompt", "answer")] == [e.line, e.prompt, e.answer]
        verdicts = [row.get(name) for name in ("completions", "correct", "strict")]
        if not same or not all(isinstance(v, list) and len(v) == samples for v in verdicts):
            raise ValueError(f"{path}, line {number}: not what was asked in line {e.line} of the data; remove the file")
    return rows if len(rows) == len(examples) else rows[: len(rows) // chunk * chunk]


def evaluate_file(
    c: EvaluateConfig, file: str, examples: list[Example], model: Transformer, tokenizer: TextTokenizer
) -> list[dict]:
    """One row per problem: its line, prompt and answer, the completions, and the verdict of both judges on each."""
    longest_prompt = model.config.max_length - 1  # at least one token of an answer must fit
    form = Format(c.chat, c.template)
    examples, _ = encode_prompts(examples, tokenizer, longest_prompt, file, format=form, drop=c.drop_long)
    strict = verifier("auto" if c.verifier == "math-verify" else c.verifier)
    sampler = open_sampler(c, model, tokenizer, examples)
    chunk = max(1, 2 * sampler.slots // c.samples)  # problems between two writes: enough to keep all slots busy
    name = Path(file).stem
    path = Path(c.out) / f"{name}.jsonl" if c.out else None
    rows = kept_rows(path, chunk, examples, c.samples) if path else []
    if path:
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    with tqdm(total=len(examples), initial=len(rows), desc=printable(name), leave=False, mininterval=1) as bar:
        for start in range(len(rows), len(examples), chunk):
            part = examples[start : start + chunk]
            places = range(start, start + len(part))
            correct, texts = answer_problems(c, sampler, tokenizer, part, places=places)
            new_rows = []
            for i, e in enumerate(part):
                completions = texts[i * c.samples : (i + 1) * c.samples]
                row = {"line": e.line, "prompt": e.prompt, "answer": e.answer, "completions": completions}
                row["correct"] = [int(value) for value in correct[i]]
                row["strict"] = [int(strict(text, e.answer, strict=True)) for text in completions]
                new_rows.append(row)
            rows += new_rows
            if path:
                check_still_ours(path.parent)
                files.append_text(path, "".join(json.dumps(row) + "\n" for row in new_rows))
            bar.update(len(part))
    return rows


def summary(name: str, ood: bool, rows: list[dict]) -> dict:
    """The scores of one file. ood: it is unlike the training data (out of distribution)."""
    correct = np.array([row["correct"] for row in rows], dtype=float)  # (problems, samples)
    return {
        "file": name,
        "ood": ood,
        "problems": len(rows),
        "samples": correct.shape[1],
        "pass_at_1": float(correct.mean()),
        "standard_error": standard_error(correct),
        "pass_at_k": pass_at_k(correct, correct.shape[1]),
        "right": int(correct.sum()),
        "right_strict": sum(sum(row["strict"]) for row in rows),
    }


def table(scores: list[dict]) -> str:
    """One line per file, then the means of --data and of --ood, weighted by the number of problems."""
    k = scores[0]["samples"]
    width = max(24, *(len(s["file"]) + 6 for s in scores))
    one = "pass@1" if k == 1 else f"avg@{k}"
    head = f"{'file':<{width}} {'problems':>9} {one:>8} {'± s.e.':>8} {f'pass@{k}':>9} {'right: lenient':>15} {'strict':>8}"
    lines = [head, "─" * len(head)]
    for s in scores:
        lines.append(table_line(s["file"] + (" (OOD)" if s["ood"] else ""), width, s))
    for ood, name in ((False, "weighted mean"), (True, "weighted mean (OOD)")):
        group = [s for s in scores if s["ood"] == ood]
        if len(group) > 1:
            lines.append(table_line(name, width, weighted_mean(group)))
    return "\n".join(lines)


def table_line(name: str, width: int, s: dict) -> str:
    return (
        f"{name:<{width}} {s['problems']:>9} {s['pass_at_1']:>8.1%} {s['standard_error']:>8.1%} {s['pass_at_k']:>9.1%} "
        f"{s['right']:>15} {s['right_strict']:>8}"
    )


def weighted_mean(scores: list[dict]) -> dict:
    """Sums of the counts, and the means of the shares weighted by the number of problems."""
    mean = {key: sum(s[key] for s in scores) for key in ("problems", "right", "right_strict")}
    n = mean["problems"]
    for key in ("pass_at_1", "pass_at_k"):
        mean[key] = sum(s[key] * s["problems"] for s in scores) / n
    # the files are independent samples, so their variances add up
    mean["standard_error"] = sum((s["standard_error"] * s["problems"] / n) ** 2 for s in scores) ** 0.5
    return mean


def main(c: EvaluateConfig) -> list[dict]:
    model, tokenizer, probed = open_model(c)
    device = model.head_weight.device
    # All files are read first: a mistake in the last one shows before hours go into the first.
    examples = {f: read_examples(f, need=("prompt", "answer"))[: c.limit or None] for f in (*c.data, *c.ood)}
    folder = open_run(c.out, c, c.resume, free=("device", "threads", "show")) if c.out else nullcontext()
    with folder:
        threads = machine.set_threads(c.threads or kept(c.out, "threads", lambda: probed), model)
        log.announce(log.header(device, threads, model.head_weight.dtype))
        if not c.out:
            log.announce("completions aren't saved; --out DIR keeps them")
        scores = []
        for file in (*c.data, *c.ood):
            rows = evaluate_file(c, file, examples[file], model, tokenizer)
            for row in rows[: c.show]:
                verdict = "right" if row["correct"][0] else "wrong"
                shown = f"{row['prompt']}\n  -> {row['completions'][0]!r}  answer {row['answer']!r}: {verdict}"
                print(printable(shown))
            scores.append(summary(Path(file).stem, file in c.ood, rows))
        cut_off = take_cut_off()
        if c.out:
            saved = {"scores": scores, "judge_cut_off": cut_off, "environment": log.environment(device)}
            files.write_json(Path(c.out) / "scores.json", files.strict(saved))
        print(printable(table(scores)))
        if cut_off:
            log.announce(f"{cut_off} times the judge ran into its limit of time; such an answer counts as wrong")
        return scores


if __name__ == "__main__":
    config.run_cli(lambda: main(config.parse(EvaluateConfig, __doc__)))
