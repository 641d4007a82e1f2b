"""How sure is the ceiling? The posterior on a grid."""

from dataclasses import dataclass

import numpy as np

from nanopcf.ceiling.law import B_RANGE, grid, shape
from nanopcf.ceiling.robust import noise_sd

B_TYPICAL = 1.2
C_REACH = 3.0  # C_mid up to this many times the last compute
GAIN = 0.10  # prior mean of A_post - s, as a fraction of max_score
NOISE = [(0, 1.0), (0.5, 0.1), (1, 0.1), (2, 0.1), (0.5, 0.4), (1, 0.4), (2, 0.4)]  # (tau, ell / last x)
TAIL = 0.075  # posterior beyond each end of the interval: the value that covers 90 % of simulated ceilings
DRAWS = 800


@dataclass(frozen=True)
class Draws:
    """R equally likely laws, and the noise around them; a_post, start, c_mid, b, tau, ell, sigma: (R,)."""

    a_post: np.ndarray
    start: np.ndarray
    c_mid: np.ndarray
    b: np.ndarray
    tau: np.ndarray
    ell: np.ndarray
    sigma: np.ndarray
    x: np.ndarray  # (n,) the points they were fitted to, P_sft at 0 first
    y: np.ndarray

    def law(self, x: np.ndarray) -> np.ndarray:
        """P_post at compute x: (R, len(x))."""
        return self.start[:, None] + (self.a_post - self.start)[:, None] * shape(x, self.c_mid, self.b)

    def scores(self, x: np.ndarray) -> np.ndarray:
        """What an evaluation at compute x would give, drift and noise included: (R, len(x))."""
        rng, n = np.random.default_rng(0), len(self.x)
        points = np.concatenate([self.x, x])
        apart = np.abs(points[:, None] - points)
        misses, scores = self.y - self.law(self.x), self.law(x)
        for tau, ell in {*zip(self.tau, self.ell, strict=True)}:
            mine = (self.tau == tau) & (self.ell == ell)
            cov = np.eye(len(points)) + tau**2 * np.exp(-apart / ell)
            # drift carried on from the misses, (n, len(x))
            weights = np.linalg.solve(cov[:n, :n], cov[:n, n:])
            left = cov[n:, n:] - cov[n:, :n] @ weights
            noise = rng.normal(size=(mine.sum(), len(x))) @ np.linalg.cholesky(left).T
            scores[mine] += misses[mine] @ weights + self.sigma[mine, None] * noise
        return scores


# ---- how sure: the posterior on a grid ----


def posterior(
    x: np.ndarray, y: np.ndarray, p: float, cap: float
) -> tuple[tuple[float, float], tuple[float, float, float, float], Draws]:
    """The 90 % interval of A_post, the law (start, A_post, C_mid, B) at its mode, and draws.

    For each noise (tau, ell), whitened by its Cholesky factor, and each pair (C_mid, B), the squared error is a
    quadratic in start and A_post: five inner products hold it. sigma^2 has an inverse gamma prior worth eight points,
    around the noise seen between neighbours, and is integrated out; the start is integrated out too (flat prior).
    """
    first = x[x > 0][0]
    x, y = np.append(0.0, x), np.append(p, y)
    n, prior, spread = len(x), 4.0, max(noise_sd(y), 2e-3 * cap)
    c_mid, b = grid((first / 3, C_REACH * x[-1]), B_RANGE, (36, 12))  # (K,)
    K, g = len(b), shape(x, c_mid, b)
    apart = np.abs(x[:, None] - x) / x[-1]
    columns = np.column_stack([y, np.ones(n), g.T])  # (n, 2 + K)
    parts = []
    for tau, ell in NOISE:
        factor = np.linalg.cholesky(np.eye(n) + tau**2 * np.exp(-apart / ell))
        white = np.linalg.solve(factor, columns)
        u, G = white[:, 0], white[:, 2:].T  # (n,), (K, n)
        H = white[:, 1] - G
        gg, gh, hh, gy, hy = (G * G).sum(1), (G * H).sum(1), (H * H).sum(1), G @ u, H @ u
        # the best start for a ceiling a is s0 - a s1, its squared error e0 - 2 a e1 + a^2 e2
        quadratic = u @ u - hy**2 / hh, gy - gh * hy / hh, gg - gh**2 / hh
        log_det = np.log(np.diag(factor)).sum() + np.log(hh) / 2
        parts.append([hy / hh, gh / hh, hh, *quadratic, log_det])
    cells = np.concatenate([np.array(part) for part in parts], axis=1)  # (7, noises * K)

    def weigh(a: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log probability, squared error and best start of cells c (M,) with ceilings a: (M,) or (J, 1)."""
        s0, s1, hh, e0, e1, e2, log_det = cells[:, c]
        s, error = s0 - a * s1, np.maximum(e0 + a * (a * e2 - 2 * e1), 0)
        above = np.maximum(s - a, 0)  # a gain can't be negative: then the start is a, and the curve flat
        s, error = s - above, error + hh * above**2
        log_p = -(prior + (n - 1) / 2) * np.log(prior * spread**2 + error / 2) - log_det
        log_p -= (a - s) / (GAIN * cap) + (np.log(b[c % K] / B_TYPICAL) / 0.5) ** 2 / 2
        return log_p, error, s

    # 1. every cell at its own best ceiling: most can be forgotten, the others say where A_post lies
    every, lowest = np.arange(cells.shape[1]), max(0.0, min(p, np.median(y)) - 0.03 * cap)
    peak = np.clip(cells[4] / (cells[5] + 1e-12), lowest, cap)
    log_p, error, _ = weigh(peak, every)
    kept = np.flatnonzero(log_p > log_p.max() - 12)
    reach = 4 * np.sqrt((prior * spread**2 + error / 2) / (prior + (n - 1) / 2) / (cells[5] + 1e-12))[kept]
    a = np.linspace(max(lowest, (peak[kept] - reach).min()), min(cap, (peak[kept] + reach).max()), 121)
    # 2. those cells at every ceiling there
    log_p, error, s = weigh(a[:, None], kept)
    weight = np.exp(log_p - log_p.max())
    marginal = weight.sum(1)  # (J,)
    below = np.append(0, np.cumsum((marginal[1:] + marginal[:-1]) / 2))
    low, high = np.interp([TAIL, 1 - TAIL], below / below[-1], a)
    j = int(marginal.argmax())
    i = int(weight[j].argmax())
    law = float(s[j, i]), float(a[j]), float(c_mid[kept[i] % K]), float(b[kept[i] % K])

    total = np.cumsum(weight.ravel())
    drawn = np.searchsorted(total, (np.arange(DRAWS) + 0.5) / DRAWS * total[-1])
    j, i = np.unravel_index(drawn, weight.shape)
    m, k = np.divmod(kept[i], K)
    rng = np.random.default_rng(0)
    variance = (prior * spread**2 + error[j, i] / 2) / rng.gamma(prior + (n - 1) / 2, size=DRAWS)
    noises = np.array(NOISE)[m] * [1, x[-1]]
    draws = Draws(a[j], s[j, i], c_mid[k], b[k], *noises.T, np.sqrt(variance), x, y)
    return (float(low), float(high)), law, draws
