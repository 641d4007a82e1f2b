"""Groups with experts: what they hold, what their tokens' log-probs are, and what they cost."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import character_tokenizer

from nanopcf import flops
from nanopcf.objectives import RECIPES
from nanopcf.rewards import verify
from nanopcf.rollouts import Group, Problem, Rollout, prefix_share, roll_out, step_flops
from nanopcf.sampler import Sampler

TOKENIZER = character_tokenizer()
EXPERT = TOKENIZER.encode_answer("7+8=15")
PROBLEMS = [Problem(TOKENIZER.encode("7+8="), "15", EXPERT), Problem(TOKENIZER.encode("1+1="), "2", EXPERT)]


OPTIONS = dict(
    group=4,
    decode=lambda prompt, tokens: TOKENIZER.decode(tokens),
    verify=verify,
    max_new_tokens=12,
    temperature=0.7,
    stop_ids=TOKENIZER.stop_ids,
    seed=(3, 0),
)


def groups_of(model, algo: str, progress: float = 0.0, **choices):
    recipe = replace(RECIPES[algo], **choices)
    sampler = Sampler(model, slots=5, max_length=64)
    return recipe, roll_out(sampler, recipe, PROBLEMS, places=range(2), progress=progress, **OPTIONS)


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
    monkeypatch.setitem(OPTIONS, "verify", lambda text, answer: float(next(calls) == 0))
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
    assert [g.teaches(RECIPES["upt"]) for g in groups] == [False, True, False, True]
    assert [g.teaches(RECIPES["dapo_dc"]) for g in groups[:3]] == [False, True, False]
    # SRFT raises and lowers likelihoods whatever the advantages are, LUFFY's expert has nothing but its advantage
    assert all(g.teaches(RECIPES["srft"]) for g in groups)
    assert not group((1, 1), expert_tokens=2).teaches(RECIPES["luffy"])


def test_prefix_share_falls_along_the_run():
    for t, low in ((0, 0.95), (0.25, 0.818198), (0.5, 0.5), (0.75, 0.181802), (1, 0.05)):
        assert prefix_share(t, 0.0) == pytest.approx(low, abs=1e-6) and prefix_share(t, 1.0) == pytest.approx(0.95)
    assert prefix_share(0.5, 0.3) == pytest.approx(0.635)


def test_a_part_of_a_round_draws_what_the_whole_would(model):
    """Two processes with a prompt each: the same groups as one process with both."""
    _, whole = groups_of(model, "prefix_rft", progress=0.6)
    sampler = Sampler(model, slots=8, max_length=64)
    (second,) = roll_out(sampler, RECIPES["prefix_rft"], PROBLEMS[1:], places=[1], progress=0.6, **OPTIONS)
    assert [r.tokens for r in second.rollouts] == [r.tokens for r in whole[1].rollouts]


@pytest.mark.parametrize("algo", ["grpo", "luffy"])
def test_compute_of_groups_that_are_dropped_is_that_of_generating_them(model, algo):
    """Eq. 24: a pass for every token drawn, three more for those trained. One group of two: (2 + 3) / (2 + 6)."""
    recipe, groups = groups_of(model, algo)
    same = [groups[0], groups[0]]
    both, one = (step_flops(model.config, recipe, same, trained) for trained in (same, same[:1]))
    assert one / both == pytest.approx(5 / 8)


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
