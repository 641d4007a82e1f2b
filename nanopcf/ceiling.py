"""How high can this RL run go, how sure is that, and how much plasticity is left? (Eqs. 1-4 and Appendix F.)

From points (RL compute x_i, score y_i) and P_sft, the score where RL starts, fit the RL scaling law:
    P_post(x) = P_sft + (A_post - P_sft) g(x),   g(x) = 1 / (1 + (x / C_mid)^-B)        (2)
    A_post = limit of P_post (3);   PL_rl = A_post - P_sft (4)

For a fixed (C_mid, B) the law is linear in A_post. So `_fit_once` tries a grid of (log C_mid, log B), each
with its best A_post in closed form, then zooms in: no starting guess, no local minimum, the same answer every
time. C_mid lies between a tenth of the smallest and the whole of the largest compute (a run that has not
reached half of its gain says nothing about its ceiling), B in [0.5, 4], A_post in [P_sft, max_score].

Robust stages (Appendix F), one setting for all curves: reject by modified Z-score until nothing changes, then
Least Trimmed Squares by C-steps, then take back every point within the Z-score's reach of that fit.

Interval: nominally 90 % profile likelihood of A_post; P_sft is one more measured point. Simulated, it covers
the truth on 84-94 % of uncollapsed curves, but on only 77-86 % of those with a gain and called saturated; 8 %
of curves with C_mid > 0.6 of the compute are called so. Verdicts:

    saturated       narrow interval, and most of the gain covered or the end flat: a_post is the ceiling
    still rising    not identified: only the interval's low end means something; its high end is max_score
    collapsed       fell far below its best and stayed there: a_post is the best smoothed score before that
    not sigmoidal   the residuals are not noise (a slow decline, say): a_post is the best smoothed score

Left out: the offset epsilon (the paper fits it on 3 curves of 33, chosen by hand); bootstrap. Run:
    python -m nanopcf.ceiling CURVES.csv [--json OUT.json] [--plot OUT.png]
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

B_RANGE = (0.5, 4.0)
TAU = 4.0  # modified Z-scores beyond this are outliers; the largest of the paper's choices
LTS_ALPHA = 0.85  # share of the points that Least Trimmed Squares fits
HOLDOUT = 0.29  # the last share of the points, for rmse_heldout
MAX_WIDTH = 0.10  # saturated: interval at most this wide, as a fraction of max_score
MIN_COVERED = 0.85  # saturated: share of the fitted gain reached at the last point
COLLAPSE = 0.03  # collapsed: this far (fraction of max_score) and 5 noise sd below the best, at the end
MIN_LACK = 0.015  # not sigmoidal: only if the misfit is at least this large, as a fraction of max_score

Law = tuple[float, float, float]  # C_mid, B, A_post
Key = tuple[str, int]  # dataset, sft_step
Branches = dict[Key, dict[str, Any]]  # x_sft, p_sft, x and y of each


@dataclass(frozen=True)
class CeilingFit:
    a_post: float
    pl_rl: float  # a_post - p_sft
    c_mid: float  # compute at half of the gain, in the unit of x
    b: float
    epsilon: float  # always 0 here: the law starts at P_sft
    interval: tuple[float, float]  # 90 %, for a_post
    p_sft: float
    rmse_fit: float  # on the kept points
    rmse_heldout: float | None  # fit on the first points, error on the last; None if too few
    status: str  # saturated | still rising | collapsed | not sigmoidal
    kept: np.ndarray  # (n,) bool: the points the fit uses
    a_fit: float  # the fitted curve's own asymptote; a_post unless collapsed or not sigmoidal

    def predict(self, x: ArrayLike) -> np.ndarray:
        """The fitted curve at compute x."""
        return _curve(np.asarray(x, float), self.p_sft, self.c_mid, self.b, self.a_fit)


def fit(
    x: ArrayLike, y: ArrayLike, p_sft: float, *, max_score: float | None = None, robust: bool = True
) -> CeilingFit:
    """Fits Eq. 2 to scores y at increasing RL compute x (0 allowed) and judges if the ceiling is identified.

    max_score: 1 or 100; by default 1 if no score is above 1. robust: the stages of Appendix F. rmse_heldout
    is the error on the last 29 % of the points of a second fit to the others only, the paper's split.
    """
    x, y, p_sft = np.asarray(x, float), np.asarray(y, float), float(p_sft)
    cap = _checked_max_score(x, y, p_sft, max_score)
    end = _collapse_point(y, p_sft, cap)  # the points from here on are the collapse
    kept, collapsed = np.arange(len(x)) < end, end < len(x)
    if end < 4:
        kept[:] = True  # it fell at once: nothing before it to fit, so show the whole curve

    def fit_law(x: np.ndarray, y: np.ndarray, allowed: np.ndarray) -> tuple[Law, np.ndarray]:
        args = x, y, p_sft, cap, allowed
        return _fit_robust(*args) if robust else (_fit_once(*args), allowed)

    law, kept = fit_law(x, y, kept)
    residual = (y - _curve(x, p_sft, *law))[kept]
    rmse = float(np.sqrt(np.mean(residual**2)))
    best, noise = _best_smoothed(y[:end], p_sft), _noise(y, p_sft)
    if collapsed or _lack_of_fit(residual, cap):
        status = "collapsed" if collapsed else "not sigmoidal"
        a_post, reach = best, 1.645 * noise  # of one measured score: no law to extrapolate
        low, high = a_post - reach, a_post + reach
    else:
        a_post = law[2]
        low, high = _profile_interval(x[kept], y[kept], p_sft, cap)  # P_sft is fixed in the fit, not in this:
        low, high = min(low, a_post), max(high, a_post)  # seldom, a_post lies outside
        covered = x[-1] > law[0] * (1 / MIN_COVERED - 1) ** (-1 / law[1])
        narrow = high - low <= MAX_WIDTH * cap
        status = "saturated" if narrow and (covered or _flat(y[kept], noise)) else "still rising"
        high = high if status == "saturated" else cap
    interval = (float(max(low, 0.0)), float(min(high, cap)))

    rmse_heldout, first = None, len(x) - round(HOLDOUT * len(x))
    if 4 <= first < len(x):
        early, _ = fit_law(x[:first], y[:first], np.ones(first, bool))
        rmse_heldout = float(np.sqrt(np.mean((y[first:] - _curve(x[first:], p_sft, *early)) ** 2)))
    numbers = a_post, a_post - p_sft, *law[:2], 0.0, interval, p_sft, rmse, rmse_heldout
    return CeilingFit(*numbers, status=status, kept=kept, a_fit=law[2])


def _checked_max_score(x: np.ndarray, y: np.ndarray, p_sft: float, max_score: float | None) -> float:
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"x and y must be lists of one length, got shapes {x.shape} and {y.shape}")
    if len(x) < 4:
        raise ValueError(f"{len(x)} points can't hold three parameters: need at least 4")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and np.isfinite(p_sft)):
        raise ValueError("compute, scores and P_sft must be finite numbers")
    if x[0] < 0 or (np.diff(x) <= 0).any():
        raise ValueError("compute must start at 0 or above and strictly increase")
    top = max(y.max(), p_sft)
    cap = max_score if max_score is not None else (1.0 if top <= 1 else 100.0)
    if min(y.min(), p_sft) < 0 or top > cap:
        raise ValueError(f"scores must lie in [0, {cap:g}], got {min(y.min(), p_sft):g} to {top:g}")
    return float(cap)


# ---- Eq. 2: variable projection ----


def _shape(x: np.ndarray, c_mid: np.ndarray, b: np.ndarray) -> np.ndarray:
    """g(x) of Eq. 2 for K pairs (c_mid, b): (K, n)."""
    with np.errstate(divide="ignore", over="ignore"):  # x = 0: (c / 0)^b = inf, and g = 0
        return 1 / (1 + (c_mid[:, None] / x) ** b[:, None])


def _curve(x: np.ndarray, p: float, c_mid: float, b: float, a_post: float) -> np.ndarray:
    return p + (a_post - p) * _shape(x, np.array([c_mid]), np.array([b]))[0]


def _ranges(x: np.ndarray) -> np.ndarray:
    """Bounds of log C_mid and log B: (2, 2)."""
    positive = x[x > 0]
    return np.log([[positive[0] / 10, positive[-1]], B_RANGE])


def _grid(ranges: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    log_c, log_b = np.meshgrid(*(np.linspace(*r, k) for r, k in zip(ranges, size, strict=True)))
    return np.exp(log_c.ravel()), np.exp(log_b.ravel())  # (K,), (K,)


def _fit_once(x: np.ndarray, y: np.ndarray, p: float, cap: float, kept: np.ndarray) -> Law:
    """Least squares on the kept points: a grid over (log C_mid, log B), then four zooms around its best."""
    bounds, size = _ranges(x), (40, 16)
    window, r = bounds, (y - p)[kept]
    for _ in range(5):
        c_mid, b = _grid(window, size)
        g = _shape(x[kept], c_mid, b)  # (K, n)
        gg, gr = (g * g).sum(1), g @ r
        gain = np.clip(
            gr / (gg + 1e-300), 0, cap - p
        )  # the best A_post - P_sft for each pair, in closed form
        i = int((gain * gain * gg - 2 * gain * gr).argmin())  # its squared error, less the constant r @ r
        best = np.log([[c_mid[i]], [b[i]]])
        step = (window[:, 1:] - window[:, :1]) / (np.array([size]).T - 1)
        window = np.clip(np.hstack([best - 1.5 * step, best + 1.5 * step]), bounds[:, :1], bounds[:, 1:])
        size = (13, 13)
    return float(c_mid[i]), float(b[i]), float(p + gain[i])


# ---- Appendix F: robust stages ----


def _modified_z(residual: np.ndarray, kept: np.ndarray, cap: float) -> np.ndarray:
    """|M_i| = 0.6745 |r_i - median r| / MAD, with median and MAD over the kept points."""
    centre = np.median(residual[kept])
    mad = np.median(np.abs(residual[kept] - centre))
    return 0.6745 * np.abs(residual - centre) / max(mad, 1e-3 * cap)  # exact data has no outliers of 1e-9


def _fit_robust(
    x: np.ndarray, y: np.ndarray, p: float, cap: float, allowed: np.ndarray
) -> tuple[Law, np.ndarray]:
    """The fit and the points it keeps, out of those allowed (a collapse stays out)."""

    def residual_of(subset: np.ndarray) -> np.ndarray:
        return y - _curve(x, p, *_fit_once(x, y, p, cap, subset))

    h, kept = max(4, int(LTS_ALPHA * allowed.sum())), allowed
    for _ in range(10):  # 1. modified Z-score, iterated
        inside = kept & (_modified_z(residual_of(kept), kept, cap) <= TAU)
        if inside.sum() < h or (inside == kept).all():
            break
        kept = inside
    for _ in range(10):  # 2. LTS: refit the h points of smallest error until they stay the same
        error = np.where(allowed, residual_of(kept) ** 2, np.inf)
        closest = np.zeros_like(kept)
        closest[np.argsort(error, kind="stable")[:h]] = True
        if (closest == kept).all():
            break
        kept = closest
    # 3. trimming drops good points too: take back all that the fit explains (MAD over all, so not too small)
    final = allowed & (_modified_z(residual_of(kept), allowed, cap) <= TAU)
    kept = final if final.sum() >= 4 else kept
    return _fit_once(x, y, p, cap, kept), kept


# ---- how sure ----


def _profile_interval(x: np.ndarray, y: np.ndarray, p: float, cap: float) -> tuple[float, float]:
    """All A_post whose best fit is not significantly worse than the best of all (F test, 1 and nu degrees).

    The start s is profiled out too: P_sft is a measurement like the others, unless x = 0 is among them.
    """
    if x[0] > 0:
        x, y = np.append(0.0, x), np.append(p, y)
    g = _shape(x, *_grid(_ranges(x), (40, 16)))  # (K, n)
    h = 1 - g
    a = np.linspace(max(0.0, y.min() - 0.05 * cap), cap, 300)[:, None]  # (300, 1)
    gg, gh, hh = (g * g).sum(1), (g * h).sum(1), (h * h).sum(1)  # (K,)
    gy, hy, yy = g @ y, h @ y, y @ y
    s = np.clip((hy - a * gh) / (hh + 1e-300), 0, cap)  # (300, K): the best start for each A_post
    sse = yy - 2 * (s * hy + a * gy) + s * s * hh + 2 * s * a * gh + a * a * gg
    profile = sse.min(1)  # (300,)
    nu = max(len(x) - 4, 1)
    z = 1.6449  # Student's t at 95 % one-sided, by its expansion in 1 / nu
    t = z + (z**3 + z) / (4 * nu) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)
    inside = a[profile <= profile.min() * (1 + t * t / nu) + 1e-9 * cap**2, 0]
    half = (a[1, 0] - a[0, 0]) / 2  # the grid's own resolution
    return inside[0] - half, inside[-1] + half


def _noise(y: np.ndarray, p: float) -> float:
    """Noise sd of one score, from differences of neighbours: trends cancel, single outliers don't count."""
    return float(1.4826 * np.median(np.abs(np.diff(y, prepend=p))) / np.sqrt(2))


