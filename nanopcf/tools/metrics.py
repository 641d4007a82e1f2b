"""What a step of RL reports: the columns of metrics.jsonl that describe its rollouts and updates (docs/metrics.md)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanopcf.answers.mathematics import take_cut_off
from nanopcf.rollouts import Batch, Group
from nanopcf.run import files, parallel


def mean(values: Tensor) -> float | None:
    return values.float().mean().item() if len(values) else None


def together(parts: list[Tensor]) -> Tensor:
    """Statistics of tokens from all micro-batches and all processes, in one tensor on the CPU."""
    own = [torch.cat(parts).cpu()] if parts else []
    return torch.cat([t for part in parallel.gathered([own]) for t in part])


def step_metrics(drawn: list[Group], batch: Batch, updates: list[dict], clock: tuple[float, ...]) -> dict:
    """drawn: all groups of the step; batch: those that were trained; updates: what `train_rl.update` returned; clock:
    seconds at the start of the step and after generating, judging and updating."""
    entropy = together([t for u in updates for t in u["entropy"]])  # (N,)
    clipped = together([t for u in updates for t in u["clipped"]])  # (N without expert tokens, 2)
    # Before the first update the weights are still those that sampled, so sampler and trainer should agree.
    delta = together(updates[0]["delta"])
    started, generated, judged, ended = clock
    seconds = ended - started
    tokens = sum(len(g.prompt) + len(r.tokens) for g in drawn for r in (g.tried or g.rollouts))
    return dict(
        pass_rate=mean(torch.cat([torch.tensor([r.correct for r in g.tried]) for g in drawn])),
        reward=mean(batch.rewards),
        signal_share=float(np.mean([g.has_signal for g in drawn])),
        length=mean(batch.lengths),
        truncated_share=mean(batch.truncated),
        judge_cut_off=int(parallel.summed(take_cut_off())),
        expert_share=mean(batch.is_expert),
        entropy=mean(entropy),
        clip_low=mean(clipped[:, 0]),
        clip_high=mean(clipped[:, 1]),
        delta_logprob_mean=mean(delta),
        delta_logprob_max=delta.max().item() if len(delta) else None,
        loss=sum(u["loss"] for u in updates),
        grad_norm=float(np.mean([u["grad_norm"] for u in updates])),
        seconds=seconds,
        tokens_per_s=round(tokens / seconds),
        generation_share=(generated - started) / seconds,
        scoring_share=(judged - generated) / seconds,
        update_share=(ended - judged) / seconds,
        peak_memory_mib=torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_initialized() else None,
    )


def progress_text(row: dict) -> str:
    """What the progress bar shows of a step."""
    text = f"signal {row['signal_share']:.2f}, {row['generation_share']:.0%} generating"
    return text if row["pass_rate"] is None else f"pass {row['pass_rate']:.2f}, {text}"


def read_curve(path: Path) -> list[dict]:
    """The curve of a run that has ended. Raises ValueError when the file is damaged."""
    curve = files.read_json(path).get("curve")
    points = curve if isinstance(curve, list) and curve else [None]
    for point in points:
        if not isinstance(point, dict) or not all(
            isinstance(point.get(k), int | float) for k in ("step", "x", "score")
        ):
            raise ValueError(
                f"{path}: damaged: expected a curve of points with step, x and score; delete it, and --resume"
            )
    if not all(isinstance(point.get("greedy"), int | float) for point in (points[0], points[-1])):
        raise ValueError(f"{path}: damaged: no greedy scores at the ends; delete it, and --resume")
    return points


def print_curve(curve: list[dict]) -> None:
    if not curve:  # a dry run
        return
    print(f"{'step':>6} {'FLOPs':>10} {'score':>7}")
    for point in curve:
        print(f"{point['step']:>6} {point['x']:>10.3g} {point['score']:>7.1%}")
    print(f"greedy: {curve[0]['greedy']:.1%} -> {curve[-1]['greedy']:.1%}")
