"""The command line of `nanopcf.ceiling`: CURVES.csv in; a table, JSON and figures out.

    python -m nanopcf.ceiling CURVES.csv [--json OUT.json] [--plot OUT.png] [--holdout] [--stop-gain POINTS]
    python -m nanopcf.ceiling CURVES.csv --method paper [--settings TABLE.csv]

`curve_files` says what the file holds. An error in a branch costs that branch: one sentence with the row number goes to
stderr, the exit code is 2, and the other branches are fitted and reported all the same.
"""

import math
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanopcf import ceiling
from nanopcf.ceiling import CeilingFit
from nanopcf.ceiling.curve_files import (
    BASE,
    COLUMNS,
    MOST_POINTS,
    Branch,
    Key,
    averaged,
    branch_name,
    read_curves,
    read_settings,
)
from nanopcf.ceiling.drawing import plot
from nanopcf.ceiling.forecasts import FRACTIONS, holdout, holdout_table
from nanopcf.ceiling.published import fit_paper
from nanopcf.run import config, files
from nanopcf.run.config import Argument, Positive
from nanopcf.run.untrusted import printable

__all__ = ["BASE", "COLUMNS", "FRACTIONS", "Branch", "holdout", "main", "read_curves", "read_settings"]

# ---- fitting ----


def fit_branch(branch: Branch, max_score: float, method: str, settings: dict) -> CeilingFit | str:
    """The fit, or a sentence that says what is wrong with the branch."""
    try:
        if branch.p_sft is None:
            raise ValueError("no row with stage sft, so no P_sft")
        if method == "paper":
            return fit_paper(branch.x, branch.y, branch.p_sft, max_score=max_score, **settings)
        return ceiling.fit(branch.x, branch.y, branch.p_sft, max_score=max_score)
    except ValueError as error:
        return str(error)


def fit_branches(
    branches: dict[Key, Branch], max_score: float, method: str, settings: dict[Key, dict]
) -> dict[Key, CeilingFit | str]:
    """`fit_branch` of each, with the settings of its key; a large file is shared among all cores."""
    tasks = [(branch, max_score, method, settings.get(key if key[1] else BASE, {})) for key, branch in branches.items()]
    if len(tasks) > 50:
        # One thread per worker, or the workers would wait for each other's threads.
        for library in ("OPENBLAS", "OMP", "MKL"):
            os.environ.setdefault(f"{library}_NUM_THREADS", "1")
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            outcomes = list(pool.map(fit_branch, *zip(*tasks, strict=True), chunksize=8))
    else:
        outcomes = [fit_branch(*task) for task in tasks]
    return dict(zip(branches, outcomes, strict=True))


# ---- showing ----


def table(fits: dict[Key, CeilingFit], max_score: float, stop_gain: float) -> str:
    """One line per branch. Of a ceiling that is not identified only the lower bound is shown, as in a report."""
    d = 3 if max_score <= 1 else 1  # digits
    width = max([7, *(len(dataset) for dataset, _ in fits)])
    lines = [f"{'dataset':<{width}}    step   P_sft   A_post  90% interval        PL_rl  stop at   rmse  verdict"]
    for (dataset, step), fit in fits.items():
        low, high = fit.interval
        if fit.identified:
            a_post, plasticity = f"{fit.a_post:.{d}f}", f"{fit.pl_rl:.{d}f}"
        else:
            a_post, plasticity = f">={low:.{d}f}", f">={max(low - fit.p_sft, 0):.{d}f}"
        interval = f"[{low:.{d}f}, {high:.{d}f}]" if fit.draws and fit.identified else ""
        stop_at = fit.stop_at(stop_gain) if fit.draws else None
        stop_text = "-" if stop_at is None else f"{stop_at:.3g}"
        lines.append(
            f"{dataset:<{width}}{step:>8}{fit.p_sft:>8.{d}f}{a_post:>9}  {interval:<18}{plasticity:>7}"
            f"{stop_text:>9}{fit.rmse_fit:>7.{d + 1}f}  {fit.status}"
        )
    if any(fit.draws for fit in fits.values()):
        lines.append(
            ">=: the curve does not identify its ceiling, and this is the low end of its interval\n"
            f"stop at: RL compute from which the expected further gain is below {stop_gain:g}; rmse: of the fit"
        )
    return "\n".join(lines)


def record(key: Key, branch: Branch, fit: CeilingFit, stop_gain: float) -> dict:
    """One branch for --json, with the names of a report's branches. Unless the ceiling is identified, a_post and pl_rl
    are lower bounds. What is not defined is null."""
    low, high = fit.interval if fit.draws else (None, None)
    return {
        "dataset": key[0],
        "sft_step": key[1],
        "x_sft": branch.x_sft,
        "p_sft": fit.p_sft,
        "best": max(branch.y),
        "status": fit.status,
        "identified": fit.identified,
        "a_post": fit.a_post if fit.identified else low,
        "a_post_low": low,
        "a_post_high": high,
        "pl_rl": fit.pl_rl if fit.identified else max(low - fit.p_sft, 0.0),
        "c_mid": fit.c_mid,
        "b": fit.b,
        "epsilon": fit.epsilon,
        "rmse_fit": fit.rmse_fit,
        "rmse_heldout": fit.rmse_heldout,
        "stop_at": fit.stop_at(stop_gain) if fit.draws else None,
        "outliers": int((~fit.kept).sum()),
    }


# ---- the command ----


@dataclass(frozen=True)
class CurvesConfig(config.Config):
    curves: Argument  # CSV of dataset,sft_step,x_sft,stage,x,score
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


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 if something was wrong. A curve of very many points is averaged first, and says so."""
    try:
        c = config.parse(CurvesConfig, __doc__, argv)
        settings = read_settings(c.settings) if c.settings else {}
        branches, errors = read_curves(c.curves)
    except (OSError, ValueError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2

    max_score = 1.0 if all(s <= 1 for b in branches.values() for s in [*b.y, b.p_sft or 0.0]) else 100.0
    stop_gain = c.stop_gain if math.isfinite(c.stop_gain) else max_score / 100
    with_rl = {key: branch for key, branch in branches.items() if branch.x}  # no RL started from the others
    for key, branch in with_rl.items():
        if len(branch.x) > MOST_POINTS and c.method == "posterior":
            with_rl[key] = branches[key] = averaged(branch)
            name = printable(f"{c.curves}: row {branch.row}: {branch_name(key)}")
            print(f"{name}: {len(branch.x):,} points, averaged to {MOST_POINTS}", file=sys.stderr)
    fits: dict[Key, CeilingFit] = {}
    for key, outcome in fit_branches(with_rl, max_score, c.method, settings).items():
        if isinstance(outcome, str):
            errors.append(f"{c.curves}: row {branches[key].row}: {branch_name(key)}: {outcome}")
        else:
            fits[key] = outcome

    print(printable(table(fits, max_score, stop_gain)))
    records = {key: record(key, branches[key], fit, stop_gain) for key, fit in fits.items()}
    if c.holdout:
        forecasts = {key: holdout(branches[key], max_score) for key in fits}
        print(printable("\n" + holdout_table(forecasts, fits)))
        for key, of_branch in forecasts.items():
            records[key]["holdout"] = of_branch
    try:
        if c.json:
            files.write_json(Path(c.json), files.strict(list(records.values())))
        if c.plot and fits:
            plot(fits, branches, c.plot)
    except (OSError, ImportError, ValueError) as error:
        errors.append(str(error))
    for error in errors:
        print(f"error: {printable(error)}", file=sys.stderr)
    return 2 if errors else 0
