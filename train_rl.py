"""Reinforcement learning with verifiable rewards, with and without an expert's help (the second stage of the paper).

    python train_rl.py --model DIR --train F.jsonl --val F.jsonl --algo dapo_dc --out runs/rl
    python train_rl.py --list          what differs between the algorithms, as a table

A step of the loop in `main`: roll out groups of responses and verify them (`collect`); turn verdicts into advantages
(`judge`); update on the per-token objective (`update`: log-probs -> loss -> backward); log. Everything that an
algorithm chooses stands in its row of `objectives.RECIPES`, and nothing here branches on names. Sampled and scored
distributions are the same one: the temperature divides the logits on both sides, and there is no top-p. Packing, masks
and the way to log-probs are those of SFT.

Every `eval_every` steps, or every `eval_flops` of compute (Eqs. 23-29), the policy is scored on --val: the curve that
`nanopcf.ceiling` fits. With dynamic sampling the run ends by itself when no prompt gives a signal any more.

On several GPUs: torchrun --nproc_per_node=N train_rl.py ... (`nanopcf/run/parallel.py`). Each process rolls out and
trains its share, and all see all groups. Left out: a value function, asynchronous rollouts.
"""

from dataclasses import dataclass
from typing import Literal

from nanopcf.run import config
from nanopcf.run.config import Count, Device, DType, Natural, NonNegative, Positive, Text, Threads, Verifier


@dataclass(frozen=True)
class RLConfig(config.Config):
    model: str  # folder of the model to start from
    train: str  # JSONL with prompt and answer
    val: str  # the same, for the curve
    out: str  # run folder
    algo: str = "dapo_dc"  # a row of the table that --list prints
    set: tuple[str, ...] = ()  # changes to that row: gate=2 aggregation=constant
    steps: Count = 100  # batches of rollouts
    max_flops: NonNegative = 0.0  # end when so much compute is spent (0: never)
    prompts: Count = 32  # prompts per batch
    group: Count = 8  # answers per prompt
    update_prompts: Count = 32  # prompts per optimizer step
    round_prompts: Count = 32  # dynamic sampling: prompts per round
    max_rounds: Count = 4  # dynamic sampling: most rounds per batch
    lr: Positive = 5e-4  # peak learning rate
    schedule: str = "constant"  # constant or cosine, after the warm-up
    warmup: Natural = 5  # optimizer steps of linear warm-up
    weight_decay: NonNegative = 0.0  # of AdamW, on matrices
    clip: Positive = 1.0  # largest norm of the gradient
    temperature: NonNegative = 1.0  # of the rollouts, and of the trained log-probs
    max_new_tokens: Count = 32  # longest answer, in tokens
    overlong_cache: Count = 8  # tokens before the limit where overlong=soft acts
    old_logprobs: Literal["sampler", "recomputed"] = "sampler"  # sampler, or recomputed by the trainer
    eval_every: Count = 10  # batches between two points of the curve
    eval_flops: NonNegative = 0.0  # or compute between two points (0: --eval-every)
    eval_samples: Count = 1  # answers per validation problem
    eval_temperature: NonNegative = 0.7  # of the curve's answers, as in the paper
    checkpoint_every: Count = 50  # batches between checkpoints
    keep: Natural = 0  # newest checkpoints to keep, and the best (0: all)
    slots: Natural = 0  # sequences generated at a time (0: what memory holds)
    pack_length: Count = 128  # tokens per packed row
    micro_rows: Count = 16  # packed rows per forward pass
    chat: bool = False  # put each prompt into the model's chat template
    template: Text = "{prompt}"  # text around each prompt
    end_token: str = ""  # ends a trajectory (default: as the chat template does)
    drop_long: bool = False  # leave out prompts too long for an answer, and count
    stop: tuple[Text, ...] = ()  # strings that end an answer, such as "Question:"
    verifier: Verifier = "auto"  # auto, ours or math-verify
    seed: Natural = 0  # of the data order and the sampling
    threads: Threads = 0  # CPU threads (0: found by a probe)
    device: Device = "auto"  # auto, cpu, cuda or mps
    dtype: DType = "auto"  # float32 or bfloat16; auto: bfloat16 on CUDA
    compile: bool = False  # torch.compile the blocks: on a CPU it pays late
    recompute: bool = False  # activations again in backward: less memory, slower
    shard_optimizer: bool = False  # of several processes each keeps a share of it
    dry_run: bool = False  # try the largest batch, and write nothing
    resume: bool = False  # continue the run in --out

    def __post_init__(self) -> None:
        super().__post_init__()
        config.one_of(self, algo=RECIPES, schedule=SCHEDULES)
        if self.recipe.expert in ("beside", "prefix") and self.group < 2:
            raise ValueError(f"--group must be at least 2 with {self.algo}: the expert takes one place")
        if self.recipe.dynamic_sampling and self.recipe.expert == "none" and self.group < 2:
            raise ValueError("--group must be at least 2 with dynamic sampling: a lone response differs from none")
        if not self.temperature > 0:
            raise ValueError("--temperature must be above 0: a greedy rollout has nothing to learn from")

    @property
    def recipe(self) -> "Recipe":
        return recipes.with_choices(RECIPES[self.algo], self.set)


