"""The pipeline end to end on a toy budget, and its cache."""

import json
import signal
from dataclasses import replace

import pytest
from conftest import sums

import pipeline
from nanopcf import evaluate, report
from nanopcf.data import read_examples, write_jsonl
from nanopcf.run import config, machine, stages

TOY = pipeline.PipelineConfig(
    preset="tiny",
    corpus=400,
    base_steps=12,
    base_batch=16,
    pool=60,
    candidates=("uniform-20", "hard-20"),
    val=16,
    test=24,
    sft_steps=6,
    sft_checkpoints=3,
    passk=2,
    every_regime=("uniform-20",),
    rl_prompts=16,
    rl_steps=4,
    rl_batch=4,
    rl_group=4,
    rl_points=4,
    workers=2,
    threads=1,
    device="cpu",
)


def stamps(out) -> dict[str, int]:
    names = ("data", "base", "candidates", "sft", "select", "rl")
    return {n: (out / f"{n}.json").stat().st_mtime_ns for n in names}


def test_pipeline_end_to_end_and_its_cache(tmp_path, capfd):
    """The report's fixed keys; a second run reruns nothing, a changed flag only what depends on it."""
    c = replace(TOY, out=str(tmp_path / "run"))
    result = pipeline.main(c)
    saved = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {"seed", "preset", "candidates", "branches", "selector", "environment", "elapsed_s"} <= set(saved)
    assert {"name", "size", "difficulty", "min_val_loss", "checkpoints"} <= set(saved["candidates"][0])
    assert {"dataset", "sft_step", "regime", "x_sft", "p_sft", "a_post", "pl_rl", "status"} <= set(saved["branches"][0])
    assert {"chosen", "spearman", "pearson"} <= set(saved["selector"])
    assert {b["dataset"] for b in saved["branches"]} == {"base", "uniform-20", "hard-20"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "") and page.count("data:image/png") == 4

    before = stamps(tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a run"):
        pipeline.main(c)
    # a run folder that was moved is the same run; what it read lies in it
    (tmp_path / "run").rename(tmp_path / "moved")
    c = replace(c, out=str(tmp_path / "moved") + "/")
    again = pipeline.main(replace(c, resume=True))
    assert stamps(tmp_path / "moved") == before and not (tmp_path / "run").exists()
    assert [b["curve"] for b in again["branches"]] == [b["curve"] for b in result["branches"]]
    compare = dict(paradigms=("grpo", "luffy"), paradigm_flops=5e9, paradigm_seeds=1)
    changed = pipeline.main(replace(c, resume=True, rl_lr=1e-3, **compare))
    after = stamps(tmp_path / "moved")
    assert [n for n in after if after[n] != before[n]] == ["rl"]
    assert changed["candidates"] == result["candidates"]

    # every paradigm from both starts, until the same total is spent
    rows = changed["paradigms"]
    assert [(r["algo"], r["start"]) for r in rows] == [
        ("grpo", "base"),
        ("grpo", "sft"),
        ("luffy", "base"),
        ("luffy", "sft"),
    ]
    for r in rows:
        assert (r["x_sft"] > 0) == (r["start"] == "sft") and r["curve"][0]["x"] == r["x_sft"]
        assert 5e9 <= r["curve"][-1]["x"] < 6e9
    page = (tmp_path / "moved" / "report.html").read_text()
    assert page.count("data:image/png") == 5 and "Every paradigm at equal compute" in page

    # all that is judged follows to the last bit from what report.json holds of the measurements
    saved = json.loads((tmp_path / "moved" / "report.json").read_text())
    measured = "dataset sft_step regime x_sft p_sft curve best out_of_signal train_pass_rate".split()
    measured += ["greedy_before", "greedy_after"]
    branches = [{key: b[key] for key in measured} for b in saved["branches"]]
    measured = "name min_val_loss recommended_step recommended_regime score pass_at_k".split()
    ranking = [{key: r[key] for key in measured} for r in saved["selector"]["ranking"]]
    unjudged = saved | {"branches": branches, "selector": {"chosen": saved["selector"]["chosen"], "ranking": ranking}}
    assert json.loads(json.dumps(report.judge(unjudged | {"claims": [], "paradigms": []}))) == saved


def interrupt(*arguments):
    raise KeyboardInterrupt


def test_a_given_model_on_given_problems(tmp_path, model_dir, monkeypatch):
    """--data: no pretraining, the file cut into disjoint parts, the given model as base; the test file's problems left
    out."""
    train, test = sums(90, 3), sums(12, 4)
    write_jsonl(tmp_path / "train.jsonl", [*train, test[0]])
    write_jsonl(tmp_path / "test.jsonl", test)
    c = replace(
        TOY,
        model=str(model_dir),
        data=str(tmp_path / "train.jsonl"),
        test_data=str(tmp_path / "test.jsonl"),
        out=str(tmp_path / "run"),
        candidates=("uniform-20",),
        max_new_tokens=16,
        pack_length=64,
    )
    result = pipeline.main(c)
    assert result["branches"][0]["dataset"] == "base" and result["base"]["parameters"] == 16_064
    parts = {n: read_examples(tmp_path / "run" / "data" / f"{n}.jsonl") for n in ("test", "val", "rl", "corpus")}
    assert [e.prompt for e in parts["test"]] == [e.prompt for e in test]
    prompts = [e.prompt for n in ("val", "rl", "corpus") for e in parts[n]]
    assert sorted(prompts) == sorted({e.prompt for e in train} - {e.prompt for e in test})
    page = (tmp_path / "run" / "report.html").read_text()
    assert "generated mathematics" not in page and str(tmp_path / "train.jsonl") in page
    # the same files and the same model by another path: nothing is run again
    before = stamps(tmp_path / "run")
    (tmp_path / "moved").mkdir()
    for name in ("train.jsonl", "model"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    moved = dict(data=str(tmp_path / "moved" / "train.jsonl"), model=str(tmp_path / "moved" / "model"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(report, "sample_answers", interrupt)  # after all stages
        pipeline.main(replace(c, resume=True, **moved))
    assert stamps(tmp_path / "run") == before
    for name in ("train.jsonl", "model"):
        (tmp_path / "moved" / name).rename(tmp_path / name)
    write_jsonl(tmp_path / "train.jsonl", train)
    with pytest.raises(ValueError, match=r"train\.jsonl has changed since the run in .* began"):
        pipeline.main(replace(c, resume=True))
    with pytest.raises(ValueError, match="--val and --rl-prompts alone take 2000"):
        pipeline.main(replace(c, out=str(tmp_path / "other"), val=1984))


@pytest.mark.parametrize("preset", [p.stem for p in pipeline.PRESETS.glob("*.toml")])
def test_presets_are_whole(preset, tmp_path):
    """Every preset makes a valid config; those for real models say what they need."""
    needs = {"smollm2": ["--model", "x"], "smoke": ["--model", "x"]}.get(preset, [])
    real = ["--data", "a", "--test-data", "b"] if needs or preset.startswith("qwen") else []
    c = config.parse(
        pipeline.PipelineConfig, "", ["--preset", preset, *needs, *real], presets=pipeline.PRESETS, preset="demo"
    )
    assert c.preset == preset and bool(c.data) == bool(real)


def test_seed_changes_the_numbers(tmp_path):
    """Down to the first stage: other data, another base model."""
    losses, data = [], []
    with pipeline.worker_pool(1) as pool:
        for seed in (1, 2):
            c = replace(TOY, base_steps=2, seed=seed)
            folder = tmp_path / str(seed)
            folder.mkdir()
            files = pipeline.make_data(c, folder)
            data.append(read_examples(files["test"]))
            losses.append(pipeline.train_base(c, folder, files, 1, pool)["pretrain_loss"])
        # The same pool, to spare the start of another: a worker that the system kills is named.
        with pytest.raises(ValueError, match=r"process \d+ by SIGKILL; at work: job\..* --workers .* --resume"):
            stages.run_parallel("a killed job", {"job": (signal.raise_signal, signal.SIGKILL)}, pool, tmp_path)
    assert losses[0] != losses[1] and data[0] != data[1]


def test_a_real_model_is_scored_with_a_probed_number_of_threads(model_dir, tmp_path, monkeypatch):
    """It is probed once (0): a resumed stage, which finds the same folder, scores with the same number."""
    given = []

    def set_threads(threads, model):
        given.append(threads)
        return threads or 3

    def open_model(c):
        settings = pipeline.scoring(c, str(model_dir), {"test": "t.jsonl"}, tmp_path / "score")
        evaluate.open_model(settings, settings.out)

    monkeypatch.setattr(machine, "set_threads", set_threads)
    open_model(TOY)
    real = replace(TOY, data="x", test_data="y", model=str(model_dir), threads=0)
    open_model(real)
    assert pipeline.scoring(replace(real, verifier="ours"), "m", {"test": "t"}, tmp_path / "score").verifier == "ours"
    rl = pipeline.rl_config(replace(real, verifier="ours"), "m", {"rl": "r", "test": "t"}, tmp_path)
    assert rl.verifier == "ours"
    open_model(real)
    open_model(replace(real, threads=2))
    assert given == [1, 0, 3, 3, 2]  # TOY has --threads 1
