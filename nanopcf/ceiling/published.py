"""For comparison: the published procedure, and a bootstrap."""

import numpy as np
from numpy.typing import ArrayLike

from nanopcf.ceiling import HOLDOUT, CeilingFit, checked_max_score
from nanopcf.ceiling.law import B_RANGE, grid, law_at, least_squares, shape
from nanopcf.ceiling.robust import reject, trim

# ---- for comparison: the published procedure, and a bootstrap ----


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
        law[1],
        law[1] - p_sft,
        law[2],
        law[3],
        law[0] - p_sft,
        (np.nan, np.nan),
        p_sft,
        float(rmse),
        heldout,
        "paper",
        everywhere,
        cap,
        law,
        None,
    )


def bootstrap(
    x: ArrayLike, y: ArrayLike, p_sft: float, *, refits: int = 1000, max_score: float | None = None
) -> np.ndarray:
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
