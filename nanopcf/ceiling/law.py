"""The scaling law of RL, Eq. 2, and plain least squares by variable projection."""

import numpy as np

B_RANGE = (0.4, 4.0)


# ---- the law, and plain least squares by variable projection ----


def shape(x: np.ndarray, c_mid: np.ndarray, b: np.ndarray) -> np.ndarray:
    """g(x) of Eq. 2 for K pairs (c_mid, b): (K, n)."""
    with np.errstate(divide="ignore", over="ignore"):  # x = 0: (c / 0)^b = inf, and g = 0
        return 1 / (1 + (c_mid[:, None] / x) ** b[:, None])


def law_at(x: np.ndarray, law: tuple[float, float, float, float]) -> np.ndarray:
    start, a_post, c_mid, b = law
    return start + (a_post - start) * shape(x, np.array([c_mid]), np.array([b]))[0]


def grid(c_range: tuple[float, float], b_range: tuple[float, float], size: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Every pair (c_mid, b), evenly in their logarithms: two (K,)."""
    c, b = (np.geomspace(*r, k) for r, k in zip((c_range, b_range), size, strict=True))
    return tuple(v.ravel() for v in np.meshgrid(c, b))


def least_squares(
    x: np.ndarray,
    y: np.ndarray,
    p: float,
    cap: float,
    *,
    reach: float = 1.0,
    b_range: tuple[float, float] = B_RANGE,
    free_offset: bool = False,
) -> tuple[float, float, float, float]:
    """(start, A_post, C_mid, B) of smallest squared error: a grid over (C_mid, B), then six zooms around its best.

    With r = y - p the law is r = e (1 - g) + a g, linear in a = A_post - p (in [0, cap - p]) and e = epsilon (>= 0,
    and 0 unless free_offset). C_mid lies between a tenth of the first and `reach` times the last compute.
    """
    r, first = y - p, x[x > 0][0]
    bounds = np.log([[first / 10, max(reach * x[-1], first)], b_range])
    window, size = bounds, (30, 14)
    for _ in range(7):
        c_mid, b = grid(np.exp(window[0]), np.exp(window[1]), size)
        g = shape(x, c_mid, b)  # (K, n)
        h = 1 - g
        gg, gh, hh, gr, hr = (g * g).sum(1), (g * h).sum(1), (h * h).sum(1) + 1e-12, g @ r, h @ r
        a = np.clip(gr / (gg + 1e-12), 0, cap - p)  # the best for e = 0
        e = np.zeros_like(a)
        if free_offset:
            both = (gr * hh - hr * gh) / (gg * hh - gh**2 + 1e-12)  # the best with e free
            # and with e = 0 where e would be < 0
            both = np.clip(np.where(hr > both * gh, both, a), 0, cap - p)
            a, e = both, np.maximum(hr - both * gh, 0) / hh
        i = int((a * a * gg + 2 * a * e * gh + e * e * hh - 2 * a * gr - 2 * e * hr).argmin())
        best = np.log([[c_mid[i]], [b[i]]])
        step = (window[:, 1:] - window[:, :1]) / (np.array([size]).T - 1)
        window = np.clip(np.hstack([best - 2 * step, best + 2 * step]), bounds[:, :1], bounds[:, 1:])
        size = (11, 11)
    return float(p + e[i]), float(p + a[i]), float(c_mid[i]), float(b[i])
