"""Which paradigm uses expert trajectories best? The paper's Fig. 2: every one at equal compute, over several seeds.

A run is {algo, start: "base" or "sft", seed, x_sft, curve}; compute on the curve includes the SFT before it, so that a run
from an SFT checkpoint has less left for itself. `summarise` makes a row of all seeds of an algorithm and a start.
"""

import math

import numpy as np

from nanopcf import ceiling

SYNCHRONISED = ("luffy", "srft", "upt", "prefix_rft")  # SFT and RL in one stage
LAST = 3  # points at the end of a curve whose mean is its final score


def summarise(runs: list[dict]) -> list[dict]:
    """A row an (algo, start), in the order of the runs.

    final: mean of the last three scores, over seeds, and final_sd: its standard deviation between seeds; peak: mean of the
    best scores; wobble: standard deviation of the scores in the second half of a run, mean over seeds; a_post, a_post_low,
    a_post_high, status: `ceiling.fit` of the mean curve; curve: that mean curve; spread: its deviation between seeds.
    """
    rows = []
    for algo, start in dict.fromkeys((r["algo"], r["start"]) for r in runs):
        curves = [r["curve"] for r in runs if (r["algo"], r["start"]) == (algo, start)]
        x_sft = next(r["x_sft"] for r in runs if (r["algo"], r["start"]) == (algo, start))
        count = min(map(len, curves))  # a run may end early, for want of a signal
        x = np.array([[p["x"] for p in curve[:count]] for curve in curves]).mean(axis=0)
        scores = np.array([[p["score"] for p in curve[:count]] for curve in curves])
        finals = np.array([np.mean([p["score"] for p in curve[-LAST:]]) for curve in curves])
        mean = scores.mean(axis=0)
        row = dict(algo=algo, start=start, seeds=len(curves), x_sft=x_sft, first=float(mean[0]))
        row |= dict(final=float(finals.mean()), final_sd=deviation(finals))
        row |= dict(peak=float(np.mean([max(p["score"] for p in curve) for curve in curves])))
        row |= dict(wobble=float(np.mean([deviation([p["score"] for p in c[len(c) // 2 :]]) for c in curves])))
        fit = None
        if count >= 5:
            fit = ceiling.fit((x - x_sft)[1:], mean[1:], float(mean[0]), max_score=1.0)
        row |= dict(a_post=fit.a_post if fit else None, status=fit.status if fit else "too few points")
        row |= dict(zip(("a_post_low", "a_post_high"), fit.interval if fit else (None, None), strict=True))
        row |= dict(best=float(mean.max()))
        row |= dict(curve=[{"x": float(a), "score": float(b)} for a, b in zip(x, mean, strict=True)])
        row |= dict(spread=[deviation(column) for column in scores.T])
        rows.append(row)
    return rows


def deviation(values) -> float:
    """Standard deviation with n - 1; 0 of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def claims(rows: list[dict]) -> list[dict]:
    """The paper's claims about paradigms against these rows: {claim, verdict, evidence}. A difference counts as shown when
    it exceeds two standard errors over the seeds."""
    by = {(r["algo"], r["start"]): r for r in rows}
    found = []

    def add(claim: str, ours: list[dict], theirs: list[dict]) -> None:
        if not ours or not theirs:
            return
        a, b = (max(group, key=lambda r: r["final"]) for group in (ours, theirs))
        error = math.sqrt(a["final_sd"] ** 2 / a["seeds"] + b["final_sd"] ** 2 / b["seeds"])
        gap = a["final"] - b["final"]
        resolved = abs(gap) > 2 * error and min(a["seeds"], b["seeds"]) > 1
        verdict = ("shown" if gap > 0 else "not shown") if resolved else "not resolved"
        evidence = f"{name(a)} {100 * a['final']:.1f}, {name(b)} {100 * b['final']:.1f} (±{200 * error:.1f})"
        found.append({"claim": claim, "verdict": verdict, "evidence": evidence})

    def group(algos: tuple[str, ...], start: str) -> list[dict]:
        return [by[a, start] for a in algos if (a, start) in by]

    sequential = group(("dapo_dc",), "sft")
    add("SFT-then-RL ends higher than the best synchronised paradigm (RQ1)", sequential, group(SYNCHRONISED, "base"))
    add("SFT-then-RL ends higher than pure RL (RQ1)", sequential, group(("grpo", "dapo_d", "dapo_dc"), "base"))
    add("SFT-then-RL ends higher than pure SFT (RQ1)", sequential, group(("sft",), "base") + group(("sft",), "sft"))
    add(
        "After SFT, RL alone ends higher than the best synchronised paradigm",
        group(("grpo", "dapo_d", "dapo_dc"), "sft"),
        group(SYNCHRONISED, "sft"),
    )
    return found


def name(row: dict) -> str:
    return f"{row['algo']} from {'the base model' if row['start'] == 'base' else 'SFT'}"


def cells(row: dict) -> list[str]:
    """A row as text: start and paradigm, then numbers in per cent."""
    per_cent = lambda value: f"{100 * value:.1f}"  # noqa: E731
    if row["a_post"] is None:
        top = "–"
    elif row["status"] == "still rising":
        top = f"≥ {per_cent(row['best'])}"
    else:
        top = f"{per_cent(row['a_post'])} [{per_cent(row['a_post_low'])}, {per_cent(row['a_post_high'])}]"
    final = f"{per_cent(row['final'])} ± {per_cent(row['final_sd'])}"
    return [
        row["start"],
        row["algo"],
        per_cent(row["first"]),
        final,
        per_cent(row["peak"]),
        per_cent(row["wobble"]),
        top,
        row["status"],
    ]


HEAD = ["start", "paradigm", "first", "final", "peak", "wobble", "ceiling A_post", "verdict"]


def terminal_table(rows: list[dict]) -> str:
    """One line a paradigm and start; at most 100 columns."""
    lines = [HEAD, *map(cells, rows)]
    widths = [6, 12, 7, 14, 7, 8, 21, 0]
    return "\n".join("".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
