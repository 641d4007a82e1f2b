"""How high can this RL run go, how sure is that, and how much plasticity is left? (Eqs. 1-4 and Appendix F.)

From points (RL compute x_i, score y_i) and P_sft, the score where RL starts, fit the RL scaling law

    P_post(x) = s + (A_post - s) g(x),    g(x) = 1 / (1 + (x / C_mid)^-B),    s = P_sft + epsilon      (2)
    A_post = limit of P_post (3);    PL_rl = A_post - P_sft (4)

**Why not just least squares?** A curve that is still rising fits a ceiling of 80 as well as one of 100, and the noise
of a training run is no coin toss a point: the policy drifts, so neighbours err together, and an error bar that takes
them for independent is far too short. So `fit` asks which ceilings the data allow, under noise that has both parts:

    y = P_post(x) + drift(x) + noise,   cov = sigma^2 (1[i=j] + tau^2 exp(-|x_i - x_j| / ell))

For fixed (C_mid, B, tau, ell) the law is linear in s and A_post, so a grid over those four is all the search there is
(variable projection): for each cell and each A_post the best s and the squared error are closed forms. Adding a prior
and integrating sigma out gives every cell a probability. No starting guess, no local minimum, no random step:

    1. a fall for good (a collapse) is cut off                                               `collapse_point`
    2. outliers are rejected: modified Z-scores, then Least Trimmed Squares (Appendix F)     `robust_points`
    3. the posterior over (A_post; C_mid, B, tau, ell; s)                                    `posterior`
    4. a_post is its mode in A_post. The interval is its middle 85 %, which covers 90 % of true ceilings over simulated noise
       from white to drift of 1.5 sd (the prior allows for drift, so the plain 90 % covers too much of white noise). The verdict:

    saturated       with 95 % probability less than 4 points (of 100) are left to gain: the ceiling is identified
    still rising    it isn't: only the interval's low end means something
    collapsed       fell far below its best and stayed there: a_post is the best smoothed score before that
    not sigmoidal   residuals that neither noise nor drift explains: a_post is the best smoothed score

The prior, one for all curves: B log-normal around 1.2 (sd 0.5), C_mid log-uniform from a third of the first to 3 times
the last compute, gains exponential with mean 10 points, B in [0.4, 4], A_post at most the score's maximum.
docs/ceiling.md has what it does on the paper's curves and on simulated ones with known ceilings, beside the published
procedure (`fit_paper`) and a bootstrap (`bootstrap`). Run:

    python -m nanopcf.ceiling CURVES.csv [--json OUT.json] [--plot OUT.png] [--holdout]
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from nanopcf.ceiling.law import law_at
from nanopcf.ceiling.posterior import Draws, posterior
from nanopcf.ceiling.robust import best_smoothed, collapse_point, misfit, robust_points

HOLDOUT = 0.29  # the last share of the points, for rmse_heldout: the paper's split
LEFT = 0.04  # saturated: less than this left to gain, as a fraction of max_score


@dataclass(frozen=True)
class CeilingFit:
    a_post: float
    pl_rl: float  # a_post - p_sft
    c_mid: float  # compute at half of the gain, in the unit of x
    b: float
    epsilon: float  # start of the law above P_sft; P_sft is one measurement of the start like any other
    interval: tuple[float, float]  # 90 %, for a_post
    p_sft: float
    rmse_fit: float  # of the law on the kept points
    rmse_heldout: float | None  # fit on the first 71 % of the points, error on the others; None if too few
    status: str  # saturated | still rising | collapsed | not sigmoidal
    kept: np.ndarray  # (n,) bool: the points the fit uses
    max_score: float
    law: tuple[float, float, float, float] = field(repr=False)  # start, A_post, C_mid, B of the drawn curve
    draws: Draws | None = field(repr=False)  # None from `fit_paper`

    @property
    def pl_interval(self) -> tuple[float, float]:
        """90 %, for the plasticity above the measured P_sft."""
        return self.interval[0] - self.p_sft, self.interval[1] - self.p_sft

    def predict(self, x: ArrayLike) -> np.ndarray:
        """The fitted law at compute x."""
        return law_at(np.asarray(x, float), self.law)

    def band(self, x: ArrayLike, level: float = 0.90) -> np.ndarray:
        """Low and high end (2, len(x)) of the law at compute x."""
        tail = (1 - level) / 2
        return np.quantile(self.draws.law(np.asarray(x, float)), [tail, 1 - tail], axis=0)

    def stop_at(self, gain: float | None = None) -> float | None:
        """The first compute after which the expected further gain is below `gain` (default: a hundredth of max_score).

        None if that lies beyond 10 times the compute spent: no curve says so much.
        """
        x = self.draws.x
        x = np.geomspace(x[x > 0][0], 10 * x[-1], 400)
        left = (self.draws.a_post[:, None] - self.draws.law(x)).mean(0)
        below = np.flatnonzero(left < (0.01 * self.max_score if gain is None else gain))
        return float(x[below[0]]) if len(below) else None


def fit(x: ArrayLike, y: ArrayLike, p_sft: float, *, max_score: float | None = None, robust: bool = True) -> CeilingFit:
    """Fits Eq. 2 to scores y at increasing RL compute x (0 allowed) and judges if the ceiling is identified.

    max_score: 1 or 100; by default 1 if no score is above 1. robust: the stages of Appendix F. Raises ValueError.
    """
    x, y, p_sft = np.asarray(x, float), np.asarray(y, float), float(p_sft)
    cap = checked_max_score(x, y, p_sft, max_score)
    end = collapse_point(y, p_sft, cap)  # the points from here on are the collapse
    before = np.arange(len(x)) < (end if end >= 4 else len(x))  # it fell at once: show the whole curve
    kept = robust_points(x, y, p_sft, cap, before) if robust else before
    interval, law, draws = posterior(x[kept], y[kept], p_sft, cap)

    a_post, misses = law[1], (y - law_at(x, law))[kept]
    left = np.quantile(draws.a_post - draws.law(x[kept][-1:])[:, 0], 0.95)
    status = "saturated" if left < LEFT * cap else "still rising"
    if end < len(x) or misfit(misses, cap):
        status = "collapsed" if end < len(x) else "not sigmoidal"
        a_post = best_smoothed(y[:end], p_sft)
        interval = min(interval[0], a_post), max(interval[1], a_post)

    heldout, first = None, len(x) - round(HOLDOUT * len(x))
    if 4 <= first < len(x):
        early = np.ones(first, bool)
        early = robust_points(x[:first], y[:first], p_sft, cap, early) if robust else early
        forecast = posterior(x[:first][early], y[:first][early], p_sft, cap)[2].scores(x[first:])
        heldout = float(np.sqrt(np.mean((y[first:] - np.median(forecast, 0)) ** 2)))
    return CeilingFit(
        a_post,
        a_post - p_sft,
        law[2],
        law[3],
        max(0.0, law[0] - p_sft),
        interval,
        p_sft,
        float(np.sqrt(np.mean(misses**2))),
        heldout,
        status,
        kept,
        cap,
        law,
        draws,
    )


def checked_max_score(x: np.ndarray, y: np.ndarray, p_sft: float, max_score: float | None) -> float:
    """The scale of the scores, 1 or 100. Raises ValueError for what can't be fitted."""
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"x and y must be lists of one length, got shapes {x.shape} and {y.shape}")
    if len(x) < 4:
        raise ValueError(f"{len(x)} points can't hold three parameters: need at least 4")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and np.isfinite(p_sft)):
        raise ValueError("compute, scores and P_sft must be finite numbers")
    if x[0] < 0 or (np.diff(x) <= 0).any():
        raise ValueError("compute must start at 0 or above and strictly increase")
    scores = np.append(y, p_sft)
    cap = max_score if max_score is not None else (1.0 if scores.max() <= 1 else 100.0)
    if scores.min() < 0 or scores.max() > cap:
        raise ValueError(f"scores must lie in [0, {cap:g}], got {scores.min():g} to {scores.max():g}")
    small, large = scores[(scores > 0) & (scores <= 1)], scores[scores > 1]
    if cap == 100 and len(small) and len(large) and (100 * small > 0.5 * large.min()).any():
        raise ValueError(f"a score of {small.max():g} beside {large.min():g}: fractions mixed with percentages?")
    return float(cap)
