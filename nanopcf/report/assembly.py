"""From the results of a pipeline's stages to its report, with what follows: ceilings, correlations, claims."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from nanopcf.data import Example, read_examples
from nanopcf.evaluate import EvaluateConfig
from nanopcf.report import paradigms
from nanopcf.report.agreement import agreement, agreement_of_draws
from nanopcf.report.ceilings import fit_ceiling
from nanopcf.report.check import check
from nanopcf.report.claims import Draws, answer, judge_claims
from nanopcf.report.text import label
from nanopcf.run import log
from nanopcf.scoring import greedy_answers


def branch_of(curve: list[dict], steps: int) -> dict:
    """What a report holds of one RL run: its curve, and what is read from it. steps: how many it was to have."""
    return {
        "p_sft": curve[0]["score"],
        "curve": [{"x": point["x"], "score": point["score"]} for point in curve],
        "best": max(point["score"] for point in curve),
        "out_of_signal": curve[-1]["step"] < steps,  # RL ended early: no prompt had a signal any more
        "train_pass_rate": next((p["pass_rate"] for p in reversed(curve) if p.get("pass_rate") is not None), None),
        "greedy_before": curve[0]["greedy"],
        "greedy_after": curve[-1]["greedy"],
    }


def assemble(
    c: Any,
    device: torch.device,
    base: dict,
    candidates: list[dict],
    selection: dict,
    branches: list[dict],
    paradigm_runs: list[dict],
    samples: list[dict],
    *,
    problems: int,
    elapsed_s: dict[str, float],
) -> dict:
    """The report, from the results of the pipeline's stages. c: the pipeline's config; problems: how many a score
    counts; elapsed_s: seconds by stage."""
    measured = {
        "seed": c.seed,
        "preset": c.preset,
        "task": c.task,
        "flags": asdict(c),
        "problems": problems,
        "base": {key: base[key] for key in ("p_0", "pass_at_k", "parameters", "pretrain_loss")},
        "candidates": candidates,
        # without the folders of their first and last policy
        "branches": [{k: v for k, v in branch.items() if k not in ("before", "after")} for branch in branches],
        "selector": {key: selection[key] for key in ("chosen", "ranking")},
        "paradigm_runs": paradigm_runs,
        "samples": samples,
        "environment": log.environment(device),
        "elapsed_s": {**elapsed_s, "total": round(sum(elapsed_s.values()), 1)},
    }
    return judge(measured)


# ---- what follows from the measurements ----


def judge(report: dict) -> dict:
    """The report with everything that follows from the curves in it, made anew; pure, so that a finished run can be
    judged by other rules without any training.

    That is the ceiling of each branch (Eqs. 2-4), the same beside the selector's ranking, the correlation of validation
    loss and ceiling (RQ3), the rows of `paradigms` (which reports from before the single runs were kept lose), and the
    verdicts on the paper's claims. Raises ValueError with the place in the report where something is missing or wrong.
    """
    check(report)
    problems = report.get("problems", report["flags"].get("test"))  # older reports have the flag only
    branches, draws = fit_branches(report["branches"], problems)

    branch_at = dict(zip(draws, branches, strict=True))
    ranking = []
    for row in report["selector"]["ranking"]:
        branch = branch_at[row["name"], row["recommended_step"]]
        names = ("p_sft", "a_post", "a_post_low", "a_post_high", "status", "identified", "train_pass_rate")
        ranking.append(row | {name: branch[name] for name in names if name in branch})
    losses = [row["min_val_loss"] for row in ranking]
    ceilings = np.array([draws[row["name"], row["recommended_step"]] for row in ranking])  # (sets, R)
    selector = {
        "chosen": report["selector"]["chosen"],
        "ranking": ranking,
        **agreement_of_draws(losses, ceilings),
        "identified": sum(row["identified"] for row in ranking),
        "spearman_p_sft": agreement(losses, [row["p_sft"] for row in ranking])["spearman"],
    }
    judged = report | {"branches": branches, "selector": selector}
    rows = paradigms.summarise(report.get("paradigm_runs") or [], problems)
    judged |= {"problems": problems, "paradigms": rows}
    claims = judge_claims(judged, draws) + paradigms.judge_claims(rows, problems)
    return judged | {"answer": answer(judged, draws), "claims": claims}


def fit_branches(branches: list[dict], problems: int) -> tuple[list[dict], Draws]:
    """The branches with the ceilings of their curves, and draws of these."""
    fitted, draws = [], {}
    for i, branch in enumerate(branches):
        ended = branch.get("out_of_signal", False)
        try:
            ceiling, drawn = fit_ceiling(branch["curve"], branch["p_sft"], problems, seed=i, out_of_signal=ended)
        except ValueError as error:
            raise ValueError(f"report: the curve of {label(branch)}: {error}") from None
        fitted.append(branch | ceiling)
        draws[branch["dataset"], branch["sft_step"]] = drawn
    return fitted, draws


def sample_answers(branches: list[dict], test: str, scoring: Callable[[str], EvaluateConfig]) -> list[dict]:
    """Test problems with the greedy answers before and after RL, for the branch from SFT that RL improved most.

    branches: with the checkpoints `before` and `after`; test: the file of problems; scoring(checkpoint): how to answer.
    """
    improved = max((b for b in branches if b["dataset"] != "base"), key=lambda b: b["best"] - b["p_sft"])
    examples = read_examples(test, need=("prompt", "answer"))[:128]
    before, after = (greedy_answers(scoring(improved[when]), examples) for when in ("before", "after"))
    return [{"dataset": improved["dataset"], **pair} for pair in sample_pairs(examples, before, after)]


def sample_pairs(examples: list[Example], before: list[tuple[str, bool]], after: list[tuple[str, bool]]) -> list[dict]:
    """The same problems before and after RL: two each that became right, stayed right, stayed wrong or were lost.

    before, after: (answer, is it right) to each of the examples.
    """
    pairs = []
    for kind in [(False, True), (True, True), (False, False), (True, False)]:
        of_this_kind = [
            {
                "prompt": e.prompt,
                "answer": e.answer,
                "before": answer_before,
                "after": answer_after,
                "before_correct": right_before,
                "after_correct": right_after,
            }
            for e, (answer_before, right_before), (answer_after, right_after) in zip(
                examples, before, after, strict=True
            )
            if (right_before, right_after) == kind
        ]
        pairs += of_this_kind[:2]
    return pairs
