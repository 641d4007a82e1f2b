"""Which paradigm uses expert trajectories best? The paper's Fig. 2: all at equal compute, each with several seeds.

A run is {algo, start, seed, x_sft, curve}, with start "base" or "sft". Compute on the curve includes the SFT before it,
so that a run from an SFT checkpoint has less left for itself. A row sums up the runs of one algorithm and one start.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nanopcf.objectives import RECIPES
from nanopcf.report.ceilings import SURE, fit_ceiling, sampling_error
from nanopcf.report.text import ceiling_text, percent
from nanopcf.run.stages import train_parallel
from nanopcf.tools import recipes

SYNCHRONISED = ("luffy", "srft", "upt", "prefix_rft")  # SFT and RL in one stage
PURE_RL = ("grpo", "dapo_d", "dapo_dc")
LAST = 3  # points at the end of a curve whose mean is its final score


# ---- the runs ----


def parsed(paradigm: str) -> tuple[str, float, tuple[str, ...]]:
    """(algorithm, factor of the learning rate, changed choices) of an entry of --paradigms.

    "upt" is the algorithm as it is, "upt:lr=5" has five times the learning rate, "prefix_rft:advantage=prefix" another
    choice. Raises ValueError for what is none of these.
    """
    algo, colon, change = paradigm.partition(":")
    if algo not in RECIPES:
        raise ValueError(f"--paradigms: no {algo!r}; there are {', '.join(RECIPES)}")
    name, _, value = change.partition("=")
    if name != "lr":
        choices = (change,) if colon else ()
        recipes.with_choices(RECIPES[algo], choices)
        return algo, 1.0, choices
    try:
        factor = float(value)
    except ValueError:
        factor = 0.0
    if not 0 < factor < np.inf:
        raise ValueError(f"--paradigms: {paradigm!r} should have a factor above 0, as in upt:lr=5")
    return algo, factor, ()


def train_all(
    c: Any,
    folder: Path,
    selection: dict,
    set_files: dict[str, str],
    rl_from: Callable[[dict, Path], Any],
    train: Callable,
    pool: Executor,
) -> list[dict]:
    """Every paradigm at equal compute, from the base model and from the checkpoint that the selector chose.

    A run ends when --paradigm-flops are spent, the SFT before it included. Whoever uses an expert has the trajectories
    that SFT had, those of the chosen set, and no others; pure RL has the RL problems. c: the pipeline's config;
    set_files: of the candidate sets; rl_from(start, folder): the settings of RL from a start of the selection; train:
    `train_rl.main`.
    """
    best = next(row for row in selection["ranking"] if row["name"] == selection["chosen"])
    best_start = (best["name"], best["recommended_step"])
    base_start = selection["starts"][0]
    sft_start = next(s for s in selection["starts"] if (s["dataset"], s["sft_step"]) == best_start)
    if sft_start["x_sft"] >= c.paradigm_flops:
        raise ValueError(f"--paradigm-flops {c.paradigm_flops:.3g}: SFT alone took {sft_start['x_sft']:.3g}")
    never = 10**6  # steps: the compute is spent long before
    runs = {}
    for seed in range(c.seed, c.seed + c.paradigm_seeds):
        for paradigm in c.paradigms:
            algo, lr_factor, choices = parsed(paradigm)
            expert = {"train": set_files[selection["chosen"]]} if RECIPES[algo].needs_expert else {}
            for name, start in (("base", base_start), ("sft", sft_start)):
                runs[paradigm, name, seed, start["x_sft"]] = replace(
                    rl_from(start, folder / f"{paradigm.replace(':', '-')}-{name}-{seed}"),
                    algo=algo,
                    set=choices,
                    lr=lr_factor * c.rl_lr,
                    seed=seed,
                    steps=never,
                    checkpoint_every=never,
                    max_flops=c.paradigm_flops - start["x_sft"],
                    eval_flops=c.paradigm_flops / c.rl_points,
                    **expert,
                )
    curves = train_parallel("paradigms", train, runs, pool, folder, "score")
    compared = []
    for (algo, name, seed, x_sft), curve in curves.items():
        total_curve = [{"x": x_sft + point["x"], "score": point["score"]} for point in curve]
        early = total_curve[-1]["x"] < c.paradigm_flops  # no prompt had a signal any more
        run = {"algo": algo, "start": name, "seed": seed, "x_sft": x_sft, "curve": total_curve}
        compared.append(run | {"out_of_signal": early})
    return compared


# ---- from runs to rows ----


def summarise(runs: list[dict], problems: int) -> list[dict]:
    """One row per (algo, start), in the order of the runs; scores are fractions of so many problems:

    first             score of the mean curve
    final, final_sd   mean of a run's last three scores; mean over the seeds, and standard deviation between them
    finals            the same by seed
    peak              a run's best score, mean over the seeds
    wobble            standard deviation of the scores in the second half of a run, mean over the seeds
    curve, spread     the mean curve, and its standard deviation between seeds
    a_post, a_post_low, a_post_high, status, identified     `fit_ceiling` of the mean curve
    """
    groups: dict[tuple[str, str], list[dict]] = {}
    for run in runs:
        groups.setdefault((run["algo"], run["start"]), []).append(run)
    return [summary(*key, group, problems) for key, group in groups.items()]


def summary(algo: str, start: str, runs: list[dict], problems: int) -> dict:
    """The row of one algorithm and one start; see `summarise`."""
    all_scores = [[point["score"] for point in run["curve"]] for run in runs]
    finals = np.array([np.mean(scores[-LAST:]) for scores in all_scores])  # (seeds,)
    # A run may end early, when no prompt gives a signal any more: the mean curve goes as far as the shortest run.
    count = min(map(len, all_scores))
    x = np.array([[point["x"] for point in run["curve"][:count]] for run in runs]).mean(axis=0)  # (count,)
    scores = np.array([scores[:count] for scores in all_scores])  # (seeds, count)
    mean, x_sft = scores.mean(axis=0), float(x[0])  # (count,); in a study each seed has spent something else on SFT
    curve = [{"x": float(at), "score": float(score)} for at, score in zip(x, mean, strict=True)]
    rl_curve = [{"x": point["x"] - x_sft, "score": point["score"]} for point in curve]
    early = any(run.get("out_of_signal") for run in runs)
    ceiling, _ = fit_ceiling(rl_curve, curve[0]["score"], problems, seed=0, out_of_signal=early)
    return {
        "algo": algo,
        "start": start,
        "seeds": len(runs),
        "x_sft": x_sft,
        "first": float(mean[0]),
        "final": float(finals.mean()),
        "finals": {str(run["seed"]): float(final) for run, final in zip(runs, finals, strict=True)},
        "final_sd": deviation(finals),
        "peak": float(np.mean([max(scores) for scores in all_scores])),
        "wobble": float(np.mean([deviation(scores[len(scores) // 2 :]) for scores in all_scores])),
        **{name: ceiling[name] for name in ("a_post", "a_post_low", "a_post_high", "status", "identified")},
        "curve": curve,
        "spread": [deviation(of_seeds) for of_seeds in scores.T],
    }


def deviation(values: Sequence[float]) -> float:
    """Standard deviation with n - 1; 0 of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


