"""Which expert data, and which of its checkpoints, should RL start from? (The paper's RQ2 and RQ3.)

The finding: the *minimum SFT validation loss* of a data set predicts its ceiling before any RL is run (r =
-0.94 over five data scales, Table 5), and the ceiling is reached from Stable or Mild checkpoints (Eqs. 5-9).
So the selector takes the set with the lowest loss, and in it the checkpoint with the lowest loss. pass@k is
shown beside the choice and never decides it. The losses are only comparable if all candidates share one
validation set and one base model.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import regimes


@dataclass(frozen=True)
class Ranked:
    """One candidate set; its checkpoints are the caller's dicts, each with its "regime" added."""

    name: str
    min_val_loss: float
    checkpoints: list[dict[str, Any]]

    def in_regime(self, *names: str) -> list[dict[str, Any]]:
        return [c for c in self.checkpoints if c["regime"] in names]


@dataclass(frozen=True)
class Selection:
    ranking: list[Ranked]  # lowest validation loss first; equal losses keep the caller's order
    chosen: str  # name of the first of the ranking
    start: dict[str, Any]  # its checkpoint of lowest loss: the one to start RL from
    alternatives: list[dict[str, Any]]  # its other Stable and Mild checkpoints, lowest loss first
    saturated: bool  # False: the loss was still falling when SFT ended, and longer SFT may change the choice


def select(candidates: Sequence[dict[str, Any]]) -> Selection:
    """Ranks candidates {"name", "checkpoints": [{"step", "val_loss", "pass_at_1"?, "pass_at_k"?}, ...]}."""
    if not candidates:
        raise ValueError("no candidate sets: need at least one with a name and checkpoints")
    ranking = []
    for candidate in candidates:
        checkpoints = candidate["checkpoints"]
        losses = [c["val_loss"] for c in checkpoints]
        if not losses:
            raise ValueError(f"candidate {candidate['name']!r} has no checkpoints: need at least one")
        try:
            names = regimes.classify([c["step"] for c in checkpoints], losses)
        except ValueError as error:
            raise ValueError(f"candidate {candidate['name']!r}: {error}") from None
        marked = [{**c, "regime": name} for c, name in zip(checkpoints, names, strict=True)]
        ranking.append(Ranked(candidate["name"], min(losses), marked))
    ranking.sort(key=lambda ranked: ranked.min_val_loss)

    best = ranking[0]
    start, *alternatives = sorted(best.in_regime("stable", "mild"), key=lambda c: c["val_loss"])
    saturated = regimes.saturated([c["val_loss"] for c in best.checkpoints])
    return Selection(ranking, best.name, start, alternatives, saturated)


def agreement(min_val_losses: Sequence[float], ceilings: Sequence[float]) -> dict[str, object]:
    """Spearman and Pearson correlation of loss and ceiling over n sets, and how much n sets can say; None if undefined.

    Near -1 the loss alone would have picked the right data. `p_value`: the share of all orders of the ceilings with a
    Spearman correlation at least as low (three sets in the right order reach -1 by chance one time in six); sampled
    above 8 sets. `pearson_interval`: 90 %, by Fisher's z; needs 4 sets. Raises ValueError.
    """
    n = len(ceilings)
    if len(min_val_losses) != n:
        raise ValueError(f"{len(min_val_losses)} losses but {n} ceilings: need one ceiling per loss")
    if not all(math.isfinite(v) for v in (*min_val_losses, *ceilings)):
        raise ValueError("losses and ceilings must be finite: leave out the sets that have none")
    losses, ranks = _ranks(min_val_losses), _ranks(ceilings)
    spearman, pearson = _pearson(losses, ranks), _pearson(min_val_losses, ceilings)
    p_value = interval = None
    if spearman is not None:
        rng = random.Random(0)
        orders = itertools.permutations(ranks) if n <= 8 else (rng.sample(ranks, n) for _ in range(20_000))
        as_low = [_pearson(losses, order) <= spearman + 1e-12 for order in orders]
        p_value = sum(as_low) / len(as_low)
    if pearson is not None and n > 3:
        z, reach = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, pearson))), 1.645 / math.sqrt(n - 3)
        interval = (math.tanh(z - reach), math.tanh(z + reach))
    return dict(spearman=spearman, pearson=pearson, n=n, p_value=p_value, pearson_interval=interval)


def _ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value from 1; ties share the average of their ranks."""
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


def _pearson(a: Sequence[float], b: Sequence[float]) -> float | None:
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    mean_a, mean_b = math.fsum(a) / len(a), math.fsum(b) / len(b)
    cov = math.fsum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    var = math.fsum((x - mean_a) ** 2 for x in a) * math.fsum((y - mean_b) ** 2 for y in b)
    return max(-1.0, min(1.0, cov / math.sqrt(var)))
