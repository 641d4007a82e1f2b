"""Which points of a curve to fit (Appendix F), and how to recognise a curve that is not sigmoidal.

The paper chose thresholds by hand for every curve. Here one setting serves all curves. (n,) arrays hold one value per
point; `allowed` and `kept` are masks (n,) of bool.
"""

import numpy as np

from nanopcf.ceiling.law import law_at, least_squares

TAU = 4.0  # a modified Z-score beyond this is an outlier; the largest of the paper's choices
LTS_ALPHA = 0.85  # the share of the points that Least Trimmed Squares fits
COLLAPSE = 0.03  # collapsed: at the end lower than the best by this (fraction of max_score) and by 5 sd of the noise
MISFIT = 0.015  # not sigmoidal: only if the residuals are at least this large, as a fraction of max_score


# ---- Appendix F: which points to fit ----


def robust_points(x: np.ndarray, y: np.ndarray, p_sft: float, max_score: float, allowed: np.ndarray) -> np.ndarray:
    """The points to fit, out of those allowed: without outliers."""
    h = max(4, int(LTS_ALPHA * allowed.sum()))
    kept = reject(x, y, p_sft, max_score, allowed, TAU, h)
    kept = trim(x, y, p_sft, max_score, allowed, kept, h)
    # Trimming always gives up good points too: take back all that the fit explains. The scale of the residuals comes
    # from all allowed points, because the best ones alone would make it too small.
    residuals = residuals_of_fit(x, y, p_sft, max_score, kept)
    explained = allowed & (modified_z(residuals, allowed, max_score) <= TAU)
    return explained if explained.sum() >= 4 else kept


def residuals_of_fit(x, y, p_sft: float, max_score: float, kept: np.ndarray, **options) -> np.ndarray:
    """What least squares on the kept points leaves unexplained at every point. options: see `least_squares`."""
    return y - law_at(x, least_squares(x[kept], y[kept], p_sft, max_score, **options))


def modified_z(residuals: np.ndarray, kept: np.ndarray, max_score: float) -> np.ndarray:
    """|M_i| = 0.6745 |r_i - median r| / MAD, with the median and the MAD of the kept points."""
    centre = np.median(residuals[kept])
    mad = np.median(np.abs(residuals[kept] - centre))
    # Without the lower bound, a curve without noise would have outliers of a billionth of a point.
    return 0.6745 * np.abs(residuals - centre) / max(mad, 1e-3 * max_score)


def reject(x, y, p_sft: float, max_score: float, kept: np.ndarray, tau: float, fewest: int, **options) -> np.ndarray:
    """Fit, drop the points whose modified Z-score exceeds tau, and repeat until nothing changes.

    It stops before fewer than `fewest` points would be left.
    """
    for _ in range(20):
        residuals = residuals_of_fit(x, y, p_sft, max_score, kept, **options)
        inside = kept & (modified_z(residuals, kept, max_score) <= tau)
        if inside.sum() < fewest or (inside == kept).all():
            break
        kept = inside
    return kept


def trim(x, y, p_sft: float, max_score: float, allowed: np.ndarray, kept: np.ndarray, h: int, **options) -> np.ndarray:
    """Least Trimmed Squares by C-steps: fit, keep the h allowed points of smallest error, until they stay the same."""
    for _ in range(30):
        residuals = residuals_of_fit(x, y, p_sft, max_score, kept, **options)
        order = np.argsort(np.where(allowed, residuals**2, np.inf), kind="stable")
        closest = np.zeros_like(kept)
        closest[order[:h]] = True
        if (closest == kept).all():
            break
        kept = closest
    return kept


# ---- curves that are not sigmoidal ----


def noise_sd(y: np.ndarray) -> float:
    """The standard deviation of one score's noise, from the differences of neighbours: a trend hardly counts there."""
    # 1.4826 MAD is the standard deviation of a normal variable; a difference of two has twice the variance.
    return float(1.4826 * np.median(np.abs(np.diff(y))) / np.sqrt(2))


def best_smoothed(y: np.ndarray, p_sft: float) -> float:
    """The highest running median of three scores, P_sft included: one lucky score is not a ceiling."""
    if not len(y):
        return float(p_sft)
    padded = np.concatenate([[p_sft], y, y[-1:]])  # (n + 2,)
    medians = np.median([padded[:-2], padded[1:-1], padded[2:]], axis=0)  # (n,)
    return float(max(p_sft, medians.max()))


def collapse_point(y: np.ndarray, p_sft: float, max_score: float) -> int:
    """Where a final collapse begins: the first point of a last stretch far below the best before it; else len(y)."""
    drop = max(COLLAPSE * max_score, 5 * noise_sd(np.append(p_sft, y)))
    end = len(y)
    while end > 0 and y[end - 1] < best_smoothed(y[: end - 1], p_sft) - drop:
        end -= 1
    # A shorter stretch is a bad evaluation or two, and no collapse.
    return end if len(y) - end >= max(2, len(y) // 20) else len(y)


def misfit(residuals: np.ndarray, max_score: float) -> bool:
    """Are the residuals large, and do they come in long waves that no noise would make?"""
    n, r = len(residuals), residuals - residuals.mean()
    if np.sqrt(np.mean(r**2)) < MISFIT * max_score:
        return False
    # Von Neumann's ratio is 2 for white noise, and smaller where neighbours agree. Here: 2.8 sd below 2.
    ratio = np.sum(np.diff(r) ** 2) / np.sum(r**2)
    return bool(ratio < 2 - 2.8 * 2 * np.sqrt((n - 2) / (n * n - 1)))
