"""Advantages and per-token objectives: what makes GRPO, DAPO_d, DAPO_dc and Dr.GRPO different from each other.

All are the same three steps with other choices: normalise rewards within a group of G answers to one prompt, weigh
each token, and take the clipped policy-ratio loss. `RECIPES` holds the choices, one row an algorithm; the functions
below hold the maths, each one pure, on float32 tensors. Losses are minimised. r = exp(logprob - old_logprob).

    GRPO     Shao et al., 2024 (DeepSeekMath); here as in the paper's Table 2: no std, entropy bonus 0.001
    DAPO_d   the paper's name for GRPO + dynamic sampling: groups all right or all wrong are sampled again
    DAPO_dc  DAPO_d + clip-higher (0.2, 0.28) + std + no entropy bonus (Yu et al., 2025); used after SFT
    Dr.GRPO  Liu et al., 2025: no std, and a constant instead of the token count below the sum

The paper says "token-level loss": one denominator, all trained tokens of the optimizer batch. The official scripts run
one sequence a micro-batch and average those means, which is "seq-mean" here. With one update a batch (the default, and
the official setting of DAPO_dc) the ratio is 1 at every token, so the clip never bites: the clip metrics show it.
Official verl also has a dual clip for negative advantages; the paper doesn't mention it and it is left out.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    advantage: str = "center"  # center: R - mean; std: divided by the group's standard deviation too
    clip_low: float = 0.2  # ratios below 1 - clip_low stop pushing down
    clip_high: float = 0.2  # ratios above 1 + clip_high stop pushing up
    dynamic_sampling: bool = False  # sample until a batch of groups with signal is there
    aggregation: str = "token-mean"  # token-mean, seq-mean or constant, see token_weights
    kl_coef: float = 0.0  # weight of the KL term to the start of RL; 0 in the paper
    kl_estimator: str = "k3"  # k1, k2 or k3, see kl_penalty
    kl_place: str = "loss"  # loss (with gradient) or reward (k1, without)
    entropy_coef: float = 0.0  # weight of the entropy bonus
    overlong: str = "none"  # answers cut at the limit: none, filter (not trained) or soft (penalised)


RECIPES = {
    "grpo": Recipe(entropy_coef=0.001),
    "dapo_d": Recipe(entropy_coef=0.001, dynamic_sampling=True),
    "dapo_dc": Recipe(advantage="std", clip_high=0.28, dynamic_sampling=True),
    "dr_grpo": Recipe(aggregation="constant"),
}


def recipe_table() -> str:
    """RECIPES as text, a column an algorithm, a row a choice; choices that all share stand below."""
    names = list(RECIPES)
    lines = ["".join(f"{cell:<18}" for cell in ("", *names)).rstrip()]
    shared = []
    for f in fields(Recipe):
        values = [str(getattr(RECIPES[n], f.name)) for n in names]
        if len(set(values)) == 1:
            shared.append(f"{f.name} {values[0]}")
        else:
            lines.append("".join(f"{cell:<18}" for cell in (f.name, *values)).rstrip())
    return "\n".join([*lines, "the same for all: " + ", ".join(shared)])


def has_signal(correct: Tensor) -> Tensor:
    """[P, G] of 0/1 -> [P] bool: some answers right and some wrong. Other groups have advantage 0 throughout."""
    right = correct.sum(dim=1)
    return (right > 0) & (right < correct.shape[1])


def group_advantages(rewards: Tensor, normalise: str) -> Tensor:
    """rewards [P, G] -> advantages [P, G] (the paper's Eq. 11).

    "center" R - mean; "std" (R - mean) / (std + 1e-6), unbiased as in verl. A group without variance gets exactly 0;
    a group of one has no baseline, so A = R.
    """
    if rewards.shape[1] == 1:
        return rewards.clone()
    same = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    centred = (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(same, 0.0)  # a mean can round
    if normalise == "center":
        return centred
    assert normalise == "std", normalise
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-6)


def token_weights(lengths: Tensor, aggregation: str, max_length: int) -> Tensor:
    """The weight of a token of each sequence, [B], so that the batch's loss is the plain sum of weight * token loss.

    Computed once for the whole optimizer batch: how it is cut into micro-batches then changes nothing.
    lengths [B]: trained tokens of a sequence; 0 takes it out of the loss and of the count.
        token-mean   1 / all trained tokens         seq-mean   1 / (sequences * its length)
        constant     1 / (sequences * max_length)   (Dr.GRPO)
    """
    trained = lengths > 0
    count = trained.sum().clamp(min=1)
    if aggregation == "token-mean":
        weights = torch.ones_like(lengths, dtype=torch.float32) / lengths.sum().clamp(min=1)
    elif aggregation == "seq-mean":
        weights = 1.0 / (count * lengths.clamp(min=1))
    else:
        assert aggregation == "constant", aggregation
        weights = torch.ones_like(lengths, dtype=torch.float32) / (count * max_length)
    return weights * trained


def clipped_ratio_loss(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """PPO's loss of each token (the paper's Eq. 12): -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)."""
    ratio = torch.exp(logprob - old_logprob)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def clip_stats(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """Where the clip takes the gradient away, (low, high) bool: A < 0 and r < 1 - low; A > 0 and r > 1 + high."""
    ratio = torch.exp(logprob - old_logprob)
    return (advantage < 0) & (ratio < 1 - clip_low), (advantage > 0) & (ratio > 1 + clip_high)


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) on sampled tokens, a value each (Schulman, 2020). d = logprob - ref_logprob:

    k1 = d (unbiased, either sign); k2 = d^2 / 2; k3 = exp(-d) - 1 + d >= 0. expm1, since near d = 0 the plain
    difference loses all its digits. In the loss only k2 has the gradient of the reverse KL.
    """
    d = logprob - ref_logprob
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d * d
    assert estimator == "k3", estimator
    return torch.expm1(-d) + d


def kl_in_reward(old_logprob: Tensor, ref_logprob: Tensor, lengths: Tensor) -> Tensor:
    """Sum over each answer's tokens of k1: what kl_place="reward" takes off its reward, times kl_coef. Flat [N] -> [B]."""
    k1 = kl_penalty(old_logprob, ref_logprob, "k1")
    return torch.stack([part.sum() for part in k1.split(lengths.tolist())])


def overlong_penalty(lengths: Tensor, limit: int, cache: int) -> Tensor:
    """DAPO's soft punishment, added to the reward: 0 up to limit - cache, falling to -1 at the limit."""
    return ((limit - cache - lengths) / cache).clamp(-1.0, 0.0)


def rl_loss(
    logprob: Tensor,
    lse: Tensor,
    entropy: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    weight: Tensor,
    ref_logprob: Tensor | None = None,
    *,
    recipe: Recipe,
) -> Tensor:
    """The sum over tokens [N] of weight * (policy loss + KL - entropy bonus): the closure for `kernels.linear_token_loss`.

    ref_logprob is given when the KL stands in the loss.
    """
    loss = clipped_ratio_loss(logprob, old_logprob, advantage, recipe.clip_low, recipe.clip_high)
    if ref_logprob is not None:
        loss = loss + recipe.kl_coef * kl_penalty(logprob, ref_logprob, recipe.kl_estimator)
    if recipe.entropy_coef:
        loss = loss - recipe.entropy_coef * entropy
    return (weight * loss).sum()
