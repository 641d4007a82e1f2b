"""The algorithms' maths against worked numbers (6 digits), central differences and brute force."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nanopcf.objectives import (
    NO_CLIP,
    RECIPES,
    Recipe,
    Terms,
    capped_weight_loss,
    clip_stats,
    clipped_ratio_loss,
    group_advantages,
    highest,
    kl_in_reward,
    kl_penalty,
    overlong_penalty,
    rl_loss,
    shaped_loss,
    token_terms,
    token_weights,
)


def close(got, want, atol=2e-6):
    torch.testing.assert_close(torch.as_tensor(got), torch.tensor(want), atol=atol, rtol=0)


def test_advantages():
    half = torch.tensor([[1.0, 0, 0, 1]])
    close(group_advantages(half, "center"), [[0.5, -0.5, -0.5, 0.5]])
    close(group_advantages(half, "std"), [[0.866024, -0.866024, -0.866024, 0.866024]])
    one = torch.tensor([[1.0] + [0.0] * 7])
    close(group_advantages(one, "center"), [[0.875] + [-0.125] * 7])
    close(group_advantages(one, "std"), [[2.474867] + [-0.353552] * 7])
    close(group_advantages(torch.tensor([[0.7], [0.0]]), "std"), [[0.7], [0.0]])  # no baseline for one
    for hybrid, by_prefix in ((1.0, 0.857143), (0.0, -0.142857)):  # Prefix-RFT: the last one does not count in the mean
        rewards = torch.tensor([[1.0] + [0.0] * 6 + [hybrid]])
        close(group_advantages(rewards, "prefix"), [[0.857143] + [-0.142857] * 6 + [by_prefix]])


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
def test_a_group_without_variance_contributes_exactly_zero(reward):
    """0.1 * 7 / 7 isn't 0.1 in floating point: a mean that rounds would leave 1e-9 / 1e-6 = 1e-3."""
    assert not group_advantages(torch.full((3, 7), reward), "std").any()
    assert not group_advantages(torch.full((3, 7), reward), "center").any()


@pytest.mark.parametrize(
    ("advantage", "ratio", "symmetric", "symmetric_grad", "higher", "higher_grad"),
    [
        (1, 0.70, -0.70, -0.70, -0.70, -0.70),
        (1, 1.00, -1.00, -1.00, -1.00, -1.00),
        (1, 1.25, -1.20, 0.0, -1.25, -1.25),
        (1, 1.35, -1.20, 0.0, -1.28, 0.0),
        (-1, 0.70, 0.80, 0.0, 0.80, 0.0),
        (-1, 1.00, 1.00, 1.00, 1.00, 1.00),
        (-1, 1.25, 1.25, 1.25, 1.25, 1.25),
        (-1, 1.35, 1.35, 1.35, 1.35, 1.35),
    ],
)
def test_clip_sign_table(advantage, ratio, symmetric, symmetric_grad, higher, higher_grad):
    """Loss and gradient for both signs of the advantage; an inverted clip for A < 0 is a published bug."""
    for high, loss, grad in ((0.2, symmetric, symmetric_grad), (0.28, higher, higher_grad)):
        logprob = torch.tensor([ratio]).log().requires_grad_()
        A = torch.tensor([float(advantage)])
        got = clipped_ratio_loss(logprob, torch.zeros(1), A, Recipe(clip_high=high))
        got.sum().backward()
        close(got, [loss])
        close(logprob.grad, [grad])
        low, up = clip_stats(logprob, torch.zeros(1), A, Recipe(clip_high=high))
        assert (low | up).item() == (grad == 0)  # the metric counts where the gradient is gone


