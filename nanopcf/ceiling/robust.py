"""Appendix F: which points of a curve the fit uses, and curves that are no sigmoids."""

import numpy as np

from nanopcf.ceiling.law import law_at, least_squares

TAU = 4.0  # modified Z-scores beyond this are outliers; the largest of the paper's choices
LTS_ALPHA = 0.85  # share of the points that Least Trimmed Squares fits
COLLAPSE = 0.03  # collapsed: this far (fraction of max_score) and 5 noise sd below the best, at the end
MISFIT = 0.015  # not sigmoidal: only if the residuals are at least this large, as a fraction of max_score


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
