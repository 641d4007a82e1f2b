"""How high can this RL run go, how sure is that, and how much plasticity is left? (Eqs. 1-4 and Appendix F.)

Given points (RL compute x_i, score y_i) and P_sft, the score where RL starts, fit the scaling law of RL:

    P_post(x) = s + (A_post - s) g(x),    g(x) = 1 / (1 + (x / C_mid)^-B),    s = P_sft + epsilon          (2)
    ceiling A_post = limit of P_post (3);    plasticity PL_rl = A_post - P_sft                             (4)

**Why least squares is not enough.** It gives one ceiling and no doubt, but a curve that still rises fits a ceiling of
80 about as well as one of 100. And the usual error bars take every score for an independent measurement, while the
policy drifts during training, so that neighbouring scores err together: such error bars are far too short. So `fit`
asks how probable each ceiling is, with noise that has both parts:

    y = P_post(x) + drift(x) + error,    covariance = sigma^2 (1[i=j] + tau^2 exp(-|x_i - x_j| / ell))

**The prior** says what is likely before the curve is seen, and is the same for all curves: small gains likelier than
large ones and none ruled out, B around 1.2, C_mid of any size between a third of the first compute and 3 times the
last, drift from none to twice sigma.

**The four steps** of `fit`:

1. Cut off a collapse: a final stretch far below the best score says nothing about the ceiling (`collapse_point`).
2. Reject outliers: modified Z-scores, then Least Trimmed Squares, as in Appendix F (`robust_points`).
3. Compute the probability of every law on a grid that zooms in (`ceiling_posterior`): no starting guess, no search.
4. Take the most probable A_post, an interval around it, and a verdict:

    saturated       with 95 % probability less than 4 points of 100 are left to gain: the curve identifies the ceiling
    still rising    much may be left to gain
    collapsed       the score fell far below its best and stayed there: a_post is the best smoothed score before that
    not sigmoidal   neither noise nor drift explains the residuals: a_post is the best smoothed score

   The last three do not identify the ceiling: only the low end of the interval means something, as a lower bound.

`result` says what a fit holds. The interval is the middle 85 % of the posterior, because that holds 90 % of the true
ceilings of simulated curves, widened by LAW_ERROR and LATE_GAIN, because real runs that went on needed that:
docs/ceiling.md. `published` has the paper's procedure. `python -m nanopcf.ceiling CURVES.csv` fits a file of curves.
"""

import numpy as np
from numpy.typing import ArrayLike

from nanopcf.ceiling.checks import checked_max_score
from nanopcf.ceiling.heldout import forecast_error
from nanopcf.ceiling.law import law_at
from nanopcf.ceiling.posterior import ceiling_posterior
from nanopcf.ceiling.result import CeilingFit
from nanopcf.ceiling.robust import best_smoothed, collapse_point, misfit, robust_points

__all__ = ["CeilingFit", "fit"]

LEFT = 0.04  # saturated: less than this is left to gain, as a fraction of max_score
LAW_ERROR = 0.004  # no real curve is exactly Eq. 2: as much further lies either end of the interval,
LATE_GAIN = 0.05  # and the upper end by this part of the gain, which real runs still made when they went on


def fit(x: ArrayLike, y: ArrayLike, p_sft: float, *, max_score: float | None = None, robust: bool = True) -> CeilingFit:
    """Fits Eq. 2 to scores y (n,) at increasing RL compute x (n,), and judges whether the ceiling is identified.

    x may start at 0. max_score: 1 or 100; by default 1 if no score is above 1. robust=False skips step 2. Raises
    ValueError for what cannot be a curve.
    """
    x, y, p_sft = np.asarray(x, float), np.asarray(y, float), float(p_sft)
    max_score = checked_max_score(x, y, p_sft, max_score)

    # 1. Only points before a collapse are allowed, unless hardly any are left: then the whole curve is shown.
    end = collapse_point(y, p_sft, max_score)
    allowed = np.arange(len(x)) < (end if end >= 4 else len(x))  # (n,) bool
    # 2. and 3.
    kept = robust_points(x, y, p_sft, max_score, allowed) if robust else allowed  # (n,) bool
    interval, law, draws = ceiling_posterior(x[kept], y[kept], p_sft, max_score)
    high = interval[1] + LAW_ERROR * max_score + LATE_GAIN * (law.a_post - law.start)
    interval = interval[0] - LAW_ERROR * max_score, min(max_score, high)
    residuals = (y - law_at(x, law))[kept]

    # 4. The verdict. A curve that is not sigmoidal has no fitted ceiling: the best that it reached stands for it.
    a_post, reached = law.a_post, best_smoothed(y[:end], p_sft)
    if end < len(x) or misfit(residuals, max_score):
        status, a_post = "collapsed" if end < len(x) else "not sigmoidal", reached
    else:
        left = np.quantile(draws.a_post - draws.law(x[kept][-1:])[:, 0], 0.95)
        status = "saturated" if left < LEFT * max_score else "still rising"
    if status != "saturated":  # a bound that lies above all that was seen would trust the law too much
        interval = min(interval[0], reached), max(interval[1], reached)
    return CeilingFit(
        a_post=a_post,
        epsilon=max(0.0, law.start - p_sft),
        interval=interval,
        p_sft=p_sft,
        rmse_fit=float(np.sqrt(np.mean(residuals**2))),
        rmse_heldout=forecast_error(x, y, p_sft, max_score, robust),
        status=status,
        kept=kept,
        max_score=max_score,
        law=law,
        draws=draws,
    )
