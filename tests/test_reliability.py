"""Nothing lost: runs are killed, stopped, starved of disk and started twice, and end as if nothing had been.

NANOPCF_KILLS=50 pytest tests/test_reliability.py -k killed        the longer run of the killing
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, write_rows
from safetensors.torch import load_file

from nanopcf import runs
from nanopcf.data import write_jsonl
from nanopcf.tasks import make_examples

KILLS = int(os.environ.get("NANOPCF_KILLS", "3"))
TIMED = {"seconds", "tokens_per_s", "generation_share", "scoring_share", "update_share"}


def command(script: str, model_dir: Path, tmp_path: Path, out: Path, steps: int = 40) -> list[str]:
    flags = dict(model=model_dir, out=out, steps=steps, checkpoint_every=1, device="cpu", threads=1)
    if script == "train_sft.py":
        if not (tmp_path / "train.jsonl").exists():
            write_jsonl(tmp_path / "train.jsonl", make_examples("digits", 40, 0))
            write_jsonl(tmp_path / "val.jsonl", make_examples("digits", 10, 1))
        flags |= dict(train=tmp_path / "train.jsonl", val=tmp_path / "val.jsonl", batch=8)
    else:
        rows = [{"prompt": p, "trajectory": a, "answer": a} for p, a in zip("+-*=", "0123", strict=True)]
        path = write_rows(tmp_path / "rl.jsonl", rows)
        flags |= dict(
            train=path,
            val=path,
            algo="upt",
            prompts=4,
            update_prompts=2,
            group=4,
            max_new_tokens=3,
            eval_every=7,
        )
    return [
        sys.executable,
        script,
        *(part for k, v in flags.items() for part in ("--" + k.replace("_", "-"), str(v))),
    ]


def start(arguments: list[str], **options) -> subprocess.Popen:
    return subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options
    )


def finish(arguments: list[str]) -> str:
    process = start(arguments)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


def wait_for_step(out: Path, process: subprocess.Popen, count: int = 2) -> None:
    while process.poll() is None and len(runs.checkpoints(out)) < count:
        time.sleep(0.02)


def what_is_left(out: Path) -> tuple:
    """Weights, optimizer and metrics at the end of a run, without what a clock wrote."""
    step, folder = runs.checkpoints(out)[-1]
    tensors = {
        f"{f}/{k}": v
        for f in ("model", "optimizer")
        for k, v in load_file(folder / f"{f}.safetensors").items()
    }
    lines = (out / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]
    return step, tensors, rows, runs.read_json(folder / "state.json")


def same(a: tuple, b: tuple) -> None:
    assert a[0] == b[0] and a[2] == b[2] and a[3] == b[3]
    assert a[1].keys() == b[1].keys() and all(a[1][k].equal(b[1][k]) for k in a[1])


@pytest.fixture(params=["train_sft.py", "train_rl.py"])
def script(request) -> str:
    return request.param


def test_killed_at_any_moment_and_resumed_a_run_ends_as_if_it_had_not_been(script, model_dir, tmp_path):
    """SIGKILL after a random time, most of them in or near a save (there is one a step), until the run is through."""
    finish(command(script, model_dir, tmp_path, tmp_path / "whole"))
    arguments = command(script, model_dir, tmp_path, tmp_path / "cut")
    rng, killed = random.Random(0), 0
    for attempt in range(10 * KILLS):
        if killed == KILLS:
            break
        process = start(arguments + ["--resume"] * (attempt > 0))
        have = len(runs.checkpoints(tmp_path / "cut"))
        wait_for_step(tmp_path / "cut", process, have + 1)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
    assert killed > 0
    finish([*arguments, "--resume"])
    same(what_is_left(tmp_path / "whole"), what_is_left(tmp_path / "cut"))
    assert not list((tmp_path / "cut" / "checkpoints").glob("*.tmp"))


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
    assert runs.checkpoints(tmp_path / "cut")[-1][0] > 0
    finish([*arguments, "--resume"])
    a, b = what_is_left(tmp_path / "whole"), what_is_left(tmp_path / "cut")
    assert a[1].keys() == b[1].keys() and all(a[1][k].equal(b[1][k]) for k in a[1])


def test_a_second_signal_ends_at_once(model_dir, tmp_path):
    with runs.at_work(tmp_path) as asked:
        assert asked() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() == signal.SIGTERM
    code = f"""
import os, signal
from pathlib import Path
from nanopcf import runs
with runs.at_work(Path({str(tmp_path)!r})):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    print("never")
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 130 and "never" not in result.stdout


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(model_dir, tmp_path):
    """A limit on the size of files stands for the disk: the third save fails in the middle of a file."""
    out = tmp_path / "run"
    finish(command("train_sft.py", model_dir, tmp_path, tmp_path / "whole"))
    arguments = command("train_sft.py", model_dir, tmp_path, out)
    process = start(arguments)
    wait_for_step(out, process, 3)
    process.kill()
    process.communicate()
    step = runs.checkpoints(out)[-1][0]
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    process = start([*arguments, "--resume"], preexec_fn=small)
    _, said = process.communicate(timeout=60)
    assert (
        process.returncode == 2
        and said.strip().splitlines()[-1].startswith("error: ")
        and "Traceback" not in said
    )
    assert runs.checkpoints(out)[-1][0] == step and not list((out / "checkpoints").glob("*.tmp"))
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
    have = len(runs.checkpoints(out))
    wait_for_step(out, third, have + 1)
    assert third.poll() is None
    third.kill()
    third.communicate()