if __name__ == "__main__":
    config.show_help(RLConfig, __doc__)  # before torch is imported, which takes seconds

import copy
import math
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

import kernels
from nanopcf import checkpoint, objectives
from nanopcf.answers.mathematics import verifier
from nanopcf.data import Example, Format, batch_indices, encode_prompts, encode_trajectory, read_examples
from nanopcf.model import Transformer
from nanopcf.objectives import RECIPES, Recipe, Terms, rl_loss, token_terms
from nanopcf.optim import SCHEDULES, Optimizer, learning_rate
from nanopcf.packing import pack, token_logprobs, trained_hidden
from nanopcf.rollouts import Batch, Group, Problem, make_batch, roll_out, step_flops
from nanopcf.run import files, log, machine, parallel, signals
from nanopcf.run.folder import FREE, Metrics, open_run
from nanopcf.sampler import Sampler
from nanopcf.scoring import complete
from nanopcf.stopping import StopStrings
from nanopcf.tokenizer import TextTokenizer
from nanopcf.tools import dry_run, recipes, replay
from nanopcf.tools.metrics import mean, print_curve, progress_text, read_curve, step_metrics


def collect(
    sampler: Sampler, tokenizer: TextTokenizer, problems: list[Problem], round_: int, progress: float, c: RLConfig
) -> tuple[list[Group], list[Group], int]:
    """Roll out rounds of prompts, beginning with the run's round number `round_`. Dynamic sampling goes on until enough
    groups teach something, --max-rounds at most; otherwise one round is all.

    Returns (all groups drawn, those to train on, the number of the next round). Each process rolls out its share of a
    round, and all of them get all groups.
    """
    options = dict(group=c.group, max_new_tokens=c.max_new_tokens, temperature=c.temperature)
    options |= dict(stop_ids=tokenizer.stop_ids, decode=StopStrings(c.stop, tokenizer.decode).response)
    options |= dict(verify=verifier(c.verifier))
    dynamic = c.recipe.dynamic_sampling
    last = round_ + (c.max_rounds if dynamic else 1)
    drawn, useful = [], []
    while len(useful) < c.prompts and round_ < last:
        indices = batch_indices(len(problems), c.round_prompts if dynamic else c.prompts, round_, c.seed)
        own = parallel.share(range(len(indices)))
        mine = [problems[indices[i]] for i in own]
        groups = roll_out(sampler, c.recipe, mine, places=own, seed=(c.seed, round_), progress=progress, **options)
        groups = parallel.gathered(groups)
        drawn += groups
        useful += [g for g in groups if not dynamic or g.teaches(c.recipe)]
        round_ += 1
    return drawn, useful[: c.prompts], round_  # the surplus is dropped, as in DAPO


