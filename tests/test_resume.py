"""What a resumed run finds: nothing of others is touched, nothing lost is passed over, nothing harmless is refused."""

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import last_weights, run_script, stop_after, write_rows

import pipeline
import train_rl
import train_sft
from nanopcf import evaluate, sampler, scoring
from nanopcf.report import study
from nanopcf.run import files, machine
from nanopcf.run.folder import Metrics, checkpoints, lock
from nanopcf.run.stages import Stages, open_pipeline


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path, place: int = -1) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def newest(out: Path) -> Path:
    return checkpoints(out)[-1][1]


# ---- folders of others ----


@pytest.fixture
def commands(sft, rl, model_dir):
    evaluation = evaluate.EvaluateConfig(
        model=str(model_dir), data=(rl.val,), max_new_tokens=2, verifier="ours", device="cpu"
    )
    toy = pipeline.PipelineConfig(preset="tiny", device="cpu", threads=1)
    return [(pipeline, toy), (train_sft, sft), (train_rl, rl), (evaluate, evaluation)]


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_others_stays_as_it_is(resume, commands, model_dir, tmp_path):
    """A model folder has a config.json, and a file named lock is no sign of a run."""
    shutil.copytree(model_dir, tmp_path / "theirs")
    (tmp_path / "theirs" / "data").mkdir()
    (tmp_path / "theirs" / "data" / "precious.csv").write_text("years of work")
    shutil.copytree(tmp_path / "theirs", tmp_path / "locked")
    (tmp_path / "locked" / "config.json").rename(tmp_path / "locked" / "lock")
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "lock").write_text("of a door")
    for name in ("theirs", "locked", "key"):
        before = content(tmp_path / name)
        for module, c in commands:
            with pytest.raises(ValueError, match="not empty and not a run folder"):
                module.main(replace(c, out=str(tmp_path / name), resume=resume))
        assert content(tmp_path / name) == before


def test_a_run_of_another_command_is_not_entered(commands, tmp_path):
    train_sft.main(commands[1][1])
    before = content(tmp_path / "sft")
    for module, c in commands:
        if module is not train_sft:
            with pytest.raises(ValueError, match="holds the run of another command"):
                module.main(replace(c, out=str(tmp_path / "sft"), resume=True))
    assert content(tmp_path / "sft") == before


def test_a_stage_clears_only_what_it_wrote(tmp_path, monkeypatch):
    c = pipeline.PipelineConfig()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious.csv").write_text("years of work")
    with pytest.raises(ValueError, match=r"data is not of this run; move it away"):
        Stages(c, tmp_path).run("data", "seed", lambda c, folder: {})
    (tmp_path / "base.json").write_text('{"years": "of work"}')
    with pytest.raises(ValueError, match=r"base\.json is not of this run; move it away"):
        Stages(c, tmp_path).run("base", "seed", lambda c, folder: {})
    assert (tmp_path / "data" / "precious.csv").exists() and "years" in (tmp_path / "base.json").read_text()

    # its own folder goes when a setting changes; a kill in the middle of that doesn't leave a half for the whole
    def work(c, folder):
        (folder / "file").write_text(str(c.seed))
        return c.seed

    def killed(folder):
        (folder / "file").unlink()
        raise KeyboardInterrupt

    assert Stages(c, tmp_path).run("sft", "seed", work) == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        Stages(replace(c, seed=1), tmp_path).run("sft", "seed", work)
    assert Stages(c, tmp_path).run("sft", "seed", work) == 0 and (tmp_path / "sft" / "file").exists()


