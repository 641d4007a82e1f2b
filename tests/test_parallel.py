"""Two processes and bfloat16 weights train what one float32 process trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TIMED, sums, write_rows
from safetensors.torch import load_file


def script(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_weights(a: Path, b: Path) -> float:
    """Largest difference of any weight."""
    one, two = (load_file(f / "model.safetensors") for f in (a, b))
    return max((one[k] - two[k]).abs().max().item() for k in one)


@pytest.fixture
def files(tmp_path):
    paths = []
    for i, name in enumerate(("train", "val")):
        rows = [dict(prompt=e.prompt, trajectory=e.trajectory, answer=e.answer) for e in sums(24, i)]
        paths.append(write_rows(tmp_path / f"{name}.jsonl", rows))
    return paths


def test_sft_on_two_processes_is_sft_on_one(model_dir, files, tmp_path):
    """Same losses, same weights up to rounding; the rows don't divide evenly, and rank 0 alone writes and speaks."""
    common = [
        "train_sft.py",
        "--model",
        str(model_dir),
        "--train",
        files[0],
        "--val",
        files[1],
        "--steps",
        "4",
        "--batch",
        "7",
        "--checkpoint-every",
        "2",
        "--micro-rows",
        "2",
        "--pack-length",
        "40",
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    for n in (1, 2):
        done = script(*common, "--out", str(tmp_path / f"run{n}"), processes=n)
        assert done.returncode == 0, done.stderr
    assert done.stderr.count("SFT: 24 trajectories") == 1
    one, two = metrics(tmp_path / "run1"), metrics(tmp_path / "run2")
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for a, b in zip(one, two, strict=True):
        for key in a.keys() - TIMED:
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
    last = "checkpoints/step-4"
    assert same_weights(tmp_path / "run1" / last, tmp_path / "run2" / last) < 1e-5


def test_rl_on_two_processes_is_rl_on_one(model_dir, files, tmp_path):
    """The same answers are drawn, the same groups kept, the same curve; also the KL, which needs every token's
    score."""
    rl = [
        "train_rl.py",
        "--model",
        str(model_dir),
        "--train",
        files[0],
        "--val",
        files[1],
        "--algo",
        "grpo",
        "--steps",
        "3",
        "--prompts",
        "5",
        "--update-prompts",
        "3",
        "--group",
        "4",
        "--eval-every",
        "3",
        "--micro-rows",
        "2",
        "--pack-length",
        "64",
        "--threads",
        "1",
        "--max-new-tokens",
        "12",
        "--old-logprobs",
        "recomputed",
        "--device",
        "cpu",
    ]
    for n in (1, 2):
        done = script(*rl, "--out", str(tmp_path / f"run{n}"), processes=n)
        assert done.returncode == 0, done.stderr
    one, two = metrics(tmp_path / "run1"), metrics(tmp_path / "run2")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        for key in a.keys() - TIMED - {"peak_memory_mib"}:
            rounding = 1e-4 if key.startswith("delta_logprob") else 1e-6  # the former is nothing but rounding
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=rounding), key
    assert json.loads((tmp_path / "run1" / "curve.json").read_text()) == json.loads(
        (tmp_path / "run2" / "curve.json").read_text()
    )
    assert same_weights(*(tmp_path / f"run{n}" / "checkpoints" / "step-3" for n in (1, 2))) < 1e-5
