"""The command line of `nanopcf.ceiling`: CURVES.csv in; a table, JSON and figures out.

    python -m nanopcf.ceiling CURVES.csv [--json OUT.json] [--plot OUT.png] [--holdout] [--stop-gain POINTS]
    python -m nanopcf.ceiling CURVES.csv --method paper [--settings TABLE.csv]

Columns: dataset, sft_step, x_sft, stage, x, score. A branch is (dataset, sft_step); its one row with stage `sft` holds
P_sft, its rows with stage `rl` the curve: x is compute within RL, increasing, in any unit (the paper: exaFLOPs); scores
are fractions or percentages, one of them for the whole file. What is wrong in a branch costs that branch, one sentence
with the row number on stderr, and exit code 2; the other branches are fitted and reported.
"""

import csv
import math
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from nanopcf import ceiling
from nanopcf.ceiling import CeilingFit
from nanopcf.ceiling.law import law_at, least_squares
from nanopcf.ceiling.published import fit_paper
from nanopcf.run import config, files
from nanopcf.run.config import Argument, Positive

COLUMNS = ["dataset", "sft_step", "x_sft", "stage", "x", "score"]
FRACTIONS = (0.3, 0.5, 0.7)  # --holdout: fit on the first so many of the points

Key = tuple[str, int]  # dataset, sft_step
BASE: Key = ("", 0)  # settings of pure RL: step 0 is the base model under every data set's name


@dataclass
class Branch:
    x_sft: float
    row: int  # where it starts in the file
    p_sft: float | None = None
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)


# ---- reading ----


def read_curves(path: str | Path) -> tuple[dict[Key, Branch], list[str]]:
    """The whole branches of a CURVES.csv, and one sentence for whatever was wrong. Raises ValueError, OSError."""
    branches: dict[Key, Branch] = {}
    errors, bad = [], set()
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        try:
            missing = [c for c in COLUMNS if c not in (rows.fieldnames or [])]
            if missing:
                raise ValueError(f"{path}: row 1: columns missing: {', '.join(missing)}")
            for row in rows:
                key = None
                try:
                    key = row["dataset"], whole_number(row["sft_step"])
                    read_row(row, branches.setdefault(key, Branch(number(row, "x_sft"), rows.line_num)))
                except ValueError as error:
                    errors.append(f"{path}: row {rows.line_num}: {error}")
                    bad.add(key)
        except (csv.Error, UnicodeError) as error:
            raise ValueError(f"{path}: row {rows.line_num + 1}: not CSV in UTF-8 ({error})") from error
    if not branches and not errors:
        raise ValueError(f"{path}: row 1: no rows below the header")
    branches = {k: b for k, b in branches.items() if k not in bad}
    highest = {k: max([*b.y, b.p_sft or 0.0]) for k, b in branches.items()}
    if any(h > 1 for h in highest.values()):
        for key in [k for k, h in highest.items() if 0 < h <= 1]:
            b = branches.pop(key)
            errors.append(
                f"{path}: row {b.row}: {name(key)}: scores up to {highest[key]:g} look like fractions, while the file has percentages"
            )
    return branches, errors


def read_row(row: dict[str, str], branch: Branch) -> None:
    """One row into its branch. Raises ValueError saying what is wrong with it."""
    x, score = number(row, "x"), number(row, "score")
    if x < 0:
        raise ValueError(f"x is {x:g}: compute can't be negative")
    if not 0 <= score <= 100:
        raise ValueError(f"score is {score:g}: must lie in [0, 1] or [0, 100]")
    if row["stage"] == "sft":
        if branch.p_sft is not None:
            raise ValueError("a second sft row for this branch")
        branch.p_sft = score
    elif row["stage"] == "rl":
        if branch.x and x <= branch.x[-1]:
            raise ValueError(f"x is {x:g} after {branch.x[-1]:g}: it must increase within a branch")
        branch.x.append(x)
        branch.y.append(score)
    else:
        raise ValueError(f"stage is {row['stage']!r}: must be sft or rl")


def number(row: dict[str, str | None], column: str) -> float:
    try:
        value = float(row[column] or "nothing")
    except ValueError:
        raise ValueError(f"{column} is {row[column]!r}: must be a number") from None
    if not np.isfinite(value):
        raise ValueError(f"{column} is {value}: must be finite")
    return value