def test_a_damaged_record_of_a_stage_is_named(tmp_path):
    """Of one that has ended, of one under way, and of one that an older version wrote, without a sum."""
    c, path = pipeline.PipelineConfig(), tmp_path / "sft.json"

    def run(work=lambda *_: {"score": 0.5, "b": (1, 2), "a": 1}):
        return Stages(c, tmp_path).run("sft", "seed", work)

    assert run() == run()
    whole = files.read_json(path)
    older = {name: value for name, value in whole.items() if name != "sha256"}
    damaged = [whole | {"result": {"score": 0.6}}, whole | {"done": False}, older | {"data": [1]}]
    damaged += [{name: value for name, value in older.items() if name != gone} for gone in ("result", "elapsed_s")]
    for record in damaged:
        path.write_text(json.dumps(record))
        with pytest.raises(ValueError, match=r"sft\.json: damaged; put it back, or remove it and .*sft, and --resume"):
            run()
    path.write_text(json.dumps(older))
    assert run(work=None) == whole["result"]
    path.unlink()
    (tmp_path / "sft").rmdir()
    assert run()["score"] == 0.5


def test_a_study_enters_only_a_study(tmp_path):
    """It writes study.json, study.md and figures, and a folder for each seed."""
    c = pipeline.PipelineConfig(preset="tiny", seeds=2)
    for name in ("theirs", "seed"):
        (tmp_path / name / "seed-1").mkdir(parents=True)
        (tmp_path / name / "study.md").write_text("years of work")
        (tmp_path / name / "seed-1" / "of a plant").touch()
    (tmp_path / "theirs" / "seed-1" / "of a plant").unlink()
    for name in ("theirs", "seed"):
        before = content(tmp_path / name)
        for resume in (False, True):
            with pytest.raises(ValueError, match="not empty and not"):
                study.run_seeds(replace(c, out=str(tmp_path / name), resume=resume), None)
        assert content(tmp_path / name) == before

    def killed(config):
        with open_pipeline(Path(config.out), config):
            raise KeyboardInterrupt

    c = replace(c, out=str(tmp_path / "ours"))
    for config in (c, replace(c, resume=True)):
        with pytest.raises(KeyboardInterrupt):
            study.run_seeds(config, killed)
        (tmp_path / "ours" / "log.txt").write_text("of a user")


def test_a_step_that_is_no_number_is_damage(sft, tmp_path):
    train_sft.main(sft)
    with (tmp_path / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": "x"}\n')
    train_sft.main(replace(sft, resume=True))  # after the last checkpoint: it is dropped
    (tmp_path / "sft" / "metrics.jsonl").write_text('{"step": null}\n')
    with pytest.raises(ValueError, match=r"lines up to step .* are lost or changed"):
        train_sft.main(replace(sft, resume=True))


def test_the_paths_in_a_result_follow_what_was_moved(tmp_path):
    """Of the run folder, and of the data and the model, which lie elsewhere."""

    def work(c, folder):
        return {"file": str(folder / "x"), "data": c.data, "text": "datasets"}

    (tmp_path / "data").write_text("content")
    c = pipeline.PipelineConfig(data=str(tmp_path / "data"), test_data="t", model="m")
    (tmp_path / "run").mkdir()
    Stages(c, tmp_path / "run").run("first", "data", work)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    (tmp_path / "data").rename(tmp_path / "given")
    stages = Stages(replace(c, data=str(tmp_path / "given")), tmp_path / "elsewhere")
    expected = {"file": str(tmp_path / "elsewhere" / "first" / "x"), "data": str(tmp_path / "given")}
    assert stages.run("first", "data", lambda *_: None) == expected | {"text": "datasets"}


# ---- the lock ----


def test_without_its_file_the_lock_still_holds(sft, tmp_path):
    with lock(tmp_path / "run", sft):
        (tmp_path / "run" / "lock").unlink()
        with pytest.raises(ValueError, match="at work in it is"), lock(tmp_path / "run", sft):
            pass
    with lock(tmp_path / "run", sft):
        pass


def test_a_run_does_not_write_into_another_folder_of_its_name(sft, tmp_path, monkeypatch):
    """Its folder was moved and another one made, in which another process may be at work."""

    def swap(self, **row):
        (tmp_path / "sft").rename(tmp_path / "moved")
        (tmp_path / "sft").mkdir()
        return log(self, **row)

    log = Metrics.log
    monkeypatch.setattr(Metrics, "log", swap)
    with pytest.raises(ValueError, match="another folder than when the run began"):
        train_sft.main(sft)
    assert not list((tmp_path / "sft").iterdir())


# ---- what was lost or damaged ----


def lose_a_line(out: Path) -> None:
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:2] + lines[3:]))


