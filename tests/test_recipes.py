"""Every recipe under every single choice: one step that trains, or one sentence that refuses it before anything is
drawn."""

from dataclasses import fields

import pytest
import torch
from conftest import character_tokenizer, write_rows

import train_rl
from nanopcf.model import ModelConfig, Transformer
from nanopcf.objectives import ALLOWED, POLICY_LOSSES, RECIPES, Recipe
from nanopcf.optim import Optimizer
from nanopcf.rollouts import Problem
from nanopcf.run.folder import read_metrics
from nanopcf.sampler import Sampler
from nanopcf.tools.recipes import recipe_table, with_choices

TOKENIZER = character_tokenizer()
# other values of the choices that are numbers or switches, the extreme ones among them
NUMBERS = dict(
    gate=(-1, 1, 99), dynamic_sampling=("true", "false"), clip_low=(0, "inf"), clip_high=(0, "inf"), ratio_cap=(0.5, "inf"),
    expert_coef=(0, 2), shape=(1,), prefix_kept=(0, 1), sampler_cap=(0, 2), kl_coef=(0, 0.1), entropy_coef=(-0.01, 0, 0.1),
)  # fmt: skip
CHOICES = [
    f"{name}={value}"
    for name, values in (ALLOWED | {"policy_loss": POLICY_LOSSES} | NUMBERS).items()
    for value in values
]


@pytest.fixture(scope="module")
def near_uniform() -> Transformer:
    """Draws each of its 16 tokens about equally often: one first token in sixteen is the answer, so there is a
    signal."""
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(vocab_size=16, width=16, layers=1, heads=2, kv_heads=1, mlp_width=16, max_length=16)
    )
    with torch.no_grad():
        model.embedding.weight.mul_(0.2)
    return model


@pytest.fixture
def first_token_counts(monkeypatch):
    """A response is right when it begins with the answer, so that longer ones can be right too."""
    monkeypatch.setattr(train_rl, "verifier", lambda name: lambda response, answer: float(response[:1] == answer))


def config_of(algo: str, *choices: str, **changed) -> train_rl.RLConfig:
    given = dict(model="m", train="t", val="v", out="o", algo=algo, set=choices, prompts=2, update_prompts=2) | changed
    return train_rl.RLConfig(**(dict(round_prompts=2, group=48, max_new_tokens=3, overlong_cache=1) | given))


def one_step(model: Transformer, c: train_rl.RLConfig) -> tuple[list, dict]:
    """Roll out, judge, update (at a learning rate of 0), as the loop does: the trained groups, what `update`
    returned."""

    def require_finite(what, value, rows, extras=None):
        assert torch.isfinite(torch.tensor(value)), what

    problems = [Problem(TOKENIZER.encode(p), a, TOKENIZER.encode_answer(a + a)) for p, a in (("+", "0"), ("-", "1"))]
    sampler = Sampler(model, slots=96, max_length=16)
    _, groups, _ = train_rl.collect(sampler, TOKENIZER, problems, 0, 0.5, c)
    batch = train_rl.judge(groups, model, model, c, require_finite)
    return groups, train_rl.update(model, Optimizer(model), batch, 0.0, c, require_finite)


def test_every_field_of_a_recipe_is_walked():
    assert {choice.partition("=")[0] for choice in CHOICES} == {f.name for f in fields(Recipe)}


@pytest.mark.parametrize("algo", RECIPES)
def test_every_recipe_under_every_single_choice(near_uniform, first_token_counts, algo):
    """Every choice of the table of every field, alone: a finite step with a gradient. None of these is refused: what
    the choice needs (experts, the trainer's log-probs before the batch or before the update) follows from it by
    itself."""
    for choice in CHOICES:
        groups, seen = one_step(near_uniform, config_of(algo, choice))
        assert groups, choice
        nothing_to_learn = (algo, choice) == ("sft", "expert_coef=0")
        assert (seen["grad_norm"] > 0) != nothing_to_learn, choice


