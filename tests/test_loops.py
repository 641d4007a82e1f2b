"""The two training scripts and the pipeline: gradients, resume, learning, bad input."""

import copy
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, write_rows
from safetensors.torch import load_file

import train_rl
import train_sft
from nanopcf import checkpoint, flops
from nanopcf.data import write_jsonl
from nanopcf.model import ModelConfig, Transformer
from nanopcf.objectives import Recipe
from nanopcf.optim import learning_rate
from nanopcf.packing import Sequence, pack
from nanopcf.run import config, files, machine
from nanopcf.run.folder import Metrics, checkpoints, read_metrics
from nanopcf.sampler import Sampler
from nanopcf.tasks import make_examples
from nanopcf.tokenizer import nano_tokenizer


@pytest.fixture
def sft(model_dir, tmp_path) -> train_sft.SFTConfig:
    write_jsonl(tmp_path / "train.jsonl", make_examples("digits", 40, 0))
    write_jsonl(tmp_path / "val.jsonl", make_examples("digits", 10, 1))
    return train_sft.SFTConfig(
        model=str(model_dir),
        train=str(tmp_path / "train.jsonl"),
        val=str(tmp_path / "val.jsonl"),
        out=str(tmp_path / "sft"),
        steps=6,
        batch=8,
        checkpoint_every=2,
        device="cpu",
    )


@pytest.fixture
def rl(model_dir, tmp_path) -> train_rl.RLConfig:
    """One-token problems ("+" -> "0", "-" -> "1"), so that a random model finds signal at once."""
    rows = [{"prompt": p, "answer": a} for p, a in (("+", "0"), ("-", "1"), ("*", "2"), ("=", "3"))]
    path = write_rows(tmp_path / "rl.jsonl", rows)
    return train_rl.RLConfig(
        model=str(model_dir),
        train=path,
        val=path,
        out=str(tmp_path / "rl"),
        algo="grpo",
        steps=4,
        prompts=4,
        update_prompts=2,
        group=8,
        eval_every=2,
        checkpoint_every=2,
        max_new_tokens=3,
        device="cpu",
    )


@pytest.fixture
def init_dir(tmp_path) -> str:
    """A model that samples nearly uniformly: one answer in sixteen is right, so RL has a signal."""
    torch.manual_seed(0)
    init = Transformer(ModelConfig(vocab_size=16, width=32, heads=2, kv_heads=1, mlp_width=64, max_length=16))
    with torch.no_grad():
        init.embedding.weight.mul_(0.2)  # the head too
    checkpoint.save(init, nano_tokenizer(), tmp_path / "init")
    return str(tmp_path / "init")


def last_weights(out) -> dict:
    return load_file(checkpoints(out)[-1][1] / "model.safetensors")


# ---- SFT ----


def test_sft_loss_is_the_mean_over_answer_tokens_of_unpacked_sequences(model):
    """Packing and masks against one sequence at a time; the end token counts, the prompt doesn't."""
    sequences = [Sequence([1, 2, 3, 4, 15], 2), Sequence([5, 6, 15], 2), Sequence([7, 8, 9, 10, 11, 15], 1)]
    expected = 0.0
    for s in sequences:
        logp = model.logits(model(torch.tensor([s.tokens]))[0]).double().log_softmax(-1)
        expected -= sum(logp[t - 1, s.tokens[t]].item() for t in range(s.prompt_length, len(s.tokens)))
    assert train_sft.sft_loss(model, pack(sequences, 9)).item() == pytest.approx(expected, rel=1e-5)
    assert train_sft.validation_loss(model, pack(sequences, 9), 1) == pytest.approx(expected / 9, rel=1e-5)


