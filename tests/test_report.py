"""Claims, page and tables of a report."""

import copy
import json
import math
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import law

from nanopcf import report
from nanopcf.ceiling import curves
from nanopcf.report import __main__ as rejudge
from nanopcf.report import paradigms
from nanopcf.report.ceilings import fit_ceiling, probability_above
from nanopcf.report.claims import problems_to_tell
from nanopcf.report.figures import spread
from nanopcf.report.text import si


def branch(dataset: str, step: int, regime: str, p_sft: float, top: float, c_mid: float, **extra) -> dict:
    """A branch whose scores follow Eq. 2 exactly: with c_mid far below 1 saturated, with c_mid of 1 still rising."""
    x = np.linspace(0, 1, 21)
    scores = law(x[1:], p_sft, top, c_mid, 1.5)
    curve = [{"x": 1e9 * at, "score": float(score)} for at, score in zip(x, [p_sft, *scores], strict=True)]
    return dict(
        dataset=dataset,
        sft_step=step,
        regime=regime,
        x_sft=step * 1e7,
        p_sft=p_sft,
        curve=curve,
        best=max(point["score"] for point in curve),
        greedy_before=0.3,
        greedy_after=0.5,
        **extra,
    )


@pytest.fixture
def made_up() -> dict:
    """What a run measures, with ceilings that are known by construction."""
    checkpoint = dict(x_sft=1e8, score=0.3, pass_at_k=0.6, k=8)
    losses = (("uniform-50", 50, 0.5), ("uniform-200", 200, 0.2), ("uniform-800", 800, 0.1))
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
        for name, size, loss in losses
    ]
    branches = [
        branch("base", 0, "base", 0.1, 0.3, 0.02),
        branch("uniform-50", 10, "stable", 0.3, 0.5, 0.02),
        branch("uniform-200", 5, "adaptive", 0.3, 0.7, 1.5),
        branch("uniform-200", 10, "stable", 0.3, 0.7, 0.02),
        branch("uniform-200", 20, "severe", 0.3, 0.8, 0.02, out_of_signal=True, train_pass_rate=0.97),
        branch("uniform-800", 10, "stable", 0.3, 0.9, 0.02),
    ]
    start = dict(recommended_step=10, recommended_regime="stable", score=0.3, pass_at_k=0.6)
    ranking = [dict(start, name=name, min_val_loss=loss) for name, _, loss in reversed(losses)]
    sample = dict(dataset="uniform-50", prompt="<script>alert(1)</script>", answer="2", before="1", after="2")
    return dict(
        seed=0,
        preset="demo",
        task="modular",
        flags={"test": 50},
        problems=2000,
        base=dict(p_0=0.1, parameters=1000, pretrain_loss=1.0),
        candidates=candidates,
        branches=branches,
        selector=dict(chosen="uniform-800", ranking=ranking),
        paradigm_runs=[],
        samples=[dict(sample, before_correct=False, after_correct=True)],
        environment=dict(command="x", versions={"python": "3"}, device="cpu", commit="abc"),
        elapsed_s={"total": 60.0},
    )


def verdicts(judged: dict, words: str) -> str:
    return next(claim["verdict"] for claim in judged["claims"] if words in claim["claim"])


def test_claims_follow_the_ceilings(made_up):
    before = copy.deepcopy(made_up)
    judged = report.judge(made_up)
    assert made_up == before and report.judge(judged) == judged  # pure, and stable
    assert judged["answer"].startswith("RL from step 10 of uniform-800 can reach 90.0 [")
    assert "from the base model it can reach 30.0 [" in judged["answer"] and "probability of 0.00." in judged["answer"]
    assert verdicts(judged, "pure RL") == "shown"
    assert verdicts(judged, "pure SFT") == "shown"
    assert verdicts(judged, "adaptive") == "not resolved"  # that branch still rises and has no upper bound
    assert verdicts(judged, "severe") == "not shown"  # severe is above stable
    assert verdicts(judged, "validation loss") == "shown"
    assert verdicts(judged, "Scale") == "shown"
    # ... and the other way round
    made_up["branches"][0] = branch("base", 0, "base", 0.1, 0.98, 0.02)
    made_up["branches"][1] = branch("uniform-50", 10, "stable", 0.3, 0.95, 0.02)
    made_up["candidates"][0]["checkpoints"][1]["score"] = 0.99
    for row, loss in zip(made_up["selector"]["ranking"], (0.5, 0.2, 0.6), strict=True):
        row["min_val_loss"] = loss
    judged = report.judge(made_up)
    # losses of 0.2, 0.5 and 0.6 now go with ceilings of 70, 90 and 95
    assert {verdicts(judged, w) for w in ("pure RL", "pure SFT", "Scale", "validation loss")} == {"not shown"}


