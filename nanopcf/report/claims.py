"""What the paper says, and what this run shows.

One seed of a nano model is no evidence for or against a paper, but it shows what to look at: each claim is held against
the numbers of the run, and the verdict is "shown", "not shown", or "not resolved" where the uncertainties overlap.
"""

import math

from nanopcf.report import paradigms
from nanopcf.report.text import ceiling_text, label, percent, rising, si

BETTER = 0.04  # a best score counts as better than pure RL's from this gap on


def judge_claims(report: dict) -> list[dict]:
    """The paper's claims that this run can be held against: {claim, verdict, evidence}."""
    base = [branch for branch in report["branches"] if branch["dataset"] == "base"]
    after_sft = [branch for branch in report["branches"] if branch["dataset"] != "base"]
    recommended = {(ranked["name"], ranked["recommended_step"]) for ranked in report["selector"]["ranking"]}
    # The branch of each candidate set that starts where the selector would start it.
    starts = {b["dataset"]: b for b in after_sft if (b["dataset"], b["sft_step"]) in recommended}
    top = max(after_sft, key=lambda branch: branch["best"])
    entries = [further_than_pure_rl(top, base[0])] if base else []
    entries.append(further_than_pure_sft(top, report))
    entries += regime_claims(starts, after_sft)
    entries += loss_claim(report["selector"])
    entries += scale_claims(starts, report["candidates"])
    entries += difficulty_claims(starts, report["candidates"])
    return entries + paradigms.judge_claims(report["paradigms"])


def entry(claim: str, verdict: str, evidence: str) -> dict:
    return {"claim": claim, "verdict": verdict, "evidence": evidence}


# ---- one ceiling against another ----


def bounds(branch: dict) -> tuple[float, float]:
    """Between which scores the ceiling lies. A branch that still rises has only a lower bound: what it reached."""
    return (branch["best"], 1.0) if rising(branch) else (branch["a_post_low"], branch["a_post_high"])


def compare(high: dict, low: dict) -> str:
    """Is the ceiling of branch `high` above that of branch `low`? The verdict."""
    high_from, high_to = bounds(high)
    low_from, low_to = bounds(low)
    if high_from > low_to:
        return "shown"
    return "not shown" if high_to < low_from else "not resolved"


def higher_ceiling(claim: str, high: dict, low: dict) -> dict:
    evidence = f"{label(high)} {ceiling_text(high)}, {label(low)} {ceiling_text(low)}"
    return entry(claim, compare(high, low), evidence)


# ---- RQ1: SFT-then-RL against either alone ----


def further_than_pure_rl(top: dict, pure_rl: dict) -> dict:
    """By the best score reached, at the total compute that pure RL had, as far as the other branch has points there."""
    spent = pure_rl["curve"][-1]["x"]
    within = [point["score"] for point in top["curve"] if point["x"] + top["x_sft"] <= spent]
    at_equal = max(within, default=None)
    reached = top["best"] if at_equal is None else at_equal
    verdict = "shown" if reached > pure_rl["best"] + BETTER else "not resolved"
    evidence = f"best score reached: {label(top)} {percent(top['best'])}, pure RL {percent(pure_rl['best'])}"
    if at_equal is not None:
        evidence += f"; at pure RL's total of {si(spent)}: {percent(at_equal)}"
    return entry("SFT-then-RL goes further than pure RL (RQ1)", verdict, evidence)


def further_than_pure_sft(top: dict, report: dict) -> dict:
    sft_best = best_sft(report)
    problems = report["flags"].get("test", 500)
    noise = 2 * math.sqrt(2 * sft_best * (1 - sft_best) / problems)  # two standard errors of a difference
    gap = top["best"] - sft_best
    verdict = "shown" if gap > noise else "not shown" if gap < -noise else "not resolved"
    evidence = (
        f"best {percent(top['best'])} against the best SFT checkpoint's {percent(sft_best)} (noise ±{percent(noise)})"
    )
    return entry("SFT-then-RL goes further than pure SFT (RQ1)", verdict, evidence)


def best_sft(report: dict) -> float:
    """The best score of any SFT checkpoint."""
    return max(c["score"] for candidate in report["candidates"] for c in candidate["checkpoints"])


# ---- RQ2: when to switch to RL ----


def regime_claims(starts: dict[str, dict], branches: list[dict]) -> list[dict]:
    entries = []
    for name, start in starts.items():
        others = {b["regime"]: b for b in branches if b["dataset"] == name and b is not start}
        if "adaptive" in others:
            claim = f"{name}: a stable start has a higher ceiling than an adaptive one (RQ2)"
            entries.append(higher_ceiling(claim, start, others["adaptive"]))
        if "severe" in others:
            claim = f"{name}: severe overfitting lowers the ceiling (RQ2)"
            entries.append(higher_ceiling(claim, start, others["severe"]))
    return entries


# ---- RQ3: which data ----


def loss_claim(selector: dict) -> list[dict]:
    """Does the loss order the ceilings? Two sets, or sets that are all alike, cannot say."""
    if selector["spearman"] is None or selector["n"] < 3:
        return []
    if selector["p_value"] <= 0.05:
        verdict = "shown"
    else:
        verdict = "not shown" if selector["spearman"] >= 0 else "not resolved"
    evidence = (
        f"Spearman {selector['spearman']:.2f} (by chance: p = {selector['p_value']:.2f}), "
        f"Pearson {selector['pearson']:.2f}, {selector['n']} candidate sets"
    )
    return [entry("A lower minimum validation loss means a higher ceiling (RQ3)", verdict, evidence)]


def scale_claims(starts: dict[str, dict], candidates: list[dict]) -> list[dict]:
    """The largest set of each difficulty against the smallest one."""
    entries = []
    for difficulty in ("uniform", "easy", "hard"):
        sets = [c for c in candidates if c["difficulty"] == difficulty and c["name"] in starts]
        sets.sort(key=lambda candidate: candidate["size"])
        if len(sets) > 1:
            claim = f"Scale: more {difficulty} trajectories, a higher ceiling (RQ3)"
            entries.append(higher_ceiling(claim, starts[sets[-1]["name"]], starts[sets[0]["name"]]))
    return entries


def difficulty_claims(starts: dict[str, dict], candidates: list[dict]) -> list[dict]:
    """Sets of one size and different difficulty."""
    sets = {candidate["name"]: candidate for candidate in candidates}
    entries = []
    for harder, easier in (("hard", "uniform"), ("uniform", "easy")):
        claim = f"Difficulty: {harder} trajectories give a higher ceiling than {easier} ones (RQ3)"
        for a, branch_a in starts.items():
            for b, branch_b in starts.items():
                same_size = sets[a]["size"] == sets[b]["size"]
                if same_size and sets[a]["difficulty"] == harder and sets[b]["difficulty"] == easier:
                    entries.append(higher_ceiling(claim, branch_a, branch_b))
    return entries
