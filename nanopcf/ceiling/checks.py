"""What cannot be a curve, said in a sentence before anything is fitted to it."""

import numpy as np

MOST = 2_000  # points: a fit needs matrices of their number squared


def checked_max_score(x: np.ndarray, y: np.ndarray, p_sft: float, max_score: float | None) -> float:
    """The scale of the scores: max_score if given, else 1 if no score is above 1, else 100.

    Raises ValueError for compute and scores, each (n,), that cannot be fitted.
    """
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"x and y must be lists of one length, got shapes {x.shape} and {y.shape}")
    if len(x) < 4:
        raise ValueError(f"{len(x)} points can't hold three parameters: need at least 4")
    if len(x) > MOST:
        raise ValueError(f"{len(x):,} points are too many for a fit, at most {MOST:,}: give it means of neighbours")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and np.isfinite(p_sft)):
        raise ValueError("compute, scores and P_sft must be finite numbers")
    if x[0] < 0 or (np.diff(x) <= 0).any():
        raise ValueError("compute must start at 0 or above and strictly increase")
    scores = np.append(y, p_sft)
    if max_score is None:
        max_score = 1.0 if scores.max() <= 1 else 100.0
    if scores.min() < 0 or scores.max() > max_score:
        raise ValueError(f"scores must lie in [0, {max_score:g}], got {scores.min():g} to {scores.max():g}")
    # A score of 0.72 among scores of 72 is a fraction by mistake; one of 0.72 among scores of 1.5 may be a percentage.
    fractions, percentages = scores[(scores > 0) & (scores <= 1)], scores[scores > 1]
    if max_score == 100 and len(fractions) and len(percentages):
        if (100 * fractions > 0.5 * percentages.min()).any():
            raise ValueError(
                f"a score of {fractions.max():g} beside {percentages.min():g}: fractions mixed with percentages?"
            )
    return float(max_score)
