"""Supervised fine-tuning on an expert's trajectories: the first stage of the paper, up to the score P_sft (Eq. 1).

    python train_sft.py --model DIR --train F.jsonl --val F.jsonl --out runs/sft

The loss is -logprob of the response tokens, the end token included; prompts are read but not trained. The validation
loss is measured at every checkpoint. At the end it puts each checkpoint in its regime (Eqs. 5-9), which says from where
to start RL: from a stable one. Compute is counted by Eq. 23. The run folder holds metrics.jsonl (the curves),
checkpoints/step-N/ and checkpoints.json (the table that is printed at the end).

On several GPUs: torchrun --nproc_per_node=N train_sft.py ... (`nanopcf/run/parallel.py`). Left out: LoRA.
"""

from dataclasses import dataclass

from nanopcf.run import config
from nanopcf.run.config import Count, Device, DType, Natural, NonNegative, Positive, Text, Threads


@dataclass(frozen=True)
class SFTConfig(config.Config):
    model: str  # folder of the model to start from
    train: str  # JSONL with prompt and trajectory
    val: str  # the same, for the validation loss
    out: str  # run folder
    steps: Count = 300  # optimizer steps
    batch: Count = 32  # examples per step
    lr: Positive = 1e-3  # peak learning rate
    schedule: str = "constant"  # constant or cosine, after the warm-up
    warmup: Natural = 10  # steps of linear warm-up
    weight_decay: NonNegative = 0.0  # of AdamW, on matrices
    clip: Positive = 1.0  # largest norm of the gradient
    pack_length: Count = 128  # tokens per packed row
    micro_rows: Count = 16  # packed rows per forward pass
    checkpoint_every: Count = 30  # steps between checkpoints, each with a validation
    keep: Natural = 0  # newest checkpoints to keep, and the best (0: all)
    chat: bool = False  # put each prompt into the model's chat template
    template: Text = "{prompt}"  # text around each prompt
    end_token: str = ""  # ends a trajectory (default: as the chat template does)
    max_length: Natural = 0  # tokens of an example at most (0: model's context)
    drop_long: bool = False  # leave out longer examples, and count them
    seed: Natural = 0  # of the data order
    threads: Threads = 0  # CPU threads (0: found by a probe)
    device: Device = "auto"  # auto, cpu, cuda or mps
    dtype: DType = "auto"  # float32 or bfloat16; auto: bfloat16 on CUDA
    compile: bool = False  # torch.compile the blocks: it pays after a minute
    recompute: bool = False  # activations again in backward: less memory, slower
    shard_optimizer: bool = False  # of several processes each keeps a share of it
    dry_run: bool = False  # try the largest batch, and write nothing
    resume: bool = False  # continue the run in --out

    def __post_init__(self) -> None:
        super().__post_init__()
        config.one_of(self, schedule=SCHEDULES)
        config.different_files(self, "train", "val")


if __name__ == "__main__":
    config.show_help(SFTConfig, __doc__)  # before torch is imported, which takes seconds

import math
import time

import torch

import kernels
from nanopcf import checkpoint, flops, regimes
from nanopcf.data import Format, batch_indices, encode_examples, read_examples
from nanopcf.optim import SCHEDULES, Optimizer, learning_rate
from nanopcf.packing import Rows, Sequence, pack, trained_hidden
from nanopcf.run import files, log, machine, parallel, signals
from nanopcf.run.folder import FREE, Metrics, checkpoints, open_run
from nanopcf.tokenizer import TextTokenizer
from nanopcf.tools import dry_run, replay

# ---- 1. the loss ----


def sft_loss(model: torch.nn.Module, rows: Rows) -> torch.Tensor:
    """Sum of -logprob over the trained tokens of packed rows: a float32 scalar."""
    hidden, targets = trained_hidden(model, rows)  # (N, D), (N,)
    return kernels.linear_cross_entropy(hidden, model.head_weight, targets, reduction="sum")


def accumulate_gradients(model: torch.nn.Module, rows: Rows, micro_rows: int) -> float:
    """Run one batch forward and backward; returns its loss, the mean -logprob of its trained tokens.

    The batch is cut into micro-batches that fit in memory, and each process takes its share. Every part is divided by
    the number of trained tokens in the *whole* batch, so the gradients add up to the same sum however it was cut.
    """
    trained = int(rows.trained.sum())
    total = 0.0
    for part in rows.own(model.head_weight.device).split(micro_rows):
        loss = sft_loss(model, part) / trained
        loss.backward()
        total += loss.item()
    return parallel.summed(total)


@torch.no_grad()
def validation_loss(model: torch.nn.Module, rows: Rows, micro_rows: int) -> float:
    """Mean -logprob of all trained tokens of the validation set; each process takes its share of the rows."""
    total = sum(sft_loss(model, part).item() for part in rows.own(model.head_weight.device).split(micro_rows))
    return parallel.summed(total) / int(rows.trained.sum())


# ---- 2. setup ----


def load_sequences(path: str, tokenizer: TextTokenizer, context: int, c: SFTConfig) -> list[Sequence]:
    """The examples of a file as tokens: the prompt, then the trajectory that is trained."""
    examples = read_examples(path, need=("prompt", "trajectory"))
    length = min(c.max_length or context, context)
    return encode_examples(examples, tokenizer, length, path, format=Format(c.chat, c.template), drop=c.drop_long)


