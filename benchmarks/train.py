"""A step of SFT and a step of RL against TRL's trainers, on the same weights, data and settings.

    python benchmarks/train.py                              this machine's best device, default model
    python benchmarks/train.py --model 10M --only sft
    python benchmarks/train.py --markdown                   also writes docs/results/train-<device>.md

SFT: examples of 32 to 256 tokens, every token but the first trained, AdamW; tokens of examples a second. TRL runs
twice: padded, with examples of like length together, and with packing ("wrapped": examples are cut where a row ends, so
every row is full). Ours packs whole examples, kept apart by a mask. Both sides are timed inside their own trainers.

RL: a GRPO step of prompts x group rollouts, a random reward, one update; seconds a step. One token of the vocabulary
ends an answer, so the vocabulary's size sets how long answers are: of at most 256 tokens 160 on average with --ends
128, 200 with 512.

Random weights of our nano shapes and a 16-token tokenizer: the work is that of the shape. Contestants take turns, each
turn a step that isn't counted and --steps that are; medians, the lowest and the highest, and the median ratio over the
turns. On the CPU each side first tries one thread and all cores, and keeps the faster. TRL is skipped, with a line,
where it isn't installed (extra `bench`).
"""

import argparse
import gc
import json
import random
import shutil
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from common import SHAPES, Page, Run, compare, make_model, ratio, spread

import train_rl
import train_sft
from nanopcf import checkpoint
from nanopcf.run import machine
from nanopcf.run.folder import read_metrics
from nanopcf.tokenizer import word_tokenizer

DIGITS = "0123456789"


def release(compiled: bool = False) -> None:
    """Free the weights and the optimizer that a run leaves in reference cycles, and in torch.compile's caches."""
    if compiled:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def step_times(trainer_class, **arguments) -> list[float]:
    """Seconds of each of a transformers trainer's steps but the first."""
    from transformers import PrinterCallback, TrainerCallback

    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    trainer = trainer_class(callbacks=[Clock()], **arguments)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    del trainer, arguments
    release()
    return [after - before for before, after in pairwise(times)]


def quiet(folder: Path, a: argparse.Namespace) -> dict:
    """Settings that both trainers share."""
    return dict(
        output_dir=str(folder / "trl"),
        max_steps=a.steps + 1,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        use_cpu=a.device.type == "cpu",
        bf16=a.dtype == torch.bfloat16,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
    )


def theirs(folder: Path) -> dict:
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    return dict(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(folder / "model", padding_side="left"),
    )


def ours(folder: Path, a: argparse.Namespace, rows: list[dict], compiled: bool) -> dict:
    """Settings that both of our trainers share; the rows to train on are written into the folder."""
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "val.jsonl").write_text(json.dumps(rows[0]) + "\n")
    return dict(
        model=str(folder / "model"),
        train=str(folder / "train.jsonl"),
        val=str(folder / "val.jsonl"),
        out=str(folder / f"run-{time.monotonic_ns()}"),
        steps=a.steps + 1,
        micro_rows=a.micro,
        threads=torch.get_num_threads(),
        device=str(a.device),
        dtype=str(a.dtype).removeprefix("torch."),
        lr=1e-4,
        warmup=0,
        compile=compiled,
    )


def finished(settings: dict, column: str) -> list[dict]:
    """The lines of a run's metrics that have this column. The run is removed: 14 bytes a parameter."""
    release(settings["compile"])
    rows = [r for r in read_metrics(Path(settings["out"]) / "metrics.jsonl") if column in r]
    shutil.rmtree(settings["out"])
    return rows


# ---- SFT: tokens a second ----


