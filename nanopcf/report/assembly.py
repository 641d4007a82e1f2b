"""From the results of a pipeline's stages to its report, with what follows: ceilings, correlations, claims."""

from dataclasses import asdict
from typing import Any

import torch

from nanopcf import ceiling
from nanopcf.data import Example
from nanopcf.report import paradigms
from nanopcf.report.agreement import agreement
from nanopcf.report.claims import judge_claims
from nanopcf.run import log


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
    elapsed_s: dict[str, float],
) -> dict:
    """The report, from the results of the pipeline's stages. c: the pipeline's config; elapsed_s: seconds by stage."""
    measured = {
        "seed": c.seed,
        "preset": c.preset,
        "task": c.task,
        "flags": asdict(c),
        "base": {key: base[key] for key in ("p_0", "pass_at_k", "parameters", "pretrain_loss")},
        "candidates": candidates,
        # without the folders of their first and last policy
        "branches": [{k: v for k, v in branch.items() if k not in ("before", "after")} for branch in branches],
        "selector": {key: selection[key] for key in ("chosen", "ranking")},
        "paradigms": paradigms.summarise(paradigm_runs),
        "samples": samples,
        "environment": log.environment(device),
        "elapsed_s": {**elapsed_s, "total": round(sum(elapsed_s.values()), 1)},
    }
    return judge(measured)


def judge(report: dict) -> dict:
    """The report with what follows from the curves in it; pure, so that a finished run can be judged anew.

    That is the ceiling of each branch (Eqs. 2-4), the same beside the selector's ranking, the correlation of validation
    loss and ceiling (RQ3), and the verdicts on the paper's claims. The ceilings of `paradigms` stay: they are fitted to
    means over seeds, whose single runs the report does not hold.
    """
    branches = [{**branch, **fit_ceiling(branch)} for branch in report["branches"]]
    branch_at = {(b["dataset"], b["sft_step"]): b for b in branches}
    ranking = []
    for row in report["selector"]["ranking"]:
        branch = branch_at[row["name"], row["recommended_step"]]
        ranking.append({**row, "a_post": branch["a_post"], "status": branch["status"]})
    correlation = agreement([r["min_val_loss"] for r in ranking], [r["a_post"] for r in ranking])
    chosen = report["selector"]["chosen"]
    judged = report | {"branches": branches, "selector": {"chosen": chosen, "ranking": ranking, **correlation}}
    return judged | {"claims": judge_claims(judged)}


def fit_ceiling(branch: dict) -> dict:
    """Eq. 2 fitted to the curve of a branch: its ceiling A_post (Eq. 3), plasticity PL_rl (Eq. 4) and the verdict."""
    points = [p for p in branch["curve"] if p["x"] > 0]
    if len(points) < 4:
        # RL ended at once for want of a signal, which leaves too few points: only the best score so far is known
        best = branch["best"]
        unknown = dict.fromkeys(("c_mid", "b", "epsilon", "law", "rmse_fit", "rmse_heldout"))
        known = {"a_post": best, "pl_rl": best - branch["p_sft"], "status": "still rising"}
        return known | {"a_post_low": best, "a_post_high": 1.0} | unknown
    fit = ceiling.fit([p["x"] for p in points], [p["score"] for p in points], branch["p_sft"], max_score=1.0)
    return {
        "a_post": fit.a_post,
        "pl_rl": fit.pl_rl,
        "c_mid": fit.c_mid,
        "b": fit.b,
        "epsilon": fit.epsilon,
        "law": fit.law,
        "rmse_fit": fit.rmse_fit,
        "rmse_heldout": fit.rmse_heldout,
        "status": fit.status,
        "a_post_low": fit.interval[0],
        "a_post_high": fit.interval[1],
    }


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
