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

import sys
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

B_RANGE = (0.4, 4.0)
B_TYPICAL = 1.2
C_REACH = 3.0  # C_mid up to this many times the last compute
GAIN = 0.10  # prior mean of A_post - s, as a fraction of max_score
NOISE = [(0, 1.0), (0.5, 0.1), (1, 0.1), (2, 0.1), (0.5, 0.4), (1, 0.4), (2, 0.4)]  # (tau, ell / last x)
TAU = 4.0  # modified Z-scores beyond this are outliers; the largest of the paper's choices
LTS_ALPHA = 0.85  # share of the points that Least Trimmed Squares fits
HOLDOUT = 0.29  # the last share of the points, for rmse_heldout: the paper's split
TAIL = 0.075  # posterior beyond each end of the interval: the value that covers 90 % of simulated ceilings
LEFT = 0.04  # saturated: less than this left to gain, as a fraction of max_score
COLLAPSE = 0.03  # collapsed: this far (fraction of max_score) and 5 noise sd below the best, at the end
MISFIT = 0.015  # not sigmoidal: only if the residuals are at least this large, as a fraction of max_score
DRAWS = 800


@dataclass(frozen=True)
class Draws:
    """R equally likely laws, and the noise around them; a_post, start, c_mid, b, tau, ell, sigma: (R,)."""

    a_post: np.ndarray
    start: np.ndarray
    c_mid: np.ndarray
    b: np.ndarray
    tau: np.ndarray
    ell: np.ndarray
    sigma: np.ndarray
    x: np.ndarray  # (n,) the points they were fitted to, P_sft at 0 first
    y: np.ndarray

    def law(self, x: np.ndarray) -> np.ndarray:
        """P_post at compute x: (R, len(x))."""
        return self.start[:, None] + (self.a_post - self.start)[:, None] * shape(x, self.c_mid, self.b)

    def scores(self, x: np.ndarray) -> np.ndarray:
        """What an evaluation at compute x would give, drift and noise included: (R, len(x))."""
        rng, n = np.random.default_rng(0), len(self.x)
        points = np.concatenate([self.x, x])
        apart = np.abs(points[:, None] - points)
        misses, scores = self.y - self.law(self.x), self.law(x)
        for tau, ell in {*zip(self.tau, self.ell, strict=True)}:
            mine = (self.tau == tau) & (self.ell == ell)
            cov = np.eye(len(points)) + tau**2 * np.exp(-apart / ell)
            # drift carried on from the misses, (n, len(x))
            weights = np.linalg.solve(cov[:n, :n], cov[:n, n:])
            left = cov[n:, n:] - cov[n:, :n] @ weights
            noise = rng.normal(size=(mine.sum(), len(x))) @ np.linalg.cholesky(left).T
            scores[mine] += misses[mine] @ weights + self.sigma[mine, None] * noise
        return scores


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


def fit(
    x: ArrayLike, y: ArrayLike, p_sft: float, *, max_score: float | None = None, robust: bool = True
) -> CeilingFit:
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
        a_post, a_post - p_sft, law[2], law[3], max(0.0, law[0] - p_sft), interval, p_sft,
        float(np.sqrt(np.mean(misses**2))), heldout, status, kept, cap, law, draws,
    )  # fmt: skip


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
        raise ValueError(
            f"a score of {small.max():g} beside {large.min():g}: fractions mixed with percentages?"
        )
    return float(cap)


# ---- the law, and plain least squares by variable projection ----


def shape(x: np.ndarray, c_mid: np.ndarray, b: np.ndarray) -> np.ndarray:
    """g(x) of Eq. 2 for K pairs (c_mid, b): (K, n)."""
    with np.errstate(divide="ignore", over="ignore"):  # x = 0: (c / 0)^b = inf, and g = 0
        return 1 / (1 + (c_mid[:, None] / x) ** b[:, None])


def law_at(x: np.ndarray, law: tuple[float, float, float, float]) -> np.ndarray:
    start, a_post, c_mid, b = law
    return start + (a_post - start) * shape(x, np.array([c_mid]), np.array([b]))[0]


def grid(c_range: tuple[float, float], b_range: tuple[float, float], size: tuple[int, int]) -> tuple[np.ndarray, ...]:  # fmt: skip
    """Every pair (c_mid, b), evenly in their logarithms: two (K,)."""
    c, b = (np.geomspace(*r, k) for r, k in zip((c_range, b_range), size, strict=True))
    return tuple(v.ravel() for v in np.meshgrid(c, b))