def test_gradient_does_not_depend_on_micro_batches(sft, tmp_path):
    """The denominator is the whole batch's token count: a mean of micro-batch means differs when lengths do."""
    for rows in (1, 2, 64):
        train_sft.main(replace(sft, out=str(tmp_path / f"m{rows}"), micro_rows=rows, steps=3))
    one, two, whole = (last_weights(tmp_path / f"m{rows}") for rows in (1, 2, 64))
    for name in whole:
        torch.testing.assert_close(one[name], whole[name], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(two[name], whole[name], atol=1e-5, rtol=1e-4)


def test_learning_rate():
    options = dict(peak=2.0, warmup=4)
    rates = [learning_rate(s, (s - 4) / 100, schedule="cosine", **options) for s in range(104)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[54] == pytest.approx(2.0 * 0.55) and rates[-1] == pytest.approx(0.2, abs=1e-3)
    assert learning_rate(80, 0.76, schedule="constant", **options) == 2.0
    # a run that ends by compute may overshoot: the rate stays at its end, the cosine doesn't come up again
    assert learning_rate(120, 1.4, schedule="cosine", **options) == pytest.approx(0.2)


def stop_after(monkeypatch, module, checkpoints: int) -> None:
    """Simulate a kill: the process dies right after its n-th checkpoint."""
    save, count = checkpoint.save_training, [0]

    def save_and_die(*arguments):
        save(*arguments)
        count[0] += 1
        if count[0] == checkpoints:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.checkpoint, "save_training", save_and_die)


def test_sft_resume_is_bit_identical(sft, tmp_path, monkeypatch):
    """k steps, stop, resume, n - k steps == n steps: weights, optimizer, metrics."""
    whole = train_sft.main(sft)
    cut = replace(sft, out=str(tmp_path / "cut"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, train_sft, 3)  # steps 0, 2, 4
        train_sft.main(cut)
    assert train_sft.main(replace(cut, resume=True)) == whole
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(checkpoints(tmp_path / n)[-1][1] / file) for n in ("sft", "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a | b)
    a, b = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("sft", "cut"))
    assert [r["step"] for r in a] == [r["step"] for r in b]
    assert [r.get("train_loss") for r in a] == [r.get("train_loss") for r in b]


def test_compute_and_seed(sft, tmp_path, model):
    table = train_sft.main(sft)
    tokens = np.mean([len(e.prompt + e.trajectory) + 1 for e in make_examples("digits", 40, 0)])
    assert table[-1]["x_sft"] == pytest.approx(6 * flops.sft_step(model.config, 8, tokens))
    other = train_sft.main(replace(sft, out=str(tmp_path / "other"), seed=1))
    assert other[0]["val_loss"] == table[0]["val_loss"]  # the seed doesn't touch the model it starts from
    assert other[-1]["val_loss"] != table[-1]["val_loss"]


# ---- RL ----


@pytest.mark.parametrize("old", ["sampler", "recomputed"])
def test_first_step_is_on_policy(rl, old, monkeypatch):
    """Ratio 1 at every token, and sampler and trainer agree: the loss is minus the advantage, as predicted by hand."""
    ratios = []
    original = train_rl.rl_loss

    def spy(logprob, lse, entropy, old_logprob, *rest, **options):
        ratios.append((logprob - old_logprob).exp())
        return original(logprob, lse, entropy, old_logprob, *rest, **options)

    monkeypatch.setattr(train_rl, "rl_loss", spy)
    train_rl.main(replace(rl, old_logprobs=old, steps=1, eval_every=1, update_prompts=4, temperature=0.8))
    torch.testing.assert_close(torch.cat(ratios), torch.ones(len(torch.cat(ratios))), atol=2e-5, rtol=0)
    row = read_metrics(Path(rl.out) / "metrics.jsonl")[-1]
    assert row["delta_logprob_max"] < 2e-5 and row["clip_low"] == row["clip_high"] == 0


@pytest.mark.cuda
def test_both_stages_run_on_a_gpu(sft, rl):
    """bfloat16 weights, float32 masters: the loss falls, and sampler and trainer agree to a few bits."""
    table = train_sft.main(replace(sft, device="cuda", steps=40, checkpoint_every=20))
    assert table[-1]["val_loss"] < table[0]["val_loss"]
    train_rl.main(replace(rl, device="cuda", algo="dapo_dc"))
    rows = read_metrics(Path(rl.out) / "metrics.jsonl")
    assert max(r["delta_logprob_mean"] for r in rows if "delta_logprob_mean" in r) < 0.05


def test_rl_cosine_falls_along_the_run(rl):
    """Whatever the number of updates a batch: the rate depends on the share of the run that is done."""
    train_rl.main(replace(rl, schedule="cosine", warmup=0, prompts=4, update_prompts=1))
    rates = [r["lr"] for r in read_metrics(Path(rl.out) / "metrics.jsonl") if "lr" in r]
    by_hand = [rl.lr * (0.1 + 0.45 * (1 + np.cos(np.pi * k / 4))) for k in range(4)]
    assert rates == pytest.approx(by_hand)


def test_rl_resume_is_bit_identical(rl, init_dir, tmp_path, monkeypatch):
    rl = replace(rl, model=init_dir, algo="dapo_dc", round_prompts=2, group=32, max_new_tokens=1)
    whole = train_rl.main(rl)
    assert [p["step"] for p in whole] == [0, 2, 4]
    cut = replace(rl, out=str(tmp_path / "cut"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, train_rl, 1)
        train_rl.main(cut)
    assert train_rl.main(replace(cut, resume=True)) == whole
    a, b = last_weights(tmp_path / "rl"), last_weights(tmp_path / "cut")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("algo", ["grpo", "dapo_d", "dapo_dc", "dr_grpo"])
def test_rl_learns(rl, algo, init_dir):
    """An accuracy gate: four one-token problems, from near chance to nearly always right."""
    curve = train_rl.main(
        replace(
            rl,
            model=init_dir,
            algo=algo,
            steps=60,
            group=32,
            lr=5e-3,
            max_new_tokens=1,
            eval_every=20,
            update_prompts=4,
            eval_samples=32,
            checkpoint_every=100,
        )
    )
    # one token and no end token: the answer is right when the digit is
    assert curve[0]["score"] < 0.25
    assert curve[-1]["score"] > 0.9
    assert all(b["x"] > a["x"] for a, b in itertools.pairwise(curve))


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_kl_term_is_silent_at_the_start_and_acts_later(rl, init_dir, tmp_path, place, monkeypatch):
    """At the reference itself k3 has no gradient and k1 is 0: the first update is that without a KL term, the later aren't."""
    base = replace(rl, model=init_dir, group=32, max_new_tokens=1, update_prompts=4, checkpoint_every=1, steps=3)
    with_kl = replace(train_rl.RECIPES["grpo"], kl_coef=0.5, kl_place=place)
    monkeypatch.setitem(train_rl.RECIPES, "with_kl", with_kl)
    for algo in ("grpo", "with_kl"):
        train_rl.main(replace(base, algo=algo, out=str(tmp_path / algo)))
    weights = {
        (algo, step): load_file(tmp_path / algo / "checkpoints" / f"step-{step}" / "model.safetensors")
        for algo in ("grpo", "with_kl")
        for step in (1, 3)
    }
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(weights["grpo", 1][name], weights["with_kl", 1][name], atol=1e-6, rtol=1e-5)
    assert (weights["grpo", 3][name] - weights["with_kl", 3][name]).abs().max() > 1e-5


def test_overlong_answers_are_filtered_or_punished(rl, init_dir, tmp_path, monkeypatch):
    """Filter: only answers that ended by themselves are trained, and the cut ones stay in the group's mean: here the
    ended ones are empty, so wrong, their advantage is -pass_rate and the loss is +pass_rate. Soft: rewards fall by 1."""
    common = replace(rl, model=init_dir, max_new_tokens=1, group=32, steps=1, eval_every=1, overlong_cache=1)
    for name in ("filter", "soft"):
        monkeypatch.setitem(train_rl.RECIPES, name, Recipe(overlong=name))
        path = write_rows(tmp_path / "one.jsonl", [{"prompt": "+", "answer": "0"}])
        train_rl.main(replace(common, algo=name, train=path, prompts=1, update_prompts=1, out=str(tmp_path / name)))
    rows = {n: read_metrics(tmp_path / n / "metrics.jsonl")[-1] for n in ("filter", "soft")}
    assert rows["filter"]["truncated_share"] > 0.8
    assert rows["soft"]["reward"] == pytest.approx(rows["soft"]["pass_rate"] - 1, abs=1e-6)
    assert rows["filter"]["truncated_share"] < 1 and rows["filter"]["pass_rate"] > 0
    assert rows["filter"]["loss"] == pytest.approx(rows["filter"]["pass_rate"], abs=1e-5)


def test_run_ends_when_no_prompt_has_signal(rl):
    """Dynamic sampling with an answer that can't be: no update, compute counted, one line, no endless loop."""
    path = write_rows(Path(rl.train), [{"prompt": "+", "answer": "99999"}])
    curve = train_rl.main(replace(rl, algo="dapo_dc", train=path, steps=50))
    assert len(curve) == 2 and curve[-1]["x"] > 0 and curve[-1]["step"] == 0


def test_compute_follows_eq_25(rl, model):
    train_rl.main(replace(rl, steps=1, eval_every=1))
    row = read_metrics(Path(rl.out) / "metrics.jsonl")[-1]
    length = row["length"] + 1
    assert row["x"] == pytest.approx(4 * 4 * 8 * length * flops.forward_per_token(model.config, length), rel=1e-6)


# ---- bad input: one sentence, exit code 2, nothing half-written ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train_sft.py", "--model", "x"], "required: --train, --val, --out"),
        (["train_sft.py", "--stepz", "3"], "no flag --stepz; did you mean --steps"),
        (
            ["train_rl.py", "--model", "m", "--train", "t", "--val", "v", "--out", "o", "--algo", "dapo_dd"],
            "did you mean dapo_d",
        ),
        (
            ["train_rl.py", "--model", "m", "--train", "t", "--val", "v", "--out", "o", "--group", "0"],
            "--group must be at least 1",
        ),
        (
            ["train_rl.py", "--model", "m", "--train", "t", "--val", "v", "--out", "o", "--schedule", "linaer"],
            "--schedule: no 'linaer'; there are constant, cosine",
        ),
        (
            ["-m", "nanopcf.generate", "--model", "m", "--prompt", "1", "--threads", "-1"],
            "--threads must be at least 0",
        ),
        (
            ["train_sft.py", "--model", "nowhere", "--train", "t", "--val", "v", "--out", "o"],
            "nowhere: no such model folder",
        ),
        (["pipeline.py", "--task", "digit"], "did you mean digits?"),
        (["pipeline.py", "--candidates", "medium-3"], "should be like uniform-240"),
        (["pipeline.py", "--steps", "a"], "no flag --steps"),
        (["pipeline.py", "--sft-steps", "many"], "invalid int value: 'many'"),
        (["pipeline.py", "--config", "nowhere.toml"], "nowhere.toml: can't be read"),
    ],
)
def test_bad_command_lines(arguments, message):
    result = run_script(*arguments)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_bad_config_file(tmp_path):
    (tmp_path / "c.toml").write_text("stepss = 3\n")
    with pytest.raises(ValueError, match=r"c\.toml: no setting 'stepss'; did you mean steps"):
        config.parse(train_sft.SFTConfig, "", ["--config", str(tmp_path / "c.toml")])
    (tmp_path / "c.toml").write_text('steps = "3"\n')
    with pytest.raises(ValueError, match=r"steps must be int, got '3'"):
        config.parse(train_sft.SFTConfig, "", ["--config", str(tmp_path / "c.toml")])
    (tmp_path / "c.toml").write_text("steps = \n")
    with pytest.raises(ValueError, match="not valid TOML"):
        config.parse(train_sft.SFTConfig, "", ["--config", str(tmp_path / "c.toml")])


def test_flags_override_the_file(tmp_path):
    (tmp_path / "c.toml").write_text('model = "m"\ntrain = "t"\nval = "v"\nout = "o"\nlr = 1\nsteps = 5\n')
    c = config.parse(train_sft.SFTConfig, "", ["--config", str(tmp_path / "c.toml"), "--steps", "7"])
    assert (c.steps, c.lr, c.model) == (7, 1.0, "m") and isinstance(c.lr, float)


def test_every_setting_has_help():
    from nanopcf.evaluate import EvaluateConfig
    from nanopcf.generate import GenerateConfig
    from pipeline import PipelineConfig

    for cls in (train_sft.SFTConfig, train_rl.RLConfig, PipelineConfig, EvaluateConfig, GenerateConfig):
        assert set(config.field_help(cls)) >= set(cls.__dataclass_fields__), cls


def test_a_run_folder_belongs_to_one_config(sft, tmp_path):
    train_sft.main(replace(sft, steps=2))
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume"):
        train_sft.main(replace(sft, steps=2))
    with pytest.raises(ValueError, match=r"another config: --steps was 2, is 4"):
        train_sft.main(replace(sft, steps=4, resume=True))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(ValueError, match="not empty and not a run folder"):
        train_sft.main(replace(sft, out=str(tmp_path / "mine")))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_nothing_is_written_for_bad_data(sft, rl, tmp_path):
    with pytest.raises(ValueError, match="no field 'trajectory'"):
        train_sft.main(replace(sft, train=rl.train))
    with pytest.raises(ValueError, match="at most 0 leave room for the answer"):
        train_rl.main(replace(rl, max_new_tokens=64))
    assert not (tmp_path / "sft").exists() and not (tmp_path / "rl").exists()


def test_divergence_stops_with_the_step(sft):
    with pytest.raises(ValueError, match=r"step \d: the .* is (nan|inf).*a lower --lr"):
        train_sft.main(replace(sft, lr=1e30, warmup=0))


def test_a_failed_save_leaves_no_half_checkpoint(tmp_path, model):
    """A disk that fills up in the middle of a checkpoint: the old one stays whole, nothing is left beside it."""
    files.write_folder(tmp_path / "c", lambda f: (f / "a").write_text("old"))

    def full(folder):
        (folder / "a").write_text("new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.write_folder(tmp_path / "c", full)
    assert [p.name for p in tmp_path.iterdir()] == ["c"] and (tmp_path / "c" / "a").read_text() == "old"


def test_metrics_have_no_torn_or_repeated_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    Metrics(tmp_path, from_step=2).log(step=3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_evaluate_and_generate_from_the_command_line(model_dir, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": "1+1=", "answer": "2"}])
    result = run_script(
        "-m", "nanopcf.evaluate", "--model", str(model_dir), "--data", data, "--samples", "4", "--device", "cpu"
    )
    assert result.returncode == 0 and "pass@4" in result.stdout
    result = run_script("-m", "nanopcf.generate", "--model", str(model_dir), "--prompt", "1+", "--device", "cpu")
    assert result.returncode == 0
    result = run_script("-m", "nanopcf.generate", "--model", str(model_dir), "--prompt", "what?")
    assert result.returncode == 2 and "can't spell" in result.stderr


def test_pass_at_k_against_enumeration():
    from nanopcf.scoring import pass_at_k

    correct = (np.random.default_rng(0).random((6, 7)) < 0.3).astype(float)
    for k in (1, 3, 7):
        brute = np.mean([np.mean([max(c) for c in itertools.combinations(row, k)]) for row in correct])
        assert pass_at_k(correct, k) == pytest.approx(brute)
    with pytest.raises(ValueError, match="needs at least 8 samples"):
        pass_at_k(correct, 8)


@pytest.mark.parametrize("script", ["train_sft.py", "train_rl.py", "pipeline.py"])
def test_help_needs_no_torch(script):
    code = f"import sys, runpy; sys.modules['torch'] = None; sys.argv = ['{script}', '--help']; runpy.run_path('{script}', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "--resume" in result.stdout, result.stderr


def test_dry_runs_take_the_longest_step_and_write_nothing(sft, rl, tmp_path, capfd):
    assert train_sft.main(replace(sft, dry_run=True, pack_length=48, micro_rows=3, batch=8)) == []
    assert train_rl.main(replace(rl, dry_run=True, slots=5, micro_rows=7, pack_length=9)) == []
    said = capfd.readouterr().err
    assert "a step of 3 rows of 48 tokens: fits" in said
    assert "generating 5 answers of 3 tokens: fits" in said and "an update of 7 rows of 9 tokens: fits" in said
    assert not (tmp_path / "sft").exists() and not (tmp_path / "rl").exists()


def test_a_dry_run_that_does_not_fit_says_so(sft, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_sft, "sft_loss", full)
    with pytest.raises(ValueError, match="doesn't fit in memory; fewer --micro-rows"):
        train_sft.main(replace(sft, dry_run=True))


def test_recomputed_activations_change_no_gradient_and_are_fewer(sft, rl, tmp_path, model):
    """Bit for bit on the CPU; and what autograd keeps of a forward pass shrinks to the blocks' inputs."""
    for c, module in (
        (replace(sft, steps=3), train_sft),
        (replace(rl, steps=2, algo="srft", train=sft.train), train_rl),
    ):
        folders = [tmp_path / f"{module.__name__}-{recompute}" for recompute in (False, True)]
        for recompute, out in zip((False, True), folders, strict=True):
            module.main(replace(c, recompute=recompute, out=str(out)))
        a, b = (last_weights(out) for out in folders)
        assert all(torch.equal(a[k], b[k]) for k in a)

    def kept() -> int:
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
        ):
            model(torch.zeros(4, 32, dtype=torch.long))
        return sum(sizes.values())

    everything = kept()
    model.recompute = True
    assert kept() < everything / 3


def test_threads_are_the_fewest_within_a_quarter_of_the_fastest(monkeypatch, model):
    seconds = {1: 1.0, 2: 0.9, 4: 0.5, 6: 0.45}
    monkeypatch.setattr(machine, "cores", lambda: 6)
    monkeypatch.setattr(machine, "step_seconds", lambda _model, _tokens, threads: seconds[threads])
    big = Transformer(ModelConfig(vocab_size=700_000, width=32, layers=1, mlp_width=32))
    try:
        assert machine.set_threads(0, model) == 4 == torch.get_num_threads()
        seconds[1] = 0.55
        assert machine.set_threads(0, model) == 1 == torch.get_num_threads()
        assert machine.set_threads(3, model) == 3 == torch.get_num_threads()
        assert machine.set_threads(0, big) == 6  # large products gain from every core
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("script", [train_sft, train_rl])
def test_a_resumed_run_keeps_its_threads(script, sft, rl, monkeypatch):
    """They decide how sums are rounded: a probe that finds another number later must not change a run's bits."""
    c = sft if script is train_sft else rl
    faster = [2]
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(machine, "step_seconds", lambda _m, _t, threads: 1.0 if threads in faster else 2.0)
    try:
        script.main(c)
        faster[:] = [1]
        torch.set_num_threads(1)
        script.main(replace(c, resume=True))
        assert torch.get_num_threads() == 2
        script.main(replace(c, out=c.out + "-fresh"))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


def test_compiled_blocks_change_no_gradient_and_leave_generation_alone(tiny_config, monkeypatch):
    """torch.compile, up to where it would call the C++ compiler for half a minute, against the plain model; the sampler, whose
    shapes change with every token, must not compile anything."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain = Transformer(replace(tiny_config, layers=1))
    compiled = copy.deepcopy(plain)
    machine.compile_blocks(compiled)
    ids = [[1] * 20, [2, 3, 4], [5] * 9, [7, 8] * 10]
    rows = pack([Sequence(s, 1) for s in ids], 24)
    for model in (plain, compiled):
        train_sft.sft_loss(model, rows).backward()
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before > 0
    answers = [Sampler(m, slots=3, max_length=40).generate(ids, max_new_tokens=9) for m in (plain, compiled)]
    assert answers[0] == answers[1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_compiling_without_a_compiler_is_refused(monkeypatch, model):
    monkeypatch.setattr("shutil.which", lambda _name: None)
    with pytest.raises(ValueError, match=r"--compile needs a C\+\+ compiler"):
        machine.compile_blocks(model)
