"""SFT regimes from the validation loss (the paper's Eqs. 5-9), and a rule to use while SFT is still running.

With L_min the minimum over the whole run, delta = 0.02 and delta2 = 0.10:

    stable    L <= (1 + delta) L_min                                                       (5, 7)
    adaptive  before the first stable checkpoint                                           (6)
    mild      after the last stable one, L < (1 + delta2) L_min                            (8)
    severe    after the last stable one, L >= (1 + delta2) L_min                           (9)
    unstable  between the first and the last stable one, but not stable; the paper has no name for these

The paper's finding: start RL from a stable checkpoint, or at the latest from a mild one. These rules need L_min, which
is known only after SFT has gone too far. `saturated` is a rule for a run that goes on; it is ours, not the paper's.
"""

import itertools
import math
from collections.abc import Sequence


def classify(
    steps: Sequence[float], val_losses: Sequence[float], delta: float = 0.02, delta2: float = 0.10
) -> list[str]:
    """The regime of every checkpoint: "adaptive", "stable", "unstable", "mild" or "severe".

    Edge cases:
    - a single checkpoint is its own minimum, so it is stable;
    - a plateau has many stable checkpoints; if all losses are equal, all checkpoints are stable;
    - a spike between two stable checkpoints is "unstable", however high it is, since training came back from it;
    - before the first stable checkpoint all are adaptive, even where the loss rises for a while;
    - after the last stable one, each is judged by its own loss: one that falls from severe back to mild is mild;
    - while the loss still falls, the last checkpoint is the minimum and is called stable. Only a longer run can
      show that it was not (see `saturated`).

    Raises ValueError if the steps do not increase or a loss is not a positive, finite number.
    """
    if len(steps) != len(val_losses):
        raise ValueError(f"{len(steps)} steps but {len(val_losses)} validation losses: need one loss per step")
    if any(after <= before for before, after in itertools.pairwise(steps)):
        raise ValueError(f"steps must strictly increase, got {list(steps)}")
    if not 0 <= delta < delta2:
        raise ValueError(f"need 0 <= delta < delta2, got delta={delta} and delta2={delta2}")
    _check_losses(val_losses)
    if not val_losses:
        return []

    minimum = min(val_losses)
    stable = [i for i, loss in enumerate(val_losses) if loss <= (1 + delta) * minimum]
    regimes = []
    for i, loss in enumerate(val_losses):
        if i < stable[0]:
            regimes.append("adaptive")
        elif loss <= (1 + delta) * minimum:
            regimes.append("stable")
        elif i < stable[-1]:
            regimes.append("unstable")
        else:
            regimes.append("mild" if loss < (1 + delta2) * minimum else "severe")
    return regimes


def saturated(val_losses: Sequence[float], delta: float = 0.02, patience: int = 2) -> bool:
    """True if the last `patience` evaluations improved the best loss before them by no more than a share delta.

    Then the best checkpoint so far is the one to start RL from. A loss that rises counts as no improvement. Fewer than
    patience + 1 evaluations are never enough. Like every such rule, it cannot foresee that the loss falls again later.
    """
    if patience < 1:
        raise ValueError(f"patience must be at least 1 evaluation, got {patience}")
    _check_losses(val_losses)
    if len(val_losses) <= patience:
        return False
    return min(val_losses[-patience:]) >= (1 - delta) * min(val_losses[:-patience])


def _check_losses(val_losses: Sequence[float]) -> None:
    for i, loss in enumerate(val_losses):
        # the thresholds are ratios to the minimum, which must therefore be above zero
        if not (math.isfinite(loss) and loss > 0):
            raise ValueError(f"validation loss {i} is {loss}: need a positive, finite number")