# ---- the paper's claims ----


def judge_claims(rows: list[dict], problems: int) -> list[dict]:
    """What the paper says about paradigms against these rows: {claim, verdict, probability, evidence}.

    A claim compares the best row on either side, and is left out where a side has no row. problems: of a score.
    """

    def group(algos: tuple[str, ...], start: str) -> list[dict]:
        return [row for row in rows if row["start"] == start and row["algo"].partition(":")[0] in algos]

    sequential, pure_sft = group(("dapo_dc",), "sft"), group(("sft",), "base") + group(("sft",), "sft")
    comparisons = {
        "SFT-then-RL ends higher than the best synchronised paradigm (RQ1)": (sequential, group(SYNCHRONISED, "base")),
        "SFT-then-RL ends higher than pure RL (RQ1)": (sequential, group(PURE_RL, "base")),
        "SFT-then-RL ends higher than pure SFT (RQ1)": (sequential, pure_sft),
        "After SFT, RL alone ends higher than the best synchronised paradigm": (
            group(PURE_RL, "sft"),
            group(SYNCHRONISED, "sft"),
        ),
    }
    return [compare(claim, *sides, problems) for claim, sides in comparisons.items() if all(sides)]


def compare(claim: str, ours: list[dict], theirs: list[dict], problems: int) -> dict:
    """Does one of ours end above all of theirs?

    With k rows on the side that wins, each is required to be as sure as 1 - 0.05 / k: the luckiest of several equal
    rows would else look better than a single one. From one seed alone nothing follows.
    """
    probability, opposite = one_above_all(ours, theirs, problems), one_above_all(theirs, ours, problems)
    if probability is None:
        verdict = "not resolved"
    elif probability >= 1 - (1 - SURE) / len(ours):
        verdict = "shown"
    else:
        verdict = "not shown" if opposite >= 1 - (1 - SURE) / len(theirs) else "not resolved"
    a, b = (max(rows, key=lambda row: row["final"]) for rows in (ours, theirs))
    evidence = "; ".join(f"{name(row)} {percent(row['final'])} ± {percent(row['final_sd'])}" for row in (a, b))
    return {"claim": claim, "verdict": verdict, "probability": probability, "evidence": evidence}