def test_how_many_problems_would_tell():
    """A margin of 1 that has a standard deviation of 2 is sure at 95 % with one of 1 / 1.645: 10.8 times as many."""
    draws = np.random.default_rng(0).normal(1, 2, 200_000)
    assert problems_to_tell(draws, 1000).startswith(("some 10,800 ", "some 10,900 ", "some 10,700 "))
    assert problems_to_tell(-draws, 1000) == problems_to_tell(draws, 1000)
    assert "30 times the 1,000" in problems_to_tell(draws - 1, 1000)


def test_what_would_settle_a_ceiling(made_up):
    """A curve that ends at its C_mid, with B = 1.5: less than 4 points of 40 are left at 4.3 C_mid, by hand."""
    made_up["branches"][-1] = branch("uniform-800", 10, "stable", 0.3, 0.7, 1.0)
    judged = report.judge(made_up)
    by_hand = 1e9 * (0.4 / 0.04 - 1) ** (1 / 1.5)
    assert by_hand < judged["branches"][-1]["settled_at"] < 6 * by_hand  # more, to be 95 % sure
    assert "can reach more than" in judged["answer"] and "times its compute would settle how high" in judged["answer"]
    made_up["branches"][-1]["out_of_signal"] = True
    assert "or other prompts, would tell" in report.judge(made_up)["answer"]


def test_few_problems_resolve_nothing(made_up):
    """The same curves on 20 problems: a difference of 20 points is within the luck of the draw."""
    assert verdicts(report.judge(made_up | {"problems": 20}), "severe") == "not resolved"
    of_flag = report.judge({key: value for key, value in made_up.items() if key != "problems"})
    assert of_flag["problems"] == 50  # a report from before the count was kept


def test_equal_ceilings_are_rarely_told_apart():
    """Of 40 pairs with one ceiling, other starts and other C_mid, at most 6 % should be told apart: 7 would be odd."""
    rng, wrong, x = np.random.default_rng(3), 0, np.linspace(0.07, 1, 14)
    for i in range(40):
        draws = []
        for start in (0.37, 0.9):
            scores = rng.binomial(512, law(x, start, 0.97, np.exp(rng.uniform(np.log(0.15), np.log(2))), 1.2)) / 512
            curve = [{"x": at, "score": score} for at, score in zip(x, scores, strict=True)]
            draws.append(fit_ceiling(curve, start, 512, seed=len(draws) + 2 * i)[1])
        wrong += not 0.05 < probability_above(*draws) < 0.95
    assert wrong <= 6


def test_one_lower_bound_everywhere(made_up, tmp_path, capsys):
    """The terminal, the page and the command line print a ceiling in doubt as its interval's low end."""
    judged = report.judge(made_up)
    rising = judged["branches"][2]
    assert rising["status"] == "still rising" and not rising["identified"]
    bound = f"≥ {100 * rising['a_post_low']:.1f}"
    gain = f"≥ {100 * (rising['a_post_low'] - 0.3):.1f}"
    assert rising["a_post"] == rising["a_post_low"] and rising["pl_rl"] == rising["a_post_low"] - 0.3  # in the JSON too
    report.publish(judged, tmp_path)
    page, printed = (tmp_path / "report.html").read_text(), capsys.readouterr().out
    for text in (page, printed):
        assert bound in text and gain in text and "out of signal (train 97.0)" in text
        assert f"{100 * rising['law'].a_post:.1f}" not in text.replace(bound, "")
    assert "<b>4 of 6</b>" in page  # ceilings identified: not the rising one, and not the one of learned prompts
    assert "90.0 [" in printed and max(len(line) for line in printed.splitlines()) <= 110

    rows = ["dataset,sft_step,x_sft,stage,x,score", "a,5,1,sft,0,30"]
    rows += [f"a,5,1,rl,{p['x']},{100 * p['score']}" for p in rising["curve"][1:]]
    (tmp_path / "c.csv").write_text("\n".join(rows))
    assert curves.main([str(tmp_path / "c.csv"), "--json", str(tmp_path / "c.json")]) == 0
    assert bound.replace(" ", "").replace("≥", ">=") in capsys.readouterr().out
    (record,) = json.loads((tmp_path / "c.json").read_text())
    assert record["a_post_low"] == pytest.approx(100 * rising["a_post_low"]) and not record["identified"]
    assert record["best"] == pytest.approx(100 * rising["best"])
    assert record["a_post"] == record["a_post_low"] and record["pl_rl"] == pytest.approx(100 * rising["pl_rl"])


