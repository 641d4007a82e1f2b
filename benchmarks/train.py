"""A step of SFT and a step of RL against TRL's trainers, on the same weights, data and settings.

    python benchmarks/train.py                              this machine's best device, default model
    python benchmarks/train.py --model 10M --only sft
    python benchmarks/train.py --markdown                   also writes docs/results/train-<device>.md

SFT: tokens a second, packed rows, AdamW, every token trained on both sides. Every row is full, so that
neither side has padding; ours comes with the document mask that keeps packed examples apart. RL: seconds a GRPO step of prompts x group rollouts with a random
reward, answers that almost never end early, one update. Random weights of our nano shapes and a 16-token tokenizer: the work is
that of the shape. The first step of every run is left out. On the CPU each side first tries one thread and all cores, and
keeps the faster. TRL is skipped, with a line, where it isn't installed (extra `bench`).
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from common import SHAPES, Page, make_model, spread

import train_rl
import train_sft
from nanopcf import checkpoint, runs
from nanopcf.data import Sequence, pack
from nanopcf.optim import Optimizer
from nanopcf.tokenizer import nano_tokenizer

DIGITS = "0123456789"


def stamps_of(trainer_class, **arguments) -> list[float]:
    """Times at which each of a transformers trainer's steps ended."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        times: list[float] = []  # noqa: RUF012

        def on_step_end(self, *_, **__):
            self.times.append(time.perf_counter())

    clock = Clock()
    clock.times = []
    trainer_class(callbacks=[clock], **arguments).train()
    return clock.times


def quiet(folder: Path, a: argparse.Namespace) -> dict:
    """Settings that both trainers share."""
    return dict(
        output_dir=str(folder / "trl"), max_steps=a.steps + 1, learning_rate=1e-4, lr_scheduler_type="constant",
        use_cpu=a.device.type == "cpu", bf16=a.dtype == torch.bfloat16, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False, optim="adamw_torch_fused", max_grad_norm=1.0,
    )  # fmt: skip


# ---- SFT: tokens a second ----


def sft_ours(folder: Path, a: argparse.Namespace) -> list[float]:
    model, _ = checkpoint.load(folder / "model", a.device, a.dtype)
    optimizer = Optimizer(model)
    ids = torch.randint(0, 10, (a.batch, a.length)).tolist()
    rates = []
    for _ in range(a.steps + 1):
        if a.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        rows = pack([Sequence(s, 1) for s in ids], a.length)
        for part in rows.map(lambda t: t.to(a.device)).split(a.micro):
            (train_sft.sft_loss(model, part) / (a.batch * a.length)).backward()
        optimizer.step(1e-4, 1.0)
        rates.append(a.batch * a.length / (time.perf_counter() - began))
    return rates[1:]


