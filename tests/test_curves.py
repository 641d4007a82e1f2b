"""The command line of nanopcf.ceiling."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import X, law

from nanopcf.ceiling import curves

HEADER = "dataset,sft_step,x_sft,stage,x,score\n"


def rows(name: str, y: np.ndarray, step: int = 10) -> str:
    points = "".join(f"{name},{step},5.0,rl,{x},{score}\n" for x, score in zip(X, y, strict=True))
    return f"{name},{step},5.0,sft,5.0,0.4\n{points}"


GOOD = rows("good", law(X, 0.4, 0.7, 1e11, 1.7))


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    """Spreadsheets write one: once "columns missing: dataset"."""
    (tmp_path / "c.csv").write_text(HEADER + GOOD, encoding="utf-8-sig")
    assert curves.read_curves(tmp_path / "c.csv")[0].keys() == {("good", 10)}


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out, figure = tmp_path / "c.csv", tmp_path / "o.json", tmp_path / "o.png"
    file.write_text(HEADER + GOOD + rows("good", law(X, 0.4, 0.9, 2e12, 1.0), step=20) + "base,0,0,sft,0,0.1\n")
    assert curves.main([str(file), "--json", str(out), "--plot", str(figure), "--holdout"]) == 0
    first, second = json.loads(out.read_text())  # the base model has no RL: no branch
    names = "dataset sft_step x_sft a_post pl_rl c_mid b epsilon p_sft a_post_low a_post_high rmse_fit"
    assert set(first) == {*names.split(), *"best identified rmse_heldout status stop_at outliers holdout".split()}
    assert first["a_post"] == pytest.approx(0.7, abs=5e-3) and first["status"] == "saturated"
    assert second["status"] == "still rising" and [h["fraction"] for h in second["holdout"]] == [0.3, 0.5, 0.7]
    assert figure.stat().st_size > 10_000
    text = capsys.readouterr().out
    assert "saturated" in text and ">=" in text and "first  50%" in text

    settings = tmp_path / "s.csv"
    settings.write_text("dataset,sft_step,outlier_threshold,lts_alpha,released_train_end\ngood,10,2.5,0.75,9\n")
    options = [str(file), "--method", "paper", "--settings", str(settings), "--json", str(out)]
    assert curves.main(options) == 0
    assert json.loads(out.read_text())[0]["outliers"] > 5  # five points held out, and a quarter trimmed
    assert json.loads(out.read_text())[0]["a_post_low"] is None


@pytest.mark.parametrize(
    ("text", "message", "branches"),
    [
        ("bad,10,5.0,rl,1e11,lots\n", "row 17: score is 'lots'", 1),
        ("bad,10,5.0,rl,1e11,nan\n", "row 17: score is nan", 1),
        ("bad,10,5.0,rl,-3,0.5\n", "row 17: x is -3: compute can't be negative", 1),
        ("bad,ten,5.0,rl,1,0.5\n", "row 17: sft_step is 'ten'", 1),
        ("bad,10,5.0,dpo,1,0.5\n", "row 17: stage is 'dpo'", 1),
        ("bad,10,5.0,rl,1\n", "row 17: score is None", 1),
        ("orphan,10,5.0,rl,1e11,0.5\n", "row 17: branch orphan, step 10: no row with stage sft", 1),
        ("few,3,5.0,sft,5,0.5\nfew,3,5.0,rl,1,0.5\n", "row 17: branch few, step 3: 1 points", 1),
        (rows("twice", X / 2e12).replace(str(X[5]), str(X[4])), "row 23: x is", 1),
        ("good,10,5.0,sft,5.0,0.5\n", "row 17: a second sft row", 0),
        (
            rows("percent", 70 + X / 1e12, step=1).replace("5.0,0.4", "5.0,70"),
            "row 2: branch good, step 10: scores up to",
            1,
        ),
        (rows("mixed", np.r_[[70.0] * 13, 0.7], step=1).replace("5.0,0.4", "5.0,70"), "fractions mixed", 0),
    ],
)
def test_a_bad_branch_costs_only_itself(tmp_path, capsys, text: str, message: str, branches: int) -> None:
    """One sentence with the row, exit code 2, and the other branches reported all the same."""
    file, out = tmp_path / "c.csv", tmp_path / "o.json"
    file.write_text(HEADER + GOOD + text)
    assert curves.main([str(file), "--json", str(out)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert any(message in e for e in errors) and all(e.startswith("error: ") for e in errors)
    assert len(json.loads(out.read_text())) == branches


def test_bad_files_and_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.csv"
    for data, message in [
        (b"dataset,x\n", "columns missing"),
        (HEADER.encode(), "no rows"),
        (b"", "columns missing"),
        (b"\xff\xfe\x00", "utf-8"),
        (HEADER.encode() + b'"' + b"a" * 200_000 + b'",1,1,rl,1,1\n', "not CSV"),
    ]:
        file.write_bytes(data)
        assert curves.main([str(file)]) == 2 and message in capsys.readouterr().err
    file.write_text(HEADER + GOOD)
    assert curves.main([str(tmp_path / "none.csv")]) == 2
    assert curves.main([str(file), "--settings", str(file)]) == 2
    assert curves.main([str(file), "--stop-gain", "0"]) == 2
    bad = tmp_path / "s.csv"
    bad.write_text("dataset,sft_step,outlier_threshold\ngood,10,often\n")
    assert curves.main([str(file), "--method", "paper", "--settings", str(bad)]) == 2
    assert "row 2" in capsys.readouterr().err
