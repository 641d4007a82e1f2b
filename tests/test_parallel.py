"""Two processes and bfloat16 weights train what one float32 process trains, and a sharded optimizer changes no bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TIMED, run_script, sums, write_rows
from safetensors.torch import load_file

from nanopcf.model import Transformer
from nanopcf.optim import Optimizer
from nanopcf.run import parallel

LAST = "checkpoints/step-4"
# What each of the processes runs: one command after the other, each a list of arguments.
SEVERAL = """
import json, runpy, sys
for sys.argv in json.load(open(sys.argv[1])):
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def in_two_processes(folder: Path, *commands: list[str]) -> str:
    """Run the commands, each in the same two processes: a start costs seconds. Returns what they said on stderr."""
    (folder / "several.py").write_text(SEVERAL)
    (folder / "commands.json").write_text(json.dumps(commands))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += [str(folder / "several.py"), str(folder / "commands.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(launch, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


def in_one_process(command: list[str]) -> None:
    done = run_script(*command)
    assert done.returncode == 0, done.stderr


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def difference(a: Path, b: Path, file: str = "model.safetensors") -> float:
    """Largest difference of any number in two checkpoints."""
    one, two = (load_file(folder / file) for folder in (a, b))
    assert one.keys() == two.keys()
    return max((one[k].float() - two[k].float()).abs().max().item() for k in one)


def cut(run: Path, copy: Path) -> Path:
    """A copy of a run as a kill after half of its four steps would have left it."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / LAST)
    (copy / "checkpoints.json").unlink()
    return copy


@pytest.fixture
def files(tmp_path):
    paths = []
    for i, name in enumerate(("train", "val")):
        rows = [dict(prompt=e.prompt, trajectory=e.trajectory, answer=e.answer) for e in sums(24, i)]
        paths.append(write_rows(tmp_path / f"{name}.jsonl", rows))
    return paths


def test_sft_on_two_processes_is_sft_on_one(model_dir, files, tmp_path):
    """Same losses, same weights up to rounding; the rows don't divide evenly, and rank 0 alone writes and speaks. The
    same bits with a sharded optimizer, whose run goes on in one process, as one process's run goes on sharded."""
    sft = ["train_sft.py", "--model", str(model_dir), "--train", files[0], "--val", files[1], "--steps", "4"]
    sft += ["--batch", "7", "--checkpoint-every", "2", "--micro-rows", "2", "--pack-length", "40", "--threads", "1"]
    sft += ["--warmup", "0", "--device", "cpu", "--out"]
    shard, half, resume = ["--shard-optimizer"], ["--dtype", "bfloat16"], ["--resume"]
    one, two, sharded, halves, on = (tmp_path / name for name in ("one", "two", "sharded", "halves", "on"))

    in_one_process([*sft, str(one)])
    said = in_two_processes(
        tmp_path,
        [*sft, str(two)],
        [*sft, str(sharded), *shard],
        [*sft, str(cut(one, on)), *shard, *resume],
        [*sft, str(halves), *half],
        [*sft, str(halves) + "-sharded", *half, *shard],
    )
    assert said.count("SFT: 24 trajectories") == 5 and said.count("resuming after step 2") == 1
    assert [r["step"] for r in metrics(one)] == [r["step"] for r in metrics(two)]
    for a, b in zip(metrics(one), metrics(two), strict=True):
        for key in a.keys() - TIMED:
            assert a[key] == pytest.approx(b[key], rel=1e-5), key
    assert difference(one / LAST, two / LAST) < 1e-5
    for step in ("checkpoints/step-2", LAST):
        for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
            assert (two / step / file).read_bytes() == (sharded / step / file).read_bytes()
            assert (halves / step / file).read_bytes() == (tmp_path / "halves-sharded" / step / file).read_bytes()
    assert any(name.endswith(".master") for name in load_file(halves / LAST / "optimizer.safetensors"))

    # From one process to two, sharded; and from two to one, where nothing is to shard.
    assert difference(one / LAST, on / LAST) < 1e-5
    in_one_process([*sft, str(cut(sharded, tmp_path / "alone")), *resume])
    assert difference(sharded / LAST, tmp_path / "alone" / LAST) < 1e-5
    alone = cut(tmp_path / "halves-sharded", tmp_path / "half-alone")
    in_one_process([*sft, str(alone), *half, *resume])
    # Two updates move a weight by 2e-3; bfloat16 gradients are rounded otherwise where other rows share a micro-batch.
    assert difference(halves / LAST, alone / LAST, "optimizer.safetensors") < 5e-4


def test_the_others_wait_until_a_slow_disk_has_the_checkpoint(monkeypatch):
    """A 7B run saves 107 GB and reads them again, more than an hour at 50 MB/s. torch's default is half an hour."""
    given = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda backend, **options: given.update(options))
    monkeypatch.setattr(parallel.atexit, "register", lambda function: None)
    parallel.start(torch.device("cpu"))
    assert given["timeout"].total_seconds() > 2 * 107e9 / 50e6


def test_each_process_keeps_its_share_of_the_optimizer(model, monkeypatch):
    """About half of the float32 weights and of the moments, and each parameter in one of the two."""
    assert parallel.owners([5, 9, 2, 3], shard=False) == [parallel.EVERYONE] * 4
    monkeypatch.setattr(parallel, "world", lambda: 2)
    assert parallel.owners([5, 9, 2, 3], shard=True) == [1, 0, 1, 1]
    whole, kept = sum(p.numel() for p in model.parameters()), []
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        optimizer = Optimizer(Transformer(model.config).bfloat16(), shard=True)
        kept.append(sum(len(master.untyped_storage()) // 4 for master in optimizer.masters if master.stride()[-1]))
        assert sum(p.numel() for group in optimizer.adamw.param_groups for p in group["params"]) == kept[-1]
    assert sum(kept) == whole and max(kept) < 0.6 * whole


def test_rl_on_two_processes_is_rl_on_one(model_dir, files, tmp_path):
    """The same answers are drawn, the same groups kept, the same curve; also the KL, which needs every token's
    score. With a sharded optimizer, too."""
    rl = ["train_rl.py", "--model", str(model_dir), "--train", files[0], "--val", files[1], "--algo", "grpo"]
    rl += ["--steps", "3", "--prompts", "5", "--update-prompts", "3", "--group", "4", "--eval-every", "3"]
    rl += ["--micro-rows", "2", "--pack-length", "64", "--threads", "1", "--max-new-tokens", "12"]
    rl += ["--old-logprobs", "recomputed", "--device", "cpu", "--out"]
    one, two = tmp_path / "one", tmp_path / "two"
    in_one_process([*rl, str(one)])
    in_two_processes(tmp_path, [*rl, str(two), "--shard-optimizer"])
    assert len(metrics(one)) == len(metrics(two)) == 4
    for a, b in zip(metrics(one), metrics(two), strict=True):
        for key in a.keys() - TIMED - {"peak_memory_mib"}:
            rounding = 1e-4 if key.startswith("delta_logprob") else 1e-6  # the former is nothing but rounding
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=rounding), key
    curves = [json.loads((run / "curve.json").read_text()) for run in (one, two)]
    assert curves[0] == curves[1]
    assert difference(*(run / "checkpoints" / "step-3" for run in (one, two))) < 1e-5
