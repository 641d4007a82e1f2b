"""Groups with experts: what they hold, what their tokens' log-probs are, what they cost, and that they teach."""

import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_rows

import train_rl
from nanopcf import flops
from nanopcf.objectives import POLICY_LOSSES, RECIPES
from nanopcf.rollouts import Group, Problem, Rollout, prefix_share, roll_out, step_flops
from nanopcf.run.folder import checkpoints, read_metrics
from nanopcf.sampler import Sampler
from nanopcf.tokenizer import nano_tokenizer

TOKENIZER = nano_tokenizer()
EXPERT = TOKENIZER.encode_answer("7+8=15")
PROBLEMS = [Problem(TOKENIZER.encode("7+8="), "15", EXPERT), Problem(TOKENIZER.encode("1+1="), "2", EXPERT)]


def groups_of(model, algo: str, **changed):
    recipe = replace(RECIPES[algo], **{k: v for k, v in changed.items() if k == "gate"})
    options = dict(
        places=range(2),
        group=4,
        decode=TOKENIZER.decode,
        max_new_tokens=12,
        temperature=0.7,
        stop_ids=TOKENIZER.stop_ids,
        seed=(3, 0),
        progress=0.0,
    )
    options |= {k: v for k, v in changed.items() if k != "gate"}
    sampler = Sampler(model, slots=5, max_length=64)
    return recipe, roll_out(sampler, recipe, PROBLEMS, **options)


@pytest.mark.parametrize(
    ("algo", "tried", "trained"), [("grpo", 4, 4), ("luffy", 3, 4), ("srft", 3, 4), ("prefix_rft", 3, 4), ("sft", 0, 1)]
)
def test_who_is_in_a_group(model, algo, tried, trained):
    _, groups = groups_of(model, algo)
    for g in groups:
        assert (len(g.tried), len(g.rollouts)) == (tried, trained)
        assert all(r.expert_tokens == 0 for r in g.tried) and g.rollouts[:tried] == g.tried
    if algo in ("luffy", "srft", "sft"):
        right, wrong = (g.rollouts[-1] for g in groups)
        assert right.tokens == EXPERT and right.expert_tokens == len(EXPERT) and not any(right.logprobs)
        assert (right.correct, wrong.correct) == (1.0, 0.0)  # the verifier judges the expert too


@pytest.mark.parametrize(("gate", "experts"), [(-1, 0), (0, 1), (4, 2)])
def test_gate_of_upt(model, monkeypatch, gate, experts):
    """k right answers of 4: 1 for the first prompt, 0 for the second. k <= gate: the expert instead of all."""
    calls = itertools.count()
    monkeypatch.setattr("nanopcf.rollouts.verify", lambda text, answer: float(next(calls) == 0))
    _, groups = groups_of(model, "upt", gate=gate)
    taught = [g for g in groups if g.rollouts[0].expert_tokens]
    assert len(taught) == experts and all(len(g.rollouts) == 1 and len(g.tried) == 4 for g in taught)
    assert all(g.rollouts == g.tried for g in groups if g not in taught)


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_a_hybrid_continues_the_expert(model, progress):
    """Its first tokens are the expert's, the others are drawn given them: their log-probs are the model's own there."""
    _, groups = groups_of(model, "prefix_rft", progress=progress)
    for g in groups:
        hybrid = g.rollouts[-1]
        k = hybrid.expert_tokens
        assert hybrid.tokens[:k] == EXPERT[:k] and len(hybrid.tokens) > k and not any(hybrid.logprobs[:k])
        assert k == int(0.95 * len(EXPERT)) if progress == 0 else k < len(EXPERT)
        assert len(hybrid.tokens) <= 12
        tokens = g.prompt + hybrid.tokens
        logp = (model.logits(model(torch.tensor([tokens]))[0]) / 0.7).log_softmax(-1)
        at = range(len(g.prompt) + k, len(tokens))
        want = torch.stack([logp[t - 1, tokens[t]] for t in at])
        torch.testing.assert_close(torch.tensor(hybrid.logprobs[k:]), want, atol=1e-5, rtol=1e-5)