def examples(a: argparse.Namespace) -> list[list[int]]:
    """One step's, of lengths evenly spread up to a.length; the same each step."""
    rng = random.Random(0)
    shortest = max(1, a.length // 8)
    lengths = [shortest + round(i * (a.length - shortest) / (a.batch - 1)) for i in range(a.batch)]
    return [rng.choices(range(10), k=n) for n in lengths]


def sft_ours(folder: Path, a: argparse.Namespace, compiled: bool) -> Run:
    rows = []
    for first, *rest in examples(a):  # the end token is one of an example's
        rows.append({"prompt": str(first), "answer": "7", "trajectory": " ".join(map(str, rest[:-1]))})

    def run() -> float:
        settings = ours(folder, a, rows, compiled)
        train_sft.main(
            train_sft.SFTConfig(batch=len(rows), pack_length=a.length, checkpoint_every=1, keep=1, **settings)
        )
        rates = [r["tokens_per_s"] for r in finished(settings, "tokens_per_s")]
        return a.steps / sum(1 / rate for rate in rates[1:])

    return run


def sft_theirs(folder: Path, a: argparse.Namespace, packed: bool) -> Run:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    ids = examples(a)
    tokens = sum(map(len, ids))
    if packed:  # the rows that TRL's "wrapped" cuts, made here so that each step has the same
        stream = [t for s in ids for t in s]
        ids = [stream[i : i + a.length] for i in range(0, len(stream) // a.length * a.length, a.length)]
        tokens = len(ids) * a.length
    micro = next(m for m in range(min(a.micro, len(ids)), 0, -1) if len(ids) % m == 0)
    settings = SFTConfig(
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=len(ids) // micro,
        max_length=a.length,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="random" if packed else "group_by_length",
        **quiet(folder, a),
    )

    def run() -> float:
        data = Dataset.from_dict({"input_ids": ids * (a.steps + 1)})
        times = step_times(SFTTrainer, args=settings, train_dataset=data, **theirs(folder))
        return tokens * a.steps / sum(times)

    return run


# ---- RL: steps a second ----


def questions(a: argparse.Namespace, count: int) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(DIGITS, k=rng.randint(8, 32))) for _ in range(count)]  # the tokenizer knows words


def rl_ours(folder: Path, a: argparse.Namespace, compiled: bool) -> Run:
    rows = [{"prompt": q, "answer": "7"} for q in questions(a, a.prompts)]

    def run() -> float:
        settings = ours(folder, a, rows, compiled)
        judge, verifier = random.Random(0), train_rl.verifier
        train_rl.verifier = lambda _: lambda *_: float(judge.random() < 0.5)  # a reward that is never constant
        try:
            train_rl.main(
                train_rl.RLConfig(
                    algo="grpo",
                    set=("entropy_coef=0",),
                    prompts=a.prompts,
                    update_prompts=a.prompts,
                    group=a.group,
                    max_new_tokens=a.new_tokens,
                    pack_length=a.new_tokens + 32,
                    slots=a.prompts * a.group,
                    eval_every=10**6,
                    checkpoint_every=10**6,
                    **settings,
                )
            )
        finally:
            train_rl.verifier = verifier
        steps = finished(settings, "seconds")
        a.last = steps[-1]
        return a.steps / sum(r["seconds"] for r in steps[1:])

    return run


def rl_theirs(folder: Path, a: argparse.Namespace) -> Run:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rng = random.Random(0)
    settings = GRPOConfig(
        per_device_train_batch_size=min(a.micro, a.prompts * a.group),
        num_generations=a.group,
        gradient_accumulation_steps=max(1, a.prompts * a.group // a.micro),
        max_completion_length=a.new_tokens,
        beta=0.0,
        num_iterations=1,
        temperature=1.0,
        scale_rewards="none",
        loss_type="dapo",
        **quiet(folder, a),
    )

    def run() -> float:
        times = step_times(
            GRPOTrainer,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": questions(a, a.prompts * (a.steps + 2))}),
            reward_funcs=lambda completions, **_: [float(rng.random() < 0.5) for _ in completions],
            **theirs(folder),
        )
        return a.steps / sum(times)

    return run


# ---- the tables ----


def table(page: Page, intro: str, contestants: dict[str, Run], a: argparse.Namespace, shown) -> None:
    """A row a contestant; the ratios are against each of TRL's."""
    rates = compare(contestants, a.device, a.repeats)
    peers = [name for name in rates if name.startswith("TRL")]
    page.head(intro, "", "median (range)", "threads", *(f"against {peer}" for peer in peers))
    for name, (values, threads) in rates.items():
        page.row(name, shown(values), str(threads), *(f"{ratio(values, rates[p][0]):.2f}x" for p in peers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="", choices=SHAPES, metavar="SIZE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--only", choices=("sft", "rl"))
    parser.add_argument("--steps", type=int, default=1, help="measured a turn, after one that isn't")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--batch", type=int, default=112, help="SFT: examples a step")
    parser.add_argument("--length", type=int, default=256, help="SFT: tokens of a row, and of the longest example")
    parser.add_argument("--prompts", type=int, default=64, help="RL: prompts a step")
    parser.add_argument("--group", type=int, default=8, help="RL: answers a prompt")
    parser.add_argument("--new-tokens", type=int, default=256, help="RL: longest answer")
    parser.add_argument("--ends", type=int, nargs="+", default=[128], help="RL: one token in so many ends an answer")
    parser.add_argument("--micro", type=int, default=16, help="rows a forward pass")
    parser.add_argument("--no-compile", action="store_true", help="leave out ours with --compile")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--markdown", action="store_true", help="write docs/results/train-<device>.md")
    a = parser.parse_args()
    a.device = machine.choose_device(a.device)
    a.dtype = machine.choose_dtype(a.dtype, a.device)
    size = a.model or ("0.8M" if a.device.type == "cpu" else "0.5B")
    page = Page("A training step", a.device)
    variants = {"nanopcf": False} | ({} if a.no_compile else {"nanopcf --compile": True})
    try:
        import trl
    except ImportError:
        print('(no TRL: pip install -e ".[bench]")', file=sys.stderr)
        trl = None

    def start(folder: Path, **changed: int) -> str:
        """Write the model to start from; returns its size in words."""
        model = make_model(size, max(512, a.length, a.new_tokens + 32), a.device, torch.float32, **changed)
        checkpoint.save(model, word_tokenizer("0123456789"), folder / "model")
        return f"{model.parameter_count():,} parameters, {str(a.dtype).removeprefix('torch.')}"

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if a.only != "rl":
            words = start(folder)
            peers = (
                {}
                if trl is None
                else {
                    "TRL, by length": sft_theirs(folder, a, packed=False),
                    "TRL, packing": sft_theirs(folder, a, packed=True),
                }
            )
            mine = {label: sft_ours(folder, a, compiled) for label, compiled in variants.items()}
            intro = f"SFT, {a.batch} examples of up to {a.length} tokens, {words}; tokens a second:"
            table(page, intro, peers | mine, a, spread)
            del mine
            release(compiled=True)
        for ends in [] if a.only == "sft" else a.ends:
            words = start(folder, vocab_size=ends)
            peers = {} if trl is None else {"TRL": rl_theirs(folder, a)}
            mine = {label: rl_ours(folder, a, compiled) for label, compiled in variants.items()}
            intro = (
                f"RL, {a.prompts} prompts x {a.group} answers of up to {a.new_tokens} tokens, one token in {ends} ends an answer, "
                f"{words}; milliseconds a step:"
            )
            table(page, intro, peers | mine, a, lambda rates: spread([1000 / r for r in rates]))
            page.add(
                "",
                "Of the last of ours {generation_share:.0%} generation, {scoring_share:.0%} scoring, {update_share:.0%} update; "
                "mean length {length:.0f}.".format(**a.last),
            )
    if a.markdown:
        page.write("train")


if __name__ == "__main__":
    main()
