"""Which expert data, and which of its checkpoints, should RL start from? (The paper's RQ2 and RQ3.)

The finding: the *minimum SFT validation loss* of a data set predicts its ceiling before any RL is run (r = -0.94 over
five data scales, Table 5), and the ceiling is reached from Stable or Mild checkpoints (Eqs. 5-9). So the selector takes
the set with the lowest loss, and in it the checkpoint with the lowest loss. pass@k is shown beside the choice but never
decides it. Losses can only be compared if all candidates share one validation set and one base model.
"""

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

    Raises ValueError if there are none, or if one has no checkpoints or a loss that is not positive and finite.
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
