"""What a fit expects of compute that is not spent yet: laws drawn from the posterior, and scores they would show."""

from dataclasses import dataclass

import numpy as np

from nanopcf.ceiling.law import shape


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
