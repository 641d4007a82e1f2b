"""How good are forecasts? Each curve's first part is fitted, and the rest of the curve is what the fit must predict."""

import numpy as np

from nanopcf import ceiling
from nanopcf.ceiling import CeilingFit
from nanopcf.ceiling.curve_files import Branch, Key
from nanopcf.ceiling.law import law_at, least_squares

FRACTIONS = (0.3, 0.5, 0.7)  # fit on the first so many of the points


def holdout(branch: Branch, max_score: float) -> list[dict]:
    """One dict per fraction: RMSE on the rest of the curve, and the error of the mean score over its last tenth.

    To compare with: `_plain` is a sigmoid of least squares, `_last` the last score seen. inside: whether the 90 %
    interval of the forecast holds the mean of the last tenth.
    """
    x, y = np.array(branch.x), np.array(branch.y)
    tenth = max(1, len(x) // 10)
    truth = y[-tenth:].mean()
    forecasts = []
    for fraction in FRACTIONS:
        n = int(fraction * len(x))
        if n < 4 or n > len(x) - tenth:
            continue
        fit = ceiling.fit(x[:n], y[:n], branch.p_sft, max_score=max_score)
        scores = fit.draws.scores(x[n:])  # (R, len(x) - n)
        low, middle, high = np.quantile(scores[:, -tenth:].mean(1), [0.05, 0.5, 0.95])
        plain = law_at(x[n:], least_squares(x[:n], y[:n], branch.p_sft, max_score))
        forecasts.append(
            {
                "fraction": fraction,
                "rmse": rmse(np.median(scores, 0), y[n:]),
                "rmse_plain": rmse(plain, y[n:]),
                "rmse_last": rmse(y[n - 1], y[n:]),
                "error": float(middle - truth),
                "error_plain": float(plain[-tenth:].mean() - truth),
                "error_last": float(y[n - 1] - truth),
                "inside": bool(low <= truth <= high),
            }
        )
    return forecasts


def rmse(prediction: np.ndarray | float, scores: np.ndarray) -> float:
    return float(np.sqrt(np.mean((prediction - scores) ** 2)))


def mean_size(forecasts: list[dict], name: str) -> float:
    """The mean of |forecast[name]|: of errors without their sign, or the share of those inside."""
    return np.mean([abs(forecast[name]) for forecast in forecasts])


def holdout_table(forecasts: dict[Key, list[dict]], fits: dict[Key, CeilingFit]) -> str:
    """Means over the curves that did not collapse: no forecast can foresee a collapse."""
    lines = [
        "forecasts: means over curves that didn't collapse; of the last tenth: |error| of its mean score",
        "fitted on   curves   rmse: ours  sigmoid  last score   last tenth: ours  sigmoid  last score   inside 90%",
    ]
    columns = dict(rmse=14, rmse_plain=9, rmse_last=12, error=19, error_plain=9, error_last=12)  # name: width
    fair = [forecast for key in forecasts if fits[key].status != "collapsed" for forecast in forecasts[key]]
    for fraction in FRACTIONS:
        chosen = [forecast for forecast in fair if forecast["fraction"] == fraction]
        if chosen:
            numbers = "".join(f"{mean_size(chosen, name):>{width}.2f}" for name, width in columns.items())
            lines.append(f"first {fraction:>4.0%}  {len(chosen):>6}{numbers}{mean_size(chosen, 'inside'):>13.0%}")
    return "\n".join(lines)