def sft_theirs(folder: Path, a: argparse.Namespace) -> list[float]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    count = (a.steps + 2) * a.batch
    ids = torch.randint(0, 10, (count, a.length)).tolist()
    micro = min(a.micro, a.batch)
    settings = SFTConfig(
        per_device_train_batch_size=micro, gradient_accumulation_steps=a.batch // micro, max_length=a.length, dataset_kwargs={"skip_prepare_dataset": True}, **quiet(folder, a),
    )  # fmt: skip
    times = stamps_of(
        SFTTrainer,
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    return [a.batch * a.length / (t - s) for s, t in pairwise(times)]


# ---- RL: seconds a step ----


def rl_ours(folder: Path, a: argparse.Namespace) -> list[float]:
    out = folder / f"rl-{time.monotonic_ns()}"
    rng = random.Random(0)
    rows = [
        {"prompt": "".join(rng.choices(DIGITS, k=rng.randint(8, 32))), "answer": "7"}
        for _ in range(a.prompts)
    ]
    (folder / "rl.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "val.jsonl").write_text(json.dumps(rows[0]) + "\n")
    judge, train_rl_verify = random.Random(0), sys.modules["nanopcf.rollouts"].verify
    sys.modules["nanopcf.rollouts"].verify = lambda *_: float(
        judge.random() < 0.5
    )  # a reward that is never constant
    try:
        train_rl.main(
            train_rl.RLConfig(
                model=str(folder / "model"), train=str(folder / "rl.jsonl"), val=str(folder / "val.jsonl"), out=str(out),
                algo="grpo", set=("entropy_coef=0",), steps=a.steps + 1, prompts=a.prompts, update_prompts=a.prompts,
                group=a.group, max_new_tokens=a.new_tokens, pack_length=a.new_tokens + 32, micro_rows=a.micro,
                eval_every=10**6, checkpoint_every=10**6, threads=torch.get_num_threads(), device=str(a.device),
                dtype=str(a.dtype).removeprefix("torch."), lr=1e-4, warmup=0,
            )
        )  # fmt: skip
    finally:
        sys.modules["nanopcf.rollouts"].verify = train_rl_verify
    rows = [r for r in runs.read_metrics(out / "metrics.jsonl") if "seconds" in r]
    a.shares = rows[-1]
    return [r["seconds"] for r in rows][1:]


def rl_theirs(folder: Path, a: argparse.Namespace) -> list[float]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    rng = random.Random(0)
    prompts = ["".join(rng.choices(DIGITS, k=rng.randint(8, 32))) for _ in range(a.prompts * (a.steps + 2))]
    settings = GRPOConfig(
        per_device_train_batch_size=min(a.micro, a.prompts * a.group), num_generations=a.group,
        gradient_accumulation_steps=max(1, a.prompts * a.group // a.micro), max_completion_length=a.new_tokens,
        beta=0.0, num_iterations=1, temperature=1.0, scale_rewards="none", loss_type="dapo", **quiet(folder, a),
    )  # fmt: skip
    times = stamps_of(
        GRPOTrainer,
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(folder / "model", padding_side="left"),
        reward_funcs=lambda completions, **_: [float(rng.random() < 0.5) for _ in completions],
    )
    return [t - s for s, t in pairwise(times)]


# ---- the table ----


def best(run: Callable, folder: Path, a: argparse.Namespace, better: Callable) -> tuple[list[float], int]:
    """(numbers, threads) with one thread or with all cores, whichever has the better median."""
    found = {}
    for threads in sorted({1, runs.cores()}) if a.device.type == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        found[threads] = run(folder, a)
    threads = better(found, key=lambda t: statistics.median(found[t]))
    return found[threads], threads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="", choices=SHAPES, metavar="SIZE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--only", choices=("sft", "rl"))
    parser.add_argument("--steps", type=int, default=3, help="measured, after one that isn't")
    parser.add_argument("--batch", type=int, default=64, help="SFT: rows a step")
    parser.add_argument("--length", type=int, default=256, help="SFT: tokens a row")
    parser.add_argument("--prompts", type=int, default=64, help="RL: prompts a step")
    parser.add_argument("--group", type=int, default=8, help="RL: answers a prompt")
    parser.add_argument("--new-tokens", type=int, default=256, help="RL: longest answer")
    parser.add_argument("--micro", type=int, default=32, help="rows a forward pass")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--markdown", action="store_true", help="write docs/results/train-<device>.md")
    a = parser.parse_args()
    a.device = runs.choose_device(a.device)
    a.dtype = runs.choose_dtype(a.dtype, a.device)
    size = a.model or ("0.8M" if a.device.type == "cpu" else "0.5B")
    page = Page("A training step", a.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(size, 512, a.device, torch.float32)
        checkpoint.save(model, nano_tokenizer(), folder / "model")
        page.add(f"{model.parameter_count():,} parameters, {str(a.dtype).removeprefix('torch.')}.")
        plans = {
            "sft": (f"SFT, {a.batch} rows of {a.length} tokens, tokens a second (more is better):", sft_ours, sft_theirs, max),
            "rl": (f"RL, {a.prompts} prompts x {a.group} answers of up to {a.new_tokens} tokens, seconds a step:", rl_ours, rl_theirs, min),
        }  # fmt: skip
        for which, (intro, ours, theirs, better) in plans.items():
            if a.only and which != a.only:
                continue
            page.head(intro, "", "median (range)", "threads", "against TRL")
            numbers = {}
            try:
                numbers["TRL"] = best(theirs, folder, a, better)
            except ImportError as error:
                print(f'(no TRL: {error}; pip install -e ".[bench]")', file=sys.stderr)
            numbers["nanopcf"] = best(ours, folder, a, better)
            for label, (values, threads) in numbers.items():
                ratio = "–"
                if "TRL" in numbers:
                    ratio = statistics.median(values) / statistics.median(numbers["TRL"][0])
                    ratio = f"{ratio if better is max else 1 / ratio:.2f}x"
                shown = spread(values) if better is max else spread([v * 1000 for v in values]) + " ms"
                page.row(label, shown, str(threads), ratio)
            if which == "rl":
                r = a.shares
                page.add(
                    "",
                    f"Of ours, generation {r['generation_share']:.0%}, scoring {r['scoring_share']:.0%}, update {r['update_share']:.0%}.",
                )
    if a.markdown:
        page.write("train")


if __name__ == "__main__":
    main()
