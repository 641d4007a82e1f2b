"""Reinforcement learning with verifiable rewards: GRPO and its relatives (the second stage of the paper).

    python train_rl.py --model DIR --train F.jsonl --val F.jsonl --algo dapo_dc --out runs/rl
    python train_rl.py --list          what differs between the algorithms, as a table

A step: 1. roll out G answers to each prompt; 2. verify them, normalise within the group; 3. update on the per-token
objective. Everything an algorithm chooses stands in its row of `objectives.RECIPES`; the loop has no branch on names.
Sampled and scored distributions are the same one: the temperature divides the logits on both sides, and there is no
top-p here. Packing, masks and the way to log-probs are those of SFT.

Every `eval_every` steps the policy is scored on --val: the curve that `nanopcf.ceiling` fits. Compute is counted by
Eqs. 24 and 25. With dynamic sampling the run ends by itself when no prompt gives a signal any more.

On several GPUs: torchrun --nproc_per_node=N train_rl.py ... (`nanopcf/parallel.py`): each process rolls out its share of the
prompts, all see all groups, each trains on its share of the rows. Left out: a value function, asynchronous rollouts.
"""

import copy
import math
import sys
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import kernels
from nanopcf import checkpoint, config, flops, parallel, runs
from nanopcf.data import Format, Rows, Sequence, batch_indices, encode_prompts, pack, read_examples
from nanopcf.evaluate import complete
from nanopcf.objectives import (
    RECIPES,
    clip_stats,
    group_advantages,
    has_signal,
    kl_in_reward,
    kl_penalty,
    overlong_penalty,
    recipe_table,
    rl_loss,
    token_weights,
)
from nanopcf.optim import Optimizer
from nanopcf.rewards import verify
from nanopcf.sampler import Completion, Sampler, slots_that_fit
from train_sft import learning_rate


@dataclass(frozen=True)
class RLConfig:
    model: str  # folder of the model to start from
    train: str  # JSONL with prompt and answer
    val: str  # JSONL with prompt and answer, for the curve
    out: str  # run folder
    algo: str = "dapo_dc"  # a row of the table that --list prints
    steps: int = 100  # rollout batches
    prompts: int = 32  # prompts a batch
    group: int = 8  # answers a prompt
    update_prompts: int = 32  # prompts an optimizer step; fewer than --prompts gives several a batch
    round_prompts: int = 32  # dynamic sampling: prompts a round of generation
    max_rounds: int = 4  # dynamic sampling: rounds a batch at most; then train on what was found
    lr: float = 5e-4  # peak learning rate
    schedule: str = "constant"  # constant or cosine (to a tenth), after the warm-up
    warmup: int = 5  # optimizer steps of linear warm-up
    weight_decay: float = 0.0  # AdamW's, on matrices
    clip: float = 1.0  # largest norm of the gradient
    temperature: float = 1.0  # of the rollouts, and of the log-probs that are trained
    max_new_tokens: int = 32  # longest answer
    overlong_cache: int = 8  # soft overlong penalty: tokens before the limit where it starts
    old_logprobs: str = "sampler"  # sampler, or recomputed by the trainer before the update
    eval_every: int = 10  # batches between two points of the curve
    eval_samples: int = 1  # answers a validation problem
    eval_temperature: float = 0.7  # of the curve, as in the paper
    checkpoint_every: int = 50  # batches between checkpoints
    slots: int = 0  # sequences generated at a time (0: what memory holds, at most 256)
    pack_length: int = 128  # tokens a packed row
    micro_rows: int = 64  # packed rows a forward pass
    chat: bool = False  # put each prompt into the model's chat template
    template: str = "{prompt}"  # text around each prompt
    drop_long: bool = False  # leave out prompts that leave no room for an answer, and count them
    seed: int = 0  # data order and sampling
    threads: int = 0  # CPU threads (0: 1 for a small model, else all cores)
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # float32 or bfloat16 (auto: bfloat16 on CUDA); the optimizer is float32
    resume: bool = False  # continue the run in --out

    def __post_init__(self) -> None:
        if self.algo not in RECIPES:
            raise ValueError(f"--algo: no {self.algo!r}{config.near(self.algo, list(RECIPES))}; see --list")
        for name in (
            "steps prompts group update_prompts round_prompts max_rounds max_new_tokens eval_every eval_samples "
            "checkpoint_every pack_length micro_rows"
        ).split():
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.slots < 0 or self.threads < 0:
            raise ValueError("--slots and --threads can't be negative")
        if self.temperature <= 0:
            raise ValueError("--temperature must be above 0: a greedy rollout has nothing to learn from")
        if self.old_logprobs not in ("sampler", "recomputed"):
            raise ValueError(f"--old-logprobs must be sampler or recomputed, got {self.old_logprobs!r}")
        if self.lr <= 0 or self.clip <= 0:
            raise ValueError("--lr and --clip must be above 0")


