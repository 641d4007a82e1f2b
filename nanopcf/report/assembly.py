"""From the results of a pipeline's stages to its report, with what follows: ceilings, correlations, claims."""

from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from nanopcf.data import Example
from nanopcf.report import paradigms
from nanopcf.report.agreement import agreement, agreement_of_draws
from nanopcf.report.ceilings import fit_ceiling
from nanopcf.report.claims import judge_claims
from nanopcf.report.text import label
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

NEEDED = {
    "branches": ("dataset", "sft_step", "regime", "x_sft", "p_sft", "best", "curve"),
    "candidates": ("name", "size", "difficulty", "checkpoints"),
}


def judge(report: dict) -> dict:
    """The report with everything that follows from the curves in it, made anew; pure, so that a finished run can be
    judged by other rules without any training.

    That is the ceiling of each branch (Eqs. 2-4), the same beside the selector's ranking, the correlation of validation
    loss and ceiling (RQ3), the rows of `paradigms`, and the verdicts on the paper's claims. Raises ValueError, with the
    place in the report, where something is missing or no curve.
    """
    check(report)
    problems = report.get("problems") or report["flags"]["test"]  # reports before the count was kept have the flag only
    branches, draws = [], {}
    for i, branch in enumerate(report["branches"]):
        try:
            ceiling, draws_here = fit_ceiling(branch["curve"], branch["p_sft"], problems, seed=i)
        except ValueError as error:
            raise ValueError(f"report: the curve of {label(branch)}: {error}") from None
        if branch.get("out_of_signal"):  # RL had no prompt left to learn from: more compute changes nothing
            ceiling["status"] = "out of signal"
        branches.append(branch | ceiling)
        draws[branch["dataset"], branch["sft_step"]] = draws_here

    branch_at = dict(zip(draws, branches, strict=True))
    ranking = []
    for row in report["selector"]["ranking"]:
        start = row["name"], row["recommended_step"]
        if start not in branch_at:
            raise ValueError(f"report: the selector starts RL at step {start[1]} of {start[0]}, and no branch does")
        names = ("p_sft", "a_post", "a_post_low", "a_post_high", "status", "identified")
        ranking.append(row | {name: branch_at[start][name] for name in names})
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
    # Reports before the single runs were kept have the rows only.
    rows = paradigms.summarise(report["paradigm_runs"], problems) if "paradigm_runs" in report else report["paradigms"]
    judged |= {"problems": problems, "paradigms": rows}
    return judged | {"claims": judge_claims(judged, draws) + paradigms.judge_claims(rows, problems)}


def check(report: dict) -> None:
    """Raises ValueError if the report lacks what `judge` reads."""
    missing = [name for name in ("branches", "candidates", "selector", "flags") if not report.get(name)]
    for part, fields in NEEDED.items():
        for i, entry in enumerate(report.get(part) or []):
            missing += [f"{part}[{i}].{field}" for field in fields if field not in entry]
    if missing:
        raise ValueError(f"report: no {missing[0]}: a report.json of another version? Run the pipeline again")
    if not report["selector"].get("ranking"):
        raise ValueError("report: the selector ranked no candidate set, so there is nothing to judge")


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
