"""The ceilings of a report, and how probable it is that one lies above another.

A ceiling is known only up to two errors: of its curve (the posterior of `ceiling.fit`), and of the test set, because
other problems would have given other scores. All scores of a run are taken on the same problems, so the second error
does not show within a curve. Draws of a ceiling hold both. For the second they take the whole binomial variance, as if
the errors of two branches were independent: branches that solve the same problems differ more surely than stated here.
"""

import math

import numpy as np

from nanopcf import ceiling
from nanopcf.ceiling.posterior import DRAWS, GAIN

SURE = 0.95  # a claim is shown from this probability on, and not shown when its opposite has it
WIDER = 3  # a ceiling that is not identified: the prior of its gain is (1 + gain / GAIN)^1.5, where `fit` has ^-1.5


def fit_ceiling(points: list[dict], p_sft: float, problems: int, seed: int) -> tuple[dict, np.ndarray]:
    """Eq. 2 fitted to a curve: its ceiling A_post (Eq. 3), plasticity PL_rl (Eq. 4) and verdict; and (R,) draws.

    points: {x, score}, with scores as fractions of so many `problems`. seed: another one for each curve, or the errors
    of their test sets would be the same. `identified` says whether the curve tells the ceiling; otherwise only
    a_post_low, the low end of its 90 % interval, means something. With fewer than 4 points there is no fit: a_post is
    None. Raises ValueError for what cannot be a curve.
    """
    if not all(math.isfinite(value) for p in points for value in (p["x"], p["score"])) or not math.isfinite(p_sft):
        raise ValueError("compute, scores and P_sft must be finite numbers")
    rng = np.random.default_rng(seed)
    points = [p for p in points if p["x"] > 0]
    if len(points) < 4:
        best = max([p_sft, *(p["score"] for p in points)])
        low, high = max(0.0, best - 1.645 * sampling_error(best, problems)), 1.0
        fields = dict.fromkeys(("a_post", "pl_rl", "c_mid", "b", "epsilon", "law", "rmse_fit", "rmse_heldout"))
        fields |= {"status": "too few points", "identified": False}
        draws = rng.uniform(low, high, DRAWS)
    else:
        fit = ceiling.fit([p["x"] for p in points], [p["score"] for p in points], p_sft, max_score=1.0)
        names = "a_post pl_rl c_mid b epsilon law rmse_fit rmse_heldout status identified"
        fields = {name: getattr(fit, name) for name in names.split()}
        low, high = fit.interval
        if fit.status == "not sigmoidal":  # no law fits, so the ceiling can lie anywhere above the low end
            draws = rng.uniform(low, 1.0, DRAWS)
        else:
            # An identified ceiling comes from its curve. For any other the prior decides how far up the draws go, and
            # one that finds small gains likelier would show too often that such a ceiling is below another one.
            gain = fit.draws.a_post - fit.draws.start
            weight = np.ones(DRAWS) if fit.identified else (1 + gain / GAIN) ** WIDER
            draws = rng.choice(fit.draws.a_post, DRAWS, p=weight / weight.sum())
    draws = draws + rng.normal(size=len(draws)) * sampling_error(draws, problems)
    return fields | {"a_post_low": low, "a_post_high": high}, draws


def sampling_error(score: np.ndarray | float, problems: int) -> np.ndarray | float:
    """The standard error of a score: the square root of p (1 - p) / problems."""
    p = np.clip(score, 0, 1)
    return np.sqrt(p * (1 - p) / problems)


def probability_above(a: np.ndarray, b: np.ndarray) -> float:
    """How probable it is that a value with draws a (R,) lies above an independent one with draws b (S,)."""
    b = np.sort(b)
    below = np.searchsorted(b, a, "left") + np.searchsorted(b, a, "right")  # equal values count half
    return float(below.mean() / (2 * len(b)))


def verdict(probability: float) -> str:
    if probability >= SURE:
        return "shown"
    return "not shown" if probability <= 1 - SURE else "not resolved"