def one_above_all(ours: list[dict], theirs: list[dict], problems: int) -> float | None:
    """A lower bound of the probability, for the best of our rows, that it ends above all of theirs; None where two rows
    have no two seeds in common. It is 1 less the sum of the probabilities that one of theirs ends above it."""
    bounds = []
    for row in ours:
        chances = [ends_above(row, other, problems) for other in theirs]
        if None in chances:
            return None
        bounds.append(max(0.0, 1 - sum(1 - chance for chance in chances)))
    return max(bounds)


def ends_above(a: dict, b: dict, problems: int) -> float | None:
    """How probable it is that a row's true final score lies above another's; None without two seeds in common.

    The runs of one seed have more in common than chance (in a study also problems and base model), so the differences
    are taken seed by seed, and their mean errs by Student's t. Other test problems would have given other scores too:
    the errors of a and b are taken as independent, which leaves rather too much doubt.
    """
    seeds = [seed for seed in a["finals"] if seed in b["finals"]]
    if len(seeds) < 2:
        return None
    rng, R = np.random.default_rng(0), 20_000
    differences = np.array([a["finals"][seed] - b["finals"][seed] for seed in seeds])  # (seeds,)
    between_seeds = deviation(differences) / len(seeds) ** 0.5 * rng.standard_t(len(seeds) - 1, size=R)
    of_the_test = np.hypot(sampling_error(a["final"], problems), sampling_error(b["final"], problems))
    return float((differences.mean() + between_seeds + of_the_test * rng.normal(size=R) > 0).mean())


def name(row: dict) -> str:
    return f"{row['algo']} from {'the base model' if row['start'] == 'base' else 'SFT'}"


# ---- as a table ----

HEAD = ["start", "paradigm", "first", "final", "peak", "wobble", "ceiling A_post", "verdict"]


def cells(row: dict) -> list[str]:
    """A row as text under HEAD, with numbers in per cent."""
    return [
        row["start"],
        row["algo"],
        percent(row["first"]),
        f"{percent(row['final'])} ± {percent(row['final_sd'])}",
        percent(row["peak"]),
        percent(row["wobble"]),
        ceiling_text(row),
        row["status"],
    ]


def terminal_table(rows: list[dict]) -> str:
    """One line per row; at most 100 columns if no paradigm has a change in its name."""
    widths = [6, max([12, *(len(row["algo"]) + 2 for row in rows)]), 7, 14, 7, 8, 21, 0]
    lines = [HEAD, *map(cells, rows)]
    return "\n".join(
        "".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