def tear_a_line(out: Path) -> None:
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join([*lines[:2], lines[2][:9] + "\n", *lines[3:]]))


def dangle(out: Path) -> None:
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints").symlink_to(out / "nowhere")


def say_another_step(out: Path) -> None:
    path = newest(out) / "state.json"
    state = files.read_json(path)
    files.write_json(path, {"step": 2, "threads": state["threads"]})  # without sums, as older versions wrote it


DAMAGE = [
    ("a line of the metrics lost", lose_a_line, r"metrics\.jsonl: lines up to step 4 are lost or changed"),
    ("one torn", tear_a_line, r"metrics\.jsonl, line 3: damaged"),
    ("one changed", lambda out: flip(out / "metrics.jsonl", 20), r"metrics\.jsonl: lines .* lost or changed|line 1"),
    ("all of them lost", lambda out: (out / "metrics.jsonl").unlink(), r"metrics\.jsonl"),
    ("checkpoints moved away", lambda out: shutil.rmtree(out / "checkpoints"), "there is no checkpoint; put"),
    ("a link to them that leads nowhere", dangle, "checkpoints"),
    ("a state of another step", say_another_step, "state of step 2"),
    ("a bit of the weights", lambda out: flip(newest(out) / "model.safetensors"), r"model\.safetensors: damaged"),
    ("a bit of the optimizer", lambda out: flip(newest(out) / "optimizer.safetensors"), r"optimizer.*: damaged"),
]