def test_labels_stay_apart_and_inside():
    """Six equal points, and one at the edge: the names keep their order, a gap apart, inside."""
    places = spread([50, 50, 50, 99, 50, 50, 50], 40, 100, 5)
    assert places[3] == max(places) <= 95 and min(places) >= 45
    many = spread([40] * 15, 40, 100, 5)
    assert min(many) > 40 and max(many) < 100
    assert np.diff(sorted(places)).min() >= 5 - 1e-9
    assert spread([10, 30, 20], 0, 40, 5) == [10, 30, 20]


def test_report_escapes_text(made_up, tmp_path):
    report.write(report.judge(made_up), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert (tmp_path / "fig8_rl_curves.png").read_bytes().startswith(b"\x89PNG")


def test_report_without_matplotlib(made_up, tmp_path, monkeypatch):
    """The extra is optional: the page must still come, and say how to get the figures."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.write(report.judge(made_up), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "data:image" not in page and ".[plot]" in page and "saturated" in page


def test_a_finished_run_is_judged_anew(made_up, tmp_path, capsys):
    """`python -m nanopcf.report RUN` needs the curves only: what was derived by other rules is replaced."""
    old = report.judge(made_up) | {"claims": []}
    old["branches"][1]["a_post"] = 0.123
    (tmp_path / "report.json").write_text(json.dumps(old))
    rejudge.main(rejudge.ReportConfig(run=str(tmp_path)))
    new = json.loads((tmp_path / "report.json").read_text())
    assert new == json.loads(json.dumps(report.judge(made_up)))
    assert (tmp_path / "report.html").exists() and "uniform-800 @10 (stable)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"report\.json is missing"):
        rejudge.main(rejudge.ReportConfig(run=str(tmp_path / "nowhere")))


def test_reports_that_cannot_be_judged(made_up):
    made_up["branches"][1]["curve"] = made_up["branches"][1]["curve"][:3]
    judged = report.judge(made_up)
    few = judged["branches"][1]
    assert few["status"] == "too few points" and few["a_post"] == few["a_post_low"] < few["best"]
    assert verdicts(judged, "Scale") == "not resolved"
    without_base = report.judge(made_up | {"branches": made_up["branches"][1:]})
    assert not any("pure RL" in claim["claim"] for claim in without_base["claims"])
    with pytest.raises(ValueError, match="selector starts RL at step 10 of uniform-800, and no branch does"):
        report.judge(made_up | {"branches": made_up["branches"][:-1]})
    made_up["branches"][4]["curve"][5]["x"] = 0.1
    with pytest.raises(ValueError, match=r"the curve of uniform-200 @20 \(severe\): compute must .* increase"):
        report.judge(made_up)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("branches.0.curve", ..., r"no branches\[0\]\.curve: a report\.json of another version"),
        ("candidates", ..., "no candidates"),
        ("branches.4.curve.5.score", math.nan, r"branches\[4\]\.curve\[5\]\.score is nan, should be a score"),
        ("branches.4.curve.5.score", None, "is None, should be a score"),
        ("branches.4.curve.5.score", 1.2, "should be a score in"),
        ("branches.4.curve.5.x", "far", "is 'far', should be a finite number"),
        ("branches.0.curve", [], "should be a list that is not empty"),
        ("branches.1.p_sft", True, "should be a score"),
        ("branches.2.sft_step", 10, "two branches start at step 10 of uniform-200"),
        ("candidates.0.checkpoints", [], "should be a list that is not empty"),
        ("candidates.0.checkpoints.0.score", None, "should be a score"),
        ("selector.chosen", "foo", "selector.chosen is 'foo'"),
        ("selector.ranking.0.min_val_loss", math.inf, "should be a finite number"),
        ("problems", 0, "problems is 0, should be a whole number above 0"),
        ("base", {}, r"no base\.p_0"),
        ("paradigm_runs", [{"algo": "sft"}], r"no paradigm_runs\[0\]\.start"),
    ],
)
def test_a_wrong_report_is_named(made_up, place, value, message):
    *way, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    inner = made_up
    for key in way:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    with pytest.raises(ValueError, match=message):
        report.judge(made_up)


def test_a_report_that_cannot_be_shown_replaces_nothing(made_up, tmp_path, monkeypatch):
    (tmp_path / "report.json").write_text("old")
    monkeypatch.setattr(report, "html_page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write(report.judge(made_up), tmp_path)
    assert (tmp_path / "report.json").read_text() == "old"


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
    luffy, sequential = paradigms.summarise(runs, 2000)
    assert luffy["final"] == pytest.approx((0.5 + 0.7) / 2) and luffy["final_sd"] == pytest.approx(0.2 / 2**0.5)
    assert luffy["peak"] == pytest.approx(0.7) and luffy["wobble"] == pytest.approx(0.5 * 0.3 / 3**0.5)
    assert [p["score"] for p in luffy["curve"]] == pytest.approx([0.1, 0.2, 0.7, 0.55, 0.55])
    assert sequential["final"] == pytest.approx(0.91) and len(sequential["curve"]) == 5

    assert luffy["finals"] == pytest.approx({"0": 0.5, "1": 0.7})

    def verdict(*finals: float) -> dict:
        of_luffy = {str(seed): final for seed, final in enumerate(finals)}
        (claim,) = paradigms.judge_claims([luffy | {"finals": of_luffy}, sequential], 2000)
        return claim

    # Two seeds that lie 20 points apart say little: Student's t with one degree of freedom has heavy tails.
    assert verdict(0.5, 0.7)["verdict"] == "not resolved" and "dapo_dc from SFT 91.0" in verdict(0.5, 0.7)["evidence"]
    # What counts is the difference seed by seed: 30 points below in both, although the seeds differ by themselves.
    assert verdict(0.6, 0.62)["verdict"] == "shown"
    assert verdict(0.98, 1.0)["verdict"] == "not shown"
    assert verdict(0.6)["probability"] is None
    assert max(map(len, paradigms.terminal_table([luffy, sequential]).splitlines())) <= 100


def test_a_paradigm_may_have_a_change():
    assert paradigms.parsed("upt") == ("upt", 1.0, ()) and paradigms.parsed("upt:lr=5") == ("upt", 5.0, ())
    assert paradigms.parsed("prefix_rft:advantage=prefix") == ("prefix_rft", 1.0, ("advantage=prefix",))
    for wrong, message in {
        "ppo": "no 'ppo'",
        "upt:lr=0": "a factor above 0",
        "upt:lr=fast": "a factor above 0",
        "upt:gate": "expected FIELD=VALUE",
        "upt:advantage=mean": "advantage must be one of center",
    }.items():
        with pytest.raises(ValueError, match=message):
            paradigms.parsed(wrong)


def test_equal_paradigms_are_rarely_told_apart():
    """One against the best of four, three seeds each, all equal: about 5 % each are "shown" and "not shown"."""
    rng, counts = np.random.default_rng(5), Counter()
    names = (("dapo_dc", "sft"), *((algo, "base") for algo in paradigms.SYNCHRONISED))
    for _ in range(200):
        finals = 0.6 + 0.02 * rng.normal(size=(5, 3))
        rows = [
            dict(algo=algo, start=start, final=of_row.mean(), final_sd=0.0, finals=dict(enumerate(of_row)))
            for (algo, start), of_row in zip(names, finals, strict=True)
        ]
        (claim,) = paradigms.judge_claims(rows, 10**6)
        counts[claim["verdict"]] += 1
    assert counts["shown"] <= 20 and counts["not shown"] <= 20
