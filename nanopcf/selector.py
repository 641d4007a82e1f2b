"""Which expert data, and which of its checkpoints, should RL start from? (The paper's RQ2 and RQ3.)

The finding: the *minimum SFT validation loss* of a data set predicts its ceiling before any RL is run (r = -0.94 over five
data scales, Table 5), and the ceiling is reached from Stable or Mild checkpoints (Eqs. 5-9). So the selector takes the set
with the lowest loss, and in it the checkpoint with the lowest loss. pass@k is shown beside the choice but never decides it.
Losses can only be compared if all candidates share one validation set and one base model.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanopcf import regimes


@dataclass(frozen=True)
class Ranked:
    """One candidate set. Its checkpoints are copies of the caller's dicts, with their "regime" added."""

    name: str
    min_val_loss: float
    checkpoints: list[dict[str, Any]]

    def in_regime(self, *names: str) -> list[dict[str, Any]]:
        return [c for c in self.checkpoints if c["regime"] in names]


@dataclass(frozen=True)
class Selection:
    ranking: list[Ranked]  # lowest validation loss first; sets of equal loss keep the caller's order
    chosen: str  # name of the first set of the ranking
    start: dict[str, Any]  # the chosen set's checkpoint of lowest loss, to start RL from
    alternatives: list[dict[str, Any]]  # the chosen set's other Stable and Mild checkpoints, lowest loss first
    saturated: bool  # False: the loss was still falling when SFT ended, so longer SFT may change the choice


def select(candidates: Sequence[dict[str, Any]]) -> Selection:
    """Rank candidates {"name", "checkpoints": [{"step", "val_loss", ...}, ...]} by minimum validation loss.

    Raises ValueError if there are none, or if one has no checkpoints or a loss that is no positive, finite number.
    """
    if not candidates:
        raise ValueError("no candidate sets: need at least one with a name and checkpoints")
    ranking = []
    for candidate in candidates:
        checkpoints = candidate["checkpoints"]
        losses = [c["val_loss"] for c in checkpoints]
        if not losses:
            raise ValueError(f"candidate {candidate['name']!r} has no checkpoints: need at least one")
        try:
            labels = regimes.classify([c["step"] for c in checkpoints], losses)
        except ValueError as error:
            raise ValueError(f"candidate {candidate['name']!r}: {error}") from None
        labelled = [{**c, "regime": label} for c, label in zip(checkpoints, labels, strict=True)]
        ranking.append(Ranked(candidate["name"], min(losses), labelled))
    ranking.sort(key=lambda ranked: ranked.min_val_loss)

    best = ranking[0]
    start, *alternatives = sorted(best.in_regime("stable", "mild"), key=lambda c: c["val_loss"])
    saturated = regimes.saturated([c["val_loss"] for c in best.checkpoints])
    return Selection(ranking, best.name, start, alternatives, saturated)


def agreement(min_val_losses: Sequence[float], ceilings: Sequence[float]) -> dict[str, object]:
    """Spearman and Pearson correlation of loss and ceiling over n sets, and how much n sets can tell; None if undefined.

    Near -1 the loss alone would have picked the right data. p_value: the share of all orders of the ceilings that have a
    Spearman correlation at least as low. Three sets reach -1 by chance one time in six. Above 8 sets the orders are
    sampled. pearson_interval: 90 %, by Fisher's z-transform, which needs 4 sets. Raises ValueError if the two lists differ
    in length or hold a number that is not finite.
    """
    n = len(ceilings)
    if len(min_val_losses) != n:
        raise ValueError(f"{len(min_val_losses)} losses but {n} ceilings: need one ceiling per loss")
    if not all(math.isfinite(v) for v in (*min_val_losses, *ceilings)):
        raise ValueError("losses and ceilings must be finite: leave out the sets that have none")
    loss_ranks, ceiling_ranks = _ranks(min_val_losses), _ranks(ceilings)
    spearman = _pearson(loss_ranks, ceiling_ranks)  # by its definition
    pearson = _pearson(min_val_losses, ceilings)
    p_value = interval = None
    if spearman is not None:
        rng = random.Random(0)
        every_order = itertools.permutations(ceiling_ranks)
        orders = every_order if n <= 8 else (rng.sample(ceiling_ranks, n) for _ in range(20_000))
        as_low = [_pearson(loss_ranks, order) <= spearman + 1e-12 for order in orders]
        p_value = sum(as_low) / len(as_low)
    if pearson is not None and n > 3:
        z = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, pearson)))  # atanh(±1) is infinite
        half_width = 1.645 / math.sqrt(n - 3)  # 1.645 standard errors of z on each side hold 90 %
        interval = (math.tanh(z - half_width), math.tanh(z + half_width))
    return {"spearman": spearman, "pearson": pearson, "n": n, "p_value": p_value, "pearson_interval": interval}


def _ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value from 1; ties share the average of their ranks."""
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


def _pearson(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson correlation; None if all values of a or all of b are equal."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    mean_a, mean_b = math.fsum(a) / len(a), math.fsum(b) / len(b)
    cov = math.fsum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    var = math.fsum((x - mean_a) ** 2 for x in a) * math.fsum((y - mean_b) ** 2 for y in b)
    return max(-1.0, min(1.0, cov / math.sqrt(var)))