def test_kl_estimators():
    d = torch.tensor([-0.5, 0.0, 0.5], requires_grad=True)
    for name, value, gradient in [
        ("k1", [-0.5, 0.0, 0.5], [1.0, 1.0, 1.0]),
        ("k2", [0.125, 0.0, 0.125], [-0.5, 0.0, 0.5]),
        ("k3", [0.148721, 0.0, 0.106531], [-0.648721, 0.0, 0.393469]),
    ]:
        k = kl_penalty(d, torch.zeros(3), name)
        (g,) = torch.autograd.grad(k.sum(), d)
        close(k, value)
        close(g, gradient)


def test_k3_is_never_negative_and_keeps_its_digits_near_zero():
    """exp(-d) - 1 + d in float32 is 0 or negative for |d| = 1e-4; d^2 / 2 is right there."""
    d = torch.cat([torch.linspace(-5, 5, 1001), torch.tensor([1e-4, -1e-4, 3e-4])])
    k3 = kl_penalty(d, torch.zeros_like(d), "k3")
    assert (k3 >= 0).all()
    torch.testing.assert_close(k3[-3:], d[-3:] ** 2 / 2, rtol=0.02, atol=1e-10)


def test_aggregation():
    """Losses [1, 3] and [2, 0, 4, 6], 16 in all, with at most 8 tokens: 16 / 6; the mean of 2 and 3; 16 / (2 * 8); 16 /
    8."""
    lengths, losses = torch.tensor([2, 4]), torch.tensor([1.0, 3, 2, 0, 4, 6])
    for name, want in (("token-mean", 2.666667), ("seq-mean", 2.5), ("constant", 1.0), ("sum", 2.0)):
        weights = token_weights(lengths, name, 8).repeat_interleave(lengths)
        close((weights * losses).sum(), want)
    # a filtered answer (length 0) is neither in the sum nor in the count
    close(token_weights(torch.tensor([2, 0]), "seq-mean", 8), [0.5, 0.0])
    close(token_weights(torch.tensor([2, 0]), "constant", 8), [0.125, 0.0])
    assert not token_weights(torch.tensor([0, 0]), "token-mean", 8).any()


def test_overlong_penalty():
    lengths = torch.tensor([10, 16, 17, 18, 19, 20, 21])
    close(overlong_penalty(lengths, 20, 4), [0, 0, -0.25, -0.5, -0.75, -1, -1])


def test_kl_in_reward_sums_over_each_answer():
    old, ref = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -2.0, -0.1])
    close(kl_in_reward(old, ref, torch.tensor([2, 1])), [0.5, -0.4])


def terms_of(recipe: Recipe, *, current, max_length: int, **batch) -> Terms:
    """`token_terms` of a batch given by its tensors."""
    return token_terms(recipe, SimpleNamespace(**batch), current, max_length)


def batch_terms(recipe: Recipe, expert: tuple[int, ...] = (0, 0, 3), **changed) -> Terms:
    """Three sequences of 2, 2 and 3 tokens; the last one's first `expert[2]` tokens are the expert's, and so on."""
    lengths = torch.tensor([2, 2, 3])
    given = dict(
        advantages=torch.tensor([0.6, -0.4, 0.9]),
        correct=torch.tensor([1.0, 0.0, 1.0]),
        rewards=torch.tensor([1.0, 0.0, 1.0]),
        one_update=False,
        lengths=lengths,
        trained_lengths=lengths,
        is_expert=torch.tensor([t < k for k, n in zip(expert, lengths.tolist(), strict=True) for t in range(n)]),
        sampler_logprobs=torch.tensor([-0.5, -1.0, -0.2, -2.0, 0.0, 0.0, 0.0]),
        old_logprobs=torch.tensor([-0.4, -1.1, -0.2, -2.2, 0.0, 0.0, 0.0]),
        current=(
            torch.tensor([-0.45, -0.9, -0.25, -1.9, -0.6, -1.2, -0.1]),
            torch.tensor([0.3, 0.7, 0.4, 0.6, 0.2, 0.8, 0.5]),
        ),
        max_length=4,
    )
    return terms_of(recipe, **(given | changed))


