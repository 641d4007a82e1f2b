"""Supervised fine-tuning on expert trajectories (the first stage of the paper, Eq. 1's P_sft).

    python train_sft.py --model DIR --train F.jsonl --val F.jsonl --out runs/sft

Sequences are experts' and the objective is -logprob of the response tokens (the end token included). Examples are
packed into rows under a document mask; the loss of an optimizer step is divided by the number of trained tokens in
the *whole* batch, so how the batch is cut into micro-batches changes nothing. Validation loss is taken at every
checkpoint; at the end each checkpoint is put in its regime (Eqs. 5-9): start RL from a stable one. Compute is
counted by Eq. 23.

On several GPUs: torchrun --nproc_per_node=N train_sft.py ... (`nanopcf/parallel.py`). Left out: LoRA.
"""

from dataclasses import dataclass

from nanopcf.run import config


@dataclass(frozen=True)
class SFTConfig:
    model: str  # folder of the model to start from
    train: str  # JSONL with prompt and trajectory
    val: str  # JSONL with prompt and trajectory, for the validation loss
    out: str  # run folder
    steps: int = 300  # optimizer steps
    batch: int = 32  # examples a step
    lr: float = 1e-3  # peak learning rate
    schedule: str = "constant"  # constant or cosine (to a tenth), after the warm-up
    warmup: int = 10  # steps of linear warm-up
    weight_decay: float = 0.0  # AdamW's, on matrices
    clip: float = 1.0  # largest norm of the gradient
    pack_length: int = 128  # tokens a packed row
    micro_rows: int = 16  # packed rows a forward pass; the batch is accumulated over them
    checkpoint_every: int = 30  # steps between checkpoints (a validation each)
    keep: int = 0  # newest checkpoints to keep, besides the best (0: all)
    chat: bool = False  # put each prompt into the model's chat template
    template: str = "{prompt}"  # text around each prompt
    max_length: int = 0  # tokens of an example at most (0: the model's context)
    drop_long: bool = False  # leave out longer examples, and count them
    seed: int = 0  # data order
    threads: int = 0  # CPU threads (0: found by a probe)
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # float32 or bfloat16 (auto: bfloat16 on CUDA); the optimizer is float32
    compile: bool = False  # torch.compile the blocks for training: less time a step, a minute at the start
    recompute: bool = False  # activations again in backward: less memory, a third more compute
    dry_run: bool = False  # one step of the longest rows: say whether it fits, and write nothing
    resume: bool = False  # continue the run in --out

    def __post_init__(self) -> None:
        config.at_least(1, self, "steps batch pack_length micro_rows checkpoint_every")
        config.at_least(0, self, "warmup weight_decay threads max_length keep")
        config.one_of(self, schedule=SCHEDULES)
        config.above_zero(self, "lr clip")


if __name__ == "__main__":
    config.show_help(SFTConfig, __doc__)  # before torch is imported, which takes seconds

import math
import time

import torch

import kernels
from nanopcf import checkpoint, flops, regimes
from nanopcf.data import Format, encode_examples, read_examples
from nanopcf.optim import SCHEDULES, Optimizer, learning_rate
from nanopcf.packing import Rows, Sequence, batch_indices, pack, trained_hidden
from nanopcf.run import files, log, machine, parallel, signals
from nanopcf.run.folder import Metrics, checkpoints, open_run
from nanopcf.tools import replay


def sft_loss(model: torch.nn.Module, rows: Rows) -> torch.Tensor:
    """Sum of -logprob over the trained tokens of packed rows."""
    hidden, targets = trained_hidden(model, rows)
    return kernels.linear_cross_entropy(hidden, model.head_weight, targets, reduction="sum")


@torch.no_grad()
def validation_loss(model: torch.nn.Module, rows: Rows, micro_rows: int) -> float:
    """Mean -logprob a trained token, over the whole validation set; each process takes its share of the rows."""
    own = rows.own(model.head_weight.device).split(micro_rows)
    total = sum(sft_loss(model, part).item() for part in own)
    return parallel.summed(total) / int(rows.trained.sum())


def try_longest(model: torch.nn.Module, optimizer: Optimizer, c: SFTConfig, longest: int, device) -> None:
    """One optimizer step on --micro-rows full rows, every token trained: no step of the run needs more memory."""
    length = max(longest, c.pack_length)
    rows = pack([Sequence([0] * length, 1)] * min(c.micro_rows, c.batch), length).to(device)

    def work() -> None:
        sft_loss(model, rows).backward()
        optimizer.step(0.0, c.clip)

    machine.try_out(f"a step of {len(rows.tokens)} rows of {length} tokens", work, device)


