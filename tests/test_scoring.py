"""pass@k against enumeration."""

import itertools

import numpy as np
import pytest


def test_pass_at_k_against_enumeration():
    from nanopcf.scoring import pass_at_k

    correct = (np.random.default_rng(0).random((6, 7)) < 0.3).astype(float)
    for k in (1, 3, 7):
        brute = np.mean([np.mean([max(c) for c in itertools.combinations(row, k)]) for row in correct])
        assert pass_at_k(correct, k) == pytest.approx(brute)
    with pytest.raises(ValueError, match="needs at least 8 samples"):
        pass_at_k(correct, 8)
