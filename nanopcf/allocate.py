"""Where the compute of RL goes: to the branches whose ceiling is still an open question.

An even split gives each branch the same number of steps. Some curves are flat after two thirds of them, and the rest
teaches nothing; others still rise at their end, and leave no more than a lower bound. So RL runs in rounds, and after
each one every curve is fitted (`report.ceilings`):

- A branch stops when its ceiling is identified, or when no prompt gives it a signal any more.
- Of the others, about half get the next round: first those that may have the highest ceiling of all, since which start
  is the best is the question of a run; then those that, going on as they do, would be identified the soonest.
- The run ends when no branch is open, or when as many steps are spent as the even split would have given to all.

Does it spoil the intervals that a curve is looked at again and again, and stopped when it looks saturated? They are
posteriors, and a posterior does not depend on the reason for stopping, if the prior fits. docs/ceiling.md has the check
by simulation.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nanopcf.report.ceilings import SURE, fit_ceiling
from nanopcf.run import files

Curves = dict[str, list[dict]]  # branch -> its points {step, x, score}, from step 0 on


def train_in_rounds(
    configs: dict[str, Any],
    train: Callable[[dict[str, Any]], Curves],
    record: Path,
    problems: int,
    *,
    even: bool = False,
) -> tuple[Curves, dict[str, int]]:
    """Train branches, {name: RLConfig}, where the question is open: their curves, and the steps granted to each.

    train: trains some branches until their `steps`, each from where it stood. The steps that were granted are kept in
    the file `record` before a round begins, so that an interrupted call goes on with the same round. problems: how many
    a score counts. even: one round, in which each branch has the steps of its config.
    """
    share, every = {(c.steps, c.eval_every) for c in configs.values()}.pop()
    if even:
        return train(configs), dict.fromkeys(configs, share)
    grant = max(1, share // 3 // every) * every  # a round ends with a point of the curve
    granted = files.read_json(record) if record.exists() else dict.fromkeys(configs, min(2 * grant, share))
    if list(granted) != list(configs) or not all(type(steps) is int and steps >= 1 for steps in granted.values()):
        raise ValueError(f"{record}: damaged; put it back, or remove {record.parent}, and --resume trains RL again")
    curves: Curves = {}
    further = granted
    while further:
        granted |= further
        files.write_json(record, granted)
        curves |= train({name: replace(configs[name], steps=steps) for name, steps in further.items()})
        further = next_round(curves, granted, budget=share * len(configs), grant=grant, problems=problems)
    return curves, granted


def next_round(curves: Curves, granted: dict[str, int], *, budget: int, grant: int, problems: int) -> dict[str, int]:
    """{branch: its steps after the next round}, each `grant` more than granted; empty if the run has come to its end.

    budget: steps of all branches together.
    """
    fits, chance = judge_branches(curves, granted, problems)

    def order(name: str) -> tuple[float, float]:
        contender = chance[name] > 1 - SURE
        return -chance[name] if contender else 0.0, (fits[name]["settled_at"] or np.inf) / curves[name][-1]["x"]

    still_open = sorted(
        (n for n in fits if not fits[n]["identified"] and fits[n]["status"] != "out of signal"), key=order
    )
    half = 2 * ((len(still_open) + 3) // 4)  # an even number, so that two workers end together
    left = (budget - sum(granted.values())) // grant
    return {name: granted[name] + grant for name in still_open[: min(half, left)]}


def judge_branches(curves: Curves, granted: dict[str, int], problems: int) -> tuple[dict[str, dict], dict[str, float]]:
    """Of each branch: what `fit_ceiling` says of its curve, and how probable it is that its ceiling is the highest."""
    fits, draws = {}, []
    for seed, (name, curve) in enumerate(curves.items()):
        ended = curve[-1]["step"] < granted[name]  # no prompt gave a signal any more
        fits[name], drawn = fit_ceiling(curve, curve[0]["score"], problems, seed=seed, out_of_signal=ended)
        draws.append(drawn)
    highest = np.argmax(draws, axis=0)  # (R,) the branch with the highest ceiling, in each draw
    return fits, dict(zip(fits, (np.bincount(highest, minlength=len(fits)) / len(highest)).tolist(), strict=True))
