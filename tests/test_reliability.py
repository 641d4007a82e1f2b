"""Nothing lost: runs are killed, stopped, starved of disk and started twice, and end as if nothing had been.

pytest -m long tests/test_reliability.py        many more kills
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, TIMED, command, run_script
from safetensors.torch import load_file

import train_rl
from nanopcf.run import files, signals
from nanopcf.run.folder import checkpoints, read_metrics


def start(arguments: list[str], **options) -> subprocess.Popen:
    return subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options
    )


def finish(arguments: list[str]) -> None:
    done = run_script(*arguments[1:])
    assert done.returncode == 0, done.stderr


def wait_for_step(out: Path, process: subprocess.Popen, count: int = 2) -> None:
    while process.poll() is None and len(checkpoints(out)) < count:
        time.sleep(0.02)


def what_is_left(out: Path) -> tuple:
    """Weights, optimizer and metrics at the end of a run, without what a clock wrote."""
    step, folder = checkpoints(out)[-1]
    tensors = {f"{f}/{k}": v for f in ("model", "optimizer") for k, v in load_file(folder / f"{f}.safetensors").items()}
    lines = (out / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]
    return step, tensors, rows, files.read_json(folder / "state.json")


def same(a: tuple, b: tuple) -> None:
    assert a[0] == b[0] and a[2] == b[2] and a[3] == b[3]
    assert a[1].keys() == b[1].keys() and all(a[1][k].equal(b[1][k]) for k in a[1])


@pytest.fixture(params=["train_sft.py", "train_rl.py"])
def script(request) -> str:
    return request.param


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.long)])
def test_killed_at_any_moment_and_resumed_a_run_ends_as_if_it_had_not_been(script, kills, model_dir, tmp_path):
    """SIGKILL after a random time, most of them in or near a save (there is one a step), until the run is through."""
    steps = max(40, 4 * kills)
    finish(command(script, model_dir, tmp_path, tmp_path / "whole", steps))
    arguments = command(script, model_dir, tmp_path, tmp_path / "cut", steps)
    rng, killed = random.Random(0), 0
    while killed < kills:
        process = start(arguments + ["--resume"] * (killed > 0))
        have = len(checkpoints(tmp_path / "cut"))
        wait_for_step(tmp_path / "cut", process, have + 1)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it has more steps than kills: none ends before its kill
        killed += 1
    finish([*arguments, "--resume"])
    same(what_is_left(tmp_path / "whole"), what_is_left(tmp_path / "cut"))
    assert not list((tmp_path / "cut" / "checkpoints").glob("*.tmp"))


@pytest.mark.long
def test_a_pipeline_killed_or_stopped_ends_as_if_it_had_not_been(tmp_path):
    """SIGKILL, SIGTERM and SIGINT in turn, twelve times, after a random time; then the report is that of a whole
    run."""
    arguments = [sys.executable, "pipeline.py", "--preset", "tiny", "--device", "cpu", "--threads", "1", "--out"]
    subprocess.run([*arguments, str(tmp_path / "whole")], cwd=ROOT, check=True)
    rng, out = random.Random(0), tmp_path / "cut"
    for i in range(12):
        process = start([*arguments, str(out), "--resume"])
        time.sleep(4 + 6 * rng.random())
        number = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[i % 3]
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
        assert process.returncode in (0, -9, 143, 130), said
        if process.returncode > 0:
            assert "the same command with --resume goes on" in said and "Traceback" not in said
    subprocess.run([*arguments, str(out), "--resume"], cwd=ROOT, check=True)
    a, b = (files.read_json(f / "report.json") for f in (tmp_path / "whole", out))
    for key in ("base", "candidates", "branches", "selector", "samples"):
        text = json.dumps(b[key]).replace(str(out), str(tmp_path / "whole"))
        assert json.loads(text) == a[key]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_saves_says_how_to_go_on_and_does(number, code, model_dir, tmp_path):
    script = "train_sft.py" if number == signal.SIGTERM else "train_rl.py"
    finish(command(script, model_dir, tmp_path, tmp_path / "whole"))
    arguments = command(script, model_dir, tmp_path, tmp_path / "cut")
    arguments[arguments.index("--checkpoint-every") + 1] = "1000"  # what is there was saved by the signal
    process = start(arguments)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        time.sleep(0.02)
    time.sleep(0.1)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "saved; the same command with --resume goes on" in said and "Traceback" not in said
    assert checkpoints(tmp_path / "cut")[-1][0] > 0
    finish([*arguments, "--resume"])
    a, b = what_is_left(tmp_path / "whole"), what_is_left(tmp_path / "cut")
    assert a[1].keys() == b[1].keys() and all(a[1][k].equal(b[1][k]) for k in a[1])


def test_a_second_signal_ends_at_once():
    with signals.stoppable() as stop_signal:
        assert stop_signal() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_signal() == signal.SIGTERM
    code = """
