"""The algorithms' maths against worked numbers (6 digits), central differences and brute force."""

import pytest
import torch

from nanopcf.objectives import (
    RECIPES,
    Recipe,
    clip_stats,
    clipped_ratio_loss,
    group_advantages,
    has_signal,
    kl_in_reward,
    kl_penalty,
    overlong_penalty,
    recipe_table,
    rl_loss,
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


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
def test_a_group_without_variance_contributes_exactly_zero(reward):
    """0.1 * 7 / 7 isn't 0.1 in floating point: a mean that rounds would leave 1e-9 / 1e-6 = 1e-3."""
    assert not group_advantages(torch.full((3, 7), reward), "std").any()
    assert not group_advantages(torch.full((3, 7), reward), "center").any()


def test_has_signal():
    assert has_signal(torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 1]])).tolist() == [False, True, False]


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
        got = clipped_ratio_loss(logprob, torch.zeros(1), A, 0.2, high)
        got.sum().backward()
        close(got, [loss])
        close(logprob.grad, [grad])
        low, up = clip_stats(logprob, torch.zeros(1), A, 0.2, high)
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
    """Losses [1, 3] and [2, 0, 4, 6] with at most 8 tokens, in each of the three ways."""
    lengths, losses = torch.tensor([2, 4]), torch.tensor([1.0, 3, 2, 0, 4, 6])
    for name, want in (("token-mean", 2.666667), ("seq-mean", 2.5), ("constant", 1.0)):
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


@pytest.mark.parametrize("name", RECIPES)
def test_gradient_of_a_two_token_policy_by_central_differences(name):
    """rl_loss of every recipe on logits z of a two-word policy, off-policy by a little, against finite differences."""
    recipe = RECIPES[name]
    z = torch.tensor([[0.3, -0.2], [1.0, 0.5], [-0.4, 0.1]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1])
    old = z.log_softmax(-1).gather(1, y[:, None])[:, 0] + torch.tensor([0.05, -0.04, 0.3])
    A, w = torch.tensor([1.0, -0.5, -1.0]), torch.tensor([0.3, 0.3, 0.4])

    def loss(z):
        logp = z.log_softmax(-1)
        return rl_loss(
            logp.gather(1, y[:, None])[:, 0], None, -(logp.exp() * logp).sum(-1), old, A, w, recipe=recipe
        )

    leaf = z.clone().requires_grad_()
    loss(leaf).backward()
    for i in range(3):
        for j in range(2):
            step = torch.zeros_like(z)
            step[i, j] = 1e-6
            slope = (loss(z + step) - loss(z - step)) / 2e-6
            assert abs(leaf.grad[i, j] - slope) < 1e-7


def test_the_kl_term_and_the_entropy_bonus_have_their_signs():
    """A policy above its reference pays; a more uniform one is paid."""
    one, zero = torch.ones(1), torch.zeros(1)
    lp = torch.tensor([-1.0])
    common = (lp, None, torch.tensor([0.6]), lp, zero, one)
    assert rl_loss(
        *common, torch.tensor([-2.0]), recipe=Recipe(kl_coef=0.1, kl_estimator="k1")
    ) == pytest.approx(0.1)
    assert rl_loss(*common, recipe=Recipe(entropy_coef=0.5)) == pytest.approx(-0.3)


def test_table_names_every_algorithm_and_choice():
    table = recipe_table()
    for word in (*RECIPES, "clip_high", "0.28", "constant", "dynamic_sampling", "overlong none"):
        assert word in table