def test_a_group_has_a_signal_or_an_expert_alone_or_teaches_nothing():
    """All wrong, some right, all right; and UPT's expert in place of all answers, which trains by its likelihood."""

    def group(verdicts, expert_tokens=0):
        return Group([1], [], [Rollout([2, 15], [0.0, 0.0], expert_tokens, float(v), False) for v in verdicts])

    groups = [group(v) for v in ((0, 0, 0), (1, 0, 0), (1, 1, 1))] + [group((1,), expert_tokens=2)]
    assert [g.has_signal for g in groups] == [False, True, False, False]
    assert [g.teaches for g in groups] == [False, True, False, True]


def test_prefix_share_falls_along_the_run():
    for t, low in ((0, 0.95), (0.25, 0.818198), (0.5, 0.5), (0.75, 0.181802), (1, 0.05)):
        assert prefix_share(t, 0.0) == pytest.approx(low, abs=1e-6) and prefix_share(t, 1.0) == pytest.approx(0.95)
    assert prefix_share(0.5, 0.3) == pytest.approx(0.635)


def test_a_part_of_a_round_draws_what_the_whole_would(model):
    """Two processes with a prompt each: the same groups as one process with both."""
    _, whole = groups_of(model, "prefix_rft", progress=0.6)
    sampler = Sampler(model, slots=8, max_length=64)
    (second,) = roll_out(
        sampler,
        RECIPES["prefix_rft"],
        PROBLEMS[1:],
        places=[1],
        group=4,
        decode=TOKENIZER.decode,
        max_new_tokens=12,
        temperature=0.7,
        stop_ids=TOKENIZER.stop_ids,
        seed=(3, 0),
        progress=0.6,
    )
    assert [r.tokens for r in second.rollouts] == [r.tokens for r in whole[1].rollouts]


def test_compute_by_each_paradigm_s_equation(model):
    """Counted by hand: a forward pass a generated token, three a trained one (an expert's costs four in Eq. 26)."""
    c = model.config
    total = lambda g, chosen: sum(len(g.prompt) + len(r.tokens) for r in chosen)  # noqa: E731
    for algo in ("grpo", "luffy", "prefix_rft", "upt", "sft"):
        recipe, groups = groups_of(model, algo, gate=2)
        own, every = (sum(total(g, getattr(g, name)) for g in groups) for name in ("tried", "rollouts"))
        tokens = {
            "grpo": 4 * own,
            "luffy": 4 * every,
            "prefix_rft": 4 * every,
            "upt": own + 3 * every,
            "sft": 3 * every,
        }[algo]
        count = sum(len(g.rollouts) for g in groups)
        length = (own + every) / (8 + count) if algo == "upt" else every / count
        want = tokens * flops.forward_per_token(c, length)
        assert step_flops(c, recipe, groups, groups) == pytest.approx(want), algo


# ---- in the loop ----


@pytest.fixture
def rl(model_dir, tmp_path) -> train_rl.RLConfig:
    """Problems that a random model never solves: a signal can come from the expert alone."""
    rows = [{"prompt": p, "trajectory": f"{a}7", "answer": f"{a}7"} for p, a in zip("+-*=", "0123", strict=True)]
    path = write_rows(tmp_path / "rl.jsonl", rows)
    return train_rl.RLConfig(
        model=str(model_dir),
        train=path,
        val=path,
        out=str(tmp_path / "rl"),
        steps=30,
        prompts=4,
        update_prompts=4,
        group=8,
        lr=5e-3,
        eval_every=30,
        eval_samples=32,
        eval_temperature=1.0,
        checkpoint_every=100,
        max_new_tokens=3,
        device="cpu",
    )


@pytest.mark.parametrize("algo", ["sft", "luffy", "srft", "upt", "prefix_rft"])
def test_experts_teach_what_the_policy_never_finds(rl, algo):
    curve = train_rl.main(replace(rl, algo=algo, steps=200 if algo == "prefix_rft" else 40, eval_every=200))
    assert curve[0]["score"] < 0.1 and curve[-1]["score"] > 0.6
    rows = read_metrics(Path(rl.out) / "metrics.jsonl")
    assert rows[1]["expert_share"] > 0