def whole_number(text: str | None) -> int:
    try:
        return int(text or "nothing")
    except ValueError:
        raise ValueError(f"sft_step is {text!r}: must be a whole number") from None


def name(key: Key) -> str:
    return f"branch {key[0]}, step {key[1]}"


def read_settings(path: str | Path) -> dict[Key, dict]:
    """The paper's choices by hand for each branch: columns of `fit_paper`'s options, with or without `released_` before."""

    def options(row: dict[str, str]) -> dict:
        get = lambda column: row.get(f"released_{column}") or ("" if f"released_{column}" in row else row.get(column))  # noqa: E731
        return dict(
            tau=float(get("outlier_threshold") or 2.5),
            lts_alpha=float(get("lts_alpha")) if get("lts_alpha") else None,
            first=int(get("train_start") or 0),
            last=int(get("train_end")) if get("train_end") else None,
            free_offset=bool(float(get("free_offset") or 0)),
        )

    settings: dict[Key, dict] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for i, row in enumerate(csv.DictReader(file), start=2):
            try:
                step = int(row["sft_step"])
                settings[(row["dataset"], step) if step else BASE] = options(row)
            except (KeyError, ValueError, TypeError) as error:
                raise ValueError(f"{path}: row {i}: not the settings of a branch ({error})") from error
    return settings


# ---- how good are forecasts? ----


