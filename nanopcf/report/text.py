"""How a report writes its numbers: scores in per cent, compute with its unit, a branch by its name and its ceiling.

A branch is one RL run, a dict of report.json.
"""

import math


def percent(value: float | None) -> str:
    """0.123 -> "12.3"."""
    return "–" if value is None else f"{100 * value:.1f}"


def correlation(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def flops_unit(largest: float) -> tuple[float, str]:
    """The unit for numbers up to `largest`: how many FLOPs it is, and its name."""
    thousands = min(6, int(math.log10(largest) // 3)) if largest >= 1 else 0
    return 1000.0**thousands, ["", "K", "M", "G", "T", "P", "E"][thousands] + "FLOPs"


def si(flops: float) -> str:
    """1.2e12 -> "1.2 TFLOPs"."""
    scale, unit = flops_unit(flops)
    return f"{flops / scale:.3g} {unit}"


def label(branch: dict) -> str:
    if branch["dataset"] == "base":
        return "pure RL"
    return f"{branch['dataset']} @{branch['sft_step']} ({branch['regime']})"


def ceiling_text(branch: dict) -> str:
    """The ceiling with its 90 % interval where the curve identifies it, else a lower bound, the interval's low end."""
    low, high = percent(branch["a_post_low"]), percent(branch["a_post_high"])
    return f"{percent(branch['a_post'])} [{low}, {high}]" if branch["identified"] else f"≥ {percent(branch['a_post'])}"


def plasticity_text(branch: dict) -> str:
    """The ceiling less the measured P_sft, by the same rule."""
    return ("" if branch["identified"] else "≥ ") + percent(branch["pl_rl"])


def verdict_text(branch: dict) -> str:
    """The verdict on a curve. Where RL ran out of signal, with the pass rate on its prompts at the last evaluation:
    near 100 they are learned, near 0 they are out of reach."""
    rate = branch.get("train_pass_rate")
    if branch["status"] == "out of signal" and rate is not None:
        return f"out of signal (train {percent(rate)})"
    return branch["status"]


def claim_text(claim: dict) -> str:
    """The verdict on a claim, with the probability where it is open."""
    if claim["verdict"] == "not resolved" and claim["probability"] is not None:
        return f"not resolved ({claim['probability']:.2f})"
    return claim["verdict"]
