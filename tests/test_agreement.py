"""Correlation of loss and ceiling: the paper's numbers, ties, and what few sets can tell."""

import numpy as np
import pytest

from nanopcf.report.agreement import agreement, agreement_of_draws


def test_published_correlations() -> None:
    """Table 5 (Qwen2.5-7B, five scales) and Table 1 (Llama-3.2-3B): r = -0.94, rho = -1 and r = -0.96."""
    table5 = agreement([0.51, 0.42, 0.41, 0.39, 0.37], [77.3, 79.7, 82.6, 82.8, 84.0])
    assert table5["spearman"] == pytest.approx(-1.0) and table5["n"] == 5
    assert round(table5["pearson"], 2) == -0.94
    fig8a = agreement([0.51, 0.44, 0.42, 0.41, 0.40, 0.39, 0.37], [77.3, 78.8, 79.7, 82.6, 82.8, 82.8, 84.0])
    assert round(fig8a["pearson"], 2) == -0.92 and fig8a["n"] == 7
    table1 = agreement([0.71, 0.59, 0.54, 0.50, 0.44], [25.0, 53.9, 55.3, 56.4, 70.4])
    assert round(table1["pearson"], 2) == -0.96


def test_what_few_sets_can_say() -> None:
    """n! orders counted by hand, and Fisher's interval for r = -0.94 of five: wide."""
    assert agreement([3.0, 2.0, 1.0], [1.0, 2.0, 3.0])["p_value"] == pytest.approx(1 / 6)
    assert agreement([3.0, 2.0, 1.0], [3.0, 2.0, 1.0])["p_value"] == 1
    table5 = agreement([0.51, 0.42, 0.41, 0.39, 0.37], [77.3, 79.7, 82.6, 82.8, 84.0])
    assert table5["p_value"] == pytest.approx(1 / 120)
    z = np.arctanh(table5["pearson"])
    assert table5["pearson_interval"] == pytest.approx((np.tanh(z - 1.645 / 2**0.5), np.tanh(z + 1.645 / 2**0.5)))
    many = agreement(list(range(10, 0, -1)), list(range(10)))
    assert many["p_value"] <= 1e-3 and agreement([2.0, 1.0], [1.0, 2.0])["pearson_interval"] is None


def test_agreement_ties_and_undefined() -> None:
    """Tied losses share their average rank; no variance is None, not NaN."""
    a, b = [0.5, 0.4, 0.4, 0.3], [1.0, 2.0, 4.0, 3.0]
    expected = np.corrcoef([4, 2.5, 2.5, 1], [1, 2, 4, 3])[0, 1]
    assert agreement(a, b)["spearman"] == pytest.approx(expected)
    assert agreement(a, b)["pearson"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    for losses, ceilings in (([0.5, 0.5], [1.0, 2.0]), ([0.5], [1.0])):
        undefined = agreement(losses, ceilings)
        assert undefined.pop("n") == len(losses) and set(undefined.values()) == {None}
    with pytest.raises(ValueError, match="one ceiling per loss"):
        agreement([0.5], [])


def test_agreement_of_ceilings_in_doubt() -> None:
    """Every draw by itself, against the plain function; equal ceilings in doubt show nothing."""
    rng = np.random.default_rng(0)
    losses, ceilings = [0.5, 0.2, 0.3, 0.1], rng.normal([[70], [80], [78], [90]], 5, size=(4, 300))
    together = agreement_of_draws(losses, ceilings)
    alone = [agreement(losses, draw) for draw in ceilings.T]
    assert together["spearman"] == pytest.approx(np.median([a["spearman"] for a in alone]))
    assert together["pearson"] == pytest.approx(np.median([a["pearson"] for a in alone]))
    assert together["p_value"] == pytest.approx(np.mean([a["p_value"] for a in alone]))
    assert together["probability"] == pytest.approx(np.mean([a["spearman"] <= -0.5 for a in alone]))
    assert agreement_of_draws(losses, rng.normal(size=(4, 300)))["probability"] < 0.5
    assert agreement_of_draws([0.5, 0.5], ceilings[:2])["spearman"] is None
