"""The pipeline end to end on a toy budget, its cache, and the report."""

import json
import sys
from dataclasses import replace

import pytest

import pipeline
from nanopcf import evaluate, report
from nanopcf.data import read_examples, write_jsonl
from nanopcf.report import paradigms
from nanopcf.report.text import si
from nanopcf.run import config, machine
from nanopcf.tasks import make_examples

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
    again = pipeline.main(replace(c, resume=True))
    assert stamps(tmp_path / "run") == before
    assert [b["curve"] for b in again["branches"]] == [b["curve"] for b in result["branches"]]
    compare = dict(paradigms=("grpo", "luffy"), paradigm_flops=5e9, paradigm_seeds=1)
    changed = pipeline.main(replace(c, resume=True, rl_lr=1e-3, **compare))
    after = stamps(tmp_path / "run")
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
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png") == 5 and "Every paradigm at equal compute" in page

    # all that is judged follows to the last bit from what report.json holds of the measurements
    saved = json.loads((tmp_path / "run" / "report.json").read_text())
    measured = "dataset sft_step regime x_sft p_sft curve best greedy_before greedy_after".split()
    branches = [{key: b[key] for key in measured} for b in saved["branches"]]
    ranking = [{k: v for k, v in r.items() if k not in ("a_post", "status")} for r in saved["selector"]["ranking"]]
    unjudged = saved | {"branches": branches, "selector": {"chosen": saved["selector"]["chosen"], "ranking": ranking}}
    assert json.loads(json.dumps(report.judge(unjudged | {"claims": []}))) == saved


def test_a_given_model_on_given_problems(tmp_path, model_dir):
    """--data: no pretraining, the file cut into disjoint parts, the given model as base; the test file's problems left out."""
    train, test = make_examples("digits", 90, 3), make_examples("digits", 12, 4)
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
    assert losses[0] != losses[1] and data[0] != data[1]


def test_a_real_model_is_scored_with_a_probed_number_of_threads(model_dir, monkeypatch):
    given = []
    monkeypatch.setattr(machine, "set_threads", lambda threads, model: given.append(threads))

    def open_model(c):
        evaluate.open_model(pipeline.scoring(c, str(model_dir), {"test": "t.jsonl"}))

    open_model(TOY)
    real = replace(TOY, data="x", test_data="y", model=str(model_dir), threads=0)
    open_model(real)
    open_model(replace(real, threads=2))
    assert given == [1, 0, 2]  # TOY has --threads 1


def branch(dataset, step, regime, status, best, low, high, p_sft=0.3):
    fit = dict(
        a_post=best,
        pl_rl=best - p_sft,
        c_mid=1e9,
        b=1.0,
        epsilon=0.0,
        law=(p_sft, best, 1e9, 1.0),
        rmse_fit=0.01,
        rmse_heldout=None,
    )
    curve = [{"x": 0.0, "score": p_sft}, {"x": 1e9, "score": best}, {"x": 2e9, "score": best}]
    return dict(
        dataset=dataset,
        sft_step=step,
        regime=regime,
        status=status,
        best=best,
        a_post_low=low,
        a_post_high=high,
        p_sft=p_sft,
        x_sft=step * 1e7,
        curve=curve,
        greedy_before=0.3,
        greedy_after=0.5,
        **fit,
    )


@pytest.fixture
def made_up() -> dict:
    """A report whose verdicts are known by construction."""
    checkpoint = dict(x_sft=1e8, score=0.4, pass_at_k=0.6, k=8)
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
        for name, size, loss in (("uniform-50", 50, 0.5), ("uniform-200", 200, 0.2), ("uniform-800", 800, 0.1))
    ]
    branches = [
        branch("base", 0, "base", "still rising", 0.2, 0.2, 1.0, p_sft=0.1),
        branch("uniform-50", 10, "stable", "saturated", 0.5, 0.48, 0.52),
        branch("uniform-200", 5, "adaptive", "still rising", 0.65, 0.6, 1.0),
        branch("uniform-200", 10, "stable", "saturated", 0.7, 0.68, 0.72),
        branch("uniform-200", 20, "severe", "saturated", 0.8, 0.78, 0.82),
        branch("uniform-800", 10, "stable", "saturated", 0.9, 0.88, 0.92),
    ]
    ranking = [
        dict(
            name=c["name"],
            min_val_loss=c["min_val_loss"],
            recommended_step=10,
            recommended_regime="stable",
            score=0.4,
            pass_at_k=0.6,
            a_post=a,
            status="saturated",
        )
        for c, a in zip(candidates, (0.5, 0.7, 0.9), strict=True)
    ]
    sample = dict(dataset="uniform-50", prompt="<script>alert(1)</script>", answer="2", before="1", after="2")
    return dict(
        seed=0,
        preset="demo",
        task="digits",
        flags={"test": 500},
        base=dict(p_0=0.1, parameters=1000, pretrain_loss=1.0),
        candidates=candidates,
        branches=branches,
        selector=dict(chosen="uniform-800", ranking=ranking, spearman=-1.0, p_value=0.04, pearson=-0.9, n=3),
        paradigms=[],
        samples=[dict(sample, before_correct=False, after_correct=True)],
        environment=dict(command="x", versions={"python": "3"}, device="cpu", commit="abc"),
        elapsed_s={"total": 60.0},
    )


def test_claims_follow_the_intervals(made_up):
    verdicts = {c["claim"]: c["verdict"] for c in report.claims(made_up)}

    def find(words: str) -> str:
        return next(verdict for claim, verdict in verdicts.items() if words in claim)

    assert find("pure RL") == "shown"
    assert find("pure SFT") == "shown"
    assert find("adaptive") == "not resolved"  # the adaptive branch still rises: it has no upper bound
    assert find("severe") == "not shown"  # severe is above stable, intervals apart
    assert find("validation loss") == "shown"
    assert find("Scale") == "shown"


def test_report_escapes_text_and_names_lower_bounds(made_up, tmp_path):
    report.write(made_up, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    table = report.terminal_table(made_up)
    assert "≥ 65.0" in table and "90.0 [88.0, 92.0]" in table
    assert max(len(line) for line in table.splitlines()) <= 110
    assert (tmp_path / "fig8_rl_curves.png").read_bytes().startswith(b"\x89PNG")


def test_report_without_matplotlib(made_up, tmp_path, monkeypatch):
    """The extra is optional: the page must still come, and say how to get the figures."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.write(made_up, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "data:image" not in page and ".[plot]" in page and "saturated" in page


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
    luffy, sequential = paradigms.summarise(runs)
    assert luffy["final"] == pytest.approx((0.5 + 0.7) / 2) and luffy["final_sd"] == pytest.approx(0.2 / 2**0.5)
    assert luffy["peak"] == pytest.approx(0.7) and luffy["wobble"] == pytest.approx(0.5 * 0.3 / 3**0.5)
    assert [p["score"] for p in luffy["curve"]] == pytest.approx([0.1, 0.2, 0.7, 0.55, 0.55])
    assert sequential["final"] == pytest.approx(0.91) and len(sequential["curve"]) == 5
    (claim,) = paradigms.claims([luffy, sequential])
    assert claim["verdict"] == "shown" and "dapo_dc from SFT 91.0" in claim["evidence"]
    (claim,) = paradigms.claims([dict(luffy, final=0.95), sequential])
    assert claim["verdict"] == "not resolved"
    (claim,) = paradigms.claims([dict(luffy, final=0.95, final_sd=0.001), dict(sequential, final_sd=0.001)])
    assert claim["verdict"] == "not shown"
    assert max(map(len, paradigms.terminal_table([luffy, sequential]).splitlines())) <= 100
