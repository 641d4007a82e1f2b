"""How well does a fit to the first 71 % of a curve foretell the rest? The paper's measure of a fit, with its split."""

import numpy as np

from nanopcf.ceiling.posterior import ceiling_posterior
from nanopcf.ceiling.robust import robust_points

HOLDOUT = 0.29  # the last share of the points


def forecast_error(x: np.ndarray, y: np.ndarray, p_sft: float, max_score: float, robust: bool) -> float | None:
    """The root mean squared error of a forecast of the last 29 % of the points, from a fit to those before."""
    n = len(x) - round(HOLDOUT * len(x))
    if not 4 <= n < len(x):
        return None
    seen_x, seen_y, kept = x[:n], y[:n], np.ones(n, bool)
    if robust:
        kept = robust_points(seen_x, seen_y, p_sft, max_score, kept)
    _, _, draws = ceiling_posterior(seen_x[kept], seen_y[kept], p_sft, max_score)
    return float(np.sqrt(np.mean((y[n:] - np.median(draws.scores(x[n:]), 0)) ** 2)))
