"""nanopcf.ceiling on curves whose ceiling is known, against brute force, and on simulated curves."""

from collections import Counter

import numpy as np
import pytest
from conftest import X, law

from nanopcf import ceiling
from nanopcf.ceiling.law import B_RANGE, grid, law_at, least_squares, shape
from nanopcf.ceiling.posterior import C_REACH, NOISE, ceiling_posterior
from nanopcf.ceiling.robust import noise_sd


def measured(p: np.ndarray | float, rng: np.random.Generator) -> np.ndarray:
    """Scores as our evaluation measures them: right answers among 450 problems."""
    return rng.binomial(450, p) / 450


def paper_like(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float, float, float]:
    """A curve with noise like the paper's, in percent: (x, y, P_sft, true ceiling, C_mid / last compute)."""
    x = np.linspace(3, 200, rng.integers(20, 80))
    p, gain, late = rng.uniform(45, 75), rng.uniform(1, 12), np.exp(rng.uniform(np.log(0.03), np.log(1.5)))
    drift = np.linalg.cholesky(np.exp(-np.abs(x[:, None] - x) / 20) + 1e-9 * np.eye(len(x)))
    noise = 0.4 * rng.normal(size=len(x)) + rng.uniform(0, 0.5) * drift @ rng.normal(size=len(x))
    y = law(x, p, p + gain, late * 200, rng.uniform(0.8, 2)) + noise
    return x, y, float(p + 0.4 * rng.normal()), p + gain, late


@pytest.mark.parametrize("scale", [1, 100])
def test_exact_curve_is_recovered(scale: float) -> None:
    """Without noise the truth is the answer, on both score scales: no stuck or biased search."""
    f = ceiling.fit(X, scale * law(X, 0.4, 0.7, 1.3e11, 1.7), scale * 0.4)
    assert f.a_post == pytest.approx(scale * 0.7, rel=5e-3) and f.status == "saturated" and f.kept.all()
    assert f.pl_rl == pytest.approx(f.a_post - scale * 0.4)
    assert f.c_mid == pytest.approx(1.3e11, rel=0.15) and f.b == pytest.approx(1.7, rel=0.2)
    assert f.predict([0.0, 1e15]) == pytest.approx([scale * 0.4, f.a_post], rel=0.01)
    assert f.interval[0] <= f.a_post <= f.interval[1] and f.epsilon < 0.01 * scale
    assert f.pl_interval == pytest.approx(np.array(f.interval) - scale * 0.4)
    low, high = f.band(X)
    assert (low <= law(X, 0.4, 0.7, 1.3e11, 1.7) * scale + 0.01 * scale).all() and (low < high).all()


def test_least_squares_beats_brute_force() -> None:
    """No point of a fine grid has a smaller error: the formulas and the zoom are right, with an offset or without."""
    rng = np.random.default_rng(3)
    c, b, top, e = np.meshgrid(
        np.geomspace(X[0] / 10, X[-1], 24), np.geomspace(0.4, 4, 16), np.linspace(0.4, 1, 41), np.linspace(0, 0.2, 11)
    )
    g = 1 / (1 + (c[..., None] / X) ** b[..., None])
    for a, offset in ((0.45, 0.0), (0.6, 0.05), (0.95, 0.1)):
        y = measured(law(X, 0.4 + offset, a, 3e11, 1.2), rng)
        errors = (((0.4 + e)[..., None] * (1 - g) + top[..., None] * g - y) ** 2).sum(-1)
        for free, brute in ((False, errors[e == 0].min()), (True, errors.min())):
            fitted = least_squares(X, y, 0.4, 1.0, free_offset=free)
            assert ((law_at(X, fitted) - y) ** 2).sum() <= brute + 1e-9
            assert fitted.start >= 0.4 and (free or fitted.start == 0.4)