def main(c: SFTConfig) -> list[dict]:
    """Train; return the checkpoints as dicts of step, x_sft (FLOPs), val_loss and regime."""
    # ---- 1. setup ----
    device = parallel.start(machine.choose_device(c.device))
    dtype = machine.choose_dtype(c.dtype, device)
    model, tokenizer = checkpoint.load(c.model, device, dtype)
    threads = machine.set_threads(c.threads, model)
    length = min(c.max_length or model.config.max_length, model.config.max_length)
    form = Format(c.chat, c.template)
    train, val = (
        encode_examples(
            read_examples(file, need=("prompt", "trajectory")), tokenizer, length, file, format=form, drop=c.drop_long
        )
        for file in (c.train, c.val)
    )
    model.recompute = c.recompute
    if c.compile:
        machine.compile_blocks(model)
    optimizer = Optimizer(model, c.weight_decay)
    if c.dry_run:
        try_longest(model, optimizer, c, max(len(s.tokens) for s in train), device)
        return []
    val_rows = pack(val, c.pack_length)

    mean_length = sum(len(s.tokens) for s in train) / len(train)
    step_flops = flops.sft_step(model.config, c.batch, mean_length)

    def check(step: int, what: str, value: float, rows: Rows) -> None:
        if not math.isfinite(value):
            replay.stop(out, f"step {step}: the {what} is {value}", model, tokenizer, rows)

    def validate(step: int) -> None:
        loss = validation_loss(model, val_rows, c.micro_rows)
        check(step, "validation loss", loss, val_rows)
        metrics.log(step=step, val_loss=loss, x_sft=step * step_flops)

    def save(step: int) -> None:
        state = {"step": step, "threads": threads}
        goodness = {r["step"]: -r["val_loss"] for r in metrics.rows("val_loss")}
        checkpoint.save_step(out, step, model, tokenizer, optimizer, state, keep=c.keep, goodness=goodness)

    # ---- 2. the run folder, and where the run stands ----
    with open_run(c.out, c, c.resume, free=("device", "threads")) as out, signals.stoppable() as asked:
        start, saved = 0, checkpoints(out)
        if saved:
            state = checkpoint.load_training(saved[-1][1], model, optimizer, {"step": 0, "threads": 0})
            start = state["step"]
            threads = machine.set_threads(c.threads or state["threads"], model)
            log.announce(f"resuming after step {start}")
        metrics = Metrics(out, start if saved else -1)
        log.announce(log.header(device, threads, dtype))
        kernels.announce_path(device)
        log.announce(f"SFT: {len(train)} trajectories, {model.parameter_count():,} parameters")
        if start == 0 and not saved:
            validate(0)
            save(0)

        # ---- 3. the loop ----
        bar = log.bar(start, c.steps, c.steps, f"SFT {out.name}")
        for step in bar:
            began = time.perf_counter()
            batch: list[Sequence] = [train[i] for i in batch_indices(len(train), c.batch, step, c.seed)]
            rows = pack(batch, c.pack_length)
            trained = int(rows.trained.sum())  # the denominator of the whole batch
            total = 0.0
            for part in rows.own(device).split(c.micro_rows):
                loss = sft_loss(model, part) / trained
                loss.backward()
                total += loss.item()
            loss = parallel.summed(total)
            check(step + 1, "loss", loss, rows)
            progress = (step - c.warmup) / max(1, c.steps - c.warmup)
            lr = learning_rate(step, progress, peak=c.lr, warmup=c.warmup, schedule=c.schedule)
            norm = optimizer.step(lr, c.clip)
            check(step + 1, "gradient's norm", norm, rows)
            seconds = time.perf_counter() - began
            tokens = sum(len(s.tokens) for s in batch)
            # ---- 4. log, validate, save ----
            number = asked()
            if (step + 1) % c.checkpoint_every == 0 or step + 1 == c.steps:
                metrics.log(step=step + 1, train_loss=loss, grad_norm=norm, lr=lr, tokens_per_s=round(tokens / seconds))
                validate(step + 1)
                save(step + 1)
            elif number:
                save(step + 1)
            if number:
                signals.leave(out, step + 1, number)
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

        # ---- 5. regimes ----
        rows = metrics.rows("val_loss")
        names = regimes.classify([r["step"] for r in rows], [r["val_loss"] for r in rows])
        there = {step for step, _ in checkpoints(out)}  # --keep may have left fewer
        table = [{**r, "regime": n} for r, n in zip(rows, names, strict=True) if r["step"] in there]
        if parallel.rank() == 0:
            files.write_json(out / "checkpoints.json", table)
        return table


def print_table(table: list[dict]) -> None:
    if not table:  # a dry run
        return
    print(f"{'step':>6} {'FLOPs':>10} {'val loss':>9}  regime")
    for r in table:
        print(f"{r['step']:>6} {r['x_sft']:>10.3g} {r['val_loss']:>9.4f}  {r['regime']}")


if __name__ == "__main__":
    config.run_cli(lambda: print_table(main(config.parse(SFTConfig, __doc__))))
