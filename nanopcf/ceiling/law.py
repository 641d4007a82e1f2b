"""The scaling law of RL (Eq. 2), and the law of least squares, found without a starting guess.

    P_post(x) = s + (A_post - s) g(x),    g(x) = 1 / (1 + (x / C_mid)^-B)                                   (2)

x is RL compute, s the score where RL starts, A_post the ceiling. g climbs from 0 to 1: C_mid is the compute at which
half of the gain is reached, and B is how steep the climb is.
"""

from typing import NamedTuple

import numpy as np

# From 10 % to 90 % of the gain takes 60,000 times the compute with B = 0.4, and 3 times with B = 4.
B_RANGE = (0.4, 4.0)
ZOOMS = 6  # of the grid of `least_squares`


class Law(NamedTuple):
    start: float
    a_post: float
    c_mid: float
    b: float


def shape(x: np.ndarray, c_mid: np.ndarray, b: np.ndarray) -> np.ndarray:
    """g(x) of Eq. 2 for K pairs (c_mid, b) at n values of compute: (K, n)."""
    # x = 0 is allowed: (c_mid / 0)^b is infinite, and g is 0.
    with np.errstate(divide="ignore", over="ignore"):
        return 1 / (1 + np.exp(b[:, None] * (np.log(c_mid)[:, None] - np.log(x))))  # (c_mid / x)^b


def law_at(x: np.ndarray, law: Law) -> np.ndarray:
    """P_post at compute x: (n,)."""
    start, a_post, c_mid, b = law
    return start + (a_post - start) * shape(x, np.array([c_mid]), np.array([b]))[0]


def grid(c_range: tuple[float, float], b_range: tuple[float, float], size: tuple[int, int]) -> list[np.ndarray]:
    """c_mid and b of every cell, evenly spaced in their logarithms: each (K,), with K = size[0] * size[1]."""
    c_mid, b = np.geomspace(*c_range, size[0]), np.geomspace(*b_range, size[1])
    return [values.ravel() for values in np.meshgrid(c_mid, b)]


def least_squares(
    x: np.ndarray,
    y: np.ndarray,
    p_sft: float,
    max_score: float,
    *,
    b_range: tuple[float, float] = B_RANGE,
    free_offset: bool = False,
) -> Law:
    """The law of smallest squared error with C_mid between a tenth of the first and the last compute.

    Once C_mid and B are fixed, the law is linear in what remains, and a formula gives the best values (`best_gains`:
    this is called variable projection). That leaves two dimensions to search: a grid over (C_mid, B), then finer
    grids around its best cell. free_offset: the law may start above P_sft (epsilon > 0).
    """
    first = x[x > 0][0]
    bounds = np.log([[first / 10, x[-1]], b_range])  # (2, 2): C_mid and B, each from low to high
    window, size = bounds, (30, 14)
    for _ in range(1 + ZOOMS):
        c_mid, b = grid(np.exp(window[0]), np.exp(window[1]), size)  # (K,)
        a, e, error = best_gains(shape(x, c_mid, b), y - p_sft, max_score - p_sft, free_offset)  # (K,)
        i = int(error.argmin())
        # The next window reaches two cells to either side of the best one, and stays within the bounds.
        centre = np.log([[c_mid[i]], [b[i]]])  # (2, 1)
        cell = (window[:, 1:] - window[:, :1]) / (np.array([size]).T - 1)  # (2, 1)
        window = np.clip(np.hstack([centre - 2 * cell, centre + 2 * cell]), bounds[:, :1], bounds[:, 1:])
        size = (11, 11)
    return Law(float(p_sft + e[i]), float(p_sft + a[i]), float(c_mid[i]), float(b[i]))


def best_gains(g: np.ndarray, r: np.ndarray, a_max: float, free_offset: bool) -> tuple[np.ndarray, ...]:
    """For each of K shapes g (K, n) the a and e of smallest error for r = y - P_sft (n,), and that error less sum r^2.

    Above P_sft the law is r = e (1 - g) + a g, with a = A_post - P_sft in [0, a_max] and e = epsilon >= 0.
    """
    h = 1 - g
    # The squared error is a quadratic in a and e; these inner products are its coefficients, each (K,).
    gg, gh, hh = (g * g).sum(1), (g * h).sum(1), (h * h).sum(1) + 1e-12
    gr, hr = g @ r, h @ r
    a = np.clip(gr / (gg + 1e-12), 0, a_max)  # the best a if e = 0
    e = np.zeros_like(a)
    if free_offset:
        # Both derivatives are 0 here, unless e would be negative: then e = 0 and the a from above.
        both = (gr * hh - hr * gh) / (gg * hh - gh**2 + 1e-12)
        a = np.clip(np.where(hr > both * gh, both, a), 0, a_max)
        e = np.maximum(hr - a * gh, 0) / hh
    return a, e, a * a * gg + 2 * a * e * gh + e * e * hh - 2 * a * gr - 2 * e * hr
