"""Reinforcement learning with verifiable rewards, with and without an expert's help (the second stage of the paper).

    python train_rl.py --model DIR --train F.jsonl --val F.jsonl --algo dapo_dc --out runs/rl
    python train_rl.py --list          what differs between the algorithms, as a table

A step: 1. roll out a group of answers to each prompt; 2. verify them, normalise within the group; 3. update on the
per-token objective. Everything an algorithm chooses stands in its row of `objectives.RECIPES`; the loop has no branch on
names. A group may hold an expert trajectory, or an answer that an expert began (`nanopcf/rollouts.py`).
Sampled and scored distributions are the same one: the temperature divides the logits on both sides, and there is no
top-p here. Packing, masks and the way to log-probs are those of SFT.

Every `eval_every` steps, or every `eval_flops` of compute, the policy is scored on --val: the curve that `nanopcf.ceiling`
fits. Compute is counted by Eqs. 23-29. With dynamic sampling the run ends by itself when no prompt gives a signal any more.

On several GPUs: torchrun --nproc_per_node=N train_rl.py ... (`nanopcf/parallel.py`): each process rolls out its share of the
prompts, all see all groups, each trains on its share of the rows. Left out: a value function, asynchronous rollouts.
"""

from dataclasses import dataclass
from typing import Literal

from nanopcf.run import config
from nanopcf.run.config import Count, Device, DType, Natural, NonNegative, Positive


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
    temperature: float = 1.0  # of the rollouts, and of the trained log-probs
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
    template: str = "{prompt}"  # text around each prompt
    drop_long: bool = False  # leave out prompts too long for an answer, and count
    seed: int = 0  # of the data order and the sampling
    threads: Natural = 0  # CPU threads (0: found by a probe)
    device: Device = "auto"  # auto, cpu, cuda or mps
    dtype: DType = "auto"  # float32 or bfloat16; auto: bfloat16 on CUDA
    compile: bool = False  # torch.compile the update: on a CPU it pays late
    recompute: bool = False  # activations again in backward: less memory, slower
    dry_run: bool = False  # try the largest batch, and write nothing
    resume: bool = False  # continue the run in --out

    def __post_init__(self) -> None:
        super().__post_init__()
        config.one_of(self, algo=RECIPES, schedule=SCHEDULES)
        if self.recipe.expert in ("beside", "prefix") and self.group < 2:
            raise ValueError(f"--group must be at least 2 with {self.algo}: the expert takes one place")
        if not self.temperature > 0:
            raise ValueError("--temperature must be above 0: a greedy rollout has nothing to learn from")

    @property
    def recipe(self) -> "Recipe":
        return with_choices(RECIPES[self.algo], self.set)


if __name__ == "__main__":
    config.show_help(RLConfig, __doc__)  # before torch is imported, which takes seconds

import copy
import math
import sys
import time
from functools import partial

import numpy as np
import torch
from torch import Tensor

import kernels
from nanopcf import checkpoint
from nanopcf.data import Format, encode_prompts, read_examples
from nanopcf.objectives import (
    RECIPES,
    Recipe,
    Terms,
    clip_stats,
    group_advantages,
    kl_in_reward,
    kl_penalty,
    overlong_penalty,
    recipe_table,
    rl_loss,
    token_terms,
    with_choices,
)
from nanopcf.optim import SCHEDULES, Optimizer, learning_rate
from nanopcf.packing import Rows, Sequence, batch_indices, pack, trained_hidden
from nanopcf.rollouts import Group, Problem, complete, roll_out, step_flops
from nanopcf.run import files, log, machine, parallel, signals
from nanopcf.run.folder import Metrics, checkpoints, open_run
from nanopcf.sampler import Sampler, slots_that_fit
from nanopcf.tools import replay