def _best_smoothed(y: np.ndarray, p: float) -> float:
    """Highest running median of three, P_sft included: one lucky score is not a ceiling."""
    padded = np.concatenate([[p], y, y[-1:]])
    return (
        float(max(p, np.median([padded[:-2], padded[1:-1], padded[2:]], axis=0).max()))
        if len(y)
        else float(p)
    )


def _collapse_point(y: np.ndarray, p: float, cap: float) -> int:
    """Index of the first point of a final stretch far below the best before it; len(y) if there is none."""
    drop = max(COLLAPSE * cap, 5 * _noise(y, p))
    end = len(y)
    while end > 0 and y[end - 1] < _best_smoothed(y[: end - 1], p) - drop:
        end -= 1
    return end if len(y) - end >= max(2, len(y) // 20) else len(y)


def _lack_of_fit(residual: np.ndarray, cap: float) -> bool:
    """Von Neumann's ratio: 2 for residuals that are white noise, less for a misfit."""
    n, r = len(residual), residual - residual.mean()
    if np.sqrt(np.mean(r**2)) < MIN_LACK * cap:
        return False
    ratio = np.sum(np.diff(r) ** 2) / np.sum(r**2)
    return bool(ratio < 2 - 2.8 * 2 * np.sqrt((n - 2) / (n * n - 1)))  # 2.8 sd below its mean


def _flat(y: np.ndarray, noise: float) -> bool:
    """The last third is no higher than the third before it, within the noise."""
    m = max(len(y) // 3, 1)
    return bool(y[-m:].mean() - y[-2 * m : -m].mean() <= 1.645 * noise * np.sqrt(2 / m))


# ---- command line ----


def read_curves(path: str) -> tuple[Branches, list[str]]:
    """The branches of a CURVES.csv, and one sentence for every bad row."""
    branches: Branches = {}
    errors = []
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        missing = {"dataset", "sft_step", "x_sft", "stage", "x", "score"} - set(rows.fieldnames or [])
        if missing:
            raise ValueError(f"{path}: row 1: columns missing: {', '.join(sorted(missing))}")
        for row in rows:
            try:
                key = row["dataset"], int(row["sft_step"])
                x_sft, x, score = (float(row[name]) for name in ("x_sft", "x", "score"))
                if row["stage"] not in ("sft", "rl"):
                    raise ValueError(f"stage is {row['stage']!r}, must be sft or rl")
                if not (np.isfinite([x_sft, x, score]).all() and x >= 0 and 0 <= score <= 100):
                    raise ValueError(f"x is {x:g} and score {score:g}: need x >= 0 and a score in [0, 100]")
                branch = branches.setdefault(key, {"x_sft": x_sft, "p_sft": None, "x": [], "y": []})
                if row["stage"] == "sft":
                    if branch["p_sft"] is not None:
                        raise ValueError("a second sft row for this branch")
                    branch["p_sft"] = score
                elif branch["x"] and x <= branch["x"][-1]:
                    raise ValueError(f"x is {x:g} after {branch['x'][-1]:g}: it must increase in a branch")
                else:
                    branch["x"].append(x)
                    branch["y"].append(score)
            except (ValueError, TypeError) as error:  # TypeError: a short row
                errors.append(f"{path}: row {rows.line_num}: {error}")
    if not branches and not errors:
        raise ValueError(f"{path}: no rows below the header")
    return branches, errors


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="nanopcf.ceiling", description="RL ceilings, with 90 % intervals")
    parser.add_argument("curves", metavar="CURVES.csv", help="columns dataset,sft_step,x_sft,stage,x,score")
    parser.add_argument("--json", metavar="OUT.json", help="write one object a branch")
    parser.add_argument("--plot", metavar="OUT.png", help="draw points, fits, intervals (needs matplotlib)")
    args = parser.parse_args(argv)
    try:
        branches, errors = read_curves(args.curves)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    scores = [s for branch in branches.values() for s in [*branch["y"], branch["p_sft"]] if s is not None]
    max_score = 1.0 if scores and max(scores) <= 1 else 100.0  # one scale for the whole file
    fits: dict[Key, CeilingFit] = {}
    for key, branch in branches.items():
        if not branch["x"]:
            continue  # no RL started from this checkpoint
        try:
            if branch["p_sft"] is None:
                raise ValueError("no row with stage sft, so no P_sft")
            fits[key] = fit(branch["x"], branch["y"], branch["p_sft"], max_score=max_score)
        except ValueError as error:
            errors.append(f"{args.curves}: branch {key[0]}, step {key[1]}: {error}")

    print(table(fits, max_score))
    if args.json:
        names = "a_post pl_rl c_mid b epsilon p_sft rmse_fit rmse_heldout status".split()
        out = [
            {"dataset": key[0], "sft_step": key[1], "x_sft": branches[key]["x_sft"]}
            | {name: getattr(f, name) for name in names}
            | {"a_post_low": f.interval[0], "a_post_high": f.interval[1]}
            for key, f in fits.items()
        ]
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(out, file, indent=1)
    if args.plot and fits:
        plot(fits, branches, args.plot)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 2 if errors else 0


def table(fits: dict[Key, CeilingFit], max_score: float) -> str:
    """One line a branch. A ceiling that is not identified is shown as its lower bound only."""
    d = 3 if max_score <= 1 else 1
    lines = ["dataset            step   P_sft   A_post  90% interval       PL_rl   rmse  verdict"]
    for (dataset, step), f in fits.items():
        low, high = f.interval
        rising = f.status == "still rising"
        a_post = f">={low:.{d}f}" if rising else f"{f.a_post:.{d}f}"
        gain = f">={low - f.p_sft:.{d}f}" if rising else f"{f.pl_rl:.{d}f}"
        span = f"[{low:.{d}f}, {high:.{d}f}]"
        lines.append(
            f"{dataset:<16}{step:>7}{f.p_sft:>8.{d}f}{a_post:>9}  {span:<16}{gain:>8}"
            f"{f.rmse_fit:>7.{d}f}  {f.status}"
        )
    return "\n".join(lines)


def plot(fits: dict[Key, CeilingFit], branches: Branches, path: str) -> None:
    """A panel a data set: points (rejected ones hollow), fitted curves, intervals as bars at the right."""
    from matplotlib.figure import Figure  # only needed here; Figure, not pyplot: no display, no global state

    datasets = sorted({dataset for dataset, _ in fits})
    figure = Figure(figsize=(5 * len(datasets), 4), layout="constrained")
    for k, dataset in enumerate(datasets, start=1):
        panel = figure.add_subplot(1, len(datasets), k)
        panel.set(title=dataset, xlabel="RL compute", ylabel="score")
        mine = [(step, f) for (name, step), f in fits.items() if name == dataset]
        right = max(branches[dataset, step]["x"][-1] for step, _ in mine)
        for i, (step, f) in enumerate(mine):
            x, y = np.array(branches[dataset, step]["x"]), np.array(branches[dataset, step]["y"])
            dense, colour = np.linspace(0, x[-1], 200), f"C{i}"
            for points, fill in ((f.kept, "full"), (~f.kept, "none")):
                panel.plot(x[points], y[points], ".", color=colour, fillstyle=fill, alpha=0.5)
            panel.plot(dense, f.predict(dense), color=colour, label=f"step {step}: {f.status}")
            panel.plot([right * (1.05 + 0.02 * i)] * 2, f.interval, color=colour, linewidth=3, alpha=0.5)
        panel.legend(fontsize="x-small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
