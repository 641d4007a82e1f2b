"""What strangers write costs a bounded time and memory, and does nothing to the terminal."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, write_rows
from safetensors.torch import load_file, save_file

import train_rl
import train_sft
from nanopcf import checkpoint, evaluate
from nanopcf.ceiling import curves
from nanopcf.interop import chat_template
from nanopcf.run import config, files, machine
from nanopcf.run.untrusted import TooLong, printable, time_limit
from nanopcf.tools.metrics import read_curve

CLEAR = "\x1b[2J"  # clears a terminal's screen


# ---- time and memory ----


def test_a_limit_ends_loops_and_leaves_no_clock_behind():
    with pytest.raises(TooLong), time_limit(0.05):
        while True:
            pass
    began = time.thread_time()
    with time_limit(0.05):
        time.sleep(0.2)  # waiting is no computing: a busy machine changes no verdict
    while time.thread_time() - began < 0.1:  # no alarm comes any more
        pass


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than 0.1 s"),
        ("{{ 'a' * 10000000000 }}", "wants more than 1 GiB of memory"),
        ("{{ '%9999999999d' % 1 }}", "wants more than 1 GiB of memory"),
        ("{{ 1 / 0 }}", "failed: ZeroDivisionError"),
        ("{{ 2 ** 2 ** 40 }}", r"failed: TemplateError: \*\* isn't allowed"),
    ],
)
def test_a_chat_template_is_limited(template, said, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.1)
    with pytest.raises(ValueError, match=said):
        chat_template.render_chat(template, [{"role": "user", "content": "hi"}], {})


def test_memory_that_is_not_there_is_one_sentence(sft, capsys):
    """On a CPU torch has no class of its own for this error. No machine has what is asked for."""
    with pytest.raises(ValueError, match="a step: doesn't fit in memory; fewer --micro-rows"):
        machine.try_out("a step", lambda: torch.empty(10**15), torch.device("cpu"))
    for work in (lambda: torch.empty(10**15), lambda: np.empty(10**15)):
        with pytest.raises(SystemExit) as ended:
            config.run_cli(work)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith("error: not enough memory for ") and "Traceback" not in said
    with pytest.raises(RuntimeError, match="another"):
        config.run_cli(lambda: (_ for _ in ()).throw(RuntimeError("another")))


def test_more_samples_than_memory_holds_are_refused(model_dir, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [dict(prompt="1+1=", answer="2")])
    for module, rest in (("evaluate", ["--data", data]), ("generate", ["--prompt", "1"])):
        done = run_script("-m", f"nanopcf.{module}", "--model", str(model_dir), "--samples", str(10**12), *rest)
        assert done.returncode == 2 and "fewer --samples" in done.stderr, done.stderr


def test_a_dry_run_with_rows_longer_than_the_context(sft, capfd):
    assert train_sft.main(replace(sft, dry_run=True, pack_length=150, micro_rows=2)) == []
    assert "a step of 2 rows of 150 tokens: fits" in capfd.readouterr().err


# ---- models ----


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.fill_(float("nan")), "holds a number that is not finite"),
        (lambda w: w.neg().log(), "holds a number that is not finite"),
        (lambda w: w.to(torch.int32), "model.norm.weight is torch.int32"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(change, said, model_dir):
    file = model_dir / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"model.norm.weight": change(weights["model.norm.weight"])}, file)
    with pytest.raises(ValueError, match=said):
        checkpoint.load(model_dir)


@pytest.mark.parametrize(
    "part",
    [
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    ],
)
def test_a_tokenizer_that_panics_is_named(part, model_dir):
    file = model_dir / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | part))
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer file"):
        checkpoint.load(model_dir)


# ---- the terminal ----


def test_control_characters_are_written_out():
    assert printable("a\tb\nc é 中 😀") == "a\tb\nc é 中 😀"
    assert printable(f"{CLEAR}\r\x07\x9b\u202e\ud800") == r"\x1b[2J\r\x07\x9b\u202e\ud800"
    printable(f"{CLEAR}\ud800").encode()


def test_nothing_that_is_read_reaches_the_terminal_raw(model_dir, tmp_path, sft, monkeypatch):
    """Prompts, names of fields, tensors, files and data sets, and what a model writes."""
    data = write_rows(tmp_path / "d.jsonl", [dict(prompt="1+1=", answer=f"2{CLEAR}")])
    field = write_rows(tmp_path / "f.jsonl", [{"prompt": "1", CLEAR: "2"}])
    curve = tmp_path / "c.csv"
    points = "".join(f"{CLEAR},1,1,rl,{x},{0.5 + x / 100}\n" for x in range(1, 9))
    curve.write_text(",".join(curves.COLUMNS) + f"\n{CLEAR},1,1,sft,0,0.5\n{points}{CLEAR},x,1,rl,1,1\n")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model_dir.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    save_file(load_file(model_dir / "model.safetensors") | {CLEAR: torch.zeros(1)}, broken / "model.safetensors")
    monkeypatch.setattr("nanopcf.tokenizer.TextTokenizer.decode", lambda self, ids: CLEAR)
    model = ["--model", str(model_dir), "--max-new-tokens", "2", "--device", "cpu", "--threads", "1"]
    for arguments in (
        ["-m", "nanopcf.evaluate", *model, "--data", data],
        ["-m", "nanopcf.evaluate", *model, "--data", field],
        ["-m", "nanopcf.evaluate", *model, "--data", data, "--model", str(broken)],
        ["-m", "nanopcf.generate", *model, "--prompt", "1"],
        ["-m", "nanopcf.generate", *model, "--prompt", "1", "--samples", "2"],
        ["-m", "nanopcf.generate", f"--{CLEAR}"],
        ["-m", "nanopcf.ceiling", str(curve)],
    ):
        done = run_script(*arguments)
        assert "\x1b[2J" not in done.stdout + done.stderr, arguments
        assert r"\x1b[2J" in done.stdout + done.stderr, (arguments, done.stdout, done.stderr)


def test_scores_are_saved_and_shown_whatever_the_terminal_can_write(model_dir, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "d.jsonl", [dict(prompt="1+1=", answer="√2")])
    c = evaluate.EvaluateConfig(str(model_dir), (data,), out=str(tmp_path / "o"), max_new_tokens=2, threads=1)
    monkeypatch.setattr(evaluate, "table", lambda scores: 1 / 0)  # whatever fails in printing, the scores are there
    with pytest.raises(ZeroDivisionError):
        evaluate.main(c)
    assert (tmp_path / "o" / "scores.json").exists()


def test_the_ends_of_a_process():
    """Another encoding, a reader that has gone, no docstrings: shared, since each process imports torch."""
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONOPTIMIZE": "2", "PYTHONPATH": str(ROOT)}
    code = "from nanopcf.run import config; config.run_cli(print, '±─' * 40_000)"
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=-1, stderr=-1)
    assert process.stdout.read(4) == b"\xb1?\xb1?"
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    done = subprocess.run([sys.executable, "train_rl.py", "--help"], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0 and b"--threads N" in done.stdout and done.stderr == b""


def test_a_damaged_curve_is_named(tmp_path):
    file, point = tmp_path / "curve.json", {"step": 0, "x": 0.0, "score": 0.5, "greedy": 0.5}
    files.write_json(file, {"curve": [point, point]})
    assert read_curve(file) == [point, point]
    damaged = [{}, {"curve": 5}, {"curve": []}, {"curve": [5]}, {"curve": [point | {"x": "0"}]}]
    for content in [*damaged, {"curve": [point, {"step": 1, "x": 1, "score": 1}]}]:
        files.write_json(file, content)
        with pytest.raises(ValueError, match=r"curve\.json: damaged"):
            read_curve(file)


# ---- numbers ----


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--threads", "100000"], "--threads must be from 0 to 1024, got 100000"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--seed", str(2**63)], "--seed must be below 2\\^63"),
    ],
)
def test_a_number_that_no_run_can_have_is_named_before_a_folder_is_made(flags, said):
    for kind in (train_sft.SFTConfig, train_rl.RLConfig):
        with pytest.raises(ValueError, match=said):
            config.parse(kind, "", ["--model", "m", "--train", "t", "--val", "v", "--out", "o", *flags])


def test_the_settings_of_a_branch_are_checked_by_name(tmp_path):
    file = tmp_path / "s.csv"
    for column, value in (("lts_alpha", "inf"), ("lts_alpha", "nan"), ("train_start", "-1"), ("train_end", "x")):
        file.write_text(f"dataset,sft_step,{column}\nd,10,{value}\n")
        with pytest.raises(ValueError, match=rf"s\.csv: row 2: {column} is '{value}': must be a "):
            curves.read_settings(file)
    for text, said in (("x" * 200_000, "not CSV"), ("", "columns missing"), ("dataset,sft_step\nd\n", "sft_step is")):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            curves.read_settings(file)


def test_a_curve_of_very_many_points_is_averaged_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curves, "MOST_POINTS", 40)
    monkeypatch.setattr("nanopcf.ceiling.curve_files.MOST_POINTS", 40)
    x = np.arange(1, 3_001)
    y = 40 + 30 / (1 + (x / 300) ** -1.2) + np.random.default_rng(0).normal(0, 1, len(x))
    points = "".join(f"d,1,1,rl,{a},{b}\n" for a, b in zip(x, y.clip(0, 100), strict=True))
    (tmp_path / "c.csv").write_text(",".join(curves.COLUMNS) + f"\nd,1,1,sft,0,40\n{points}")
    assert curves.main([str(tmp_path / "c.csv"), "--json", str(tmp_path / "o.json")]) == 0
    assert "row 2: branch d, step 1: 3,000 points, averaged to 40" in capsys.readouterr().err
    (fit,) = json.loads((tmp_path / "o.json").read_text())
    assert 69 < fit["a_post"] < 71
    assert curves.main([str(tmp_path / "c.csv"), "--method", "paper"]) == 2
    assert "3,000 points are too many for a fit" in capsys.readouterr().err