def test_open_and_closed_gate_are_grpo_and_sft_in_the_loop(rl, tmp_path):
    from safetensors.torch import load_file

    weights = {}
    for name, algo, choices in (
        ("open", "upt", ("gate=-1",)),
        ("grpo", "grpo", ("clip_low=inf", "clip_high=inf")),
        ("closed", "upt", ("gate=8", "entropy_coef=0")),
        ("sft", "sft", ()),
    ):
        out = tmp_path / name
        train_rl.main(replace(rl, algo=algo, set=choices, steps=3, eval_every=3, eval_samples=1, out=str(out)))
        weights[name] = load_file(checkpoints(out)[-1][1] / "model.safetensors")
    for a, b in (("open", "grpo"), ("closed", "sft")):
        assert all(torch.equal(weights[a][k], weights[b][k]) for k in weights[a]), (a, b)
    assert any(not torch.equal(weights["open"][k], weights["sft"][k]) for k in weights["sft"])


@pytest.mark.parametrize("algo", ["gspo", "cispo", "rloo", "tis", "prefix_rft"])
def test_updates_after_the_first_stay_finite(rl, algo, tmp_path):
    """Several updates a batch, where ratios leave 1, and gradients that are there."""
    rows = [{"prompt": p, "trajectory": a, "answer": a} for p, a in zip("+-*=", "0123", strict=True)]
    path = write_rows(tmp_path / "easy.jsonl", rows)
    train_rl.main(
        replace(
            rl, algo=algo, train=path, val=path, update_prompts=1, steps=4, eval_every=4, group=32, max_new_tokens=2
        )
    )
    rows = [r for r in read_metrics(Path(rl.out) / "metrics.jsonl") if "loss" in r]
    assert len(rows) == 4 and any(r["grad_norm"] > 0 for r in rows)


def test_a_budget_of_compute_ends_the_run_and_spaces_the_points(rl):
    whole = train_rl.main(replace(rl, algo="grpo", steps=20, eval_every=1, eval_samples=1))
    budget = whole[10]["x"]
    out = str(rl.out) + "2"
    curve = train_rl.main(
        replace(rl, algo="grpo", steps=20, max_flops=budget, eval_flops=budget / 3, eval_samples=1, out=out)
    )
    assert curve[-1]["step"] == 10 and curve[-1]["x"] == budget
    assert [p["step"] for p in curve] == [
        0,
        *(next(k for k in range(21) if whole[k]["x"] >= i * budget / 3) for i in (1, 2, 3)),
    ]
    assert (
        train_rl.main(
            replace(
                rl, algo="grpo", steps=20, max_flops=budget, eval_flops=budget / 3, eval_samples=1, out=out, resume=True
            )
        )
        == curve
    )


def test_experts_are_asked_for_by_name(rl, tmp_path):
    path = write_rows(tmp_path / "bare.jsonl", [{"prompt": "+", "answer": "0"}])
    with pytest.raises(ValueError, match="no field 'trajectory'"):
        train_rl.main(replace(rl, algo="luffy", train=path))
    train_rl.main(replace(rl, algo="grpo", train=path, steps=1, prompts=1, update_prompts=1, eval_every=1))
    with pytest.raises(ValueError, match="--group must be at least 2 with luffy"):
        replace(rl, algo="luffy", group=1)


def test_the_example_of_extending_md_runs(rl, tmp_path):
    """The code block of the document, saved and run as it says."""
    text = (ROOT / "docs" / "extending.md").read_text()
    assert len(text.splitlines()) < 60
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "dual_clip.py").write_text(code)
    flags = dict(model=rl.model, train=rl.train, val=rl.val, out=str(tmp_path / "out"), steps=2, prompts=4, group=8)
    flags |= dict(update_prompts=1, eval_every=2, max_new_tokens=2, device="cpu", algo="dual_clip")
    arguments = [part for k, v in flags.items() for part in ("--" + k.replace("_", "-"), str(v))]
    result = subprocess.run(
        [sys.executable, str(tmp_path / "dual_clip.py"), *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "dual_clip" in result.stderr and "greedy" in result.stdout
    scope: dict = {"__name__": "dual_clip"}
    try:
        exec(compile(code, "dual_clip.py", "exec"), scope)
        A, ratio = torch.tensor([-1.0, -1.0, 1.0]), torch.tensor([5.0, 2.0, 5.0])
        losses = scope["dual_clipped"](ratio.log(), torch.zeros(3), A, RECIPES["dual_clip"])
        torch.testing.assert_close(losses, torch.tensor([3.0, 2.0, -1.2]))
    finally:
        del RECIPES["dual_clip"], POLICY_LOSSES["dual"]
