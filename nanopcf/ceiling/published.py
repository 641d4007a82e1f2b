"""To compare with `fit`: the paper's own procedure, and the usual error bar, a bootstrap."""

import numpy as np
from numpy.typing import ArrayLike

from nanopcf.ceiling import CeilingFit
from nanopcf.ceiling.checks import checked_max_score
from nanopcf.ceiling.heldout import HOLDOUT
from nanopcf.ceiling.law import B_RANGE, grid, law_at, least_squares, shape
from nanopcf.ceiling.robust import reject, trim

PAPER_B_RANGE = (0.1, 12.0)
FEWEST = 5  # rejecting outliers stops before fewer points are left


def fit_paper(
    x: ArrayLike,
    y: ArrayLike,
    p_sft: float,
    *,
    tau: float = 2.5,
    lts_alpha: float | None = None,
    first: int = 0,
    last: int | None = None,
    free_offset: bool = False,
    max_score: float | None = None,
) -> CeilingFit:
    """Appendix F as published, with its choices by hand for every curve.

    Points first:last are fitted (by default the first 71 %), and those from `last` on are held out. Modified Z-scores
    above tau are rejected; with lts_alpha, Least Trimmed Squares then keeps that share of the rest; bounded least
    squares fits what is left, with C_mid within the compute fitted. There is no interval and no verdict: status is
    "paper". Raises ValueError.
    """
    x, y, p_sft = np.asarray(x, float), np.asarray(y, float), float(p_sft)
    max_score = checked_max_score(x, y, p_sft, max_score)
    last = round((1 - HOLDOUT) * len(x)) if last is None else min(last, len(x))
    if last - first < 4:
        raise ValueError(f"points {first} to {last} are fewer than the 4 a fit needs")
    fit_x, fit_y = x[first:last], y[first:last]
    options = dict(b_range=PAPER_B_RANGE, free_offset=free_offset)

    kept = reject(fit_x, fit_y, p_sft, max_score, np.ones(len(fit_x), bool), tau, FEWEST, **options)
    if lts_alpha is not None:
        h = max(4, int(lts_alpha * kept.sum()))
        kept = trim(fit_x, fit_y, p_sft, max_score, kept, kept, h, **options)
    law = least_squares(fit_x[kept], fit_y[kept], p_sft, max_score, **options)

    kept_of_all = np.zeros(len(x), bool)
    kept_of_all[first:last] = kept
    residuals = y - law_at(x, law)
    return CeilingFit(
        a_post=law.a_post,
        epsilon=law.start - p_sft,
        interval=(np.nan, np.nan),
        p_sft=p_sft,
        rmse_fit=float(np.sqrt(np.mean(residuals[kept_of_all] ** 2))),
        rmse_heldout=float(np.sqrt(np.mean(residuals[last:] ** 2))) if last < len(x) else None,
        status="paper",
        kept=kept_of_all,
        max_score=max_score,
        law=law,
        draws=None,
    )


def bootstrap(
    x: ArrayLike, y: ArrayLike, p_sft: float, *, refits: int = 1000, max_score: float | None = None
) -> np.ndarray:
    """A_post of `refits` least-squares fits to resampled curves: (refits,).

    A resampled curve is the fitted law plus residuals drawn in blocks of an eighth of the curve: within a block the
    correlation of neighbours survives. All curves are fitted on one grid over (C_mid, B) at once.
    """
    x, y, p_sft = np.asarray(x, float), np.asarray(y, float), float(p_sft)
    max_score = checked_max_score(x, y, p_sft, max_score)
    fitted = law_at(x, least_squares(x, y, p_sft, max_score))
    n, rng = len(x), np.random.default_rng(0)
    block = max(1, n // 8)
    block_starts = rng.integers(0, n, size=(refits, -(-n // block)))
    index = (block_starts[:, :, None] + np.arange(block)).reshape(refits, -1)[:, :n] % n  # (refits, n)
    r = fitted + (y - fitted)[index] - p_sft  # (refits, n)
    g = shape(x, *grid((x[x > 0][0] / 10, x[-1]), B_RANGE, (40, 16)))  # (K, n)
    gg, gr = (g * g).sum(1), r @ g.T  # (K,), (refits, K)
    a = np.clip(gr / gg, 0, max_score - p_sft)  # (refits, K): the best gain for each cell, as in `best_gains`
    best = (a * a * gg - 2 * a * gr).argmin(1)
    return p_sft + a[np.arange(refits), best]
