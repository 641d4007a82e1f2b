"""How sure is the ceiling? The probability of every law, given the curve: a grid and formulas, no random search.

The noise of scores i and j has covariance sigma^2 (1[i = j] + tau^2 exp(-|x_i - x_j| / ell)): an error of each score
alone, and a drift of the policy that neighbours share over a compute of ell. A cell of the grid fixes C_mid, B, tau and
ell. In a cell the law is linear in its start s and its ceiling a, and the squared error is a quadratic in both: the
integrals over s and over sigma are formulas, and each cell gives each ceiling a probability.
"""

from typing import NamedTuple

import numpy as np

from nanopcf.ceiling.law import B_RANGE, Law, grid, shape
from nanopcf.ceiling.result import Draws
from nanopcf.ceiling.robust import noise_sd

# ---- the prior and the grid, the same for all curves ----

# A_post - s, as a fraction of max_score: density (1 + gain / GAIN)^-GAIN_POWER. Small gains are likelier, as in the
# paper, and the tail is heavy, so that a curve that gains 50 points is not pulled down.
GAIN, GAIN_POWER = 0.20, 1.5
B_TYPICAL, B_SPREAD = 1.2, 0.55  # B: log-normal around 1.2, with this standard deviation of log B
C_REACH = 3.0  # C_mid: log-uniform from a third of the first compute to 3 times the last
# (tau, ell / last compute, weight): white noise is as likely as two of the others.
NOISE = [(0, 1.0, 2), (0.5, 0.1, 1), (1, 0.1, 1), (2, 0.1, 1), (0.5, 0.4, 1), (1, 0.4, 1), (2, 0.4, 1)]
SIGMA_POINTS = 8  # sigma^2: inverse gamma, worth so many points with the noise seen between neighbours
GRID = (36, 12)  # how many values of C_mid and of B
ZOOMS = 3  # at most so many finer grids over the part where the probability is
CEILINGS = 121  # how many values of A_post
NEGLIGIBLE = 12  # cells e^12 times less probable than the best one are left out
TAIL = 0.075  # the probability beyond each end of the interval; so 90 % of simulated ceilings lie inside
DRAWS = 800


class Cells(NamedTuple):
    """M cells of the grid, each array (M,), and in each what the curve says about a ceiling a:

    best start = start_0 - a start_1,    squared error there = error_0 - 2 a error_1 + a^2 error_2
    """

    c_mid: np.ndarray
    b: np.ndarray
    tau: np.ndarray
    ell: np.ndarray
    start_0: np.ndarray
    start_1: np.ndarray
    error_0: np.ndarray
    error_1: np.ndarray
    error_2: np.ndarray
    hh: np.ndarray  # a start that is off the best one by d adds d^2 hh to the squared error
    log_weight: np.ndarray  # of the noise's prior, less half the log-determinants of the noise and of the start


def ceiling_posterior(
    x: np.ndarray, y: np.ndarray, p_sft: float, max_score: float
) -> tuple[tuple[float, float], Law, Draws]:
    """The interval of A_post, the most probable law, and draws, from scores y at RL compute x."""
    window = np.log([[x[x > 0][0] / C_REACH, C_REACH * x[-1]], B_RANGE])  # (2, 2): C_mid and B, each from low to high
    x, y = np.append(0.0, x), np.append(p_sft, y)  # (n,): P_sft is one measurement of the start like any other
    # Given a law with its squared error, sigma^2 is inverse gamma with alpha and beta + error / 2. (The start, of which
    # nothing was known before, takes one of the n points.)
    alpha = SIGMA_POINTS / 2 + (len(x) - 1) / 2
    beta = SIGMA_POINTS / 2 * max(noise_sd(y), 2e-3 * max_score) ** 2
    lowest = max(0.0, min(p_sft, np.median(y)) - 0.03 * max_score)

    # Every cell at its own best ceiling shows where the probability is, and where A_post can lie. A curve with little
    # noise leaves only a few cells of the grid, too few to tell its ceilings apart: then the next grid is finer.
    noises = noise_models(x)
    for _ in range(1 + ZOOMS):
        cells = fit_cells(x, y, noises, *grid(*np.exp(window), GRID))
        a = np.clip(cells.error_1 / (cells.error_2 + 1e-12), lowest, max_score)  # (M,)
        log_p, error, _ = weigh(cells, a, alpha, beta, max_score)
        likely = log_p > log_p.max() - NEGLIGIBLE  # (M,) bool
        smaller = around(cells, likely, window)
        if np.prod(np.ptp(smaller, axis=1)) > np.prod(np.ptp(window, axis=1)) / 2:
            break
        window = smaller
    reach = 4 * np.sqrt((beta + error / 2) / alpha / (cells.error_2 + 1e-12))  # (M,) 4 sd of A_post in the cell
    a_range = max(lowest, (a - reach)[likely].min()), min(max_score, (a + reach)[likely].max())
    cells = Cells(*(values[likely] for values in cells))

    # The cells that are left, at J ceilings.
    a = np.linspace(*a_range, CEILINGS)  # (J,)
    log_p, error, start = weigh(cells, a[:, None], alpha, beta, max_score)  # (J, M)
    probability = np.exp(log_p - log_p.max())

    # The sum over the cells is the probability of each ceiling: its mode and the interval.
    marginal = probability.sum(1)  # (J,)
    below = np.append(0, np.cumsum((marginal[1:] + marginal[:-1]) / 2))  # trapezoids up to each ceiling
    low, high = np.interp([TAIL, 1 - TAIL], below / below[-1], a)
    j = int(marginal.argmax())
    i = int(probability[j].argmax())
    law = Law(float(start[j, i]), float(a[j]), float(cells.c_mid[i]), float(cells.b[i]))

    # Draws at even steps of the cumulative probability, and for each a sigma from its inverse gamma distribution.
    total = np.cumsum(probability.ravel())
    drawn = np.searchsorted(total, (np.arange(DRAWS) + 0.5) / DRAWS * total[-1])
    j, i = np.unravel_index(drawn, probability.shape)  # (R,)
    sigma = np.sqrt((beta + error[j, i] / 2) / np.random.default_rng(0).gamma(alpha, size=DRAWS))
    draws = Draws(a[j], start[j, i], cells.c_mid[i], cells.b[i], cells.tau[i], cells.ell[i], sigma, x, y)
    return (float(low), float(high)), law, draws


