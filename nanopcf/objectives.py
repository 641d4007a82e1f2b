"""Advantages and per-token objectives: what makes each training paradigm of the paper different from the others.

Every paradigm is the same loss with other choices, and each is one row of `RECIPES`. A batch holds groups of responses,
one group per prompt; each token was written by the policy or by the expert. With r = exp(logprob - old_logprob), the
loss that is minimised is a sum over tokens,

    weight * (policy_loss(r, advantage) + kl_coef * KL - entropy_coef * entropy)  -  likelihood * logprob

The update goes through this file from top to bottom: rewards become advantages (`group_advantages`), every token gets
its weight (`token_weights`), `token_terms` collects what the recipe wants of each token, and `rl_loss` is the sum
above. All functions are pure, on float32 tensors. Equation numbers are the paper's. docs/algorithms.md has the table of
paradigms: equation, source, where the official code deviates, and what is chosen here.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

NO_CLIP = math.inf

# ---- 1. a recipe: everything that an algorithm chooses ----

ALLOWED = {
    "expert": ("none", "only", "beside", "instead", "prefix"),
    "advantage": ("center", "std", "rloo", "prefix"),
    "expert_loss": ("likelihood", "shaped", "both", "policy"),
    "aggregation": ("token-mean", "seq-mean", "constant", "sum"),
    "kl_estimator": ("k1", "k2", "k3"),
    "kl_place": ("loss", "reward"),
    "overlong": ("none", "filter", "soft"),
}


@dataclass(frozen=True)
class Recipe:
    """The choices of one algorithm. Raises ValueError on a choice that does not exist."""

    # which responses make up a group
    expert: str = "none"  # none, only, beside or prefix (one of the G), or instead (of all G, see gate)
    gate: int = 0  # expert "instead": a prompt with at most this many right answers trains on its expert
    dynamic_sampling: bool = False  # sample until there are enough groups that teach something
    # the loss of a token
    advantage: str = "center"  # center: R - mean; std: that over the deviation; rloo or prefix: R - mean of others
    policy_loss: str = "clipped"  # loss of the policy's tokens, a name in POLICY_LOSSES
    clip_low: float = 0.2  # ratios below 1 - clip_low stop pushing down
    clip_high: float = 0.2  # ratios above 1 + clip_high stop pushing up
    ratio_cap: float = 5.0  # policy_loss "capped": the largest weight of a token
    expert_loss: str = "likelihood"  # likelihood, shaped, both or policy: loss of the expert's tokens
    expert_coef: float = 1.0  # weight of the expert's likelihood
    shape: float = 0.1  # expert_loss "shaped" and "both": gamma of p / (p + gamma)
    prefix_kept: float = 0.2  # expert "prefix": share of its tokens, of highest entropy, with an advantage
    sampler_cap: float = 0.0  # largest correction of sampler against trainer (0: no correction)
    # the sum over tokens, and what is added to it
    aggregation: str = "token-mean"  # token-mean, seq-mean, constant or sum, see token_weights
    kl_coef: float = 0.0  # weight of the KL term to the start of RL; 0 in the paper
    kl_estimator: str = "k3"  # k1, k2 or k3, see kl_penalty
    kl_place: str = "loss"  # loss (with gradient) or reward (k1, without)
    entropy_coef: float = 0.0  # weight of the entropy bonus
    overlong: str = "none"  # responses cut at the limit: none, filter (not trained) or soft (penalised)

    def __post_init__(self) -> None:
        for name, allowed in (ALLOWED | {"policy_loss": tuple(POLICY_LOSSES)}).items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in "clip_low clip_high ratio_cap expert_coef shape prefix_kept sampler_cap kl_coef".split():
            if not getattr(self, name) >= 0:  # written so that nan fails too
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not (math.isfinite(self.kl_coef) and math.isfinite(self.entropy_coef)):
            raise ValueError(f"kl_coef and entropy_coef must be finite, got {self.kl_coef} and {self.entropy_coef}")
        if self.shape == 0 or self.prefix_kept > 1:
            raise ValueError("shape must be above 0 and prefix_kept a share up to 1")

    # What a recipe needs and trains follows from its fields, in these five places. one_update: a batch is one update.

    @property
    def needs_expert(self) -> bool:
        """The training data must hold the expert's trajectories."""
        return self.expert != "none"

    @property
    def trains_likelihood(self) -> bool:
        """Some log-probs are pushed up whatever the advantages are: SFT, UPT and SRFT."""
        return self.policy_loss == "likelihood" or (self.needs_expert and self.expert_loss in ("likelihood", "both"))

    def needs_sequence_ratio(self, one_update: bool) -> bool:
        """GSPO's ratio must be computed: it is 1 as long as the weights are those that sampled, an expert apart."""
        return self.policy_loss == "sequence" and (self.needs_expert or not one_update)

    def needs_old_logprobs(self, one_update: bool) -> bool:
        """The trainer must score the batch before its first update, because the sampler's log-probs do not suffice: the
        correction compares the two, nobody has sampled the tokens of an expert's prefix, and a narrow clip would act on
        the difference of the two, which in bfloat16 is some hundredths."""
        narrow = min(self.clip_low, self.clip_high) < 0.1
        acts = self.policy_loss != "sequence" or self.needs_sequence_ratio(one_update)
        return self.sampler_cap > 0 or self.expert == "prefix" or (narrow and acts)

    def needs_current_logprobs(self, one_update: bool) -> bool:
        """Each update must first score its whole sequences: GSPO's ratio and SRFT's two weights belong to a sequence,
        and Prefix-RFT ranks the entropies of the expert's tokens."""
        weighs_by_entropy = self.policy_loss == "likelihood" or (self.needs_expert and self.expert_loss == "both")
        return self.needs_sequence_ratio(one_update) or weighs_by_entropy or self.expert == "prefix"


