"""Advantages and per-token objectives: what makes each training paradigm of the paper different from the others.

Every paradigm is the same loss with other choices, one row of `RECIPES` each. A batch holds the sequences of some
groups, one group a prompt, and each of their tokens was written by the policy or by the expert. Its loss is

    sum over tokens of  weight * (policy loss + KL - entropy bonus)  -  likelihood * logprob

and `token_terms` fills in what each token brings: advantage, weight, likelihood. r = exp(logprob - old_logprob) and losses
are minimised. The functions below hold the maths, each one pure, on float32 tensors. Eq. numbers are the paper's.

    sft         expert tokens alone, likelihood 1 / Z (Eq. 10)
    grpo        Shao et al., 2024 (Eqs. 11, 12); as in the paper's Table 2: no std, entropy bonus 0.001
    dapo_d      the paper's name for GRPO + dynamic sampling: groups all right or all wrong are sampled again
    dapo_dc     DAPO_d + clip-higher (0.2, 0.28) + std + no entropy bonus (Yu et al., 2025); used after SFT
    dr_grpo     Liu et al., 2025: no std, and a constant instead of the token count below the sum
    luffy       Yan et al., 2025 (Eqs. 13, 14): one of the G answers is the expert's, in the group's mean too; its
                policy loss is -f(p) A with f(p) = p / (p + 0.1). No clip anywhere
    srft        Fu et al., 2025 (Eqs. 15, 16): LUFFY's expert term; its likelihood besides, weight 0.5 exp(-H); own answers
                by likelihood, 0.1 exp(H) for right ones, -1 for wrong ones. H: mean entropy of the sequence, detached
    upt         Lv et al., 2025 (Eqs. 17, 18; HPT in its authors' words): a prompt of which at most `gate` answers are right
                trains on its expert's likelihood, any other on its answers as in GRPO without clip
    prefix_rft  Huang et al., 2025 (Eq. 19): one answer continues the expert's first tokens, of which only the 20 % with the
                highest entropy have an advantage. The share of the expert falls along the run (`prefix_share`)
    gspo        Zheng et al., 2025: one ratio a sequence, the geometric mean of its tokens', and one clip
    cispo       MiniMax, 2025: the ratio is a capped, detached weight, so that no token loses its gradient
    rloo        Ahmadian et al., 2024: REINFORCE, the baseline is the mean of the *other* answers
    tis         GRPO, each token weighted by min(trainer's probability / sampler's, 2) (Yao et al., 2025)

Where the paper and the official code disagree, this is the paper; `--set FIELD=VALUE` of train_rl.py changes any choice:

- One denominator, all trained tokens of the optimizer batch; the likelihood of expert tokens has its own, their count.
  The official DAPO_dc runs a sequence a micro-batch and averages those means ("seq-mean" here); LUFFY, SRFT and UPT divide
  by a constant (aggregation=constant).
- With one update a batch (the default, and the official setting of DAPO_dc) the ratio is 1 at every token of the policy's, so
  no clip bites: the clip metrics show it.
- Eq. 13 writes LUFFY's ratio over pi_old; shaping that would change nothing. As in its code, pi_old is 1 for expert tokens.
- Eq. 16 adds what is to be maximised to what is to be minimised; the signs here are those of the code.
- SRFT's H is one number in the paper, a sequence's in the code: the latter. Nothing bounds its -1 on wrong answers.
- UPT's gate has no value in the paper. The code has 0 of 8 for Qwen, 2 of 8 for Llama (gate=2). Its steps of gradient norm
  above 80 are skipped there; none is here.
- Prefix-RFT: Eq. 19 has one mean for the whole group; the code gives the continuation its raw reward, and the prefix the
  reward minus the others' mean. Which one the paper ran isn't known. The entropies are ranked over the optimizer batch.
- verl has a dual clip for negative advantages; the paper doesn't mention it and it is left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

NO_CLIP = math.inf


ALLOWED = {
    "expert": ("none", "only", "beside", "instead", "prefix"),
    "advantage": ("center", "std", "rloo"),
    "expert_loss": ("likelihood", "shaped", "both", "policy"),
    "aggregation": ("token-mean", "seq-mean", "constant"),
    "kl_estimator": ("k1", "k2", "k3"),
    "kl_place": ("loss", "reward"),
    "overlong": ("none", "filter", "soft"),
}


@dataclass(frozen=True)
class Recipe:
    # ---- which sequences make up a group ----
    expert: str = "none"  # none, only, beside or prefix (one of the G), or instead (of all, see gate)
    gate: int = 0  # expert "instead": right answers of a prompt up to which its expert is trained
    dynamic_sampling: bool = False  # sample until a batch of groups with signal is there
    # ---- the loss of a token ----
    advantage: str = "center"  # center: R - mean; std: by the deviation too; rloo: R - mean of the others
    policy_loss: str = "clipped"  # a name in POLICY_LOSSES, of the policy's tokens
    clip_low: float = 0.2  # ratios below 1 - clip_low stop pushing down
    clip_high: float = 0.2  # ratios above 1 + clip_high stop pushing up
    ratio_cap: float = 5.0  # policy_loss "capped": the largest weight of a token
    expert_loss: str = "likelihood"  # likelihood, shaped, both or policy, of the expert's tokens
    expert_coef: float = 1.0  # weight of the expert's likelihood
    shape: float = 0.1  # expert_loss "shaped": gamma of p / (p + gamma)
    prefix_kept: float = 0.2  # expert "prefix": share of its tokens, of highest entropy, with an advantage
    sampler_cap: float = 0.0  # largest correction of sampler against trainer; 0: none
    # ---- the sum, and what is added ----
    aggregation: str = "token-mean"  # token-mean, seq-mean or constant, see token_weights
    kl_coef: float = 0.0  # weight of the KL term to the start of RL; 0 in the paper
    kl_estimator: str = "k3"  # k1, k2 or k3, see kl_penalty
    kl_place: str = "loss"  # loss (with gradient) or reward (k1, without)
    entropy_coef: float = 0.0  # weight of the entropy bonus
    overlong: str = "none"  # answers cut at the limit: none, filter (not trained) or soft (penalised)

    def __post_init__(self) -> None:
        for name, allowed in (ALLOWED | {"policy_loss": tuple(POLICY_LOSSES)}).items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    @property
    def needs_old(self) -> bool:
        """The trainer must score the batch before the first update: the sampler's log-probs don't do."""
        return self.sampler_cap > 0 or self.expert == "prefix"

    @property
    def needs_current(self) -> bool:
        """Log-probs and entropies of whole sequences under the weights of each update are wanted before it."""
        return self.policy_loss in ("sequence", "likelihood") or self.expert == "prefix"


def recipe_table() -> str:
    """RECIPES as text, a row an algorithm, a column a choice; a dot is the default, which stands below the name."""
    varying = [f for f in fields(Recipe) if len({getattr(r, f.name) for r in RECIPES.values()}) > 1]
    cell = lambda r, f: "." if getattr(r, f.name) == f.default else str(getattr(r, f.name))  # noqa: E731
    rows = [["", *(f.name for f in varying)], ["default", *(str(f.default) for f in varying)]]
    rows += [[name, *(cell(r, f) for f in varying)] for name, r in RECIPES.items()]
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    lines = ["".join(f"{v:<{w}}" for v, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    same = [f"{f.name} {getattr(RECIPES['grpo'], f.name)}" for f in fields(Recipe) if f not in varying]
    return "\n".join([*lines, "the same for all: " + ", ".join(same)])


def with_choices(recipe: Recipe, choices: Sequence[str]) -> Recipe:
    """The recipe with FIELD=VALUE choices changed. Raises ValueError on an unknown field or a value of another type."""
    kinds = {f.name: f.type for f in fields(Recipe)}
    changed: dict[str, object] = {}
    for choice in choices:
        name, equals, value = choice.partition("=")
        if name not in kinds or not equals:
            raise ValueError(f"--set {choice}: expected FIELD=VALUE with a field of {', '.join(kinds)}")
        try:
            if kinds[name] is bool:
                changed[name] = {"true": True, "false": False}[value.lower()]
            else:
                changed[name] = kinds[name](value)
        except (ValueError, KeyError) as error:
            raise ValueError(f"--set {choice}: {value!r} is no {kinds[name].__name__}") from error
    return replace(recipe, **changed)


def has_signal(correct: Tensor) -> Tensor:
    """[P, G] of 0/1 -> [P] bool: some answers right and some wrong. Other groups have advantage 0 throughout."""
    right = correct.sum(dim=1)
    return (right > 0) & (right < correct.shape[1])


def group_advantages(rewards: Tensor, normalise: str) -> Tensor:
    """rewards [P, G] -> advantages [P, G] (the paper's Eq. 11).

    "center" R - mean; "std" (R - mean) / (std + 1e-6), unbiased as in verl; "rloo" R - mean of the others, which is
    G / (G - 1) times "center". A group without variance gets exactly 0; a group of one has no baseline, so A = R.
    """
    if rewards.shape[1] == 1:
        return rewards.clone()
    same = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    centred = (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(same, 0.0)  # a mean can round
    if normalise == "center":
        return centred
    if normalise == "rloo":
        return centred * (rewards.shape[1] / (rewards.shape[1] - 1))
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


def clipped_ratio_loss(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, recipe: Recipe) -> Tensor:
    """PPO's loss of each token (the paper's Eq. 12): -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)."""
    ratio = torch.exp(logprob - old_logprob)
    clipped = ratio.clamp(1 - recipe.clip_low, 1 + recipe.clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def capped_weight_loss(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, recipe: Recipe) -> Tensor:
    """CISPO's loss of each token: -min(r, ratio_cap) A logprob, the weight detached, so that a capped token still learns.

    `ratio_cap` is the weight itself, as in TRL. verl clamps to [1 - clip_low, 1 + clip_high] instead.
    """
    weight = torch.exp(logprob - old_logprob).detach().clamp(max=recipe.ratio_cap)
    return -weight * advantage * logprob


def shaped_loss(logprob: Tensor, advantage: Tensor, gamma: float) -> Tensor:
    """LUFFY's loss of each expert token (Eqs. 13, 14): -f(p) A, f(p) = p / (p + gamma). Its slope peaks at p = gamma."""
    p = torch.exp(logprob)
    return -p / (p + gamma) * advantage


