"""Several seeds together: the spread between them counts, and the page says so."""

import copy
import json

import numpy as np
import pytest
from test_report import branch, made_up  # noqa: F401

from nanopcf import report
from nanopcf.report import __main__ as rejudge
from nanopcf.report import study
from nanopcf.report.__main__ import ReportConfig


def seeds_of(made_up: dict, tops: list[float]) -> list[dict]:  # noqa: F811
    """A judged report per seed, in which RL from the chosen set ends at these ceilings, and pure RL at 0.6."""
    reports = []
    for seed, top in enumerate(tops):
        measured = copy.deepcopy(made_up) | {"seed": seed, "problems": 5000}
        measured["branches"][0] = branch("base", 0, "base", 0.1, 0.6, 0.02)
        measured["branches"][-1] = branch("uniform-800", 10, "stable", 0.3, top, 0.02)
        reports.append(report.judge(measured))
    return reports


def claim(pooled: dict, words: str) -> dict:
    return next(claim for claim in pooled["claims"] if words in claim["claim"])


def test_the_mean_over_seeds_errs_by_students_t():
    draws = study.mean_over_seeds(np.array([[1.0], [2.0], [3.0]]))
    low, middle, high = np.quantile(draws, [0.05, 0.5, 0.95])
    half = 2.920 / 3**0.5  # the 95 % point of t with 2 degrees of freedom, times 1 / sqrt(3)
    assert middle == pytest.approx(2, abs=0.02) and high - 2 == pytest.approx(half, rel=0.05)
    assert 2 - low == pytest.approx(half, rel=0.05)


def test_seeds_that_differ_resolve_nothing(made_up):  # noqa: F811
    """Each seed alone is sure, but they contradict each other."""
    agree = study.pool(seeds_of(made_up, [0.90, 0.92, 0.91]))
    found = claim(agree, "pure RL")
    assert found["verdict"] == "shown" and found["seeds"] == pytest.approx({0: 1.0, 1: 1.0, 2: 1.0})
    low, mean, high = found["margin"]
    assert low < mean < high and mean == pytest.approx(0.31, abs=0.01)
    differ = claim(study.pool(seeds_of(made_up, [0.90, 0.40, 0.75])), "pure RL")
    assert differ["seeds"] == pytest.approx({0: 1.0, 1: 0.0, 2: 1.0}, abs=0.01)
    assert differ["verdict"] == "not resolved" and 0.1 < differ["probability"] < 0.9
    assert claim(study.pool(seeds_of(made_up, [0.9])), "pure RL")["probability"] is None  # no spread to judge by


def test_the_regret_of_a_guide(made_up):  # noqa: F811
    """The loss takes uniform-800; if that ends at 0.65, uniform-50 with 0.7 would have been 5 points better."""
    (of_seed,) = study.pool(seeds_of(made_up, [0.65]))["guides"]
    assert of_seed["validation loss"]["set"] == "uniform-800"
    best = max(0.65, *(b["a_post"] for b in made_up_ceilings(made_up)))
    assert of_seed["validation loss"]["regret"] == pytest.approx(best - 0.65, abs=0.01)
    assert of_seed["first half of RL"]["regret"] == pytest.approx(0, abs=0.01)


def made_up_ceilings(made_up: dict) -> list[dict]:  # noqa: F811
    """The branches at which the selector would start, but for the chosen set's."""
    starts = {(row["name"], row["recommended_step"]) for row in made_up["selector"]["ranking"]}
    judged = report.judge(made_up)
    return [b for b in judged["branches"] if (b["dataset"], b["sft_step"]) in starts and b["dataset"] != "uniform-800"]


def test_a_study_is_published_and_judged_anew(made_up, tmp_path, capsys):  # noqa: F811
    reports = seeds_of(made_up, [0.90, 0.92])
    for judged in reports:
        folder = tmp_path / f"seed-{judged['seed']}"
        folder.mkdir()
        report.write(judged, folder)
    study.publish(reports, tmp_path)
    page = (tmp_path / "study.md").read_text()
    assert "| SFT-then-RL has a higher ceiling than pure RL (RQ1) | **" in page and "| 0 | pure RL | base |" in page
    assert f"\n    python {reports[0]['environment']['command']}\n" in page  # with every flag
    for name in ("study_ceilings", "study_loss", "study_curves", "study_sft"):
        assert f"({name}.png)" in page and (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    saved = json.loads((tmp_path / "study.json").read_text())
    (tmp_path / "study.json").unlink()
    rejudge.main(ReportConfig(run=str(tmp_path)))
    assert json.loads((tmp_path / "study.json").read_text()) == saved
    assert "higher ceiling than pure RL" in capsys.readouterr().out
