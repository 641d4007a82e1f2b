"""What the paper says, and what this run shows."""

import math

from nanopcf.report import paradigms
from nanopcf.report.figures import ceiling_text, label, percent, rising, si

# ---- what the paper says, and what this run shows ----


def compare(high: dict, low: dict) -> str:
    """Is the ceiling of `high` above that of `low`? shown / not shown / not resolved, by verdicts and intervals."""
    # a rising branch has no upper bound; what it reached is its lower one
    low_of = lambda b: b["best"] if rising(b) else b["a_post_low"]  # noqa: E731
    high_of = lambda b: 1.0 if rising(b) else b["a_post_high"]  # noqa: E731
    if low_of(high) > high_of(low):
        return "shown"
    return "not shown" if high_of(high) < low_of(low) else "not resolved"


def claims(report: dict) -> list[dict]:
    """The paper's claims that this run can be held against: {claim, verdict, evidence}."""
    branches, rows = report["branches"], []
    base = next((b for b in branches if b["dataset"] == "base"), None)
    tuned = [b for b in branches if b["dataset"] != "base"]
    chosen = {(r["name"], r["recommended_step"]) for r in report["selector"]["ranking"]}
    best_start = {b["dataset"]: b for b in tuned if (b["dataset"], b["sft_step"]) in chosen}

    def add(claim: str, verdict: str, evidence: str) -> None:
        rows.append({"claim": claim, "verdict": verdict, "evidence": evidence})

    def versus(claim: str, high: dict, low: dict) -> None:
        add(claim, compare(high, low), f"{label(high)} {ceiling_text(high)}, {label(low)} {ceiling_text(low)}")

    top = max(tuned, key=lambda b: b["best"])
    if base:
        spent = base["curve"][-1]["x"]
        at_equal = max((p["score"] for p in top["curve"] if p["x"] + top["x_sft"] <= spent), default=None)
        note = f"; at pure RL's total of {si(spent)}: {percent(at_equal)}" if at_equal is not None else ""
        verdict = "shown" if (at_equal or top["best"]) > base["best"] + 0.04 else "not resolved"
        add(
            "SFT-then-RL goes further than pure RL (RQ1)",
            verdict,
            f"best score reached: {label(top)} {percent(top['best'])}, pure RL {percent(base['best'])}{note}",
        )
    sft_best = max(c["score"] for s in report["candidates"] for c in s["checkpoints"])
    n = report["flags"].get("test", 500)
    noise = 2 * math.sqrt(2 * sft_best * (1 - sft_best) / n)  # two standard errors of a difference
    difference = top["best"] - sft_best
    verdict = "shown" if difference > noise else "not shown" if difference < -noise else "not resolved"
    add(
        "SFT-then-RL goes further than pure SFT (RQ1)",
        verdict,
        f"best {percent(top['best'])} against the best SFT checkpoint's {percent(sft_best)} (noise ±{percent(noise)})",
    )
    for name, start in best_start.items():
        others = {b["regime"]: b for b in tuned if b["dataset"] == name and b is not start}
        if "adaptive" in others:
            versus(f"{name}: a stable start has a higher ceiling than an adaptive one (RQ2)", start, others["adaptive"])
        if "severe" in others:
            versus(f"{name}: severe overfitting lowers the ceiling (RQ2)", start, others["severe"])
    s = report["selector"]
    if s["spearman"] is not None and s["n"] >= 3:
        verdict = "shown" if s["p_value"] <= 0.05 else "not shown" if s["spearman"] >= 0 else "not resolved"
        add(
            "A lower minimum validation loss means a higher ceiling (RQ3)",
            verdict,
            f"Spearman {s['spearman']:.2f} (by chance: p = {s['p_value']:.2f}), Pearson {s['pearson']:.2f}, {s['n']} candidate sets",
        )
    size = {c["name"]: c["size"] for c in report["candidates"]}
    kind = {c["name"]: c["difficulty"] for c in report["candidates"]}
    for k in ("uniform", "easy", "hard"):
        same = sorted((b for b in best_start.values() if kind[b["dataset"]] == k), key=lambda b: size[b["dataset"]])
        if len(same) > 1:
            versus(f"Scale: more {k} trajectories, a higher ceiling (RQ3)", same[-1], same[0])
    for high, low in (("hard", "uniform"), ("uniform", "easy")):
        for a in best_start.values():
            for b in best_start.values():
                equal = size[a["dataset"]] == size[b["dataset"]]
                if equal and kind[a["dataset"]] == high and kind[b["dataset"]] == low:
                    versus(f"Difficulty: {high} trajectories give a higher ceiling than {low} ones (RQ3)", a, b)
    return rows + paradigms.claims(report["paradigms"])