@torch.no_grad()
def score_tokens(
    model: torch.nn.Module, rows: Rows, micro_rows: int, count: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies at all `count` trained tokens of packed rows, in their flat order: [count] float32, CPU.

    Each process scores its share of the rows.
    """
    device = model.head_weight.device
    found = torch.zeros(2, count, device=device)
    for part in rows.own(device).split(micro_rows):
        hidden, targets = trained_hidden(model, part)
        scores = kernels.linear_logprob(hidden, model.head_weight, targets, temperature=temperature, entropy=True)
        found[:, part.index[part.trained]] = torch.stack(scores)
    parallel.total([found])
    return tuple(found.cpu())


def together(parts: list[Tensor]) -> Tensor:
    """Token statistics of all micro-batches and processes, on the CPU."""
    own = [torch.cat(parts).cpu()] if parts else []
    return torch.cat([t for part in parallel.gathered([own]) for t in part])


def try_longest(
    model: torch.nn.Module, optimizer: Optimizer, sampler: Sampler, c: RLConfig, prompt: list[int], device
) -> None:
    """The longest prompt in every slot, answered to the limit; then one update on --micro-rows rows of that length."""
    length = max(len(prompt) + c.max_new_tokens, c.pack_length)
    rows = pack([Sequence([0] * length, 1)] * min(c.micro_rows, c.update_prompts * c.group), length)
    rows = rows.to(device)
    zeros = torch.zeros(rows.tokens.numel(), device=device)

    def generate() -> None:
        prompts = [prompt] * sampler.slots
        sampler.generate(prompts, max_new_tokens=c.max_new_tokens, temperature=c.temperature)

    def update() -> None:
        hidden, targets = trained_hidden(model, rows)
        terms = [zeros[: len(hidden)]] * 4 + [zeros[: len(hidden)].bool()]
        loss, _ = kernels.linear_token_loss(
            hidden, model.head_weight, targets, partial(rl_loss, recipe=c.recipe), terms
        )
        loss.backward()
        optimizer.step(0.0, c.clip)

    machine.try_out(f"generating {sampler.slots} answers of {c.max_new_tokens} tokens", generate, device)
    machine.try_out(f"an update of {len(rows.tokens)} rows of {length} tokens", update, device)


def mean(values: Tensor) -> float | None:
    return values.float().mean().item() if len(values) else None


def main(c: RLConfig) -> list[dict]:
    """Train; return the curve as dicts of step, x (FLOPs), score, greedy."""
    # ---- 1. setup ----
    device = parallel.start(machine.choose_device(c.device))
    recipe = c.recipe
    dtype = machine.choose_dtype(c.dtype, device)
    model, tokenizer = checkpoint.load(c.model, device, dtype)
    threads = machine.set_threads(c.threads, model)
    room = model.config.max_length - c.max_new_tokens  # for prompts
    form = Format(c.chat, c.template)
    asked = ("prompt", "answer")
    taught = asked if recipe.expert == "none" else (*asked, "trajectory")
    (train, prompt_ids), (val, val_ids) = (
        encode_prompts(read_examples(file, need=need), tokenizer, room, file, format=form, drop=c.drop_long)
        for file, need in ((c.train, taught), (c.val, asked))
    )
    # an expert longer than the limit is cut there, and then has no end token
    experts = [tokenizer.encode_answer(e.trajectory)[: c.max_new_tokens] for e in train]
    problems = [Problem(ids, e.answer, x) for ids, e, x in zip(prompt_ids, train, experts, strict=True)]
    reference = copy.deepcopy(model)  # where RL started: for the KL term and the KL metric
    model.recompute = c.recompute
    if c.compile:
        model.compile_blocks()
    optimizer = Optimizer(model, c.weight_decay)
    longest = max(map(len, prompt_ids + val_ids)) + c.max_new_tokens
    slots = c.slots or slots_that_fit(model, longest)
    sampler = Sampler(model, slots=slots, max_length=model.config.max_length)
    if c.dry_run:
        try_longest(model, optimizer, sampler, c, max(prompt_ids, key=len), device)
        return []
    # drawn: rounds of prompts; x: FLOPs spent; ended: by compute or for want of a signal; threads: rounding depends on them
    state = {"step": 0, "updates": 0, "drawn": 0, "x": 0.0, "ended": False, "threads": threads}

    def evaluate(temperature: float) -> float:
        options = dict(max_new_tokens=c.max_new_tokens, slots=slots, seed=c.seed, format=form)
        own = parallel.share(range(len(val)))
        correct, _ = complete(
            model,
            tokenizer,
            [val[i] for i in own],
            samples=c.eval_samples,
            temperature=temperature,
            places=own,
            **options,
        )
        return parallel.summed(float(correct.sum())) / (len(val) * c.eval_samples)

    def draw_groups(round_: int, prompts: int, progress: float) -> list[Group]:
        """Round `round_` of rollouts; each process does its share."""
        drawn = batch_indices(len(train), prompts, round_, c.seed)
        own = parallel.share(range(len(drawn)))
        groups = roll_out(
            sampler,
            recipe,
            [problems[drawn[j]] for j in own],
            places=own,
            group=c.group,
            decode=tokenizer.decode,
            max_new_tokens=c.max_new_tokens,
            temperature=c.temperature,
            stop_ids=tokenizer.stop_ids,
            seed=(c.seed, round_),
            progress=progress,
        )
        return parallel.gathered(groups)

    def check(step: int, what: str, value: float, rows: Rows, extras: list[Tensor] | None = None) -> None:
        if not math.isfinite(value):
            used = dict(recipe=recipe if extras else None, extras=extras, temperature=c.temperature)
            replay.stop(out, f"step {step}: the {what} is {value}", model, tokenizer, rows, **used)

    def save() -> None:
        scores = {r["step"]: r["score"] for r in metrics.rows("score")}
        checkpoint.save_step(out, state["step"], model, tokenizer, optimizer, state, keep=c.keep, goodness=scores)

    # ---- 2. the run folder, and where the run stands ----
    with open_run(c.out, c, c.resume, free=("device", "threads")) as out, signals.stoppable() as stop_signal:
        saved = checkpoints(out)
        if saved:
            state = checkpoint.load_training(saved[-1][1], model, optimizer, state)
            threads = state["threads"] = machine.set_threads(c.threads or state["threads"], model)
            log.announce(f"resuming after step {state['step']}")
        metrics = Metrics(out, state["step"] if saved else -1)
        log.announce(log.header(device, threads, dtype))
        kernels.path(None, device)  # says which one
        log.announce(
            f"RL: {c.algo}, {len(train)} prompts, {model.parameter_count():,} parameters\n"
            "(on-policy the loss stays near 0: watch the reward, the gradient norm and the share of groups with signal)"
        )
        if not saved:
            metrics.log(step=0, x=0.0, score=evaluate(c.eval_temperature), greedy=evaluate(0.0))
        bar = log.bar(state["step"], state["step"] if state["ended"] else c.steps, c.steps, f"RL {out.name}")
        for step in bar:
            began = time.perf_counter()
            # ---- 3. rollouts (dynamic sampling: rounds, until enough groups have a signal) ----
            progress = state["x"] / c.max_flops if c.max_flops else step / c.steps
            groups: list[Group] = []
            seen: list[Group] = []
            for _ in range(c.max_rounds if recipe.dynamic_sampling else 1):
                prompts = c.round_prompts if recipe.dynamic_sampling else c.prompts
                fresh = draw_groups(state["drawn"], prompts, progress)
                state["drawn"] += 1
                seen += fresh
                groups += [g for g in fresh if g.has_signal or not recipe.dynamic_sampling]
                if len(groups) >= c.prompts:
                    break
            groups = groups[: c.prompts]  # the surplus is dropped, as in DAPO
            generated = time.perf_counter()

            x_before = state["x"]
            state["x"] += step_flops(model.config, recipe, seen, groups)
            if not groups:
                log.announce(f"{out.name}: no prompt gave a signal in {c.max_rounds} rounds; RL ends at step {step}")
                state["ended"] = True
                break

            # ---- 4. rewards and advantages: a number a sequence (B of them), or a token (N) ----
            rollouts = [r for g in groups for r in g.rollouts]
            sequences = [Sequence(g.prompt + r.tokens, len(g.prompt)) for g in groups for r in g.rollouts]
            lengths = torch.tensor([len(r.tokens) for r in rollouts])
            truncated = torch.tensor([r.truncated for r in rollouts])
            correct = torch.tensor([r.correct for r in rollouts])
            sampled = torch.tensor([lp for r in rollouts for lp in r.logprobs])
            expert = torch.tensor([t < r.expert for r in rollouts for t in range(len(r.tokens))])
            old, ref = sampled, None
            rows = pack(sequences, c.pack_length)
            check(step + 1, "sum of the sampled log-probs", sampled.sum().item(), rows)
            if c.old_logprobs == "recomputed" or recipe.needs_old:
                old, _ = score_tokens(model, rows, c.micro_rows, len(sampled), c.temperature)
                if recipe.expert != "prefix":
                    old = torch.where(expert, sampled, old)
            if recipe.kl_coef:
                ref, _ = score_tokens(reference, rows, c.micro_rows, len(sampled), c.temperature)
            rewards = correct.clone()
            if recipe.overlong == "soft":
                rewards += overlong_penalty(lengths, c.max_new_tokens, c.overlong_cache)
            if recipe.kl_coef and recipe.kl_place == "reward":
                rewards -= recipe.kl_coef * kl_in_reward(torch.where(expert, ref, old), ref, lengths)
            sizes = [len(g.rollouts) for g in groups]
            advantages = torch.cat([group_advantages(r[None], recipe.advantage)[0] for r in rewards.split(sizes)])
            trained_lengths = lengths.masked_fill(truncated, 0) if recipe.overlong == "filter" else lengths

            # ---- 5. update ----
            scored = time.perf_counter()
            first_of = [0, *np.cumsum(sizes)]  # sequence of each group, token of each sequence
            token_of = [0, *lengths.cumsum(0).tolist()]
            losses, norms = [], []
            entropies, deltas, clipped = [], [], []  # of this process's tokens
            for first in range(0, len(groups), c.update_prompts):
                part = slice(first_of[first], first_of[min(first + c.update_prompts, len(groups))])
                flat = slice(token_of[part.start], token_of[part.stop])
                packed = pack(sequences[part], c.pack_length)
                current = None
                if recipe.needs_current:
                    current = score_tokens(model, packed, c.micro_rows, flat.stop - flat.start, c.temperature)
                terms = token_terms(
                    recipe,
                    advantages=advantages[part],
                    correct=correct[part],
                    lengths=lengths[part],
                    trained_lengths=trained_lengths[part],
                    expert=expert[flat],
                    sampled=sampled[flat],
                    old=old[flat],
                    current=current,
                    max_length=c.max_new_tokens,
                )
                terms = Terms(*(t.to(device) for t in terms))
                extras = [*terms]
                if recipe.kl_coef and recipe.kl_place == "loss":
                    extras.append(ref[flat].to(device))
                loss_sum = 0.0
                for micro in packed.own(device).split(c.micro_rows):
                    hidden, targets = trained_hidden(model, micro)
                    at = micro.index[micro.trained]
                    loss, stats = kernels.linear_token_loss(
                        hidden,
                        model.head_weight,
                        targets,
                        partial(rl_loss, recipe=recipe),
                        [e[at] for e in extras],
                        temperature=c.temperature,
                    )
                    loss.backward()
                    loss_sum += loss.item()
                    entropies.append(stats["entropy"])
                    own = ~terms.expert[at]
                    pair = clip_stats(stats["logprob"], terms.old_logprob[at], terms.advantage[at], recipe)
                    clipped.append(torch.stack(pair, dim=1)[own])
                    if first == 0:  # still the weights that sampled: sampler and trainer should agree
                        deltas.append((stats["logprob"] - sampled[flat].to(device)[at])[own].abs())
                losses.append(parallel.summed(loss_sum))
                check(step + 1, "loss", losses[-1], packed, extras)
                lr = learning_rate(state["updates"], progress, peak=c.lr, warmup=c.warmup, schedule=c.schedule)
                norms.append(optimizer.step(lr, c.clip))
                check(step + 1, "gradient's norm", norms[-1], packed, extras)
                state["updates"] += 1
            state["step"] = step + 1

            # ---- 6. log, evaluate, save ----
            now = time.perf_counter()
            tried = [torch.tensor([r.correct for r in g.tried]) for g in seen]
            generated_tokens = sum(len(g.prompt) + len(r.tokens) for g in seen for r in (g.tried or g.rollouts))
            entropy, delta, clipped = (together(part) for part in (entropies, deltas, clipped))
            row = dict(
                step=step + 1,
                x=state["x"],
                pass_rate=mean(torch.cat(tried)),
                reward=mean(rewards),
                signal_share=float(np.mean([g.has_signal for g in seen])),
                rounds=len(seen) / (c.round_prompts if recipe.dynamic_sampling else c.prompts),
                length=mean(lengths),
                truncated_share=mean(truncated),
                expert_share=mean(expert),
                entropy=mean(entropy),
                clip_low=mean(clipped[:, 0]),
                clip_high=mean(clipped[:, 1]),
                delta_logprob_mean=mean(delta),
                delta_logprob_max=delta.max().item() if len(delta) else None,
                loss=sum(losses),
                grad_norm=float(np.mean(norms)),
                lr=lr,
                seconds=now - began,
                tokens_per_s=round(generated_tokens / (now - began)),
                generation_share=(generated - began) / (now - began),
                scoring_share=(scored - generated) / (now - began),
                update_share=(now - scored) / (now - began),
                peak_memory_mib=torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None,
            )
            spent = 0 < c.max_flops <= state["x"]
            state["ended"] = spent
            last = spent or step + 1 == c.steps
            due = (step + 1) % c.eval_every == 0
            if c.eval_flops:
                due = state["x"] // c.eval_flops > x_before // c.eval_flops
            if due or last:
                row["score"] = evaluate(c.eval_temperature)
                rows = pack(sequences, c.pack_length)
                (now_logprob, _), (start_logprob, _) = (
                    score_tokens(m, rows, c.micro_rows, len(sampled), c.temperature) for m in (model, reference)
                )
                row["kl_to_start"] = mean(kl_penalty(now_logprob, start_logprob, "k3"))
            metrics.log(**row)
            if last:
                break
            number = stop_signal()
            if (step + 1) % c.checkpoint_every == 0 or number:
                save()
            if number:
                signals.leave(out, step + 1, number)
            shown = f"signal {row['signal_share']:.2f}"
            shown = shown if row["pass_rate"] is None else f"pass {row['pass_rate']:.2f}, {shown}"
            bar.set_postfix_str(f"{shown}, {row['generation_share']:.0%} generating", refresh=False)

        # ---- 7. the end: the policy, and its curve ----
        parallel.wait()
        if not (out / "curve.json").exists():
            save()
            names = ("step", "x", "score", "greedy")
            curve = [{k: r[k] for k in names if k in r} for r in metrics.rows("score")]
            if curve[-1]["x"] < state["x"]:  # ended between two evaluations
                curve.append({"step": state["step"], "x": state["x"], "score": evaluate(c.eval_temperature)})
            curve[-1]["greedy"] = evaluate(0.0)
            if parallel.rank() == 0:
                files.write_json(out / "curve.json", {"curve": curve})
            parallel.wait()
    return files.read_json(out / "curve.json")["curve"]


def print_curve(curve: list[dict]) -> None:
    if not curve:  # a dry run
        return
    print(f"{'step':>6} {'FLOPs':>10} {'score':>7}")
    for point in curve:
        print(f"{point['step']:>6} {point['x']:>10.3g} {point['score']:>7.1%}")
    print(f"greedy: {curve[0]['greedy']:.1%} -> {curve[-1]['greedy']:.1%}")


if __name__ == "__main__":
    if "--list" in sys.argv[1:]:
        print(recipe_table())
        print("\nchoices, for --set:")
        for name, comment in config.field_help(Recipe).items():
            print(f"  {name:<18}{comment}")
    else:
        config.run_cli(lambda: print_curve(main(config.parse(RLConfig, __doc__))))