# ---- 2. from rewards to advantages ----


def group_advantages(rewards: Tensor, normalise: str) -> Tensor:
    """rewards [P, G] -> advantages [P, G] (the paper's Eq. 11).

    "center": R - mean. "std": (R - mean) / (std + 1e-6), unbiased as in verl. "rloo": R - mean of the others, which is
    G / (G - 1) times "center". A group without variance gets exactly 0; a group of one has no baseline, so A = R.
    "prefix", Prefix-RFT's official code: R - mean of all but the last, which is the one that the expert began.
    """
    if rewards.shape[1] == 1:
        return rewards.clone()
    if normalise == "prefix":
        return rewards - rewards[:, :-1].mean(dim=1, keepdim=True)
    same = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)  # (P, 1)
    # equal rewards are set to 0 by hand: their mean can round, and a rounding error over 1e-6 is no small number
    centred = (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(same, 0.0)
    if normalise == "center":
        return centred
    if normalise == "rloo":
        return centred * (rewards.shape[1] / (rewards.shape[1] - 1))
    assert normalise == "std", normalise
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-6)


def overlong_penalty(lengths: Tensor, limit: int, cache: int) -> Tensor:
    """DAPO's soft punishment [B], added to the reward: 0 up to limit - cache tokens, falling to -1 at the limit."""
    return ((limit - cache - lengths) / cache).clamp(-1.0, 0.0)


def kl_in_reward(old_logprob: Tensor, ref_logprob: Tensor, lengths: Tensor) -> Tensor:
    """Sum of k1 over the tokens of each response, [N] -> [B]: kl_coef times this is taken off its reward."""
    k1 = kl_penalty(old_logprob, ref_logprob, "k1")
    return torch.stack([part.sum() for part in k1.split(lengths.tolist())])


# ---- 3. the loss of a token: f(logprob, old_logprob, advantage, recipe), each [N] ----


def policy_ratio(logprob: Tensor, old_logprob: Tensor, recipe: Recipe) -> Tensor:
    """r = exp(logprob - old_logprob) [N]. GSPO's r has the value exp(-old_logprob), the sequence's ratio at each of its
    tokens, so that all of them clip together; and its gradient is that of the token's own log-prob."""
    if recipe.policy_loss == "sequence":
        logprob = logprob - logprob.detach()
    return torch.exp(logprob - old_logprob)