@pytest.mark.parametrize("name", RECIPES)
def test_gradient_of_a_two_token_policy_by_central_differences(name):
    """rl_loss of every recipe on logits of a two-word policy, off-policy by a little, against finite differences.

    What the formulas detach (weights by entropy, GSPO's ratio, CISPO's cap) stays fixed in the difference too.
    """
    recipe = RECIPES[name]
    z = torch.tensor(
        [[0.3, -0.2], [1.0, 0.5], [-0.4, 0.1], [0.2, 0.9], [0.0, 0.3], [1.5, -1.0], [0.1, 0.2]], dtype=torch.float64
    )
    y = torch.tensor([0, 1, 1, 0, 1, 0, 1])
    logprob = lambda z: z.log_softmax(-1).gather(1, y[:, None])[:, 0]  # noqa: E731
    here = logprob(z).float()
    nudge = torch.tensor([0.05, -0.04, 0.3, -0.02, 0.0, 0.0, 0.0])
    mine = (0, 0, 3) if recipe.expert != "none" else (0, 0, 0)
    old = here + nudge
    if recipe.expert != "prefix" and recipe.expert != "none":
        old[4:] = 0.0
    entropy = lambda z: -(z.log_softmax(-1).exp() * z.log_softmax(-1)).sum(-1)  # noqa: E731
    terms = batch_terms(recipe, mine, old_logprobs=old, current=(here, entropy(z).float()))

    def loss(z, frozen=None):
        if recipe.policy_loss == "capped":  # its weight is detached: -w A logprob with w held still
            w = torch.exp(here.double() - terms.old_logprob).clamp(max=recipe.ratio_cap)
            if frozen:
                return -(terms.weight * w * terms.advantage * logprob(z)).sum()
        if recipe.policy_loss == "sequence" and frozen:  # a token moves by itself, from the ratio of its sequence
            moved = terms._replace(old_logprob=here + terms.old_logprob)
            return rl_loss(logprob(z), None, entropy(z), *moved, recipe=replace(recipe, policy_loss="clipped"))
        return rl_loss(logprob(z), None, entropy(z), *terms, recipe=recipe)

    leaf = z.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad.any()
    for i in range(7):
        for j in range(2):
            step = torch.zeros_like(z)
            step[i, j] = 1e-6
            slope = (loss(z + step, True) - loss(z - step, True)) / 2e-6
            assert abs(leaf.grad[i, j] - slope) < 1e-6, (i, j)


def test_the_kl_term_and_the_entropy_bonus_have_their_signs():
    """A policy above its reference pays; a more uniform one is paid."""
    one, zero = torch.ones(1), torch.zeros(1)
    lp = torch.tensor([-1.0])
    common = (lp, None, torch.tensor([0.6]), lp, zero, one, zero, zero.bool())
    assert rl_loss(*common, torch.tensor([-2.0]), recipe=Recipe(kl_coef=0.1, kl_estimator="k1")) == pytest.approx(0.1)
    assert rl_loss(*common, recipe=Recipe(entropy_coef=0.5)) == pytest.approx(-0.3)


# ---- the paradigms with experts, and the other relatives of GRPO ----


def test_rloo_advantages():
    close(group_advantages(torch.tensor([[1.0, 0, 0, 1]]), "rloo"), [[0.666667, -0.666667, -0.666667, 0.666667]])
    close(group_advantages(torch.tensor([[1.0] + [0.0] * 7]), "rloo"), [[1.0] + [-0.142857] * 7])
    brute = torch.rand(1, 5)
    others = [(brute.sum() - r) / 4 for r in brute[0]]
    close(group_advantages(brute, "rloo")[0], (brute[0] - torch.stack(others)).tolist())