def main(c: SFTConfig) -> list[dict]:
    """Train; return the checkpoints as dicts of step, x_sft (FLOPs), val_loss and regime."""
    device = parallel.start(machine.choose_device(c.device))
    dtype = machine.choose_dtype(c.dtype, device)
    model, tokenizer = checkpoint.load(c.model, device, dtype, chat=c.chat, end_token=c.end_token)
    threads = machine.set_threads(c.threads, model)
    train, val = (load_sequences(path, tokenizer, model.config.max_length, c) for path in (c.train, c.val))
    model.recompute = c.recompute
    if c.compile:
        machine.compile_blocks(model)
    optimizer = Optimizer(model, c.weight_decay, c.shard_optimizer)
    if c.dry_run:
        dry_run.try_sft(model, optimizer, sft_loss, max(len(s.tokens) for s in train), c)
        return []
    # several short examples share a row, so that little of a forward pass is spent on padding
    val_rows = pack(val, c.pack_length)
    step_flops = flops.sft_step(model.config, c.batch, sum(len(s.tokens) for s in train) / len(train))

    # ---- 3. the run folder, and where an earlier start of this run stopped ----
    with open_run(c.out, c, c.resume, free=FREE) as out, signals.stoppable() as stop_signal:
        start = 0
        saved = checkpoint.resume(out, model, optimizer, {"step": 0, "threads": 0})  # None if the run begins
        if saved:
            start = saved["step"]
            # another number of threads would round sums differently
            threads = machine.set_threads(c.threads or saved["threads"], model)
            log.announce(f"resuming after step {start}")
        metrics = Metrics(out)  # without the lines of steps that run again
        log.announce(log.header(device, threads, dtype))
        kernels.announce_path(device)
        log.announce(f"SFT: {len(train)} trajectories, {model.parameter_count():,} parameters")

        def require_finite(step: int, what: str, value: float, rows: Rows) -> None:
            """A number that is not finite ends the run: training on would only hide where it went wrong."""
            if not math.isfinite(value):
                replay.stop(out, f"step {step}: the {what} is {value}", model, tokenizer, rows)

        def validate(step: int) -> None:
            loss = validation_loss(model, val_rows, c.micro_rows)
            require_finite(step, "validation loss", loss, val_rows)
            metrics.log(step=step, val_loss=loss, x_sft=step * step_flops)

        def save(step: int) -> None:
            # --keep spares the checkpoint of the lowest validation loss
            goodness = {row["step"]: -row["val_loss"] for row in metrics.rows("val_loss")}
            state = {"step": step, "threads": threads}
            checkpoint.save_step(out, step, model, tokenizer, optimizer, state, keep=c.keep, goodness=goodness)

        if not saved:
            validate(0)
            save(0)

        # ---- 4. the loop ----
        progress_bar = log.bar(start, c.steps, c.steps, f"SFT {out.name}")
        for step in progress_bar:
            began = time.perf_counter()
            # the batch depends on the seed and the step alone: a resumed run sees the same data
            batch = [train[i] for i in batch_indices(len(train), c.batch, step, c.seed)]
            rows = pack(batch, c.pack_length)
            loss = accumulate_gradients(model, rows, c.micro_rows)
            # checked before the update, so that the weights which led to it can be kept
            require_finite(step + 1, "loss", loss, rows)
            progress = (step - c.warmup) / max(1, c.steps - c.warmup)
            lr = learning_rate(step, progress, peak=c.lr, warmup=c.warmup, schedule=c.schedule)
            # the norm before it is clipped; the optimizer changes nothing when it is not finite
            norm = optimizer.step(lr, c.clip)
            require_finite(step + 1, "gradient's norm", norm, rows)
            tokens_per_s = round(sum(len(s.tokens) for s in batch) / (time.perf_counter() - began))

            # ---- 5. validate and save: every --checkpoint-every steps, and when a signal asks for it ----
            number = stop_signal()  # 0 unless Ctrl-C or SIGTERM came
            if (step + 1) % c.checkpoint_every == 0 or step + 1 == c.steps:
                metrics.log(step=step + 1, train_loss=loss, grad_norm=norm, lr=lr, tokens_per_s=tokens_per_s)
                validate(step + 1)
                save(step + 1)
            elif number:
                save(step + 1)
            if number:
                signals.leave(out, step + 1, number)
            progress_bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

        # ---- 6. the regime of each checkpoint ----
        validations = metrics.rows("val_loss")
        names = regimes.classify([v["step"] for v in validations], [v["val_loss"] for v in validations])
        on_disk = {step for step, _ in checkpoints(out)}  # --keep may have left fewer
        table = [{**v, "regime": name} for v, name in zip(validations, names, strict=True) if v["step"] in on_disk]
        if parallel.rank() == 0:
            files.write_json(out / "checkpoints.json", table)
        return table


def print_table(table: list[dict]) -> None:
    if not table:  # a dry run
        return
    print(f"{'step':>6} {'FLOPs':>10} {'val loss':>9}  regime")
    for row in table:
        print(f"{row['step']:>6} {row['x_sft']:>10.3g} {row['val_loss']:>9.4f}  {row['regime']}")


if __name__ == "__main__":
    config.run_cli(lambda: print_table(main(config.parse(SFTConfig, __doc__))))
