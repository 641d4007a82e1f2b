"""The ceilings of a report, and how probable it is that one lies above another.

A ceiling is known only up to two errors: of its curve (the posterior of `ceiling.fit`), and of the test set, because
other problems would have given other scores. All scores of a run are taken on the same problems, so the second error
does not show within a curve. Draws of a ceiling hold both. For the second they take the whole binomial variance, as if
the errors of two branches were independent: branches that solve the same problems differ more surely than stated here.
"""

from functools import lru_cache

import numpy as np

from nanopcf import ceiling
from nanopcf.ceiling.posterior import DRAWS, GAIN, GAIN_POWER

SURE = 0.95  # a claim is shown from this probability on, and not shown when its opposite has it
RISING = 1.5  # for a ceiling that is not identified, the prior of the gain is (1 + gain / GAIN)^RISING: wide upward


def fit_ceiling(
    points: list[dict], p_sft: float, problems: int, *, seed: int, out_of_signal: bool = False
) -> tuple[dict, np.ndarray]:
    """Eq. 2 fitted to a curve: its ceiling A_post (Eq. 3), plasticity PL_rl (Eq. 4) and verdict; and (R,) draws.

    points: {x, score}, with scores as fractions of so many `problems`. seed: another one for each curve, or the errors
    of their test sets would be the same. out_of_signal: RL had no prompt left to learn from, so that the curve ends at
    the ceiling of those prompts, and not of the policy; fit_status keeps what the curve alone would say.

    If `identified`, a_post is the ceiling and pl_rl the plasticity. If not, both are lower bounds: a_post is the low
    end of the 90 % interval, and settled_at the RL compute that would probably identify the ceiling. Fewer than 4
    points after the start have no fit, and the verdict "too few points". Raises ValueError for what cannot be a curve.
    """
    rng, rl = np.random.default_rng(seed), [p for p in points if p["x"] != 0]
    names = ("c_mid", "b", "epsilon", "law", "rmse_fit", "rmse_heldout")
    if len(rl) < 4:
        best = max([p_sft, *(p["score"] for p in rl)])
        low, high = float(max(0.0, best - 1.645 * sampling_error(best, problems))), 1.0
        fields, status, identified = dict.fromkeys((*names, "settled_at")), "too few points", False
        draws = rng.uniform(low, high, DRAWS)
    else:
        fit = fitted(tuple(p["x"] for p in rl), tuple(p["score"] for p in rl), p_sft)
        fields, (low, high) = {name: getattr(fit, name) for name in names}, fit.interval
        fields["settled_at"] = None if fit.identified else settled_at(fit, rl[-1]["x"])
        status, identified = fit.status, fit.identified and not out_of_signal
        if not identified:  # a bound above all that was seen would trust the law too much
            low = min(low, max(p["score"] for p in rl))
        if status == "not sigmoidal":  # no law fits, so the ceiling can lie anywhere above the low end
            draws = rng.uniform(low, 1.0, DRAWS)
        else:
            # An identified ceiling comes from its curve. For any other the prior decides how far up the draws go, and
            # one that finds small gains likelier would show too often that such a ceiling is below another one.
            gain = fit.draws.a_post - fit.draws.start
            weight = np.ones(DRAWS) if identified else (1 + gain / GAIN) ** (GAIN_POWER + RISING)
            draws = rng.choice(fit.draws.a_post, DRAWS, p=weight / weight.sum())
            if not identified:
                # Real curves can bend before the law does: at even odds it is anywhere from what was reached.
                anywhere = rng.uniform(np.minimum(low, draws), draws)
                draws = np.where(rng.random(DRAWS) < 0.5, anywhere, draws)
    draws = draws + rng.normal(size=DRAWS) * sampling_error(draws, problems)
    a_post = fit.a_post if identified else low
    return fields | {
        "a_post": a_post,
        "a_post_low": low,
        "a_post_high": high,
        "pl_rl": a_post - p_sft if identified else max(0.0, low - p_sft),
        "status": "out of signal" if out_of_signal else status,
        "fit_status": status,
        "identified": identified,
    }, draws


@lru_cache(64)  # a curve is fitted after each round of the allocation, for the report and for the study
def fitted(x: tuple[float, ...], scores: tuple[float, ...], p_sft: float) -> ceiling.CeilingFit:
    return ceiling.fit(x, scores, p_sft, max_score=1.0)


def settled_at(fit: ceiling.CeilingFit, spent: float) -> float | None:
    """The RL compute where the curve would be saturated, if it goes on like its draws; None beyond 30 times spent."""
    x = np.geomspace(spent, 30 * spent, 100)
    left = np.quantile(fit.draws.a_post[:, None] - fit.draws.law(x), 0.95, axis=0)  # (100,)
    enough = np.flatnonzero(left < ceiling.LEFT * fit.max_score)
    return float(x[enough[0]]) if len(enough) else None


def sampling_error(score: np.ndarray | float, problems: int) -> np.ndarray | float:
    """The standard error of a score: the square root of p (1 - p) / problems.

    p is the score with one right and one wrong answer added, since 20 right answers of 20 leave some doubt too.
    """
    p = (np.clip(score, 0, 1) * problems + 1) / (problems + 2)
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