def judge(
    groups: list[Group], model: Transformer, reference: Transformer, c: RLConfig, require_finite: Callable
) -> Batch:
    """The groups as a batch with rewards, advantages, and the log-probs that the update compares with.
    require_finite(what, value, rows, extras) ends the run when a number is not finite, and keeps what led to it."""
    recipe, batch = c.recipe, make_batch(groups)
    rows = pack(batch.sequences, c.pack_length)
    require_finite("sum of the sampled log-probs", batch.sampler_logprobs.sum().item(), rows)
    # The ratio is taken over the policy that sampled. Its log-probs are the sampler's, which cost nothing, or the
    # trainer's where the recipe needs them: of each part packed as in its update, since rounding depends on the rows.
    # As in LUFFY, the expert's own probability counts as 1.
    batch.old_logprobs = batch.sampler_logprobs  # (N,)
    batch.one_update = len(groups) <= c.update_prompts
    if c.old_logprobs == "recomputed" or recipe.needs_old_logprobs(batch.one_update):
        parts = [make_batch(groups[i : i + c.update_prompts]) for i in range(0, len(groups), c.update_prompts)]
        parts = [pack(part.sequences, c.pack_length) for part in parts]
        scores = [token_logprobs(model, part, c.micro_rows, c.temperature) for part in parts]
        batch.old_logprobs = torch.cat([logprobs for logprobs, _ in scores])
        if recipe.expert != "prefix":
            batch.old_logprobs = torch.where(batch.is_expert, batch.sampler_logprobs, batch.old_logprobs)
    if recipe.kl_coef:
        with machine.on_device(reference, model.head_weight.device):
            batch.ref_logprobs, _ = token_logprobs(reference, rows, c.micro_rows, c.temperature)

    batch.rewards = batch.correct.clone()  # (B,)
    if recipe.overlong == "soft":
        batch.rewards += objectives.overlong_penalty(batch.lengths, c.max_new_tokens, c.overlong_cache)
    if recipe.kl_coef and recipe.kl_place == "reward":
        # The policy pays for its own tokens alone: where the expert wrote, the difference is 0.
        own_logprobs = torch.where(batch.is_expert, batch.ref_logprobs, batch.old_logprobs)
        batch.rewards -= recipe.kl_coef * objectives.kl_in_reward(own_logprobs, batch.ref_logprobs, batch.lengths)
    # Groups can differ in size (UPT), so each is normalised by itself.
    by_group = batch.rewards.split(batch.group_sizes)
    batch.advantages = torch.cat([objectives.group_advantages(r[None], recipe.advantage)[0] for r in by_group])  # (B,)
    batch.trained_lengths = batch.lengths
    if recipe.overlong == "filter":  # a response that was cut is not trained, and its reward stays in the group's mean
        batch.trained_lengths = batch.lengths.masked_fill(batch.truncated, 0)
    return batch


def update(
    model: Transformer, optimizer: Optimizer, batch: Batch, lr: float, c: RLConfig, require_finite: Callable
) -> dict:
    """One optimizer step. Returns loss, grad_norm, and by token of this process's rows: entropy [n]; without the
    expert's tokens delta [m], |trainer's - sampler's log-prob|, and clipped [m, 2], gradient lost below and above."""
    recipe, head = c.recipe, model.head_weight
    rows = pack(batch.sequences, c.pack_length)
    scored = recipe.needs_current_logprobs(batch.one_update)
    current = token_logprobs(model, rows, c.micro_rows, c.temperature) if scored else None
    # What each token brings to the loss, for the whole batch at once: its split into micro-batches changes nothing.
    terms = token_terms(recipe, batch, current, c.max_new_tokens)
    terms = Terms(*(term.to(head.device) for term in terms))  # (N,) each
    sampler_logprobs = batch.sampler_logprobs.to(head.device)
    ref_logprobs = [batch.ref_logprobs.to(head.device)] if recipe.kl_coef and recipe.kl_place == "loss" else []

    loss_fn = partial(rl_loss, recipe=recipe)
    loss_sum, entropy, delta, clipped = 0.0, [], [], []
    for micro in rows.own(head.device).split(c.micro_rows):
        hidden, targets = trained_hidden(model, micro)  # (n, D), (n,)
        place = micro.index[micro.trained]  # (n,) where these tokens stand among the N
        t = Terms(*(term[place] for term in terms))
        extras = [*t, *(ref[place] for ref in ref_logprobs)]
        # Log-probs and loss are one operation, so that no logits [n, V] are kept for backward.
        loss, stats = kernels.linear_token_loss(hidden, head, targets, loss_fn, extras, temperature=c.temperature)
        loss.backward()
        loss_sum += loss.item()
        entropy.append(stats["entropy"])
        low_high = objectives.clip_stats(stats["logprob"], t.old_logprob, t.advantage, recipe)
        clipped.append(torch.stack(low_high, dim=1)[~t.is_expert])
        delta.append((stats["logprob"] - sampler_logprobs[place])[~t.is_expert].abs())
    loss_sum = parallel.summed(loss_sum)
    require_finite("loss", loss_sum, rows, [*terms, *ref_logprobs])
    grad_norm = optimizer.step(lr, c.clip)
    require_finite("gradient's norm", grad_norm, rows, [*terms, *ref_logprobs])
    return dict(loss=loss_sum, grad_norm=grad_norm, entropy=entropy, delta=delta, clipped=clipped)