@dataclass
class Group:
    """The G answers to one prompt."""

    prompt: list[int]
    answers: list[Completion]
    correct: Tensor  # [G] of 0/1


@torch.no_grad()
def score_tokens(
    model: torch.nn.Module, rows: Rows, micro_rows: int, count: int, temperature: float
) -> Tensor:
    """Log-probs of all `count` trained tokens of packed rows, in their flat order: [count] float32, on the CPU.

    Each process scores its share of the rows.
    """
    device = model.head_weight.device
    logprobs = torch.zeros(count, device=device)
    for part in rows.map(lambda t: parallel.share(t).to(device)).split(micro_rows):
        hidden = model(part.tokens, positions=part.positions, documents=part.documents)
        hidden, targets = hidden[part.trained], part.targets[part.trained]
        logprobs[part.index[part.trained]] = kernels.linear_logprob(
            hidden, model.head_weight, targets, temperature=temperature
        )
    parallel.total([logprobs])
    return logprobs.cpu()


def together(parts: list[Tensor]) -> Tensor:
    """Token statistics of all micro-batches and processes, on the CPU."""
    own = [torch.cat(parts).cpu()] if parts else []
    return torch.cat([t for part in parallel.gathered([own]) for t in part])


def main(c: RLConfig) -> list[dict]:
    """Train; return the curve as dicts of step, x (FLOPs), score, greedy."""
    # ---- 1. setup ----
    device = parallel.start(runs.choose_device(c.device))
    to_device = lambda t: t.to(device)  # noqa: E731
    recipe = RECIPES[c.algo]
    dtype = runs.choose_dtype(c.dtype, device)
    model, tokenizer = checkpoint.load(c.model, device, dtype)
    threads = runs.set_threads(c.threads, model.parameter_count())
    room = model.config.max_length - c.max_new_tokens  # for prompts
    form = Format(c.chat, c.template)
    (train, prompt_ids), (val, val_ids) = (
        encode_prompts(
            read_examples(file, need=("prompt", "answer")),
            tokenizer,
            room,
            file,
            format=form,
            drop=c.drop_long,
        )
        for file in (c.train, c.val)
    )
    out = runs.open_run(c.out, c, c.resume, free=("device", "threads"))
    reference = copy.deepcopy(model)  # where RL started: for the KL term and the KL metric
    optimizer = Optimizer(model, c.weight_decay)
    longest = max(map(len, prompt_ids + val_ids)) + c.max_new_tokens
    slots = c.slots or slots_that_fit(model, longest)
    sampler = Sampler(model, slots=slots, max_length=model.config.max_length)
    # drawn: rounds of prompts; x: FLOPs spent; ended: no signal is left
    state = {"step": 0, "updates": 0, "drawn": 0, "x": 0.0, "ended": False}
    saved = runs.checkpoints(out)
    if saved:
        state = checkpoint.load_training(saved[-1][1], model, optimizer)
        runs.announce(f"resuming after step {state['step']}")
    metrics = runs.Metrics(out, state["step"])
    runs.announce(runs.header(device, threads, dtype))
    kernels.path(None, device)  # says which one
    runs.announce(
        f"RL: {c.algo}, {len(train)} prompts, {model.parameter_count():,} parameters\n"
        "(on-policy the loss stays near 0: watch the reward, the gradient norm and the share of groups with signal)"
    )

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

    def roll_out(round_: int, prompts: int) -> list[Group]:
        """Round `round_` of generation: what it draws depends on (seed, round_) alone. Each process does its share."""
        drawn = batch_indices(len(train), prompts, round_, c.seed)
        own = parallel.share(range(len(drawn)))
        answers = sampler.generate(
            [prompt_ids[drawn[j]] for j in own],
            n=c.group,
            max_new_tokens=c.max_new_tokens,
            temperature=c.temperature,
            stop_ids=tokenizer.stop_ids,
            seed=hash((c.seed, round_)),
            places=own,
        )
        groups = []
        for k, j in enumerate(own):
            mine = answers[k * c.group : (k + 1) * c.group]
            answer = train[drawn[j]].answer
            correct = torch.tensor([verify(tokenizer.decode(a.tokens), answer) for a in mine])
            groups.append(Group(prompt_ids[drawn[j]], mine, correct))
        return parallel.gathered(groups)

    def save() -> None:
        if parallel.rank() == 0:
            folder = out / "checkpoints" / f"step-{state['step']}"
            checkpoint.save_training(folder, model, tokenizer, optimizer, state)
        parallel.wait()

    # ---- 2. the loop ----
    if not saved:
        metrics.log(step=0, x=0.0, score=evaluate(c.eval_temperature), greedy=evaluate(0.0))
    bar = tqdm(
        range(state["step"], state["step"] if state["ended"] else c.steps),
        initial=state["step"],
        total=c.steps,
        desc=f"RL {out.name}",
        leave=False,
        mininterval=0.5,
        disable=parallel.rank() > 0,
    )
    for step in bar:
        began = time.perf_counter()
        # ---- 3. rollouts (dynamic sampling: rounds, until enough groups have a signal) ----
        groups: list[Group] = []
        seen: list[Group] = []
        for _ in range(c.max_rounds if recipe.dynamic_sampling else 1):
            fresh = roll_out(state["drawn"], c.round_prompts if recipe.dynamic_sampling else c.prompts)
            state["drawn"] += 1
            seen += fresh
            groups += [g for g in fresh if not recipe.dynamic_sampling or has_signal(g.correct[None])[0]]
            if len(groups) >= c.prompts:
                break
        groups = groups[: c.prompts]  # the surplus is dropped, as in DAPO
        generated = time.perf_counter()

        lengths_seen = [len(g.prompt) + len(a.tokens) for g in seen for a in g.answers]
        state["x"] += flops.rl_step(
            model.config, len(seen), c.group, float(np.mean(lengths_seen)), train_prompts=len(groups)
        )
        if not groups:
            runs.announce(
                f"{out.name}: no prompt gave a signal in {c.max_rounds} rounds; RL ends at step {step}"
            )
            break

        # ---- 4. rewards and advantages ----
        answers = [a for g in groups for a in g.answers]
        sequences = [Sequence(g.prompt + a.tokens, len(g.prompt)) for g in groups for a in g.answers]
        lengths = torch.tensor([len(a.tokens) for a in answers])
        truncated = torch.tensor([a.finish_reason == "length" for a in answers])
        sampled = torch.tensor([lp for a in answers for lp in a.logprobs])  # flat, (N,)
        old, ref = sampled, None
        if c.old_logprobs == "recomputed" or recipe.kl_coef:
            rows = pack(sequences, c.pack_length)
            if c.old_logprobs == "recomputed":
                old = score_tokens(model, rows, c.micro_rows, len(sampled), c.temperature)
            if recipe.kl_coef:
                ref = score_tokens(reference, rows, c.micro_rows, len(sampled), c.temperature)
        rewards = torch.stack([g.correct for g in groups])  # (P, G)
        if recipe.overlong == "soft":
            rewards = rewards + overlong_penalty(lengths, c.max_new_tokens, c.overlong_cache).view_as(rewards)
        if recipe.kl_coef and recipe.kl_place == "reward":
            rewards = rewards - recipe.kl_coef * kl_in_reward(old, ref, lengths).view_as(rewards)
        advantages = group_advantages(rewards, recipe.advantage).flatten()  # (P * G,)
        trained_lengths = lengths.masked_fill(truncated, 0) if recipe.overlong == "filter" else lengths

        # ---- 5. update ----
        per_update = c.update_prompts * c.group  # sequences an optimizer step
        starts = [0, *lengths.cumsum(0).tolist()]  # of each sequence in the flat vectors
        losses, norms = [], []
        entropies, deltas, clipped = [], [], []  # of this process's tokens
        for first in range(0, len(sequences), per_update):
            part = slice(first, first + per_update)
            flat = slice(starts[first], starts[min(first + per_update, len(sequences))])
            per_token = partial(torch.repeat_interleave, repeats=lengths[part])
            weights = token_weights(trained_lengths[part], recipe.aggregation, c.max_new_tokens)
            extras = [old[flat], per_token(advantages[part]), per_token(weights)]
            if recipe.kl_coef and recipe.kl_place == "loss":
                extras.append(ref[flat])
            extras = [to_device(e) for e in extras]
            loss_sum = 0.0
            packed = pack(sequences[part], c.pack_length).map(lambda t: parallel.share(t).to(device))
            for rows in packed.split(c.micro_rows):
                at = rows.index[rows.trained]
                hidden = model(rows.tokens, positions=rows.positions, documents=rows.documents)
                loss, stats = kernels.linear_token_loss(
                    hidden[rows.trained],
                    model.head_weight,
                    rows.targets[rows.trained],
                    partial(rl_loss, recipe=recipe),
                    [e[at] for e in extras],
                    temperature=c.temperature,
                )
                loss.backward()
                loss_sum += loss.item()
                entropies.append(stats["entropy"])
                low, high = clip_stats(
                    stats["logprob"], extras[0][at], extras[1][at], recipe.clip_low, recipe.clip_high
                )
                clipped.append(torch.stack([low, high], dim=1))
                if first == 0:  # still the weights that sampled: sampler and trainer should agree
                    deltas.append((stats["logprob"] - to_device(sampled[flat])[at]).abs())
            losses.append(parallel.summed(loss_sum))
            if not math.isfinite(losses[-1]):
                raise ValueError(f"step {step + 1}: the loss is {losses[-1]}; try a lower --lr")
            lr = learning_rate(
                state["updates"], peak=c.lr, warmup=c.warmup, steps=c.steps, schedule=c.schedule
            )
            norms.append(optimizer.step(lr, c.clip, step + 1))
            state["updates"] += 1
        state["step"] = step + 1

        # ---- 6. log, evaluate, save ----
        now = time.perf_counter()
        all_correct = torch.stack([g.correct for g in seen])  # (drawn, G)
        entropy, delta, clipped = (together(part) for part in (entropies, deltas, clipped))
        row = dict(
            step=step + 1,
            x=state["x"],
            pass_rate=all_correct.mean().item(),
            reward=rewards.mean().item(),
            signal_share=has_signal(all_correct).float().mean().item(),
            rounds=len(seen) / (c.round_prompts if recipe.dynamic_sampling else c.prompts),
            length=lengths.float().mean().item(),
            truncated_share=truncated.float().mean().item(),
            entropy=entropy.mean().item(),
            clip_low=clipped[:, 0].float().mean().item(),
            clip_high=clipped[:, 1].float().mean().item(),
            delta_logprob_mean=delta.mean().item(),
            delta_logprob_max=delta.max().item(),
            loss=sum(losses),
            grad_norm=float(np.mean(norms)),
            lr=lr,
            tokens_per_s=round(sum(lengths_seen) / (now - began)),
            generation_share=(generated - began) / (now - began),
            peak_memory_mib=torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None,
        )
        last = step + 1 == c.steps
        if (step + 1) % c.eval_every == 0 or last:
            row["score"] = evaluate(c.eval_temperature)
            rows = pack(sequences, c.pack_length)
            now_logprob, start_logprob = (
                score_tokens(m, rows, c.micro_rows, len(sampled), c.temperature) for m in (model, reference)
            )
            row["kl_to_start"] = kl_penalty(now_logprob, start_logprob, "k3").mean().item()
        metrics.log(**row)
        if (step + 1) % c.checkpoint_every == 0 and not last:
            save()
        bar.set_postfix_str(f"pass {row['pass_rate']:.2f}, signal {row['signal_share']:.2f}", refresh=False)

    # ---- 7. the end: the policy, and its curve ----
    parallel.wait()
    if not (out / "curve.json").exists():
        save()
        rows = runs.read_metrics(metrics.path)
        curve = [{k: r[k] for k in ("step", "x", "score", "greedy") if k in r} for r in rows if "score" in r]
        if curve[-1]["x"] < state["x"]:  # ended between two evaluations
            curve.append({"step": state["step"], "x": state["x"], "score": evaluate(c.eval_temperature)})
        curve[-1]["greedy"] = evaluate(0.0)
        if parallel.rank() == 0:
            runs.write_json(out / "curve.json", {"curve": curve})
        parallel.wait()
    return runs.read_json(out / "curve.json")["curve"]


def print_curve(curve: list[dict]) -> None:
    print(f"{'step':>6} {'FLOPs':>10} {'score':>7}")
    for point in curve:
        print(f"{point['step']:>6} {point['x']:>10.3g} {point['score']:>7.1%}")
    print(f"greedy: {curve[0]['greedy']:.1%} -> {curve[-1]['greedy']:.1%}")


if __name__ == "__main__":
    if "--list" in sys.argv[1:]:
        print(recipe_table())
    else:
        config.run_cli(lambda: print_curve(main(config.parse(RLConfig, __doc__.split("\n\n")[0]))))
