"""The RL loop: on-policy at first, resumed bit for bit, ended by compute or without a signal; and it learns."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, character_tokenizer, last_weights, stop_after, write_rows
from safetensors.torch import load_file

import train_rl
import train_sft
from nanopcf import flops
from nanopcf.model import Transformer
from nanopcf.objectives import POLICY_LOSSES, RECIPES, Recipe
from nanopcf.optim import Optimizer
from nanopcf.packing import Sequence
from nanopcf.rollouts import Problem
from nanopcf.run.folder import checkpoints, read_metrics
from nanopcf.sampler import Sampler


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


NARROW = ("clip_low=0.001", "clip_high=0.001")
CLIPS = [(name, ("gate=-1",) if name == "upt" else ()) for name in RECIPES if name != "sft"]


@pytest.fixture
def two_groups(model) -> Callable[[str, tuple[str, ...], int], Iterator[dict]]:
    """The updates of one step of a bfloat16 model, by algorithm, choices and --update-prompts: responses to two
    prompts, each with an advantage, of either sign. At a learning rate of 0 the weights stay those that sampled."""
    model, tokenizer = model.bfloat16(), character_tokenizer()
    problems = [Problem(tokenizer.encode(prompt), "0", tokenizer.encode("12+34=")) for prompt in "+-"]
    files, sizes = dict(model="-", train="-", val="-", out="-"), dict(prompts=2, round_prompts=2, group=8)
    options = dict(max_rounds=1, max_new_tokens=24, pack_length=64, verifier="ours")
    optimizer, ignore = Optimizer(model), lambda *_: None

    def updates(algo: str, choices: tuple[str, ...], update_prompts: int) -> Iterator[dict]:
        c = train_rl.RLConfig(algo=algo, set=choices, update_prompts=update_prompts, **files, **sizes, **options)
        sampler = Sampler(model, slots=16, max_length=64)
        drawn, _, _ = train_rl.collect(sampler, tokenizer, problems, 0, 0.5, c)
        for group in drawn:
            for i, rollout in enumerate(group.rollouts):
                rollout.correct = float(i % 2)
        batch = train_rl.judge(drawn, model, model, c, ignore)
        for first in range(0, 2, update_prompts):
            yield train_rl.update(model, optimizer, batch.part(first, first + update_prompts), 0.0, c, ignore)

    return updates


@pytest.mark.parametrize("update_prompts", [2, 1])
@pytest.mark.parametrize(("algo", "choices"), [*CLIPS, ("grpo", NARROW), ("luffy", NARROW)])
def test_no_clip_acts_in_bfloat16_before_the_weights_move(two_groups, algo, choices, update_prompts):
    """Sampler and trainer differ by more than a narrow clip allows: there the ratio must be taken over the trainer's
    own log-probs."""
    for seen in two_groups(algo, choices, update_prompts):
        assert seen["grad_norm"] > 0 and torch.cat(seen["delta"]).max() > 1e-3  # the two do differ
        assert not torch.cat(seen["clipped"]).any()


def test_gspo_scores_the_rows_of_each_update_or_nothing(two_groups, monkeypatch):
    """Rounding depends on how sequences are packed, so the old log-probs come from the rows that the update has. With
    one update a batch the ratio is 1 and costs nothing."""
    scored, score = [], train_rl.token_logprobs
    monkeypatch.setattr(train_rl, "token_logprobs", lambda m, rows, *rest: scored.append(rows) or score(m, rows, *rest))
    assert len(list(two_groups("gspo", (), 2))) == 1 and not scored
    assert len(list(two_groups("gspo", (), 1))) == 2 and len(scored) == 4
    before, current = scored[:2], scored[2:]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(before, current, strict=True))


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
    # a run that has ended goes on with more steps, and says so where its settings are
    short = replace(rl, out=str(tmp_path / "short"), steps=2)
    assert train_rl.main(short)[-1]["step"] == 2
    assert train_rl.main(replace(short, steps=4, resume=True)) == whole
    assert json.loads((tmp_path / "short" / "config.json").read_text())["steps"] == 4
    a, b, c = (last_weights(tmp_path / name) for name in ("rl", "cut", "short"))
    assert all(torch.equal(a[k], b[k]) and torch.equal(a[k], c[k]) for k in a)
    with pytest.raises(ValueError, match="--steps was 2, is 4"):  # its learning rate was stretched over the two steps
        train_rl.main(cosine := replace(rl, out=str(tmp_path / "cosine"), steps=2, schedule="cosine"))
        train_rl.main(replace(cosine, steps=4, resume=True))


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
    """At the reference itself k3 has no gradient and k1 is 0: the first update is that without a KL term, the later
    aren't."""
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
    ended ones are empty, so wrong, their advantage is -pass_rate and the loss is +pass_rate. Soft: rewards fall by
    1."""
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


def test_rollouts_and_curve_are_judged_by_the_chosen_verifier(rl, monkeypatch):
    """A verifier that takes everything: all rollouts and all points of the curve are right."""
    asked = []
    monkeypatch.setattr(train_rl, "verifier", lambda name: asked.append(name) or (lambda response, answer: 1.0))
    curve = train_rl.main(replace(rl, steps=1, eval_every=1, verifier="ours"))
    rows = read_metrics(Path(rl.out) / "metrics.jsonl")
    assert set(asked) == {"ours"} and rows[-1]["pass_rate"] == 1
    assert all(point["score"] == 1 for point in curve)
    with pytest.raises(ValueError, match="--verifier must be auto, ours or math-verify, got 'x'"):
        replace(rl, verifier="x")


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


@pytest.fixture
def unsolved(model_dir, tmp_path) -> train_rl.RLConfig:
    """Problems that a random model never solves: a signal can come from the expert alone."""
    rows = [{"prompt": p, "trajectory": f"{a}7", "answer": f"{a}7"} for p, a in zip("+-*=", "0123", strict=True)]
    path = write_rows(tmp_path / "rl.jsonl", rows)
    return train_rl.RLConfig(
        model=str(model_dir),
        train=path,
        val=path,
        out=str(tmp_path / "unsolved"),
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
def test_experts_teach_what_the_policy_never_finds(unsolved, algo):
    curve = train_rl.main(replace(unsolved, algo=algo, steps=200 if algo == "prefix_rft" else 40, eval_every=200))
    assert curve[0]["score"] < 0.1 and curve[-1]["score"] > 0.6
    rows = read_metrics(Path(unsolved.out) / "metrics.jsonl")
    assert rows[1]["expert_share"] > 0


def test_open_and_closed_gate_are_grpo_and_sft_in_the_loop(unsolved, tmp_path):
    from safetensors.torch import load_file

    weights = {}
    for name, algo, choices in (
        ("open", "upt", ("gate=-1",)),
        ("grpo", "grpo", ("clip_low=inf", "clip_high=inf")),
        ("closed", "upt", ("gate=8", "entropy_coef=0")),
        ("sft", "sft", ()),
    ):
        out = tmp_path / name
        train_rl.main(replace(unsolved, algo=algo, set=choices, steps=3, eval_every=3, eval_samples=1, out=str(out)))
        weights[name] = load_file(checkpoints(out)[-1][1] / "model.safetensors")
    for a, b in (("open", "grpo"), ("closed", "sft")):
        assert all(torch.equal(weights[a][k], weights[b][k]) for k in weights[a]), (a, b)
    assert any(not torch.equal(weights["open"][k], weights["sft"][k]) for k in weights["sft"])


@pytest.mark.parametrize("algo", ["gspo", "cispo", "rloo", "tis", "prefix_rft"])
def test_updates_after_the_first_stay_finite(unsolved, algo, tmp_path):
    """Several updates a batch, where ratios leave 1, and gradients that are there."""
    rows = [{"prompt": p, "trajectory": a, "answer": a} for p, a in zip("+-*=", "0123", strict=True)]
    path = write_rows(tmp_path / "easy.jsonl", rows)
    train_rl.main(
        replace(
            unsolved,
            algo=algo,
            train=path,
            val=path,
            update_prompts=1,
            steps=4,
            eval_every=4,
            group=32,
            max_new_tokens=2,
        )
    )
    rows = [r for r in read_metrics(Path(unsolved.out) / "metrics.jsonl") if "loss" in r]
    assert len(rows) == 4 and any(r["grad_norm"] > 0 for r in rows)


def test_a_budget_of_compute_ends_the_run_and_spaces_the_points(unsolved):
    whole = train_rl.main(replace(unsolved, algo="grpo", steps=20, eval_every=1, eval_samples=1))
    budget = whole[10]["x"]
    out = str(unsolved.out) + "2"
    curve = train_rl.main(
        replace(unsolved, algo="grpo", steps=20, max_flops=budget, eval_flops=budget / 3, eval_samples=1, out=out)
    )
    assert curve[-1]["step"] == 10 and curve[-1]["x"] == budget
    assert [p["step"] for p in curve] == [
        0,
        *(next(k for k in range(21) if whole[k]["x"] >= i * budget / 3) for i in (1, 2, 3)),
    ]
    assert (
        train_rl.main(
            replace(
                unsolved,
                algo="grpo",
                steps=20,
                max_flops=budget,
                eval_flops=budget / 3,
                eval_samples=1,
                out=out,
                resume=True,
            )
        )
        == curve
    )


def test_experts_are_asked_for_by_name(unsolved, tmp_path):
    path = write_rows(tmp_path / "bare.jsonl", [{"prompt": "+", "answer": "0"}])
    with pytest.raises(ValueError, match="no field 'trajectory'"):
        train_rl.main(replace(unsolved, algo="luffy", train=path))
    train_rl.main(replace(unsolved, algo="grpo", train=path, steps=1, prompts=1, update_prompts=1, eval_every=1))
    with pytest.raises(ValueError, match="--group must be at least 2 with luffy"):
        replace(unsolved, algo="luffy", group=1)


def test_the_example_of_extending_md_runs(unsolved, tmp_path):
    """The code block of the document, saved and run as it says."""
    text = (ROOT / "docs" / "extending.md").read_text()
    assert len(text.splitlines()) < 60
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "dual_clip.py").write_text(code)
    flags = dict(
        model=unsolved.model,
        train=unsolved.train,
        val=unsolved.val,
        out=str(tmp_path / "out"),
        steps=2,
        prompts=4,
        group=8,
    )
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


def test_kl_to_start_leaves_out_what_the_expert_wrote(tiny_config):
    """An expert's tokens say nothing about where the policy goes by itself; without own tokens there is no estimate."""
    torch.manual_seed(0)
    policy, start = Transformer(tiny_config), Transformer(tiny_config)
    sequences = [Sequence([1, 2, 3, 4, 5], 2), Sequence([6, 7, 8, 9], 2)]  # three and two trained tokens
    is_expert = torch.tensor([True, True, False, False, True])
    c = SimpleNamespace(pack_length=16, micro_rows=2, temperature=1.0)
    batch = SimpleNamespace(sequences=sequences, is_expert=is_expert)

    def logprobs(model: Transformer, s: Sequence) -> torch.Tensor:
        logits = model(torch.tensor([s.tokens]))[0] @ model.head_weight.T  # (T, V)
        of_next = torch.log_softmax(logits[:-1], dim=-1).gather(1, torch.tensor(s.tokens[1:])[:, None])[:, 0]
        return of_next[s.prompt_length - 1 :]

    own, ref = (torch.cat([logprobs(model, s) for s in sequences])[~is_expert] for model in (policy, start))
    expected = ((ref - own).exp() - 1 - (ref - own)).mean().item()
    assert train_rl.kl_to_start(batch, policy, start, c) == pytest.approx(expected, rel=1e-4)
    batch.is_expert = torch.ones(5, dtype=torch.bool)
    assert train_rl.kl_to_start(batch, policy, start, c) is None