def around(cells: Cells, likely: np.ndarray, window: np.ndarray) -> np.ndarray:
    """The part of the window (2, 2) of log C_mid and log B that holds the likely cells, and one cell on every side."""
    places = np.log([cells.c_mid[likely], cells.b[likely]])  # (2, likely cells)
    step = np.ptp(window, axis=1) / (np.array(GRID) - 1)  # (2,)
    ends = np.stack([places.min(axis=1) - step, places.max(axis=1) + step], axis=1)
    return np.clip(ends, window[:, :1], window[:, 1:])


def noise_models(x: np.ndarray) -> list[tuple]:
    """For each of NOISE tau, ell in the unit of x (n,), the matrix (n, n) that turns such noise into independent errors
    of size sigma, and the logarithm of its weight, less half the log-determinant of its covariance."""
    models = []
    for tau, ell, weight in NOISE:
        covariance = np.eye(len(x)) + tau**2 * np.exp(-np.abs(x[:, None] - x) / (ell * x[-1]))
        factor = np.linalg.cholesky(covariance)
        models.append((tau, ell * x[-1], np.linalg.inv(factor), np.log(weight) - np.log(np.diag(factor)).sum()))
    return models


def fit_cells(x: np.ndarray, y: np.ndarray, noises: list[tuple], c_mid: np.ndarray, b: np.ndarray) -> Cells:
    """All pairs of c_mid and b, each (K,), with every noise: M = K len(NOISE) cells for scores y (n,) at x (n,)."""
    K, n = len(b), len(x)
    columns = np.column_stack([y, np.ones(n), shape(x, c_mid, b).T])  # (n, 2 + K)
    parts = []
    for tau, ell, whiten, log_weight in noises:
        white = whiten @ columns  # from here on plain squared errors count
        # The law is s h + a g with h = 1 - g, and the error |u - s h - a g|^2 is least for s = (hu - a gh) / hh, where
        # two letters are an inner product. Put back, it is the quadratic in a that a cell holds.
        u, g = white[:, 0], white[:, 2:].T  # (n,), (K, n)
        h = white[:, 1] - g  # (K, n)
        gg, gh, hh, gu, hu = (g * g).sum(1), (g * h).sum(1), (h * h).sum(1), g @ u, h @ u  # (K,)
        starts = hu / hh, gh / hh
        errors = u @ u - hu**2 / hh, gu - gh * hu / hh, gg - gh**2 / hh
        log_weight = log_weight - np.log(hh) / 2
        parts.append(Cells(c_mid, b, np.full(K, tau), np.full(K, ell), *starts, *errors, hh, log_weight))
    return Cells(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def weigh(
    cells: Cells, a: np.ndarray, alpha: float, beta: float, max_score: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log probability (up to a constant), squared error and best start of M cells at ceilings a, (M,) or (J, 1)."""
    start = cells.start_0 - a * cells.start_1
    error = np.maximum(cells.error_0 + a * (a * cells.error_2 - 2 * cells.error_1), 0)
    # The gain cannot be negative: where it would be, the start comes down to a, and the curve is flat.
    above = np.maximum(start - a, 0)
    start, error = start - above, error + cells.hh * above**2
    # The likelihood, with sigma and the start integrated out; then the prior of the gain and of B.
    log_p = -alpha * np.log(beta + error / 2) + cells.log_weight
    log_p -= GAIN_POWER * np.log1p((a - start) / (GAIN * max_score)) + (np.log(cells.b / B_TYPICAL) / B_SPREAD) ** 2 / 2
    return log_p, error, start