def least_squares(
    x: np.ndarray, y: np.ndarray, p: float, cap: float, *, reach: float = 1.0, b_range: tuple[float, float] = B_RANGE,
    free_offset: bool = False,
) -> tuple[float, float, float, float]:  # fmt: skip
    """(start, A_post, C_mid, B) of smallest squared error: a grid over (C_mid, B), then six zooms around its best.

    With r = y - p the law is r = e (1 - g) + a g, linear in a = A_post - p (in [0, cap - p]) and e = epsilon (>= 0,
    and 0 unless free_offset). C_mid lies between a tenth of the first and `reach` times the last compute.
    """
    r, first = y - p, x[x > 0][0]
    bounds = np.log([[first / 10, max(reach * x[-1], first)], b_range])
    window, size = bounds, (30, 14)
    for _ in range(7):
        c_mid, b = grid(np.exp(window[0]), np.exp(window[1]), size)
        g = shape(x, c_mid, b)  # (K, n)
        h = 1 - g
        gg, gh, hh, gr, hr = (g * g).sum(1), (g * h).sum(1), (h * h).sum(1) + 1e-12, g @ r, h @ r
        a = np.clip(gr / (gg + 1e-12), 0, cap - p)  # the best for e = 0
        e = np.zeros_like(a)
        if free_offset:
            both = (gr * hh - hr * gh) / (gg * hh - gh**2 + 1e-12)  # the best with e free
            # and with e = 0 where e would be < 0
            both = np.clip(np.where(hr > both * gh, both, a), 0, cap - p)
            a, e = both, np.maximum(hr - both * gh, 0) / hh
        i = int((a * a * gg + 2 * a * e * gh + e * e * hh - 2 * a * gr - 2 * e * hr).argmin())
        best = np.log([[c_mid[i]], [b[i]]])
        step = (window[:, 1:] - window[:, :1]) / (np.array([size]).T - 1)
        window = np.clip(np.hstack([best - 2 * step, best + 2 * step]), bounds[:, :1], bounds[:, 1:])
        size = (11, 11)
    return float(p + e[i]), float(p + a[i]), float(c_mid[i]), float(b[i])


# ---- Appendix F: robust stages ----


def modified_z(misses: np.ndarray, kept: np.ndarray, cap: float) -> np.ndarray:
    """|M_i| = 0.6745 |r_i - median r| / MAD, with median and MAD over the kept points."""
    centre = np.median(misses[kept])
    mad = np.median(np.abs(misses[kept] - centre))
    return 0.6745 * np.abs(misses - centre) / max(mad, 1e-3 * cap)  # exact data has no outliers of 1e-9


def reject(x, y, p, cap, kept: np.ndarray, tau: float, fewest: int, **options) -> np.ndarray:
    """Points within tau by modified Z-score of the fit to the points kept, repeated until nothing changes."""
    for _ in range(20):
        misses = y - law_at(x, least_squares(x[kept], y[kept], p, cap, **options))
        inside = kept & (modified_z(misses, kept, cap) <= tau)
        if inside.sum() < fewest or (inside == kept).all():
            break
        kept = inside
    return kept


def trim(x, y, p, cap, allowed: np.ndarray, kept: np.ndarray, h: int, **options) -> np.ndarray:
    """Least Trimmed Squares by C-steps: refit the h allowed points of smallest error until they stay the same."""
    for _ in range(30):
        misses = y - law_at(x, least_squares(x[kept], y[kept], p, cap, **options))
        closest = np.zeros_like(kept)
        closest[np.argsort(np.where(allowed, misses**2, np.inf), kind="stable")[:h]] = True
        if (closest == kept).all():
            break
        kept = closest
    return kept


def robust_points(x: np.ndarray, y: np.ndarray, p: float, cap: float, allowed: np.ndarray) -> np.ndarray:
    """The points the fit uses, out of those allowed (a collapse stays out): one setting for every curve."""
    h = max(4, int(LTS_ALPHA * allowed.sum()))
    kept = reject(x, y, p, cap, allowed, TAU, h)
    kept = trim(x, y, p, cap, allowed, kept, h)
    # trimming drops good points too: take back all that the fit explains (MAD over all, so not too small)
    misses = y - law_at(x, least_squares(x[kept], y[kept], p, cap))
    final = allowed & (modified_z(misses, allowed, cap) <= TAU)
    return final if final.sum() >= 4 else kept


# ---- how sure: the posterior on a grid ----


