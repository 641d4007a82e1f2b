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


def rising(branch: dict) -> bool:
    """Whether the curve does not identify its ceiling: then what the run reached is a lower bound, and all there is."""
    return branch["status"] == "still rising"


def ceiling_text(branch: dict) -> str:
    if rising(branch):
        return f"≥ {percent(branch['best'])}"
    return f"{percent(branch['a_post'])} [{percent(branch['a_post_low'])}, {percent(branch['a_post_high'])}]"