import os, signal, time
from nanopcf.run import signals

with signals.stoppable():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # so soon after the first that it counts as the same one
    print("once", flush=True)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGINT)
    print("never")
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 130 and result.stdout.split() == ["once"]


def test_a_closed_terminal_saves_too():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever has started the tests
    try:
        with signals.stoppable() as stop_signal:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop_signal() == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts a run
        with signals.stoppable() as stop_signal:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop_signal() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_drops_the_rollouts_saves_and_the_resumed_run_ends_as_if_it_had_not_come(rl, monkeypatch):
    """A judge that hangs holds up nothing: what the step has drawn is dropped, and drawn again."""
    rl = replace(rl, checkpoint_every=100)
    train_rl.main(replace(rl, out=rl.out + "-whole"))
    judge, judged = train_rl.roll_out, []

    def hangs(*arguments, **options):
        judged.append(judge(*arguments, **options))
        if len(judged) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
        return judged[-1]

    monkeypatch.setattr(train_rl, "roll_out", hangs)
    with pytest.raises(SystemExit) as ended:
        train_rl.main(rl)
    assert ended.value.code == 143 and checkpoints(Path(rl.out))[-1][0] == 2
    train_rl.main(replace(rl, resume=True))
    same(what_is_left(Path(rl.out + "-whole")), what_is_left(Path(rl.out)))


def test_a_signal_waits_two_seconds_for_a_judge_of_a_validation(rl, monkeypatch, capsys):
    def slow(*_):
        if not signals.noted:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.02)
        return 0.0

    monkeypatch.setattr(signals, "PATIENCE_S", 0.05)
    monkeypatch.setattr(train_rl, "verifier", lambda _: slow)
    with pytest.raises(SystemExit) as ended:
        train_rl.main(rl)
    assert ended.value.code == 143 and "--resume goes on where it last saved" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(model_dir, tmp_path):
    """A limit on the size of files stands for the disk: the third save fails in the middle of a file."""
    out = tmp_path / "run"
    finish(command("train_sft.py", model_dir, tmp_path, tmp_path / "whole"))
    arguments = command("train_sft.py", model_dir, tmp_path, out)
    process = start(arguments)
    wait_for_step(out, process, 3)
    process.kill()
    process.communicate()
    step = checkpoints(out)[-1][0]

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start([*arguments, "--resume"], preexec_fn=limit_files)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and said.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in said
    assert checkpoints(out)[-1][0] == step and not list((out / "checkpoints").glob("*.tmp"))
    finish([*arguments, "--resume"])
    same(what_is_left(tmp_path / "whole"), what_is_left(out))


def test_two_processes_do_not_share_a_run_folder(model_dir, tmp_path):
    out = tmp_path / "run"
    arguments = command("train_sft.py", model_dir, tmp_path, out, steps=100_000)
    first = start(arguments)
    wait_for_step(out, first)
    second = start([*arguments, "--resume"])
    _, said = second.communicate(timeout=60)
    assert second.returncode == 2 and f"at work in it is process {first.pid}" in said
    first.kill()  # its lock dies with it
    first.communicate()
    third = start([*arguments, "--resume"])
    have = len(checkpoints(out))
    wait_for_step(out, third, have + 1)
    assert third.poll() is None
    third.kill()
    third.communicate()


def test_the_newest_and_the_best_checkpoints_are_kept(script, model_dir, tmp_path):
    """--keep 2 of ten: the last two, and the best one (of those with a score, in RL)."""
    arguments = [*command(script, model_dir, tmp_path, tmp_path / "run", steps=10), "--keep", "2"]
    if script == "train_rl.py":
        arguments[arguments.index("--eval-every") + 1] = "1"
    else:
        arguments += ["--lr", "1", "--warmup", "0"]  # the loss rises
    finish(arguments)
    column, sign = ("val_loss", -1) if script == "train_sft.py" else ("score", 1)
    rows = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if column in r]
    first = 0 if script == "train_sft.py" else 1  # RL saves no checkpoint of where it starts
    best = max((r for r in rows if r["step"] >= first), key=lambda r: sign * r[column])["step"]
    assert [step for step, _ in checkpoints(tmp_path / "run")] == sorted({best, 9, 10})
    assert best < 9 or script == "train_rl.py"  # so the test shows something
    if script == "train_sft.py":
        table = json.loads((tmp_path / "run" / "checkpoints.json").read_text())
        assert [r["step"] for r in table] == [best, 9, 10]
