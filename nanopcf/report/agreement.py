"""Does the minimum validation loss order the ceilings? The correlation behind RQ3, and how much few sets can tell."""

import itertools
import math
import random
from collections.abc import Sequence


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