def test_the_expert_stands_in_the_group_of_luffy():
    """[1, 0 x 6] and an expert that is right: one mean over the eight."""
    close(group_advantages(torch.tensor([[1.0] + [0.0] * 6 + [1.0]]), "center"), [[0.75] + [-0.25] * 6 + [0.75]])
    close(group_advantages(torch.tensor([[0.0] * 7 + [1.0]]), "center"), [[-0.125] * 7 + [0.875]])
    assert not group_advantages(torch.ones(1, 8), "center").any()  # solved: no pull to the expert


@pytest.mark.parametrize(
    ("p", "f", "slope"),
    [(0.01, 0.090909, 0.082645), (0.1, 0.5, 0.25), (0.5, 0.833333, 0.138889), (1.0, 0.909091, 0.082645)],
)
def test_shaping_and_its_slope(p, f, slope):
    logprob = torch.tensor([p], dtype=torch.float64).log().requires_grad_()
    loss = shaped_loss(logprob, torch.ones(1), 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(-f, abs=1e-6) and logprob.grad.item() == pytest.approx(-slope, abs=1e-6)


def test_cispo_caps_the_weight_and_keeps_the_gradient():
    ratios = torch.tensor([1.105171, 0.7, 3.0, 9.0])
    logprob = ratios.log().requires_grad_()
    capped_weight_loss(logprob, torch.zeros(4), torch.ones(4), Recipe(ratio_cap=5.0)).sum().backward()
    close(-logprob.grad, [1.105171, 0.7, 3.0, 5.0])


def test_gspo_has_one_ratio_a_sequence_and_one_clip():
    """Log-ratios [.1, -.2, .3]: s = exp(.066667) at all three; each token's slope is -A s / T, none once clipped."""
    logprob = torch.tensor([-1.0, -1.0, -1.0])
    old, three = logprob - torch.tensor([0.1, -0.2, 0.3]), torch.tensor([3])
    for clip, slope in ((0.2, -1.068939 / 3), (4e-4, 0.0)):
        recipe = replace(RECIPES["gspo"], clip_high=clip)
        terms = terms_of(
            recipe,
            advantages=torch.ones(1),
            correct=torch.ones(1),
            one_update=False,
            lengths=three,
            trained_lengths=three,
            is_expert=torch.zeros(3).bool(),
            sampler_logprobs=old,
            old_logprobs=old,
            current=(logprob, torch.zeros(3)),
            max_length=8,
        )
        leaf = logprob.clone().requires_grad_()
        rl_loss(leaf, None, None, *terms, recipe=recipe).backward()
        close(leaf.grad, [slope] * 3)


def test_the_sampler_correction_is_capped_and_leaves_experts_alone():
    old, sampled = torch.tensor([-0.5, 0.0, 0.5, 1.0]), torch.zeros(4)
    four = torch.tensor([4])
    given = dict(
        advantages=torch.ones(1),
        correct=torch.ones(1),
        lengths=four,
        trained_lengths=four,
        sampler_logprobs=sampled,
        old_logprobs=old,
        current=None,
        max_length=4,
    )
    terms = terms_of(RECIPES["tis"], is_expert=torch.zeros(4).bool(), **given)
    close(terms.advantage, [0.606531, 1.0, 1.648721, 2.0])
    mixed = replace(RECIPES["luffy"], sampler_cap=2.0)
    close(terms_of(mixed, is_expert=torch.ones(4).bool(), **given).advantage, [1.0] * 4)


def test_srft_weights():
    """Right l = [-.1, -.2] with H = .5, wrong l = [-.3], over 8: -.031317. The expert's weight: .5 exp(-H) over its
    tokens."""
    lengths = torch.tensor([2, 1, 2])
    expert = torch.tensor([False, False, False, True, True])
    entropy = torch.tensor([0.4, 0.6, 0.9, 0.05, 0.15])
    recipe = replace(RECIPES["srft"], aggregation="constant", entropy_coef=0.0)
    terms = terms_of(
        recipe,
        advantages=torch.tensor([0.3, -0.6, 0.3]),
        correct=torch.tensor([1.0, 0, 1]),
        lengths=lengths,
        trained_lengths=lengths,
        is_expert=expert,
        sampler_logprobs=torch.zeros(5),
        old_logprobs=torch.zeros(5),
        current=(torch.zeros(5), entropy),
        max_length=8,
    )
    close(terms.likelihood * 24, [0.164872, 0.164872, -1.0, 24 * 0.452419 / 2, 24 * 0.452419 / 2], atol=2e-5)
    logprob = torch.tensor([-0.1, -0.2, -0.3, -0.7, -1.1])
    own = rl_loss(logprob[:3], None, None, *(t[:3] for t in terms), recipe=recipe)
    assert own.item() * 3 == pytest.approx(-0.031317, abs=2e-6)  # constant: 3 sequences of 8
    p = logprob[3:].exp()
    pull = rl_loss(logprob[3:], None, None, *(t[3:] for t in terms), recipe=recipe)
    want = -(0.3 * p / (p + 0.1)).sum() / 24 + 0.452419 / 2 * 1.8
    assert pull.item() == pytest.approx(want.item(), abs=1e-6)


def test_prefix_tokens_of_high_entropy_alone_have_an_advantage():
    entropy = torch.tensor([0.9, 0.1, 0.5, 0.3, 0.7, 0.05, 0.2, 1.2, 0.4, 0.6])
    assert highest(entropy, torch.ones(10).bool(), 0.2).nonzero().squeeze(-1).tolist() == [0, 7]
    assert not highest(entropy, torch.zeros(10).bool(), 0.2).any()
    terms = batch_terms(replace(RECIPES["prefix_rft"], prefix_kept=0.5), (0, 0, 2))
    close(
        terms.advantage, [0.6, 0.6, -0.4, -0.4, 0.0, 0.9, 0.9]
    )  # two of the expert's: one is kept; one of the policy's
    close(terms.weight, [1 / 7] * 7)  # the idle one counts
    # the official code: the policy's continuation of a prefix has its reward as advantage, not the reward less a mean
    own = batch_terms(replace(RECIPES["prefix_rft"], prefix_kept=0.5, advantage="prefix"), (0, 0, 2))
    close(own.advantage, [0.6, 0.6, -0.4, -0.4, 0.0, 0.9, 1.0])


def same_loss(a: str | Recipe, b: str | Recipe, expert: tuple[int, ...] = (0, 0, 0), **changed) -> None:
    """Loss and gradient of two recipes agree on the same sequences."""
    results = []
    for recipe in (RECIPES.get(r, r) if isinstance(r, str) else r for r in (a, b)):
        recipe = replace(recipe, **changed)
        leaf = torch.tensor([-0.45, -0.9, -0.25, -1.9, -0.6, -1.2, -0.1], requires_grad=True)
        loss = rl_loss(leaf, None, torch.zeros(7), *batch_terms(recipe, expert), recipe=recipe)
        results.append((loss.item(), torch.autograd.grad(loss, leaf)[0]))
    assert results[0][0] == results[1][0] != 0 and torch.equal(results[0][1], results[1][1])


def test_limits():
    """Without experts the paradigms with experts are the ones without; with nothing else UPT is SFT."""
    unclipped = dict(clip_low=NO_CLIP, clip_high=NO_CLIP)
    same_loss("luffy", "dr_grpo", aggregation="constant", entropy_coef=0.001, **unclipped)
    same_loss("upt", "grpo", **unclipped)
    same_loss("prefix_rft", "grpo")
    same_loss("upt", "sft", expert=(2, 2, 3), entropy_coef=0.0)
    loss = rl_loss(torch.full((7,), -2.0), None, None, *batch_terms(RECIPES["sft"], (2, 2, 3)), recipe=RECIPES["sft"])
    assert loss.item() == pytest.approx(2.0)  # the mean over expert tokens: cross-entropy