def sequence_means(values: Tensor, lengths: Tensor) -> Tensor:
    """Flat [N] and lengths [B] -> the mean over each sequence, [B]; 0 where it is empty."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return torch.zeros(len(lengths)).index_add(0, owner, values) / lengths.clamp(min=1)


def highest(entropy: Tensor, among: Tensor, share: float) -> Tensor:
    """[N] bool: those of `among` [N] bool that are left when the floor((1 - share) n) lowest entropies go."""
    places = among.nonzero().squeeze(-1)
    dropped = math.floor((1 - share) * len(places) + 1e-9)  # 0.8 * 10 is 8 in exact arithmetic only
    kept = torch.zeros_like(among)
    kept[places[entropy[places].argsort(stable=True)[dropped:]]] = True
    return kept


def prefix_share(progress: float, uniform: float) -> float:
    """Share of the expert's tokens that a hybrid continues: Prefix-RFT, at `progress` (0 to 1) of the run.

    Uniform (Beta(1, 1), its code's default) between a lower bound, a cosine from 0.95 to 0.05, and 0.95.
    """
    low = 0.05 + 0.90 * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return low + (0.95 - low) * uniform


def clip_stats(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Where the clip takes the gradient away, (low, high) bool: A < 0 and r < 1 - low; A > 0 and r > 1 + high."""
    ratio = torch.exp(logprob - old_logprob)
    return (advantage < 0) & (ratio < 1 - recipe.clip_low), (advantage > 0) & (ratio > 1 + recipe.clip_high)


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


# What a policy's token loses: f(logprob, old_logprob, advantage, recipe), each [N]. For "sequence" and "likelihood"
# `token_terms` has changed old_logprob and advantage.
POLICY_LOSSES = {
    "clipped": clipped_ratio_loss,
    "sequence": clipped_ratio_loss,
    "capped": capped_weight_loss,
    "likelihood": clipped_ratio_loss,
}


RECIPES = {
    "sft": Recipe(expert="only"),
    "grpo": Recipe(entropy_coef=0.001),
    "dapo_d": Recipe(entropy_coef=0.001, dynamic_sampling=True),
    "dapo_dc": Recipe(advantage="std", clip_high=0.28, dynamic_sampling=True),
    "dr_grpo": Recipe(aggregation="constant"),
    "luffy": Recipe(expert="beside", expert_loss="shaped", clip_low=NO_CLIP, clip_high=NO_CLIP, entropy_coef=0.001),
    "srft": Recipe(expert="beside", expert_loss="both", policy_loss="likelihood", entropy_coef=0.001),
    "upt": Recipe(expert="instead", clip_low=NO_CLIP, clip_high=NO_CLIP, entropy_coef=0.001),
    "prefix_rft": Recipe(expert="prefix", expert_loss="policy", entropy_coef=0.001),
    "gspo": Recipe(advantage="std", policy_loss="sequence", clip_low=3e-4, clip_high=4e-4, aggregation="seq-mean"),
    "cispo": Recipe(advantage="std", policy_loss="capped"),
    "rloo": Recipe(advantage="rloo", clip_low=NO_CLIP, clip_high=NO_CLIP),
    "tis": Recipe(sampler_cap=2.0, entropy_coef=0.001),
}


class Terms(NamedTuple):
    """What each trained token of an optimizer batch brings to `rl_loss`: all [N]."""

    old_logprob: Tensor  # under the policy that wrote it; 0 where LUFFY takes the expert's probability for 1
    advantage: Tensor
    weight: Tensor  # of its policy loss, KL term and entropy bonus
    likelihood: Tensor  # weight of -logprob
    expert: Tensor  # bool: written by the expert


def token_terms(
    recipe: Recipe,
    *,
    advantages: Tensor,
    correct: Tensor,
    lengths: Tensor,
    trained_lengths: Tensor,
    expert: Tensor,
    sampled: Tensor,
    old: Tensor,
    current: tuple[Tensor, Tensor] | None,
    max_length: int,
) -> Terms:
    """A batch of B sequences, N tokens in all, as terms of the loss. Nothing here has a gradient.

    advantages [B]; correct [B] 0/1; lengths [B]: tokens; trained_lengths [B]: the same, 0 for what isn't trained;
    expert [N] bool; sampled and old [N]: log-probs by the sampler, and those that the ratio is taken over;
    current: (logprob [N], entropy [N]) under the weights before the update, for recipes with `needs_current`.
    """
    per_token = lambda x: torch.repeat_interleave(x, lengths)  # noqa: E731
    weight = per_token(token_weights(trained_lengths, recipe.aggregation, max_length))
    advantage = per_token(advantages)
    likelihood = torch.zeros_like(weight)
    if recipe.sampler_cap:
        # below a positive factor min and clip don't change sides: it may stand in the advantage
        correction = torch.exp(old - sampled).clamp(max=recipe.sampler_cap)
        advantage = torch.where(expert, advantage, correction * advantage)
    if recipe.policy_loss == "sequence":
        # old is moved so that exp(logprob - old) is the sequence's ratio at every token; each still gets its gradient
        logprob, _ = current
        old = logprob - per_token(sequence_means(logprob - old, lengths))
    if recipe.policy_loss == "likelihood":
        uncertainty = per_token(sequence_means(current[1], lengths))
        push = torch.where(per_token(correct) == 1, 0.1 * torch.exp(uncertainty), -1.0)
        likelihood = torch.where(expert, 0.0, push * weight)
        advantage = torch.where(expert, advantage, 0.0)
    if recipe.expert == "prefix":
        idle = expert & ~highest(current[1], expert, recipe.prefix_kept)
        advantage = advantage.masked_fill(idle, 0.0)
    if recipe.expert_loss in ("likelihood", "both"):
        taught = torch.full_like(weight, recipe.expert_coef / max(1, int(expert.sum())))
        if recipe.expert_loss == "both":
            taught = taught * 0.5 * torch.exp(-uncertainty)
        else:
            advantage = advantage.masked_fill(expert, 0.0)
        likelihood = torch.where(expert, taught, likelihood)
    return Terms(old, advantage, weight, likelihood, expert)


def rl_loss(
    logprob: Tensor,
    lse: Tensor,
    entropy: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    weight: Tensor,
    likelihood: Tensor,
    expert: Tensor,
    ref_logprob: Tensor | None = None,
    *,
    recipe: Recipe,
) -> Tensor:
    """The sum over tokens [N] of their loss: the closure for `kernels.linear_token_loss`.

    The five in the middle are `Terms`; ref_logprob is given when the KL stands in the loss.
    """
    loss = POLICY_LOSSES[recipe.policy_loss](logprob, old_logprob, advantage, recipe)
    if recipe.expert_loss in ("shaped", "both"):
        loss = torch.where(expert, shaped_loss(logprob, advantage, recipe.shape), loss)
    if ref_logprob is not None:
        loss = loss + recipe.kl_coef * kl_penalty(logprob, ref_logprob, recipe.kl_estimator)
    if recipe.entropy_coef:
        loss = loss - recipe.entropy_coef * entropy
    return (weight * loss).sum() - (likelihood * logprob).sum()