def test_posterior_equals_brute_force_integration() -> None:
    """The same probabilities without the algebra: every start tried, every residual whitened one at a time."""
    rng = np.random.default_rng(1)
    x, p = np.linspace(10, 120, 9), 70.0
    y = law(x, p, 77, 25, 1.2) + 0.4 * rng.normal(size=9)
    interval, best, _ = ceiling_posterior(x, y, p, 100.0)
    points, scores = np.append(0, x), np.append(p, y)
    spread = noise_sd(scores)
    c_mid, b = grid((10 / C_REACH, C_REACH * 120), B_RANGE, (48, 16))
    g = shape(points, c_mid, b)  # (K, n)
    a, s = np.linspace(70, 100, 121), np.linspace(67, 73, 49)
    total = np.zeros(len(a))
    for tau, ell, weight in NOISE:
        cov = np.eye(10) + tau**2 * np.exp(-np.abs(points[:, None] - points) / (ell * 120))
        white = np.linalg.inv(np.linalg.cholesky(cov))
        for i, top in enumerate(a):
            miss = scores - (s[:, None, None] * (1 - g) + top * g)  # (starts, K, n)
            error = ((miss @ white.T) ** 2).sum(-1)
            log_p = -(4 + 10 / 2) * np.log(4 * spread**2 + error / 2) - np.log(np.linalg.det(cov)) / 2
            gain = np.maximum(top - s, 0)[:, None]
            log_p += np.where(s > top, -np.inf, 0)[:, None] - 1.5 * np.log(1 + gain / 20)
            log_p -= (np.log(b / 1.2) / 0.55) ** 2 / 2
            total[i] += weight * np.exp(log_p + 40).sum()
    below = np.append(0, np.cumsum((total[1:] + total[:-1]) / 2))
    assert interval == pytest.approx(np.interp([0.075, 0.925], below / below[-1], a), abs=0.3)
    assert best.a_post == pytest.approx(a[total.argmax()], abs=0.5)


def test_outliers_are_rejected() -> None:
    """Two broken evaluations must not move the ceiling; exactly those two points are given up."""
    y = law(X, 0.4, 0.7, 1e11, 1.7) + 0.005 * np.cos(7 * np.arange(14))
    clean = ceiling.fit(X, y, 0.4, max_score=1)
    y[[5, 10]] -= 0.3
    f = ceiling.fit(X, y, 0.4, max_score=1)
    assert np.flatnonzero(~f.kept).tolist() == [5, 10] and abs(f.a_post - clean.a_post) < 0.015
    loose = ceiling.fit(X, y, 0.4, max_score=1, robust=False)
    assert loose.kept.all() and loose.interval[1] - loose.interval[0] > 2 * (f.interval[1] - f.interval[0])


def test_intervals_cover_and_verdicts_hold_on_simulated_curves() -> None:
    """90 % of 150 curves is 135 +- 4: under 120 or all 150 would be wrong. docs/ceiling.md counts thousands."""
    rng = np.random.default_rng(0)
    inside, off, verdicts, next_score = [], [], Counter(), []
    for _ in range(150):
        x, y, p, truth, late = paper_like(rng)
        n = len(x) * 3 // 4
        f = ceiling.fit(x[:n], y[:n], p)
        inside.append(f.interval[0] <= truth <= f.interval[1])
        low, high = np.quantile(f.draws.scores(x[n:])[:, -1], [0.05, 0.95])
        next_score.append(low <= y[-1] <= high)
        verdicts["late" if late > 0.8 else "early" if late < 0.08 else "", f.status] += 1
        if f.status == "saturated":
            off.append(abs(f.a_post - truth))
    assert 120 <= sum(inside) < 150 and 120 <= sum(next_score) < 150
    assert verdicts["early", "saturated"] > 4 * verdicts["early", "still rising"]
    assert verdicts["late", "still rising"] > 3 * verdicts["late", "saturated"]
    assert np.median(off) < 0.5


@pytest.mark.parametrize(
    ("points", "sd", "gain", "late", "fewest"),
    [(60, 0.4, (20, 50), (0.05, 0.5), 0.8), (14, 1.5, (20, 50), (0.5, 3), 0.72), (14, 1.5, (2, 12), (0.05, 1.5), 0.8)],
)
def test_intervals_cover_whatever_the_signal(points: int, sd: float, gain: tuple, late: tuple, fewest: float) -> None:
    """Large gains with little noise need a fine grid, and large gains seen early a prior with a heavy tail.

    With a fixed grid of 36 x 12 the first kind is covered in 60 % of curves, with an exponential prior of 10 points the
    second in 52 %. `fewest` is three standard errors or more below what 60 curves give on average (0.95, 0.86, 0.95).
    """
    rng, inside = np.random.default_rng(7), 0
    x = np.linspace(1 / points, 1, points)
    for _ in range(60):
        p, g = rng.uniform(10, 45), rng.uniform(*gain)
        scores = law(x, p, p + g, np.exp(rng.uniform(*np.log(late))), 1.2) + sd * rng.normal(size=points)
        f = ceiling.fit(x, np.clip(scores, 0, 100), max(0.0, p + sd * rng.normal()), max_score=100.0)
        inside += f.interval[0] <= p + g <= f.interval[1]
    assert inside / 60 >= fewest


