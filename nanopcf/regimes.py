"""SFT regimes from the validation loss (the paper's Eqs. 5-9), and the rule to use while SFT is running.

With L_min the minimum over the whole run, delta = 0.02 and delta2 = 0.10:

    stable    L <= (1 + delta) L_min                                                       (5, 7)
    adaptive  before the first stable checkpoint                                           (6)
    mild      after the last stable one, L < (1 + delta2) L_min                            (8)
    severe    after the last stable one, L >= (1 + delta2) L_min                           (9)
    unstable  between the first and the last stable one, yet not stable: the paper gives these no name

The paper's finding: start RL from a stable checkpoint, or at the latest from a mild one. Its rule needs
L_min, which is known only once SFT has gone too far; `saturated` is the online counterpart (ours, not the
paper's).
"""

import itertools
import math
from collections.abc import Sequence


def classify(
    steps: Sequence[float], val_losses: Sequence[float], delta: float = 0.02, delta2: float = 0.10
) -> list[str]:
    """The regime of every checkpoint: "adaptive", "stable", "unstable", "mild" or "severe".

    Edge cases:
    - one checkpoint is its own minimum: stable;
    - a plateau has many stable checkpoints; all-equal losses are all stable;
    - a spike between two stable checkpoints is "unstable", however high: training came back from it;
    - before the first stable checkpoint all are adaptive, even where the loss rises for a while;
    - after the last stable one each is judged on its own loss: a dip from severe back to mild is mild;
    - while the loss still falls, the last checkpoint is the minimum: it is called stable, and only a longer
      run can tell that it was not (see `saturated`).
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

    low = min(val_losses)
    stable = [i for i, loss in enumerate(val_losses) if loss <= (1 + delta) * low]
    regimes = []
    for i, loss in enumerate(val_losses):
        if i < stable[0]:
            regimes.append("adaptive")
        elif loss <= (1 + delta) * low:
            regimes.append("stable")
        elif i < stable[-1]:
            regimes.append("unstable")
        else:
            regimes.append("mild" if loss < (1 + delta2) * low else "severe")
    return regimes


def saturated(val_losses: Sequence[float], delta: float = 0.02, patience: int = 2) -> bool:
    """True once the last `patience` evaluations improved the best loss before by at most a fraction delta.

    Then the best checkpoint so far is the one to start RL from. A loss that rises counts as no improvement;
    fewer than patience + 1 evaluations are never enough. Like any online rule it can't foresee a late second
    descent.
    """
    if patience < 1:
        raise ValueError(f"patience must be at least 1 evaluation, got {patience}")
    _check_losses(val_losses)
    if len(val_losses) <= patience:
        return False
    return min(val_losses[-patience:]) >= (1 - delta) * min(val_losses[:-patience])


def _check_losses(val_losses: Sequence[float]) -> None:
    for i, loss in enumerate(val_losses):
        if not (math.isfinite(loss) and loss > 0):  # the thresholds are ratios: zero or less has no meaning
            raise ValueError(f"validation loss {i} is {loss}: need a positive, finite number")