@pytest.fixture
def cut(sft, monkeypatch) -> train_sft.SFTConfig:
    """A run that was killed after step 4 of 6, to be resumed."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, train_sft, 3)  # steps 0, 2, 4
        train_sft.main(sft)
    return replace(sft, resume=True)


def test_what_was_lost_or_damaged_is_refused_and_nothing_else_goes(cut, tmp_path):
    for name, damage, message in DAMAGE:
        out = tmp_path / "damaged"
        shutil.copytree(cut.out, out)
        damage(out)
        before = content(out)
        with pytest.raises((ValueError, OSError), match=message):
            train_sft.main(replace(cut, out=str(out)))
        changed = {path for path, data in (content(out).items() ^ before.items())}
        assert changed <= {"lock", "config.json"}, name  # who holds the folder, and its new name
        shutil.rmtree(out)
    # as the message advises, the run goes on from the checkpoint before the damaged one, and ends with the same bits
    shutil.copytree(cut.out, tmp_path / "damaged")
    whole = train_sft.main(cut)
    flip(newest(tmp_path / "damaged") / "model.safetensors")
    with pytest.raises(ValueError, match=r"remove .*step-4, and --resume goes on from step-2"):
        train_sft.main(replace(cut, out=str(tmp_path / "damaged")))
    shutil.rmtree(newest(tmp_path / "damaged"))
    assert train_sft.main(replace(cut, out=str(tmp_path / "damaged"))) == whole
    a, b = (last_weights(tmp_path / name) for name in ("sft", "damaged"))
    assert all(a[k].equal(b[k]) for k in a | b)


def test_an_ended_run_without_its_last_checkpoint_is_not_trained_again(rl):
    curve = train_rl.main(rl)
    out = Path(rl.out)
    shutil.move(newest(out), out / "elsewhere")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"has ended, yet its last checkpoint, step-4, is gone"):
            train_rl.main(replace(rl, resume=True))
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    (out / "checkpoints").mkdir()
    shutil.move(out / "elsewhere", out / "checkpoints" / "step-4")
    assert train_rl.main(replace(rl, resume=True)) == curve


def test_every_file_of_a_checkpoint_has_its_sum(cut):
    """python -m nanopcf.checkpoint verify, on a checkpoint and on a run."""
    for folder in (cut.out, str(newest(Path(cut.out)))):
        done = run_script("-m", "nanopcf.checkpoint", "verify", folder)
        assert done.returncode == 0 and done.stdout.count("whole") == done.stdout.count("\n") > 0
    for path in sorted(newest(Path(cut.out)).iterdir()):
        if path.name == "metrics.json":  # it says what metrics.jsonl must be, which a resumed run compares
            continue
        flip(path, path.stat().st_size // 2)
        done = run_script("-m", "nanopcf.checkpoint", "verify", cut.out)
        assert done.returncode == 2 and "error: 1 of 3 checkpoints" in done.stderr, path
        assert str(path) in done.stdout.splitlines()[-1]
        flip(path, path.stat().st_size // 2)
    done = run_script("-m", "nanopcf.checkpoint", "verify", cut.model)
    assert done.returncode == 2 and "state.json" in done.stdout + done.stderr


def test_answers_that_were_corrected_are_scored_anew(commands, tmp_path):
    """Also where the run holds no fingerprint of its data."""
    _, c = commands[-1]
    rows = [{"prompt": p, "answer": "0"} for p in "+-*="]
    c = replace(c, data=(write_rows(tmp_path / "d.jsonl", rows),), out=str(tmp_path / "scores"))
    evaluate.main(c)
    evaluate.main(replace(c, resume=True))
    config = tmp_path / "scores" / "config.json"
    files.write_json(config, {k: v for k, v in files.read_json(config).items() if k != "fingerprints"})
    write_rows(tmp_path / "d.jsonl", [*rows[:2], {"prompt": "*", "answer": "1"}, *rows[3:]])
    with pytest.raises(ValueError, match=r"d\.jsonl, line 3: not what was asked in line 3 of the data; remove"):
        evaluate.main(replace(c, resume=True))


# ---- what a kill leaves ----


def test_checkpoints_that_a_kill_left_aside_come_back_or_go(cut, tmp_path):
    """Killed while the newest one was replaced, and while an older one was pruned."""
    shutil.copytree(cut.out, tmp_path / "left")
    whole = train_sft.main(cut)
    folder = tmp_path / "left" / "checkpoints"
    (folder / "step-4").rename(folder / "step-4.old")
    shutil.copytree(folder / "step-4.old", folder / "step-4.tmp")
    (folder / "step-4.tmp" / "state.json").unlink()
    (folder / "step-0").rename(folder / "step-0.old")
    assert train_sft.main(replace(cut, out=str(tmp_path / "left"))) == whole[1:]
    assert sorted(path.name for path in folder.iterdir()) == ["step-2", "step-4", "step-6"]
    a, b = (last_weights(tmp_path / name) for name in ("sft", "left"))
    assert all(a[k].equal(b[k]) for k in a | b)


def test_a_checkpoint_that_is_there_is_not_written_again(rl):
    """A run that was killed after its last save, before it wrote the curve."""
    curve = train_rl.main(rl)
    path = newest(Path(rl.out)) / "model.safetensors"
    before = path.stat().st_ino
    (Path(rl.out) / "curve.json").unlink()
    assert train_rl.main(replace(rl, resume=True)) == curve and path.stat().st_ino == before
    kept = [step for step, folder in checkpoints(Path(rl.out)) if (folder / "optimizer.safetensors").exists()]
    assert kept == [2, 4]


def test_a_full_disk_names_the_file_and_leaves_none(tmp_path):
    """A limit on the size of files stands for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in (files.write_text, files.append_text):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(OSError, match="too large") as raised:
                write(tmp_path / "x.json", "x" * 5000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert raised.value.filename == str(tmp_path / "x.json")
        assert not (tmp_path / "x.json.tmp").exists()


# ---- what is harmless ----


def test_a_run_that_lies_elsewhere_goes_on(cut, tmp_path, monkeypatch):
    """Moved, under another name of its folder, its files and its model, with another --keep."""
    shutil.copytree(cut.out, tmp_path / "copy")
    whole = train_sft.main(cut)
    (tmp_path / "inputs").mkdir()
    for name in ("train", "val", "model"):
        shutil.move(getattr(cut, name), tmp_path / "inputs" / name)
    monkeypatch.chdir(tmp_path)
    moved = replace(cut, out="copy/", model="inputs/model/", train="inputs/train", val="inputs/../inputs/val")
    assert train_sft.main(replace(moved, keep=2)) == whole[2:]
    flip(tmp_path / "inputs" / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="inputs/model/ has changed since the run"):
        train_sft.main(moved)


def test_a_run_of_an_older_version_goes_on(rl, tmp_path, monkeypatch):
    """Without a mark, without sums, with free memory for another number of slots."""
    whole = train_rl.main(rl)
    cut = replace(rl, out=str(tmp_path / "cut"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, train_rl, 1)
        train_rl.main(cut)
    config, folder = tmp_path / "cut" / "config.json", newest(tmp_path / "cut")
    saved = {k: v for k, v in files.read_json(config).items() if k not in ("fingerprints", "written_by")}
    files.write_json(config, saved | {"out": cut.out})
    state = files.read_json(folder / "state.json")
    files.write_json(folder / "state.json", {k: v for k, v in state.items() if k not in ("sha256", "slots")})
    (folder / "metrics.json").unlink()
    assert train_rl.main(replace(cut, resume=True)) == whole


# ---- what a run chose by looking at the machine ----


def test_rl_keeps_its_slots(rl, monkeypatch):
    used, generate = [], sampler.Sampler.generate
    monkeypatch.setattr(sampler.Sampler, "generate", lambda s, *a, **k: used.append(s.slots) or generate(s, *a, **k))
    monkeypatch.setattr(machine, "free_memory", lambda device: 200_000)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, train_rl, 1)
        train_rl.main(rl)
    (slots,) = set(used)
    monkeypatch.setattr(machine, "free_memory", lambda device: 1 << 40)
    train_rl.main(replace(rl, resume=True))
    assert 1 < slots < 256 and set(used) == {slots}


def test_an_evaluation_keeps_its_slots_and_threads(commands, tmp_path, monkeypatch):
    _, c = commands[-1]
    used, complete = [], scoring.complete
    monkeypatch.setattr(scoring, "complete", lambda *a, **k: used.append(a[0].slots) or complete(*a, **k))
    set_threads = []
    for memory, threads in ((20_000, 2), (1 << 40, 3)):
        monkeypatch.setattr(machine, "free_memory", lambda device, memory=memory: memory)
        monkeypatch.setattr(machine, "set_threads", lambda n, model, t=threads: set_threads.append(n or t) or n or t)
        evaluate.main(replace(c, out=str(tmp_path / "e"), resume=memory > 20_000))
        (tmp_path / "e" / "rl.jsonl").unlink()
    assert len(set(used)) == 1 and used[0] < 256
    assert set_threads[-1] == 2


def test_a_pipeline_probes_once(tmp_path, monkeypatch):
    for seconds in ({1: 1.0, 2: 0.1}, {1: 0.1, 2: 1.0}):
        monkeypatch.setattr(machine, "time_threads", lambda model, seconds=seconds: seconds)
        threads, _ = machine.share_cores(0, 0, machine.choose_device("cpu"), object(), tmp_path)
        assert threads == 2
    assert machine.share_cores(1, 0, machine.choose_device("cpu"), object(), tmp_path)[0] == 1
    (tmp_path / "chosen.json").write_text(json.dumps({"threads": "all"}))
    with pytest.raises(ValueError, match=r"chosen\.json: threads is 'all', expected a number"):
        machine.share_cores(0, 0, machine.choose_device("cpu"), object(), tmp_path)