def clipped_ratio_loss(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, recipe: Recipe) -> Tensor:
    """PPO's loss of each token (the paper's Eq. 12): -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)."""
    ratio = policy_ratio(logprob, old_logprob, recipe)
    clipped = ratio.clamp(1 - recipe.clip_low, 1 + recipe.clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def capped_weight_loss(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, recipe: Recipe) -> Tensor:
    """CISPO's loss of each token: -min(r, ratio_cap) A logprob. The weight is detached, so a capped token still learns.

    `ratio_cap` is the weight itself, as in TRL. verl clamps to [1 - clip_low, 1 + clip_high] instead.
    """
    weight = torch.exp(logprob - old_logprob).detach().clamp(max=recipe.ratio_cap)
    return -weight * advantage * logprob


def shaped_loss(logprob: Tensor, advantage: Tensor, gamma: float) -> Tensor:
    """LUFFY's loss of each expert token (Eqs. 13, 14): -f(p) A, f(p) = p / (p + gamma), steepest at p = gamma."""
    p = torch.exp(logprob)
    return -p / (p + gamma) * advantage


# For "sequence" and "likelihood", `token_terms` has changed old_logprob and advantage beforehand.
POLICY_LOSSES = {
    "clipped": clipped_ratio_loss,
    "sequence": clipped_ratio_loss,
    "capped": capped_weight_loss,
    "likelihood": clipped_ratio_loss,
}


def clip_stats(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Where the clip takes the gradient away, (low, high) bool [N]: A < 0 and r < 1 - low; A > 0 and r > 1 + high."""
    ratio = policy_ratio(logprob, old_logprob, recipe)
    clips = recipe.policy_loss != "capped"  # CISPO caps a weight, and no token loses its gradient
    low, high = clips & (ratio < 1 - recipe.clip_low), clips & (ratio > 1 + recipe.clip_high)
    return low & (advantage < 0), high & (advantage > 0)


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) on sampled tokens, one value each (Schulman, 2020). With d = logprob - ref_logprob:

    k1 = d (unbiased, of either sign); k2 = d^2 / 2; k3 = exp(-d) - 1 + d >= 0. It uses expm1, since near d = 0 the
    plain difference loses all of its digits. In the loss only k2 has the gradient of the reverse KL.
    """
    d = logprob - ref_logprob
    return {"k1": lambda: d, "k2": lambda: 0.5 * d * d, "k3": lambda: torch.expm1(-d) + d}[estimator]()


# ---- 4. the sum over a batch ----


def token_weights(lengths: Tensor, aggregation: str, max_length: int) -> Tensor:
    """The weight of each token of a sequence, [B], so that the loss of the batch is a plain sum of weight * token loss.

    It is computed once for the whole optimizer batch, so how that is cut into micro-batches changes nothing.
    lengths [B]: trained tokens of each sequence; a length of 0 takes it out of the loss and out of the count.

        token-mean   1 / all trained tokens          constant   1 / (sequences * max_length)   (Dr.GRPO)
        seq-mean     1 / (sequences * its length)    sum        1 / max_length   (verl; the official LUFFY, UPT)
    """
    trained = lengths > 0
    sequences = trained.sum().clamp(min=1)
    ones = torch.ones_like(lengths, dtype=torch.float32)
    weights = {
        "token-mean": ones / lengths.sum().clamp(min=1),
        "seq-mean": ones / (sequences * lengths.clamp(min=1)),
        "constant": ones / (sequences * max_length),
        "sum": ones / max_length,
    }[aggregation]
    return weights * trained


def sequence_means(values: Tensor, lengths: Tensor) -> Tensor:
    """Flat [N] and lengths [B] -> the mean over each sequence, [B]; 0 where a sequence is empty."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # (N,) the sequence of each token
    return torch.zeros(len(lengths)).index_add(0, owner, values) / lengths.clamp(min=1)


def highest(entropy: Tensor, among: Tensor, share: float) -> Tensor:
    """[N] bool: those of `among` [N] bool that are left when the floor((1 - share) n) lowest entropies go."""
    places = among.nonzero().squeeze(-1)  # (n,)
    dropped = math.floor((1 - share) * len(places) + 1e-9)  # 0.8 * 10 is 8 in exact arithmetic only
    kept = torch.zeros_like(among)
    kept[places[entropy[places].argsort(stable=True)[dropped:]]] = True
    return kept


class Terms(NamedTuple):
    """What each trained token of an optimizer batch brings to `rl_loss`: all [N]."""

    old_logprob: Tensor  # under the policy that wrote it; LUFFY: 0 for the expert's; GSPO: -log of the sequence's ratio
    advantage: Tensor
    weight: Tensor  # of its policy loss, KL term and entropy bonus
    likelihood: Tensor  # weight of its logprob, which is pushed up
    is_expert: Tensor  # bool: written by the expert


def token_terms(recipe: Recipe, batch: Any, current: tuple[Tensor, Tensor] | None, max_length: int) -> Terms:
    """What each of the N tokens of an optimizer batch brings to the loss. Nothing here has a gradient.

    batch: a `rollouts.Batch`, B sequences with their advantages and old log-probs; current: (logprobs [N], entropies
    [N]) under the weights before this update, if `needs_current_logprobs`; max_length: the longest response allowed.
    """
    is_expert, old_logprobs = batch.is_expert, batch.old_logprobs  # (N,) each

    def per_token(values: Tensor) -> Tensor:
        return torch.repeat_interleave(values, batch.lengths)  # (B,) -> (N,)

    weight = per_token(token_weights(batch.trained_lengths, recipe.aggregation, max_length))  # (N,)
    advantage = per_token(batch.advantages)  # (N,)
    likelihood = torch.zeros_like(weight)  # (N,)
    if current is not None:
        logprobs, entropies = current
        uncertainty = per_token(sequence_means(entropies, batch.lengths))  # SRFT's H, one per sequence, (N,)

    if recipe.sampler_cap:
        # A positive factor moves through the minimum and the clip unchanged, so it can stand in the advantage.
        correction = torch.exp(old_logprobs - batch.sampler_logprobs).clamp(max=recipe.sampler_cap)
        advantage = torch.where(is_expert, advantage, correction * advantage)
    if recipe.policy_loss == "sequence":  # from here on the ratio of its sequence, in the form of `policy_ratio`
        old_logprobs = torch.zeros_like(weight)  # (N,), a ratio of 1
        if recipe.needs_sequence_ratio(batch.one_update):
            old_logprobs = per_token(sequence_means(batch.old_logprobs - logprobs, batch.lengths))
    if recipe.policy_loss == "likelihood":
        # SRFT pulls right answers up, the more the less sure it is of them, and pushes wrong ones down. No advantage.
        push = torch.where(per_token(batch.correct) == 1, 0.1 * torch.exp(uncertainty), -1.0)
        likelihood = torch.where(is_expert, 0.0, push * weight)
        advantage = torch.where(is_expert, advantage, 0.0)
    if recipe.expert == "prefix":
        # Most tokens of a prefix are what the policy would have written anyway: only the uncertain ones are taught.
        idle = is_expert & ~highest(entropies, is_expert, recipe.prefix_kept)
        advantage = advantage.masked_fill(idle, 0.0)
        if recipe.advantage == "prefix":  # what continues a prefix has no response to be compared with: its reward
            continued = per_token(sequence_means(is_expert.float(), batch.lengths) > 0) & ~is_expert
            advantage = torch.where(continued, per_token(batch.rewards), advantage)
    if recipe.needs_expert and recipe.expert_loss in ("likelihood", "both"):
        # The likelihood has a denominator of its own: the number of expert tokens in the batch.
        taught = torch.full_like(weight, recipe.expert_coef / max(1, int(is_expert.sum())))
        if recipe.expert_loss == "both":
            taught = taught * 0.5 * torch.exp(-uncertainty)
        else:
            advantage = advantage.masked_fill(is_expert, 0.0)
        likelihood = torch.where(is_expert, taught, likelihood)
    return Terms(old_logprobs, advantage, weight, likelihood, is_expert)


def rl_loss(
    logprob: Tensor, lse: Tensor, entropy: Tensor, old_logprob: Tensor, advantage: Tensor, weight: Tensor,
    likelihood: Tensor, is_expert: Tensor, ref_logprob: Tensor | None = None, *, recipe: Recipe,
) -> Tensor:  # fmt: skip
    """The loss summed over tokens [N]: the function that `kernels.linear_token_loss` calls with its log-probs.

    From old_logprob to is_expert the arguments are `Terms`; ref_logprob is given when the KL term stands in the loss.
    """
    loss = POLICY_LOSSES[recipe.policy_loss](logprob, old_logprob, advantage, recipe)
    if recipe.expert_loss in ("shaped", "both"):
        loss = torch.where(is_expert, shaped_loss(logprob, advantage, recipe.shape), loss)
    if ref_logprob is not None:
        loss = loss + recipe.kl_coef * kl_penalty(logprob, ref_logprob, recipe.kl_estimator)
    if recipe.entropy_coef:
        loss = loss - recipe.entropy_coef * entropy
    return (weight * loss).sum() - (likelihood * logprob).sum()


# ---- 5. the algorithms: to add one, write its row ----

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
