"""nanopcf.ceiling on curves whose ceiling is known: exact, noisy, collapsed, and the command line."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nanopcf import ceiling

X = np.linspace(1e12 / 14, 1e12, 14)


def law(x: np.ndarray, p: float, a: float, c: float, b: float) -> np.ndarray:
    return p + (a - p) / (1 + (x / c) ** -b)


def measured(p: np.ndarray | float, rng: np.random.Generator) -> np.ndarray:
    """Scores as our evaluation measures them: right answers among 450 problems."""
    return rng.binomial(450, p) / 450


@pytest.mark.parametrize("scale", [1, 100])
def test_exact_curve_is_recovered(scale: float) -> None:
    """Without noise the global optimum is the truth, on both score scales: no stuck or biased search."""
    f = ceiling.fit(X, scale * law(X, 0.4, 0.7, 1.3e11, 1.7), scale * 0.4)
    assert f.a_post == pytest.approx(scale * 0.7, rel=2e-3) and f.status == "saturated" and f.kept.all()
    assert f.pl_rl == pytest.approx(f.a_post - scale * 0.4)
    assert f.c_mid == pytest.approx(1.3e11, rel=0.02) and f.b == pytest.approx(1.7, rel=0.03)
    assert f.predict([0.0, f.c_mid]) == pytest.approx([scale * 0.4, (scale * 0.4 + f.a_post) / 2])
    assert f.interval[0] <= f.a_post <= f.interval[1]


def test_fit_beats_brute_force() -> None:
    """No point of a fine three-parameter grid has a smaller error: the closed form and the zoom are right."""
    rng = np.random.default_rng(3)
    for a in (0.45, 0.6, 0.95):
        y = measured(law(X, 0.4, a, 3e11, 1.2), rng)
        f = ceiling.fit(X, y, 0.4, robust=False)
        c, b, top = np.meshgrid(
            np.geomspace(X[0] / 10, X[-1], 60), np.geomspace(0.5, 4, 40), np.linspace(0.4, 1, 121)
        )
        g = 1 / (1 + (c[..., None] / X) ** b[..., None])
        brute = ((0.4 + (top[..., None] - 0.4) * g - y) ** 2).sum(-1).min()
        assert ((f.predict(X) - y) ** 2).sum() <= brute + 1e-12


def test_outliers_are_rejected() -> None:
    """Two broken evaluations must not move the ceiling; exactly those two points are given up."""
    y = law(X, 0.4, 0.7, 1e11, 1.7) + 0.005 * np.cos(7 * np.arange(14))
    y[[5, 10]] -= 0.3
    f = ceiling.fit(X, y, 0.4, max_score=1)
    assert np.flatnonzero(~f.kept).tolist() == [5, 10] and abs(f.a_post - 0.7) < 0.015
    assert abs(ceiling.fit(X, y, 0.4, max_score=1, robust=False).a_post - 0.7) > 0.015


def test_verdicts_on_simulated_curves() -> None:
    """Noise of 450 problems, 14 points. Thresholds leave room around what is measured."""
    rng = np.random.default_rng(0)
    verdicts: dict[str, Counter[str]] = {}
    errors, covered = [], []
    for kind in ("early", "rising", "flat", "collapse"):
        verdicts[kind] = Counter()
        for _ in range(60):
            p, gain, b = rng.uniform(0.15, 0.6), rng.uniform(0.1, 0.35), rng.uniform(1.3, 2.2)
            if kind == "flat":
                gain = 0
            c = 1e12 * (rng.uniform(0.6, 2) if kind == "rising" else rng.uniform(0.03, 0.1))
            truth = law(X, p, p + gain, c, b)
            if kind == "collapse":
                truth[rng.integers(7, 12) :] = 0.5 * p
            f = ceiling.fit(X, measured(truth, rng), float(measured(p, rng)), max_score=1)
            verdicts[kind][f.status] += 1
            if kind in ("early", "flat"):
                covered.append(f.interval[0] <= p + gain <= f.interval[1])
                if f.status == "saturated":
                    errors.append(abs(f.a_post - p - gain))
            if f.status == "still rising":
                assert f.interval[1] == 1.0  # a lower bound only
    assert verdicts["early"]["saturated"] >= 30 and verdicts["flat"]["saturated"] >= 15
    assert verdicts["rising"]["saturated"] <= 12 and verdicts["collapse"]["collapsed"] >= 55
    assert np.median(errors) < 0.012 and np.mean(covered) > 0.8


def test_flat_and_falling_curves() -> None:
    """RL that adds nothing: ceiling P_sft, plasticity 0, no crash. A collapse: the best before it."""
    f = ceiling.fit(X, np.full(14, 0.5), 0.5)
    assert (
        f.status == "saturated" and f.a_post == pytest.approx(0.5) and f.pl_rl == pytest.approx(0, abs=1e-9)
    )
    y = law(X, 0.4, 0.7, 5e10, 2.0)
    y[10:] = 0.1
    f = ceiling.fit(X, y, 0.4)
    assert (
        f.status == "collapsed"
        and abs(f.a_post - y[9]) < 0.01
        and f.kept.tolist() == [True] * 10 + [False] * 4
    )
    hill = 0.4 + 0.3 * np.sin(np.linspace(0, np.pi, 30)) ** 2  # rises, then falls back slowly
    assert ceiling.fit(np.arange(1.0, 31), hill, 0.4).status in ("collapsed", "not sigmoidal")


@pytest.mark.parametrize(
    ("x", "y", "p", "message"),
    [
        ([1, 2, 3], [0.1] * 3, 0.1, "at least 4"),
        ([1, 2, 2, 3], [0.1] * 4, 0.1, "strictly increase"),
        ([-1, 2, 3, 4], [0.1] * 4, 0.1, "at 0 or above"),
        ([1, 2, 3, 4], [0.1, 0.2, np.nan, 0.2], 0.1, "finite"),
        ([1, 2, 3, 4], [0.1, 0.2, 101, 0.2], 0.1, "must lie in"),
        ([1, 2, 3, 4], [0.1] * 3, 0.1, "one length"),
    ],
)
def test_bad_input(x: list[float], y: list[float], p: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ceiling.fit(x, y, p)


HEADER = "dataset,sft_step,x_sft,stage,x,score\n"


def rows(name: str, y: np.ndarray) -> str:
    points = "".join(f"{name},10,5.0,rl,{x},{score}\n" for x, score in zip(X, y, strict=True))
    return f"{name},10,5.0,sft,5.0,0.4\n{points}"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bad row is named by number and costs exit code 2; the other branches are still reported and saved."""
    file, out, figure = tmp_path / "c.csv", tmp_path / "o.json", tmp_path / "o.png"
    good = HEADER + rows("good", law(X, 0.4, 0.7, 1e11, 1.7))
    file.write_text(good)
    assert ceiling.main([str(file), "--json", str(out), "--plot", str(figure)]) == 0
    (branch,) = json.loads(out.read_text())
    names = "dataset sft_step x_sft a_post pl_rl c_mid b epsilon p_sft a_post_low a_post_high rmse_fit"
    assert set(branch) == {*names.split(), "rmse_heldout", "status"} and branch["a_post"] == pytest.approx(
        0.7, abs=2e-3
    )
    assert figure.stat().st_size > 1000 and "saturated" in capsys.readouterr().out

    file.write_text(good + "bad,10,5.0,rl,1e11,lots\n" + "orphan,10,5.0,rl,1e11,0.5\n")
    assert ceiling.main([str(file), "--json", str(out)]) == 2
    err = capsys.readouterr().err
    assert "row 17" in err and "orphan" in err and len(json.loads(out.read_text())) == 1
    for text, message in [("dataset,x\n", "columns missing"), (HEADER, "no rows"), ("", "columns missing")]:
        file.write_text(text)
        assert ceiling.main([str(file)]) == 2 and message in capsys.readouterr().err


def test_paper_curves() -> None:
    """Pins today's behaviour on real curves; no proof of agreement with Table 4.

    Of the five different public curves called saturated these three are within 0.5 of it. Easy102K 1800 (76.8,
    published 77.8) and pure RL (72.8, published 72.0 by its own P_sft + PL_rl) are not. COLLAPSE was lowered to
    0.03 after a look at Uniform102K 1800.
    """
    shared = Path(__file__).parents[2] / "shared" / "paper"
    if not shared.exists():
        pytest.skip("the paper's curves are not beside the repository")
    branches, errors = ceiling.read_curves(str(shared / "retu_curves_public.csv"))
    assert not errors and len(branches) == 19
    published = {("Uniform102K", 360): 76.9, ("Uniform102K", 1440): 77.5, ("Easy102K", 1440): 76.8}
    for key, a_post in published.items():
        f = ceiling.fit(branches[key]["x"], branches[key]["y"], branches[key]["p_sft"])
        assert f.status == "saturated" and abs(f.a_post - a_post) < 0.5
    b = branches["Uniform102K", 1800]  # collapses in its last quarter
    assert ceiling.fit(b["x"], b["y"], b["p_sft"]).status == "collapsed"
