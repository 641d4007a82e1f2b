"""nanopcf.regimes against Eqs. 5-9 worked by hand, with the edge cases its docstring names."""

import math

import pytest

from nanopcf.regimes import classify, saturated


def test_classify_by_hand() -> None:
    """Thresholds 1.02 and 1.10 of the minimum, on and beside them; catches < for <= and local minima."""
    losses = [2.0, 1.5, 1.02, 1.3, 1.0, 1.021, 1.0999, 1.1, 1.05]
    names = "adaptive adaptive stable unstable stable mild mild severe mild"
    assert classify(range(9), losses) == names.split()


@pytest.mark.parametrize(
    ("losses", "names"),
    [
        ([], []),
        ([0.7], ["stable"]),
        ([0.5, 0.5, 0.5], ["stable"] * 3),
        ([3.0, 2.0, 1.0], ["adaptive", "adaptive", "stable"]),
        ([1.0, 2.0], ["stable", "severe"]),
        ([1.5, 1.9, 1.0], ["adaptive", "adaptive", "stable"]),
    ],
)
def test_classify_edges(losses: list[float], names: list[str]) -> None:
    """Empty, single, plateau, still falling, only overfitting, and a bump before the first stable one."""
    assert classify(range(len(losses)), losses) == names


def test_saturated_online() -> None:
    """Read after every evaluation of a falling, flattening run: False while it improves, True soon after."""
    losses = [2.0, 1.4, 1.1, 1.0, 0.995, 0.99, 1.05]
    assert [saturated(losses[: n + 1]) for n in range(7)] == [False, False, False, False, False, True, True]
    slow = [0.985**n for n in range(20)]  # 1.5 % an evaluation: small steps that add up are not saturation
    assert not any(saturated(slow[:n]) for n in range(20))
    assert saturated([1.0, 2.0, 3.0])


def test_bad_input() -> None:
    """A NaN compares False with every threshold, so without a check it would be called stable or severe."""
    for losses in ([1.0, math.nan], [1.0, math.inf], [1.0, -0.1]):
        with pytest.raises(ValueError, match="validation loss 1"):
            classify([0, 1], losses)
        with pytest.raises(ValueError, match="validation loss 1"):
            saturated(losses)
    with pytest.raises(ValueError, match="increase"):
        classify([5, 5], [1.0, 1.0])
    with pytest.raises(ValueError, match="one loss per step"):
        classify([1, 2, 3], [1.0, 1.0])
