"""Does the minimum validation loss order the ceilings? The correlation behind RQ3, and how much few sets can tell."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

FOLLOWS = -0.5  # the losses order the ceilings: Spearman's correlation is at most this
ORDERS = 20_000  # sampled where there are too many to try all


def agreement(min_val_losses: Sequence[float], ceilings: Sequence[float]) -> dict[str, object]:
    """Spearman and Pearson correlation of loss and ceiling over n sets, and how much they tell; None if undefined.

    Near -1 the loss alone would have picked the right data. p_value: the share of all orders of the ceilings that have
    a Spearman correlation at least as low. Three sets reach -1 by chance one time in six. Above 8 sets the orders are
    sampled. pearson_interval: 90 %, by Fisher's z-transform, which needs 4 sets. Raises ValueError if the two lists
    differ in length or hold a number that is not finite.
    """
    n = len(ceilings)
    if len(min_val_losses) != n:
        raise ValueError(f"{len(min_val_losses)} losses but {n} ceilings: need one ceiling per loss")
    if not all(math.isfinite(v) for v in (*min_val_losses, *ceilings)):
        raise ValueError("losses and ceilings must be finite: leave out the sets that have none")
    loss_ranks, ceiling_ranks = _ranks(min_val_losses), _ranks(ceilings)
    spearman = _pearson(loss_ranks, ceiling_ranks)  # by its definition
    pearson = _pearson(np.array(min_val_losses), np.array(ceilings))
    p_value = interval = None
    if spearman is not None:
        p_value = float(_share_as_low(loss_ranks, ceiling_ranks, np.array([spearman]))[0])
    if pearson is not None and n > 3:
        z = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, pearson)))  # atanh(±1) is infinite
        half_width = 1.645 / math.sqrt(n - 3)  # 1.645 standard errors of z on each side hold 90 %
        interval = (math.tanh(z - half_width), math.tanh(z + half_width))
    return {"spearman": spearman, "pearson": pearson, "n": n, "p_value": p_value, "pearson_interval": interval}


def agreement_of_draws(min_val_losses: Sequence[float], ceilings: np.ndarray) -> dict[str, object]:
    """The correlations of loss and ceiling over n sets, where the ceilings are known by their draws (n, R).

    spearman, pearson: medians over the draws. spearman_interval: 90 % of them. p_value: how often a random order of the
    ceilings has a Spearman correlation at least as low, mean over the draws (so no p-value in the strict sense).
    probability: of a Spearman correlation of at most FOLLOWS. All are None for fewer than 3 sets and for equal losses.
    """
    n, spearman = len(ceilings), spearman_of_draws(min_val_losses, ceilings)
    result: dict[str, object] = dict.fromkeys(("spearman", "spearman_interval", "pearson", "p_value", "probability"))
    if spearman is not None:
        low, middle, high = np.quantile(spearman, [0.05, 0.5, 0.95])
        result = {
            "spearman": float(middle),
            "spearman_interval": (float(low), float(high)),
            "pearson": float(np.median(_correlations(np.array(min_val_losses), ceilings.T))),
            "p_value": float(_share_as_low(_ranks(min_val_losses), np.arange(1.0, n + 1), spearman).mean()),
            "probability": float((spearman <= FOLLOWS + 1e-12).mean()),
        }
    return result | {"n": n}


def spearman_of_draws(guide: Sequence[float], ceilings: np.ndarray) -> np.ndarray | None:
    """Spearman's correlation of a guide, such as the loss, with each draw of the ceilings (n, R): (R,).

    None for fewer than 3 sets, of which the correlation is 1 or -1 whatever they are, and for a guide that is the same
    for all.
    """
    ranks = _ranks(guide)
    if len(ranks) < 3 or np.ptp(ranks) == 0:
        return None
    return _correlations(ranks, ceilings.argsort(axis=0).argsort(axis=0).T + 1.0)


def _share_as_low(ranks: np.ndarray, others: np.ndarray, spearman: np.ndarray) -> np.ndarray:
    """Which share of all orders of `others` (n,) correlates with `ranks` (n,) at most as spearman (R,) says: (R,)."""
    if len(others) <= 8:
        orders = np.array(list(itertools.permutations(others)))  # (n!, n)
    else:
        orders = np.random.default_rng(0).permuted(np.tile(others, (ORDERS, 1)), axis=1)  # (ORDERS, n)
    by_chance = np.sort(_correlations(ranks, orders))
    return np.searchsorted(by_chance, spearman + 1e-12, "right") / len(by_chance)


def _correlations(a: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Pearson's correlation of a (n,) with each row of rows (R, n): (R,)."""
    a, rows = a - a.mean(), rows - rows.mean(axis=1, keepdims=True)
    return rows @ a / np.sqrt((a @ a) * (rows * rows).sum(axis=1))


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Rank of each value from 1, (n,); ties share the average of their ranks."""
    return np.array([sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values])


def _pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson correlation of two (n,); None if all values of a or all of b are equal."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(np.clip(_correlations(a, b[None])[0], -1, 1))
