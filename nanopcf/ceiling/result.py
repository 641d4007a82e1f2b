"""What `fit` returns: the ceiling, its interval and verdict, and the laws that it finds equally likely."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from nanopcf.ceiling.law import Law, law_at, shape


@dataclass(frozen=True)
class Draws:
    """R equally likely laws and the noise around each: a_post, start, c_mid, b, tau, ell, sigma are (R,)."""

    a_post: np.ndarray
    start: np.ndarray
    c_mid: np.ndarray
    b: np.ndarray
    tau: np.ndarray
    ell: np.ndarray
    sigma: np.ndarray
    x: np.ndarray  # (n,) compute of the points fitted; the first is P_sft, at 0
    y: np.ndarray  # (n,) their scores

    def law(self, x: np.ndarray) -> np.ndarray:
        """P_post at m values of compute x: (R, m)."""
        return self.start[:, None] + (self.a_post - self.start)[:, None] * shape(x, self.c_mid, self.b)

    def scores(self, x: np.ndarray) -> np.ndarray:
        """What evaluations at m values of compute x would show, with drift and noise: (R, m)."""
        rng, n = np.random.default_rng(0), len(self.x)
        points = np.concatenate([self.x, x])
        distance = np.abs(points[:, None] - points)  # (n + m, n + m)
        residuals, scores = self.y - self.law(self.x), self.law(x)  # (R, n), (R, m)
        for tau, ell in {*zip(self.tau, self.ell, strict=True)}:
            draws = (self.tau == tau) & (self.ell == ell)  # (R,) those with this noise
            cov = np.eye(n + len(x)) + tau**2 * np.exp(-distance / ell)
            # The new scores given the old residuals: the mean and covariance of a conditional normal distribution.
            weights = np.linalg.solve(cov[:n, :n], cov[:n, n:])  # (n, m)
            conditional = cov[n:, n:] - cov[n:, :n] @ weights  # (m, m)
            noise = rng.normal(size=(draws.sum(), len(x))) @ np.linalg.cholesky(conditional).T
            scores[draws] += residuals[draws] @ weights + self.sigma[draws, None] * noise
        return scores


@dataclass(frozen=True)
class CeilingFit:
    a_post: float
    epsilon: float  # the start of the law above P_sft, which is itself only a measurement
    interval: tuple[float, float]  # 90 %, of a_post
    p_sft: float
    rmse_fit: float  # of the law, on the kept points
    rmse_heldout: float | None  # of a fit to the first 71 % of the points, on the others; None if too few
    status: str  # saturated | still rising | collapsed | not sigmoidal
    kept: np.ndarray  # (n,) bool: the points that the fit uses
    max_score: float
    law: Law = field(repr=False)  # the most probable one
    draws: Draws | None = field(repr=False)  # R equally probable laws; None from `fit_paper`

    @property
    def pl_rl(self) -> float:
        """The plasticity (Eq. 4)."""
        return self.a_post - self.p_sft

    @property
    def c_mid(self) -> float:
        """Compute at half of the gain, in the unit of x."""
        return self.law.c_mid

    @property
    def b(self) -> float:
        return self.law.b

    @property
    def identified(self) -> bool:
        """Whether the curve tells its ceiling. Otherwise only interval[0] means something: the ceiling is above it."""
        return self.status in ("saturated", "paper")  # the paper's procedure never doubts

    @property
    def pl_interval(self) -> tuple[float, float]:
        """90 %, of the plasticity above the measured P_sft."""
        return self.interval[0] - self.p_sft, self.interval[1] - self.p_sft

    def predict(self, x: ArrayLike) -> np.ndarray:
        """The fitted law at compute x (m,): (m,)."""
        return law_at(np.asarray(x, float), self.law)

    def band(self, x: ArrayLike, level: float = 0.90) -> np.ndarray:
        """Between which scores the law lies at compute x (m,): (2, m), the low and the high end."""
        tail = (1 - level) / 2
        return np.quantile(self.draws.law(np.asarray(x, float)), [tail, 1 - tail], axis=0)

    def stop_at(self, gain: float | None = None) -> float | None:
        """The first compute after which less than `gain` is expected (default: a hundredth of max_score).

        None if that lies beyond 10 times the compute spent: no curve can say that much.
        """
        spent = self.draws.x
        x = np.geomspace(spent[spent > 0][0], 10 * spent[-1], 400)
        left = (self.draws.a_post[:, None] - self.draws.law(x)).mean(0)  # (400,)
        enough = np.flatnonzero(left < (0.01 * self.max_score if gain is None else gain))
        return float(x[enough[0]]) if len(enough) else None
