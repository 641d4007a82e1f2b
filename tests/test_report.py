"""Claims, page and tables of a report."""

import sys

import pytest

from nanopcf import report
from nanopcf.report import paradigms
from nanopcf.report.text import si


def branch(dataset, step, regime, status, best, low, high, p_sft=0.3):
    fit = dict(
        a_post=best,
        pl_rl=best - p_sft,
        c_mid=1e9,
        b=1.0,
        epsilon=0.0,
        law=(p_sft, best, 1e9, 1.0),
        rmse_fit=0.01,
        rmse_heldout=None,
    )
    curve = [{"x": 0.0, "score": p_sft}, {"x": 1e9, "score": best}, {"x": 2e9, "score": best}]
    return dict(
        dataset=dataset,
        sft_step=step,
        regime=regime,
        status=status,
        best=best,
        a_post_low=low,
        a_post_high=high,
        p_sft=p_sft,
        x_sft=step * 1e7,
        curve=curve,
        greedy_before=0.3,
        greedy_after=0.5,
        **fit,
    )


@pytest.fixture
def made_up() -> dict:
    """A report whose verdicts are known by construction."""
    checkpoint = dict(x_sft=1e8, score=0.4, pass_at_k=0.6, k=8)
    candidates = [
        dict(
            name=name,
            size=size,
            difficulty="uniform",
            min_val_loss=loss,
            checkpoints=[
                dict(checkpoint, step=10, val_loss=loss, regime="stable"),
                dict(checkpoint, step=20, x_sft=2e8, val_loss=2 * loss, regime="severe"),
            ],
        )
        for name, size, loss in (("uniform-50", 50, 0.5), ("uniform-200", 200, 0.2), ("uniform-800", 800, 0.1))
    ]
    branches = [
        branch("base", 0, "base", "still rising", 0.2, 0.2, 1.0, p_sft=0.1),
        branch("uniform-50", 10, "stable", "saturated", 0.5, 0.48, 0.52),
        branch("uniform-200", 5, "adaptive", "still rising", 0.65, 0.6, 1.0),
        branch("uniform-200", 10, "stable", "saturated", 0.7, 0.68, 0.72),
        branch("uniform-200", 20, "severe", "saturated", 0.8, 0.78, 0.82),
        branch("uniform-800", 10, "stable", "saturated", 0.9, 0.88, 0.92),
    ]
    ranking = [
        dict(
            name=c["name"],
            min_val_loss=c["min_val_loss"],
            recommended_step=10,
            recommended_regime="stable",
            score=0.4,
            pass_at_k=0.6,
            a_post=a,
            status="saturated",
        )
        for c, a in zip(candidates, (0.5, 0.7, 0.9), strict=True)
    ]
    sample = dict(dataset="uniform-50", prompt="<script>alert(1)</script>", answer="2", before="1", after="2")
    return dict(
        seed=0,
        preset="demo",
        task="modular",
        flags={"test": 500},
        base=dict(p_0=0.1, parameters=1000, pretrain_loss=1.0),
        candidates=candidates,
        branches=branches,
        selector=dict(chosen="uniform-800", ranking=ranking, spearman=-1.0, p_value=0.04, pearson=-0.9, n=3),
        paradigms=[],
        samples=[dict(sample, before_correct=False, after_correct=True)],
        environment=dict(command="x", versions={"python": "3"}, device="cpu", commit="abc"),
        elapsed_s={"total": 60.0},
    )


def test_claims_follow_the_intervals(made_up):
    verdicts = {c["claim"]: c["verdict"] for c in report.judge_claims(made_up)}

    def find(words: str) -> str:
        return next(verdict for claim, verdict in verdicts.items() if words in claim)

    assert find("pure RL") == "shown"
    assert find("pure SFT") == "shown"
    assert find("adaptive") == "not resolved"  # the adaptive branch still rises: it has no upper bound
    assert find("severe") == "not shown"  # severe is above stable, intervals apart
    assert find("validation loss") == "shown"
    assert find("Scale") == "shown"


def test_report_escapes_text_and_names_lower_bounds(made_up, tmp_path):
    report.write(made_up, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    table = report.terminal_table(made_up)
    assert "≥ 65.0" in table and "90.0 [88.0, 92.0]" in table
    assert max(len(line) for line in table.splitlines()) <= 110
    assert (tmp_path / "fig8_rl_curves.png").read_bytes().startswith(b"\x89PNG")


def test_report_without_matplotlib(made_up, tmp_path, monkeypatch):
    """The extra is optional: the page must still come, and say how to get the figures."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.write(made_up, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "data:image" not in page and ".[plot]" in page and "saturated" in page


def test_flops_have_their_unit():
    assert [si(v) for v in (5.0, 1.5e9, 2.34e12, 4e18)] == ["5 FLOPs", "1.5 GFLOPs", "2.34 TFLOPs", "4 EFLOPs"]


def curve_of(scores: list[float], start: float = 0.0) -> list[dict]:
    return [{"x": start + 10.0 * i, "score": v} for i, v in enumerate(scores)]


def test_summary_of_paradigms():
    """Two seeds each: means, deviations and verdicts by hand."""
    runs = [
        dict(algo="luffy", start="base", seed=s, x_sft=0.0, curve=curve_of(v))
        for s, v in enumerate(([0.1, 0.2, 0.5, 0.5, 0.5], [0.1, 0.2, 0.9, 0.6, 0.6]))
    ] + [
        dict(algo="dapo_dc", start="sft", seed=s, x_sft=5.0, curve=curve_of(v, 5.0))
        for s, v in enumerate(([0.4, 0.7, 0.9, 0.9, 0.9], [0.4, 0.7, 0.92, 0.92, 0.92, 0.92]))
    ]
    luffy, sequential = paradigms.summarise(runs)
    assert luffy["final"] == pytest.approx((0.5 + 0.7) / 2) and luffy["final_sd"] == pytest.approx(0.2 / 2**0.5)
    assert luffy["peak"] == pytest.approx(0.7) and luffy["wobble"] == pytest.approx(0.5 * 0.3 / 3**0.5)
    assert [p["score"] for p in luffy["curve"]] == pytest.approx([0.1, 0.2, 0.7, 0.55, 0.55])
    assert sequential["final"] == pytest.approx(0.91) and len(sequential["curve"]) == 5
    (claim,) = paradigms.judge_claims([luffy, sequential])
    assert claim["verdict"] == "shown" and "dapo_dc from SFT 91.0" in claim["evidence"]
    (claim,) = paradigms.judge_claims([dict(luffy, final=0.95), sequential])
    assert claim["verdict"] == "not resolved"
    (claim,) = paradigms.judge_claims([dict(luffy, final=0.95, final_sd=0.001), dict(sequential, final_sd=0.001)])
    assert claim["verdict"] == "not shown"
    assert max(map(len, paradigms.terminal_table([luffy, sequential]).splitlines())) <= 100
