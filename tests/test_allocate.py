"""Which branches get the next round of RL, and that an interrupted allocation goes on as if it had not been."""

from dataclasses import dataclass

import numpy as np
import pytest
from conftest import law

from nanopcf.allocate import next_round, train_in_rounds


@dataclass(frozen=True)
class Settings:  # what the rounds need of an RLConfig
    steps: int = 30
    eval_every: int = 2


def curve(steps: int, top: float, c_mid: float, start: float = 0.3) -> list[dict]:
    """Scores every second step that follow Eq. 2 exactly; c_mid in steps."""
    at = np.arange(2, steps + 1, 2)
    points = [{"step": 0, "x": 0.0, "score": start}]
    scores = law(at.astype(float), start, top, c_mid, 1.5)
    return points + [{"step": int(n), "x": 1e9 * n, "score": float(s)} for n, s in zip(at, scores, strict=True)]


def more(curves: dict, budget: int = 10_000) -> dict[str, int]:
    granted = {name: max(20, points[-1]["step"]) for name, points in curves.items()}
    return next_round(curves, granted, budget=budget, grant=10, problems=2000)


def test_a_round_goes_to_open_branches_the_contenders_first():
    curves = {
        "flat": curve(20, 0.6, 0.2),
        "contender": curve(20, 0.95, 20.0),
        "low": curve(20, 0.45, 6.0),
        "lower": curve(20, 0.42, 6.0),
    }
    # Two of the three that are open, and the one that may be the best of all is among them.
    chosen = more(curves)
    assert len(chosen) == 2 and chosen["contender"] == 30 and "flat" not in chosen
    # a curve that ended before its steps has no signal left, whatever it looks like
    curves["contender"] = curves["contender"][:6]
    assert set(more(curves)) == {"low", "lower"}
    assert more({name: curves[name] for name in ("flat", "contender")}) == {}


def test_the_budget_is_kept():
    curves = {f"rising {i}": curve(20, 0.95, 20.0) for i in range(6)}
    assert len(more(curves)) == 4
    assert len(more(curves, budget=6 * 20 + 25)) == 2
    assert more(curves, budget=6 * 20 + 9) == {}


CURVES = {"flat": curve(400, 0.6, 0.2), "slow": curve(400, 0.9, 15.0), "short": curve(10, 0.7, 9.0)}


def test_what_stopped_branches_leave_goes_to_the_open_one(tmp_path):
    calls = []

    def train(configs: dict, interrupt: int | None = None) -> dict:
        calls.append({name: c.steps for name, c in configs.items()})
        if len(calls) - 1 == interrupt:
            raise KeyboardInterrupt
        return {n: [p for p in CURVES[n] if p["step"] <= c.steps] for n, c in configs.items()}

    configs = dict.fromkeys(CURVES, Settings())
    curves, granted = train_in_rounds(configs, train, tmp_path / "whole.json", problems=2000)
    assert granted["flat"] == granted["short"] == 20 and curves["short"][-1]["step"] == 10
    assert granted["slow"] > 30 and sum(granted.values()) <= 3 * 30  # more than the even split
    assert calls == [dict.fromkeys(CURVES, 20), *({"slow": n} for n in range(30, granted["slow"] + 1, 10))]

    # interrupted in its third round, it begins with that round
    whole, calls = calls, []
    with pytest.raises(KeyboardInterrupt):
        train_in_rounds(configs, lambda some: train(some, 2), tmp_path / "cut.json", problems=2000)
    assert calls == whole[:3]
    calls = []
    again = train_in_rounds(configs, train, tmp_path / "cut.json", problems=2000)
    assert again == (curves, granted) and calls == [dict.fromkeys(CURVES, 20) | whole[2], *whole[3:]]

    # what isn't the steps of these branches is damaged
    for damage in ('{"flat": 20}', '{"flat": 20, "slow": "x", "short": 20}', "{}", "[]"):
        (tmp_path / "cut.json").write_text(damage)
        with pytest.raises(ValueError, match=r"cut\.json"):
            train_in_rounds(configs, train, tmp_path / "cut.json", problems=2000)