def posterior(
    x: np.ndarray, y: np.ndarray, p: float, cap: float
) -> tuple[tuple[float, float], tuple[float, float, float, float], Draws]:
    """The 90 % interval of A_post, the law (start, A_post, C_mid, B) at its mode, and draws.

    For each noise (tau, ell), whitened by its Cholesky factor, and each pair (C_mid, B), the squared error is a
    quadratic in start and A_post: five inner products hold it. sigma^2 has an inverse gamma prior worth eight points,
    around the noise seen between neighbours, and is integrated out; the start is integrated out too (flat prior).
    """
    first = x[x > 0][0]
    x, y = np.append(0.0, x), np.append(p, y)
    n, prior, spread = len(x), 4.0, max(noise_sd(y), 2e-3 * cap)
    c_mid, b = grid((first / 3, C_REACH * x[-1]), B_RANGE, (36, 12))  # (K,)
    K, g = len(b), shape(x, c_mid, b)
    apart = np.abs(x[:, None] - x) / x[-1]
    columns = np.column_stack([y, np.ones(n), g.T])  # (n, 2 + K)
    parts = []
    for tau, ell in NOISE:
        factor = np.linalg.cholesky(np.eye(n) + tau**2 * np.exp(-apart / ell))
        white = np.linalg.solve(factor, columns)
        u, G = white[:, 0], white[:, 2:].T  # (n,), (K, n)
        H = white[:, 1] - G
        gg, gh, hh, gy, hy = (G * G).sum(1), (G * H).sum(1), (H * H).sum(1), G @ u, H @ u
        # the best start for a ceiling a is s0 - a s1, its squared error e0 - 2 a e1 + a^2 e2
        quadratic = u @ u - hy**2 / hh, gy - gh * hy / hh, gg - gh**2 / hh
        log_det = np.log(np.diag(factor)).sum() + np.log(hh) / 2
        parts.append([hy / hh, gh / hh, hh, *quadratic, log_det])
    cells = np.concatenate([np.array(part) for part in parts], axis=1)  # (7, noises * K)

    def weigh(a: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log probability, squared error and best start of cells c (M,) with ceilings a: (M,) or (J, 1)."""
        s0, s1, hh, e0, e1, e2, log_det = cells[:, c]
        s, error = s0 - a * s1, np.maximum(e0 + a * (a * e2 - 2 * e1), 0)
        above = np.maximum(s - a, 0)  # a gain can't be negative: then the start is a, and the curve flat
        s, error = s - above, error + hh * above**2
        log_p = -(prior + (n - 1) / 2) * np.log(prior * spread**2 + error / 2) - log_det
        log_p -= (a - s) / (GAIN * cap) + (np.log(b[c % K] / B_TYPICAL) / 0.5) ** 2 / 2
        return log_p, error, s

    # 1. every cell at its own best ceiling: most can be forgotten, the others say where A_post lies
    every, lowest = np.arange(cells.shape[1]), max(0.0, min(p, np.median(y)) - 0.03 * cap)
    peak = np.clip(cells[4] / (cells[5] + 1e-12), lowest, cap)
    log_p, error, _ = weigh(peak, every)
    kept = np.flatnonzero(log_p > log_p.max() - 12)
    reach = 4 * np.sqrt((prior * spread**2 + error / 2) / (prior + (n - 1) / 2) / (cells[5] + 1e-12))[kept]
    a = np.linspace(max(lowest, (peak[kept] - reach).min()), min(cap, (peak[kept] + reach).max()), 121)
    # 2. those cells at every ceiling there
    log_p, error, s = weigh(a[:, None], kept)
    weight = np.exp(log_p - log_p.max())
    marginal = weight.sum(1)  # (J,)
    below = np.append(0, np.cumsum((marginal[1:] + marginal[:-1]) / 2))
    low, high = np.interp([TAIL, 1 - TAIL], below / below[-1], a)
    j = int(marginal.argmax())
    i = int(weight[j].argmax())
    law = float(s[j, i]), float(a[j]), float(c_mid[kept[i] % K]), float(b[kept[i] % K])

    total = np.cumsum(weight.ravel())
    drawn = np.searchsorted(total, (np.arange(DRAWS) + 0.5) / DRAWS * total[-1])
    j, i = np.unravel_index(drawn, weight.shape)
    m, k = np.divmod(kept[i], K)
    rng = np.random.default_rng(0)
    variance = (prior * spread**2 + error[j, i] / 2) / rng.gamma(prior + (n - 1) / 2, size=DRAWS)
    noises = np.array(NOISE)[m] * [1, x[-1]]
    draws = Draws(a[j], s[j, i], c_mid[k], b[k], *noises.T, np.sqrt(variance), x, y)
    return (float(low), float(high)), law, draws


def noise_sd(y: np.ndarray) -> float:
    """Noise sd of one score, from differences of neighbours: trends cancel, single outliers don't count."""
    return float(1.4826 * np.median(np.abs(np.diff(y))) / np.sqrt(2))


# ---- curves that aren't sigmoids ----


def best_smoothed(y: np.ndarray, p: float) -> float:
    """Highest running median of three, P_sft included: one lucky score is not a ceiling."""
    if not len(y):
        return float(p)
    padded = np.concatenate([[p], y, y[-1:]])
    return float(max(p, np.median([padded[:-2], padded[1:-1], padded[2:]], axis=0).max()))


def collapse_point(y: np.ndarray, p: float, cap: float) -> int:
    """Index of the first point of a final stretch far below the best before it; len(y) if there is none."""
    drop = max(COLLAPSE * cap, 5 * noise_sd(np.append(p, y)))
    end = len(y)
    while end > 0 and y[end - 1] < best_smoothed(y[: end - 1], p) - drop:
        end -= 1
    return end if len(y) - end >= max(2, len(y) // 20) else len(y)


def misfit(misses: np.ndarray, cap: float) -> bool:
    """Large residuals in long waves. Von Neumann's ratio is 2 for white noise, less where neighbours agree."""
    n, r = len(misses), misses - misses.mean()
    if np.sqrt(np.mean(r**2)) < MISFIT * cap:
        return False
    ratio = np.sum(np.diff(r) ** 2) / np.sum(r**2)
    return bool(ratio < 2 - 2.8 * 2 * np.sqrt((n - 2) / (n * n - 1)))  # 2.8 sd below its mean


# ---- for comparison: the published procedure, and a bootstrap ----


def fit_paper(
    x: ArrayLike, y: ArrayLike, p_sft: float, *, tau: float = 2.5, lts_alpha: float | None = None, first: int = 0,
    last: int | None = None, free_offset: bool = False, max_score: float | None = None,
) -> CeilingFit:  # fmt: skip
    """Appendix F as published, with its choices by hand for every curve: points first:last are fitted, the others held out.

    Modified Z-scores at tau, then (with lts_alpha) Least Trimmed Squares on that share of what is left, and bounded
    least squares; C_mid within the compute fitted, B in [0.1, 12]. No interval and no verdict: status is "paper".
    """
    x, y, p_sft = np.asarray(x, float), np.asarray(y, float), float(p_sft)
    cap = checked_max_score(x, y, p_sft, max_score)
    last = round((1 - HOLDOUT) * len(x)) if last is None else min(last, len(x))
    if last - first < 4:
        raise ValueError(f"points {first} to {last} are fewer than the 4 a fit needs")
    u, v, options = x[first:last], y[first:last], dict(b_range=(0.1, 12.0), free_offset=free_offset)
    kept = reject(u, v, p_sft, cap, np.ones(len(u), bool), tau, 5, **options)
    if lts_alpha is not None:
        kept = trim(u, v, p_sft, cap, kept, kept, max(4, int(lts_alpha * kept.sum())), **options)
    law = least_squares(u[kept], v[kept], p_sft, cap, **options)
    everywhere = np.zeros(len(x), bool)
    everywhere[first:last] = kept
    rmse = np.sqrt(np.mean((v - law_at(u, law))[kept] ** 2))
    heldout = float(np.sqrt(np.mean((y[last:] - law_at(x[last:], law)) ** 2))) if last < len(x) else None
    return CeilingFit(
        law[1], law[1] - p_sft, law[2], law[3], law[0] - p_sft, (np.nan, np.nan), p_sft, float(rmse), heldout, "paper",
        everywhere, cap, law, None,
    )  # fmt: skip


def bootstrap(x: ArrayLike, y: ArrayLike, p_sft: float, *, refits: int = 1000, max_score: float | None = None) -> np.ndarray:  # fmt: skip
    """A_post of `refits` least-squares fits to resampled curves (refits,): the law plus residuals drawn in blocks.

    Blocks of an eighth of the curve keep the drift's correlation. Each refit is the best of a fixed grid, all at once.
    """
    x, y, p_sft = np.asarray(x, float), np.asarray(y, float), float(p_sft)
    cap = checked_max_score(x, y, p_sft, max_score)
    fitted = law_at(x, least_squares(x, y, p_sft, cap))
    n, rng = len(x), np.random.default_rng(0)
    block = max(1, n // 8)
    starts = rng.integers(0, n, size=(refits, -(-n // block)))
    index = (starts[:, :, None] + np.arange(block)).reshape(refits, -1)[:, :n] % n
    r = fitted + (y - fitted)[index] - p_sft  # (refits, n)
    g = shape(x, *grid((x[x > 0][0] / 10, x[-1]), B_RANGE, (40, 16)))  # (K, n)
    gg, gr = (g * g).sum(1), r @ g.T  # (K,), (refits, K)
    a = np.clip(gr / gg, 0, cap - p_sft)
    best = (a * a * gg - 2 * a * gr).argmin(1)
    return p_sft + a[np.arange(refits), best]


if __name__ == "__main__":
    from nanopcf import curves

    sys.exit(curves.main())