def holdout(branch: Branch, max_score: float) -> list[dict]:
    """Fits to the first part of a curve against the rest: RMSE there, and the mean score of the last tenth."""
    x, y, found = np.array(branch.x), np.array(branch.y), []
    tenth = max(1, len(x) // 10)
    for fraction in FRACTIONS:
        n = int(fraction * len(x))
        if n < 4 or n > len(x) - tenth:
            continue
        seen = ceiling.fit(x[:n], y[:n], branch.p_sft, max_score=max_score)
        scores = seen.draws.scores(x[n:])  # (draws, points left)
        low, middle, high = np.quantile(scores[:, -tenth:].mean(1), [0.05, 0.5, 0.95])
        truth = y[-tenth:].mean()
        plain = law_at(x[n:], least_squares(x[:n], y[:n], branch.p_sft, max_score))
        rmse = lambda prediction: float(np.sqrt(np.mean((prediction - y[n:]) ** 2)))  # noqa: B023, E731
        found.append(
            {
                "fraction": fraction,
                "rmse": rmse(np.median(scores, 0)),
                "rmse_plain": rmse(plain),
                "rmse_last": rmse(y[n - 1]),
                "error": float(middle - truth),
                "error_plain": float(plain[-tenth:].mean() - truth),
                "error_last": float(y[n - 1] - truth),
                "inside": bool(low <= truth <= high),
            }
        )
    return found


def holdout_table(results: dict[Key, list[dict]], fits: dict[Key, CeilingFit]) -> str:
    """Means over the curves that didn't collapse: a forecast can't know of that."""
    lines = ["forecasts: means over curves that didn't collapse; of the last tenth: |error| of its mean score"]
    lines.append(
        "fitted on   curves   rmse: ours  sigmoid  last score   last tenth: ours  sigmoid  last score   inside 90%"
    )
    rows = [r for key, rs in results.items() if fits[key].status != "collapsed" for r in rs]
    for fraction in FRACTIONS:
        mine = [r for r in rows if r["fraction"] == fraction]
        if mine:
            mean = lambda k: np.mean([abs(r[k]) for r in mine])  # noqa: B023, E731
            lines.append(
                f"first {fraction:>4.0%}  {len(mine):>6}{mean('rmse'):>14.2f}{mean('rmse_plain'):>9.2f}{mean('rmse_last'):>12.2f}"
                f"{mean('error'):>19.2f}{mean('error_plain'):>9.2f}{mean('error_last'):>12.2f}{mean('inside'):>13.0%}"
            )
    return "\n".join(lines)


# ---- showing ----


def table(fits: dict[Key, CeilingFit], max_score: float, stop_gain: float) -> str:
    """One line a branch. A ceiling that is not identified is shown as its lower bound only."""
    d = 3 if max_score <= 1 else 1
    wide = max([7, *(len(dataset) for dataset, _ in fits)])
    lines = [f"{'dataset':<{wide}}    step   P_sft   A_post  90% interval        PL_rl  stop at   rmse  verdict"]
    for (dataset, step), f in fits.items():
        low, high = f.interval
        rising, paper = f.status == "still rising", f.draws is None
        a_post = f">={low:.{d}f}" if rising else f"{f.a_post:.{d}f}"
        gain = f">={max(low - f.p_sft, 0):.{d}f}" if rising else f"{f.pl_rl:.{d}f}"
        span = "" if paper else f"[{low:.{d}f}, {high:.{d}f}]"
        stop = None if paper else f.stop_at(stop_gain)
        lines.append(
            f"{dataset:<{wide}}{step:>8}{f.p_sft:>8.{d}f}{a_post:>9}  {span:<18}{gain:>7}"
            f"{'-' if stop is None else f'{stop:.3g}':>9}{f.rmse_fit:>7.{d + 1}f}  {f.status}"
        )
    if fits and not paper:
        lines.append(
            f"stop at: RL compute from which the expected further gain is below {stop_gain:g}; rmse: of the fit"
        )
    return "\n".join(lines)


def record(key: Key, branch: Branch, f: CeilingFit, stop_gain: float) -> dict:
    """One branch for --json; what isn't defined is null."""
    names = "a_post pl_rl c_mid b epsilon p_sft rmse_fit rmse_heldout status".split()
    low, high = (None, None) if f.draws is None else f.interval
    return (
        {"dataset": key[0], "sft_step": key[1], "x_sft": branch.x_sft}
        | {n: getattr(f, n) for n in names}
        | {"a_post_low": low, "a_post_high": high}
        | {"stop_at": None if f.draws is None else f.stop_at(stop_gain), "outliers": int((~f.kept).sum())}
    )


def plot(fits: dict[Key, CeilingFit], branches: dict[Key, Branch], path: str | Path) -> None:
    """After the paper's Fig. 8 (above: score along RL, law and band) and Fig. 3 (below: P_sft and plasticity by SFT compute)."""
    from matplotlib.figure import Figure  # only needed here; Figure, not pyplot: no display, no global state

    datasets = list(dict.fromkeys(dataset for dataset, _ in fits))
    figure = Figure(figsize=(4.6 * len(datasets), 7), layout="constrained")
    axes = figure.subplots(2, len(datasets), squeeze=False, sharey="row")
    for i, dataset in enumerate(datasets):
        mine = [(key, fits[key]) for key in fits if key[0] == dataset]
        draw_curves(axes[0, i], mine, branches)
        draw_ceilings(axes[1, i], mine, branches)
        axes[0, i].set(title=dataset, xlabel="RL compute")
    axes[0, 0].set_ylabel("score")
    axes[1, 0].set_ylabel("score: after SFT, and ceiling with 90 % interval")
    figure.savefig(path, dpi=130)


def draw_curves(panel, mine: list[tuple[Key, CeilingFit]], branches: dict[Key, Branch]) -> None:
    from matplotlib import colormaps

    for i, (key, f) in enumerate(mine):
        colour = colormaps["viridis"](0.9 * i / max(len(mine) - 1, 1))
        x, y = np.array(branches[key].x), np.array(branches[key].y)
        panel.plot(x[f.kept], y[f.kept], ".", color=colour, ms=3, alpha=0.6)
        panel.plot(x[~f.kept], y[~f.kept], "x", color=colour, ms=4, alpha=0.6)  # outliers, or a collapse
        dense = np.linspace(0, x[-1], 120)
        panel.plot(dense, f.predict(dense), color=colour, lw=1.3, label=f"step {key[1]}: {f.status}")
        if f.draws is not None:
            panel.fill_between(dense, *f.band(dense), color=colour, alpha=0.15, lw=0)
    shown = np.concatenate([branches[key].y for key, _ in mine])
    low, high = np.quantile(shown, [0.02, 1])
    panel.set_ylim(low - 0.15 * (high - low), high + 0.15 * (high - low))  # a collapse would hide the rest
    if len(mine) <= 12:
        panel.legend(fontsize="x-small", frameon=False, loc="lower right")
    panel.grid(alpha=0.25)


def draw_ceilings(panel, mine: list[tuple[Key, CeilingFit]], branches: dict[Key, Branch]) -> None:
    at = np.arange(len(mine))
    p = np.array([f.p_sft for _, f in mine])
    a = np.array([f.a_post for _, f in mine])
    panel.bar(at, p, 0.6, color="#9ecae1", label="P_sft")
    for i, (_, f) in enumerate(mine):
        sure = f.status != "still rising"
        panel.bar(
            at[i],
            a[i] - p[i],
            0.6,
            p[i],
            color="#d55e00" if sure else "none",
            edgecolor="#d55e00",
            hatch=None if sure else "//",
            alpha=0.8,
        )
        if f.draws is not None:
            panel.errorbar(
                at[i],
                a[i],
                [[max(a[i] - f.interval[0], 0)], [max(f.interval[1] - a[i], 0)]],
                color="black",
                capsize=3,
                lw=1,
            )
    high = max([*a, *(f.interval[1] for _, f in mine if f.draws is not None)])
    panel.set_ylim(max(0, p.min() - 0.4 * (high - p.min())), high + 0.05 * (high - p.min()))
    panel.set_xticks(at, [f"{branches[key].x_sft:.3g}" for key, _ in mine], rotation=45, fontsize="small")
    panel.set(xlabel="SFT compute; hatched: still rising, a bound only")
    panel.grid(alpha=0.25, axis="y")


# ---- the command ----


@dataclass(frozen=True)
class CurvesConfig(config.Config):
    curves: Argument  # dataset,sft_step,x_sft,stage,x,score
    json: str = ""  # file to write, with one object per branch
    plot: str = ""  # figure to draw of curves and ceilings (needs matplotlib)
    holdout: bool = False  # forecast from 30, 50 and 70 % of each curve
    stop_gain: Positive = math.inf  # points, for 'stop at' (inf: 1 of 100)
    method: Literal["posterior", "paper"] = "posterior"  # posterior, or paper (Appendix F)
    settings: str = ""  # CSV of the paper's choices for each branch

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.settings and self.method != "paper":
            raise ValueError("--settings: only for --method paper")
        if self.holdout and self.method == "paper":
            raise ValueError("--holdout: only for --method posterior")


def fit_branch(b: Branch, max_score: float, method: str, settings: dict) -> CeilingFit | str:
    """The fit, or what is wrong with the branch."""
    try:
        if b.p_sft is None:
            raise ValueError("no row with stage sft, so no P_sft")
        if method == "paper":
            return fit_paper(b.x, b.y, b.p_sft, max_score=max_score, **settings)
        return ceiling.fit(b.x, b.y, b.p_sft, max_score=max_score)
    except ValueError as error:
        return str(error)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        c = config.parse(CurvesConfig, __doc__, argv)
        settings = read_settings(c.settings) if c.settings else {}
        branches, errors = read_curves(c.curves)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    max_score = 1.0 if all(s <= 1 for b in branches.values() for s in [*b.y, b.p_sft or 0.0]) else 100.0
    stop_gain = c.stop_gain if math.isfinite(c.stop_gain) else max_score / 100
    wanted = [(key, b) for key, b in branches.items() if b.x]  # no RL started from the others
    tasks = [(b, max_score, c.method, settings.get(key if key[1] else BASE, {})) for key, b in wanted]
    if len(tasks) > 50:
        for library in ("OPENBLAS", "OMP", "MKL"):  # a thread a worker, or they wait for each other
            os.environ.setdefault(f"{library}_NUM_THREADS", "1")
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            outcomes = list(pool.map(fit_branch, *zip(*tasks, strict=True), chunksize=8))
    else:
        outcomes = [fit_branch(*t) for t in tasks]
    fits: dict[Key, CeilingFit] = {}
    for (key, b), outcome in zip(wanted, outcomes, strict=True):
        if isinstance(outcome, str):
            errors.append(f"{c.curves}: row {b.row}: {name(key)}: {outcome}")
        else:
            fits[key] = outcome

    print(table(fits, max_score, stop_gain))
    records = {key: record(key, branches[key], f, stop_gain) for key, f in fits.items()}
    if c.holdout:
        results = {key: holdout(branches[key], max_score) for key in fits}
        print("\n" + holdout_table(results, fits))
        for key, result in results.items():
            records[key]["holdout"] = result
    try:
        if c.json:
            files.write_json(Path(c.json), list(records.values()))
        if c.plot and fits:
            plot(fits, branches, c.plot)
    except (OSError, ImportError, ValueError) as error:
        errors.append(str(error))
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 2 if errors else 0