def test_noise_that_drifts_widens_the_interval() -> None:
    """The same residuals in their order, or shuffled: an error bar that can't tell the two apart is too short."""
    rng = np.random.default_rng(2)
    x = np.linspace(3, 200, 60)
    drift = np.linalg.cholesky(np.exp(-np.abs(x[:, None] - x) / 30) + 1e-9 * np.eye(60))
    widths = {"drift": [], "white": []}
    for _ in range(12):
        noise = 0.6 * drift @ rng.normal(size=60) + 0.3 * rng.normal(size=60)
        for kind, n in (("drift", noise), ("white", rng.permutation(noise))):
            low, high = ceiling.fit(x, law(x, 70, 76, 10, 1.5) + n, 70.0).interval
            widths[kind].append(high - low)
    assert np.median(widths["drift"]) > 1.3 * np.median(widths["white"])


def test_flat_falling_and_collapsing_curves() -> None:
    """RL that adds nothing: ceiling P_sft, plasticity 0, no crash. A collapse: the best before it."""
    f = ceiling.fit(X, np.full(14, 0.5), 0.5)
    assert f.status == "saturated" and f.a_post == pytest.approx(0.5, abs=0.01) and abs(f.pl_rl) < 0.01
    y = law(X, 0.4, 0.7, 5e10, 2.0)
    y[10:] = 0.1
    f = ceiling.fit(X, y, 0.4)
    assert f.status == "collapsed" and abs(f.a_post - y[9]) < 0.01
    assert f.kept.tolist() == [True] * 10 + [False] * 4
    hill = 0.4 + 0.3 * np.sin(np.linspace(0, np.pi, 30)) ** 2  # rises, then falls back slowly
    assert ceiling.fit(np.arange(1.0, 31), hill, 0.4).status in ("collapsed", "not sigmoidal")


def test_stop_at_is_where_the_law_says() -> None:
    """Almost no noise: the compute after which less than a point is left, solved by hand from Eq. 2."""
    x = np.linspace(2, 200, 100)
    f = ceiling.fit(x, law(x, 60, 70, 12, 1.5), 60.0)
    by_hand = 12 * (10 / 1 - 1) ** (1 / 1.5)  # 10 (1 - g) = 1
    assert f.stop_at(1.0) == pytest.approx(by_hand, rel=0.25)
    from_zero = np.append(0.0, x)  # a curve may hold its own point at 0
    assert ceiling.fit(from_zero, law(from_zero, 60, 70, 12, 1.5), 60.0).stop_at(1.0) == pytest.approx(
        by_hand, rel=0.25
    )
    assert f.stop_at() == f.stop_at(1.0) and f.stop_at(2.0) < f.stop_at(1.0)
    rising = ceiling.fit(x, law(x, 60, 90, 400, 1.0), 60.0)
    assert rising.status == "still rising" and rising.stop_at(0.1) is None


@pytest.mark.parametrize(
    ("x", "y", "p", "message"),
    [
        ([1, 2, 3], [0.1] * 3, 0.1, "at least 4"),
        ([1, 2, 2, 3], [0.1] * 4, 0.1, "strictly increase"),
        ([-1, 2, 3, 4], [0.1] * 4, 0.1, "at 0 or above"),
        ([1, 2, 3, 4], [0.1, 0.2, np.nan, 0.2], 0.1, "finite"),
        ([1, 2, 3, 4], [0.1, 0.2, 101, 0.2], 0.1, "must lie in"),
        ([1, 2, 3, 4], [70, 71, 0.72, 73], 70, "mixed with percentages"),
        ([1, 2, 3, 4], [0.1] * 3, 0.1, "one length"),
    ],
)
def test_bad_input(x: list[float], y: list[float], p: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ceiling.fit(x, y, p)