def evaluate(
    sampler: Sampler, tokenizer: TextTokenizer, examples: list[Example], temperature: float, c: RLConfig
) -> float:
    """Share of right responses to the validation problems. Each process answers its share of them."""
    own = parallel.share(range(len(examples)))
    options = dict(samples=c.eval_samples, temperature=temperature, max_new_tokens=c.max_new_tokens, seed=c.seed)
    options |= dict(places=own, format=Format(c.chat, c.template), judge=verifier(c.verifier))
    correct, _ = complete(sampler, tokenizer, [examples[i] for i in own], **options)
    return parallel.summed(float(correct.sum())) / (len(examples) * c.eval_samples)


def kl_to_start(batch: Batch, model: Transformer, reference: Transformer, c: RLConfig) -> float | None:
    """The k3 estimate of KL(policy || start of RL), on the tokens that the policy drew; None if there are none."""
    rows = pack(batch.sequences, c.pack_length)
    with machine.on_device(reference, model.head_weight.device):
        logprobs, ref_logprobs = (token_logprobs(m, rows, c.micro_rows, c.temperature)[0] for m in (model, reference))
    return mean(objectives.kl_penalty(logprobs, ref_logprobs, "k3")[~batch.is_expert])


def main(c: RLConfig) -> list[dict]:
    """Train; return the curve as dicts of step, x (FLOPs), score, greedy."""
    # ---- 1. setup ----
    recipe = c.recipe
    device = parallel.start(machine.choose_device(c.device))
    dtype = machine.choose_dtype(c.dtype, device)
    model, tokenizer = checkpoint.load(c.model, device, dtype, chat=c.chat, end_token=c.end_token)
    threads = machine.set_threads(c.threads, model)
    room = model.config.max_length - c.max_new_tokens  # tokens that a prompt may have

    def load_problems(file: str, *fields: str) -> tuple[list, list[list[int]]]:
        examples = read_examples(file, need=("prompt", "answer", *fields))
        return encode_prompts(examples, tokenizer, room, file, format=Format(c.chat, c.template), drop=c.drop_long)

    train, prompts = load_problems(c.train, *(["trajectory"] if recipe.needs_expert else []))
    val, val_prompts = load_problems(c.val)
    # An expert longer than the limit is cut there, and then has no end token.
    experts = [encode_trajectory(p, e, tokenizer)[: c.max_new_tokens] for p, e in zip(prompts, train, strict=True)]
    problems = [Problem(prompt, e.answer, x) for prompt, e, x in zip(prompts, train, experts, strict=True)]
    # The policy that RL starts from, for the KL. Where memory is short it waits on the CPU until it is asked.
    reference = copy.deepcopy(model).to("cpu" if c.shard_optimizer else device)
    model.recompute = c.recompute
    if c.compile:
        machine.compile_blocks(model)
    optimizer = Optimizer(model, c.weight_decay, c.shard_optimizer)
    longest = max(map(len, prompts + val_prompts)) + c.max_new_tokens
    slots = c.slots or machine.slots_that_fit(model, longest)
    sampler = Sampler(model, slots=slots, max_length=longest, stop=StopStrings(c.stop, tokenizer.decode))
    if c.dry_run:
        dry_run.try_rl(model, optimizer, sampler, judge, update, max(prompts, key=len), c)
        return []
    # What a resumed run needs besides weights and optimizer. drawn: rounds of prompts so far; x: FLOPs spent; ended: by
    # compute, or because no group had a signal; threads and slots, because their number decides how sums are rounded.
    state = {"step": 0, "updates": 0, "drawn": 0, "x": 0.0, "ended": False, "threads": threads, "slots": slots}

    def require_finite(what: str, value: float, rows, extras=None) -> None:
        if not math.isfinite(value):
            used = dict(recipe=recipe if extras else None, extras=extras, temperature=c.temperature)
            replay.stop(out, f"step {state['step'] + 1}: the {what} is {value}", model, tokenizer, rows, **used)

    def save() -> None:
        scores = {r["step"]: r["score"] for r in metrics.rows("score")}  # --keep spares the best checkpoint
        checkpoint.save_step(out, state["step"], model, tokenizer, optimizer, state, keep=c.keep, goodness=scores)

    # ---- 2. the run folder, and where the run stands ----
    fixed_end = c.schedule != "constant" or recipe.expert == "prefix"  # else a run may be continued with more steps
    free = FREE if fixed_end else (*FREE, "steps")
    with open_run(c.out, c, c.resume, free=free) as out, signals.stoppable() as stop_signal:
        saved = checkpoint.resume(out, model, optimizer, state)  # None if the run begins
        if saved:
            state, sampler.slots = saved, saved["slots"]
            threads = state["threads"] = machine.set_threads(c.threads or state["threads"], model)
            log.announce(f"resuming after step {state['step']}")
        metrics = Metrics(out)  # without the lines of steps that run again
        score = partial(evaluate, sampler, tokenizer, val, c=c)
        log.announce(log.header(device, threads, dtype))
        kernels.announce_path(device)
        log.announce(
            f"RL: {c.algo}, {len(train)} prompts, {model.parameter_count():,} parameters\n"
            "(on-policy the loss stays near 0: watch the reward, the gradient norm and the share of groups with signal)"
        )
        if not saved:
            metrics.log(step=0, x=0.0, score=score(c.eval_temperature), greedy=score(0.0))
        last_step = state["step"] if state["ended"] else c.steps  # a run that has ended has no steps left
        if state["step"] < last_step:
            (out / "curve.json").unlink(missing_ok=True)
        bar = log.bar(state["step"], last_step, c.steps, f"RL {out.name}")
        for step in bar:
            # ---- 3. roll out ----
            started, x_before = time.perf_counter(), state["x"]
            # With a budget of compute nobody knows the number of steps: then the schedules follow the compute spent.
            progress = state["x"] / c.max_flops if c.max_flops else step / c.steps
            roll = partial(collect, sampler, tokenizer, problems, state["drawn"], progress, c)
            drawn, groups, state["drawn"] = signals.unless_stopped(roll, out, step, save)  # a signal drops the rollouts
            state["x"] += step_flops(model.config, recipe, drawn, groups)  # dropped groups cost their generation
            if not groups:
                log.announce(f"{out.name}: no prompt gave a signal in {c.max_rounds} rounds; RL ends at step {step}")
                state["ended"] = True
                break

            # ---- 4. judge ----
            generated = time.perf_counter()  # `collect` has verified the responses too
            batch = judge(groups, model, reference, c, require_finite)

            # ---- 5. update: once, or (with --update-prompts below --prompts) several times on parts of the batch ----
            # Each part is packed anew, since fewer sequences fill other rows.
            judged, updates = time.perf_counter(), []
            for first in range(0, len(groups), c.update_prompts):
                part = batch.part(first, first + c.update_prompts)
                lr = learning_rate(state["updates"], progress, peak=c.lr, warmup=c.warmup, schedule=c.schedule)
                updates.append(update(model, optimizer, part, lr, c, require_finite))
                state["updates"] += 1  # the warm-up counts updates, the schedule follows the run
            state["step"] = step + 1  # from here on a checkpoint holds this step

            # ---- 6. log, evaluate, save ----
            clock = (started, generated, judged, time.perf_counter())
            row = dict(step=step + 1, x=state["x"], lr=lr) | step_metrics(drawn, batch, updates, clock)
            row["rounds"] = len(drawn) / (c.round_prompts if recipe.dynamic_sampling else c.prompts)
            state["ended"] = 0 < c.max_flops <= state["x"]  # the budget of compute is spent
            last = state["ended"] or step + 1 == c.steps
            due = (step + 1) % c.eval_every == 0
            if c.eval_flops:  # has this step crossed a multiple of it?
                due = state["x"] // c.eval_flops > x_before // c.eval_flops
            if due or last:
                row["score"] = score(c.eval_temperature)  # a point of the curve that the ceiling is fitted to
                row["kl_to_start"] = kl_to_start(batch, model, reference, c)
            metrics.log(**row)
            if last:  # the end below saves, whatever signal has come
                break
            number = stop_signal()  # 0 unless Ctrl-C or the like came
            if (step + 1) % c.checkpoint_every == 0 or number:
                save()
            if number:
                signals.leave(out, step + 1, number)
            bar.set_postfix_str(progress_text(row), refresh=False)

        # ---- 7. the end: the policy, and its curve ----
        parallel.wait()  # so that all processes find the same files
        if not (out / "curve.json").exists():
            save()
            names = ("step", "x", "score", "greedy", "pass_rate")
            curve = [{k: r[k] for k in names if k in r} for r in metrics.rows("score")]
            if curve[-1]["x"] < state["x"]:  # the run ended between two evaluations
                curve.append({"step": state["step"], "x": state["x"], "score": score(c.eval_temperature)})
            curve[-1]["greedy"] = score(0.0)
            if parallel.rank() == 0:
                files.write_json(out / "curve.json", {"curve": curve})
            parallel.wait()  # the others read what rank 0 has written
    return read_curve(out / "curve.json")


if __name__ == "__main__":
    if "--list" in sys.argv[1:]:
        config.run_cli(recipes.print_recipes)
    else:
        config.run_cli(lambda: print_curve(main(config.parse(RLConfig, __doc__))))