@pytest.mark.parametrize(
    ("algo", "choice", "changed", "message"),
    [
        ("grpo", "shape=0", {}, "shape must be above 0"),
        ("grpo", "prefix_kept=1.5", {}, "prefix_kept a share up to 1"),
        ("grpo", "clip_low=-0.1", {}, "clip_low must be at least 0"),
        ("grpo", "kl_coef=nan", {}, "kl_coef must be at least 0"),
        ("grpo", "kl_coef=inf", {}, "kl_coef and entropy_coef must be finite"),
        ("grpo", "entropy_coef=nan", {}, "kl_coef and entropy_coef must be finite"),
        ("grpo", "expert=both", {}, "expert must be one of none"),
        ("luffy", "gate=0", {"group": 1}, "--group must be at least 2 with luffy: the expert takes one place"),
        ("grpo", "expert=prefix", {"group": 1}, "--group must be at least 2 with grpo: the expert takes one place"),
        ("dapo_dc", "gate=0", {"group": 1}, "--group must be at least 2 with dynamic sampling"),
        ("grpo", "dynamic_sampling=true", {"group": 1}, "--group must be at least 2 with dynamic sampling"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_drawn(algo, choice, changed, message):
    with pytest.raises(ValueError, match=message):
        config_of(algo, choice, **changed)


def test_dynamic_sampling_keeps_the_groups_that_an_expert_stands_for(near_uniform, first_token_counts):
    """UPT with a gate that is never passed: each prompt trains on its expert, which has no right and wrong to differ
    but a likelihood to raise. Dropped as "no signal", the run would end at step 0."""
    groups, seen = one_step(near_uniform, config_of("upt", "dynamic_sampling=true", "gate=99"))
    assert len(groups) == 2 and all(len(g.rollouts) == 1 for g in groups) and seen["grad_norm"] > 0


def test_a_choice_that_needs_an_expert_asks_for_its_trajectories(model_dir, tmp_path):
    """In the loop: refused with a sentence that names file, line and field, and nothing is written."""
    path = write_rows(tmp_path / "rl.jsonl", [{"prompt": "+", "answer": "0"}])
    c = config_of("grpo", "expert=beside", model=str(model_dir), train=path, val=path, out=str(tmp_path / "rl"))
    with pytest.raises(ValueError, match=r"rl\.jsonl, line 1: no field 'trajectory'"):
        train_rl.main(c)
    assert not (tmp_path / "rl").exists()


def test_the_loop_runs_what_used_to_crash(model_dir, tmp_path):
    """LUFFY with SRFT's expert loss wants the entropies before each update, which its own recipe doesn't."""
    path = write_rows(tmp_path / "rl.jsonl", [{"prompt": "+", "answer": "0", "trajectory": "0"}])
    files = dict(model=str(model_dir), train=path, val=path, out=str(tmp_path / "rl"), device="cpu")
    train_rl.main(config_of("luffy", "expert_loss=both", steps=1, prompts=1, round_prompts=1, **files))
    assert read_metrics(tmp_path / "rl" / "metrics.jsonl")[-1]["grad_norm"] > 0


def test_table_names_every_algorithm_and_choice():
    table = recipe_table()
    for word in (*RECIPES, "clip_high", "0.28", "constant", "dynamic_sampling", "overlong none"):
        assert word in table


def test_choices_on_the_command_line():
    recipe = with_choices(RECIPES["upt"], ["gate=2", "aggregation=constant", "dynamic_sampling=true", "clip_low=inf"])
    assert (recipe.gate, recipe.aggregation, recipe.dynamic_sampling) == (2, "constant", True)
    for bad, message in (
        ("gates=2", "expected FIELD=VALUE"),
        ("gate=two", "'two' is no int"),
        ("gate", "expected FIELD=VALUE"),
        ("aggregation=mean", "must be one of token-mean"),
        ("dynamic_sampling=maybe", "is no bool"),
    ):
        with pytest.raises(ValueError, match=message):
            with_choices(RECIPES["upt"], [bad])
