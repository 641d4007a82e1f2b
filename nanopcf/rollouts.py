"""Groups of responses to a prompt, their verdicts, and the batch of tensors that an update trains on.

Which responses a group holds is the first choice of a `Recipe` (`expert`): the policy's own, an expert's trajectory
beside or instead of them, or one that the expert began and the policy continued. Every token knows who wrote it: the
first `expert_tokens` tokens of a rollout are the expert's. Their log-prob is 0: LUFFY divides by 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from nanopcf import flops, packing
from nanopcf.model import ModelConfig
from nanopcf.objectives import Recipe
from nanopcf.sampler import Completion, Sampler

# ---- 1. what is rolled out ----


@dataclass(frozen=True)
class Problem:
    prompt: list[int]
    answer: str
    # tokens of the expert's trajectory, with the end token unless it was cut at the limit
    expert: list[int] = field(default_factory=list)


@dataclass
class Rollout:
    """One response to a prompt, as tokens."""

    tokens: list[int]
    logprobs: list[float]  # of the sampler; 0 for the expert's tokens
    expert_tokens: int  # how many tokens at the start the expert wrote
    correct: float  # 1 or 0, the verifier's verdict
    truncated: bool  # the policy came to the limit without an end token


@dataclass
class Group:
    """All responses to one prompt."""

    prompt: list[int]
    tried: list[Rollout]  # what the policy wrote by itself
    rollouts: list[Rollout]  # what is trained

    @property
    def has_signal(self) -> bool:
        """Some responses are right and some are wrong: elsewhere every advantage is 0."""
        right = sum(r.correct for r in self.rollouts)
        return 0 < right < len(self.rollouts)

    def teaches(self, recipe: Recipe) -> bool:
        """There is something to learn: a signal, or a likelihood that is trained (of the policy's tokens or of the
        expert's, if it has written any)."""
        has_likelihood = recipe.policy_loss == "likelihood" or any(r.expert_tokens for r in self.rollouts)
        return self.has_signal or (recipe.trains_likelihood and has_likelihood)


def prefix_share(progress: float, uniform: float) -> float:
    """Share of the expert's tokens that a response continues in Prefix-RFT, at `progress` (0 to 1) of the run.

    It is uniform (Beta(1, 1), the default of its code) between a lower bound and 0.95; the bound falls along a cosine
    from 0.95 to 0.05. uniform: a random number in [0, 1).
    """
    low = 0.05 + 0.90 * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return low + (0.95 - low) * uniform


def roll_out(
    sampler: Sampler, recipe: Recipe, problems: list[Problem], *, places: Sequence[int], group: int,
    decode: Callable[[list[int], list[int]], str], verify: Callable[[str, str], float], max_new_tokens: int,
    temperature: float, stop_ids: set[int] | list[int], seed: tuple[int, int], progress: float,
) -> list[Group]:  # fmt: skip
    """One group per problem. What is sampled depends on `seed` and the problem's place in the round (`places`) alone.

    group: G, rollouts per prompt where no expert takes a place; progress: share of the run that is done, 0 to 1, for
    the length of prefixes; decode: (prompt, response), both as ids, -> the text to judge; verify: `rewards.verify`.
    """

    verify = cache(verify)  # responses to a problem are often the same

    def judged(problem: Problem, completion: Completion, prefix: Sequence[int] = ()) -> Rollout:
        tokens = [*prefix, *completion.tokens]
        logprobs = [0.0] * len(prefix) + completion.logprobs
        correct = verify(decode(problem.prompt, tokens), problem.answer)
        return Rollout(tokens, logprobs, len(prefix), correct, completion.finish_reason == "length")

    def expert_rollout(problem: Problem) -> Rollout:
        # An expert can be wrong: the verifier decides, as for any other response.
        tokens, correct = problem.expert, verify(decode(problem.prompt, problem.expert), problem.answer)
        return Rollout(tokens, [0.0] * len(tokens), len(tokens), correct, truncated=False)

    # 1. The policy's own responses. An expert alone leaves no place for them, an expert in the group takes one.
    own = {"only": 0, "beside": group - 1, "prefix": group - 1}.get(recipe.expert, group)
    options = dict(temperature=temperature, stop_ids=stop_ids, places=places)
    completions: list[Completion] = []
    if own:
        # Python's hash of a tuple of integers is the same in every process, on every 64-bit CPython.
        prompts = [problem.prompt for problem in problems]
        completions = sampler.generate(prompts, n=own, max_new_tokens=max_new_tokens, seed=hash(seed), **options)
    # 2. The groups, with whole trajectories of the expert where the recipe wants them.
    groups = []
    for k, problem in enumerate(problems):
        tried = [judged(problem, completion) for completion in completions[k * own : (k + 1) * own]]
        rollouts = list(tried)
        if recipe.expert == "instead" and sum(r.correct for r in tried) <= recipe.gate:
            rollouts = [expert_rollout(problem)]  # UPT: too few right answers, so this prompt trains on its expert
        elif recipe.expert in ("only", "beside"):
            rollouts.append(expert_rollout(problem))
        groups.append(Group(problem.prompt, tried, rollouts))
    # 3. Prefix-RFT: the last response of a group continues the expert's first tokens, at least one short of its end.
    if recipe.expert == "prefix":
        prefixes = []
        for problem, place in zip(problems, places, strict=True):
            share = prefix_share(progress, np.random.default_rng((*seed, place)).random())
            prefixes.append(problem.expert[: min(len(problem.expert) - 1, int(share * len(problem.expert)))])
        completions = sampler.generate(
            [problem.prompt + prefix for problem, prefix in zip(problems, prefixes, strict=True)],
            max_new_tokens=[max_new_tokens - len(prefix) for prefix in prefixes],
            seed=hash((*seed, 1)),
            **options,
        )
        for g, problem, completion, prefix in zip(groups, problems, completions, prefixes, strict=True):
            g.rollouts.append(judged(problem, completion, prefix))
    return groups


# ---- 2. the batch that is trained ----


@dataclass
class Batch:
    """The trained responses of some groups: B sequences with N response tokens in all. Tensors on the CPU.

    A tensor of tokens is flat: the tokens of the first sequence, then those of the second, and so on.
    """

    sequences: list[packing.Sequence]  # B prompts, each with its response
    group_sizes: list[int]  # sequences of each group
    correct: Tensor  # [B] 1 or 0, the verifier's verdict
    lengths: Tensor  # [B] response tokens
    truncated: Tensor  # [B] bool
    is_expert: Tensor  # [N] bool: written by the expert
    sampler_logprobs: Tensor  # [N] 0 for the expert's tokens
    # filled in by the judge, see train_rl.py
    one_update: bool = True  # the groups rolled out together are trained in one update: its weights sampled them
    rewards: Tensor | None = None  # [B] correct, less what the recipe takes off
    advantages: Tensor | None = None  # [B]
    trained_lengths: Tensor | None = None  # [B] lengths, but 0 for a response that is not trained
    old_logprobs: Tensor | None = None  # [N] what the ratio is taken over
    ref_logprobs: Tensor | None = None  # [N] of the policy that RL started from, for a KL term

    def part(self, first: int, last: int) -> "Batch":
        """Groups first:last, the batch of one optimizer step."""
        edges = [0, *np.cumsum(self.group_sizes).tolist()]  # group -> its first sequence
        starts = [0, *self.lengths.cumsum(0).tolist()]  # sequence -> its first token
        sequences = slice(edges[first], edges[min(last, len(self.group_sizes))])
        tokens = slice(starts[sequences.start], starts[sequences.stop])
        cut = {"group_sizes": self.group_sizes[first:last], "sequences": self.sequences[sequences]}
        for name in ("correct", "lengths", "truncated", "rewards", "advantages", "trained_lengths"):
            cut[name] = getattr(self, name)[sequences]
        for name in ("is_expert", "sampler_logprobs", "old_logprobs", "ref_logprobs"):
            values = getattr(self, name)
            cut[name] = None if values is None else values[tokens]
        return replace(self, **cut)


def make_batch(groups: list[Group]) -> Batch:
    rollouts = [r for g in groups for r in g.rollouts]
    return Batch(
        sequences=[packing.Sequence(g.prompt + r.tokens, len(g.prompt)) for g in groups for r in g.rollouts],
        group_sizes=[len(g.rollouts) for g in groups],
        correct=torch.tensor([r.correct for r in rollouts]),
        lengths=torch.tensor([len(r.tokens) for r in rollouts]),
        truncated=torch.tensor([r.truncated for r in rollouts]),
        is_expert=torch.tensor([t < r.expert_tokens for r in rollouts for t in range(len(r.tokens))]),
        sampler_logprobs=torch.tensor([logprob for r in rollouts for logprob in r.logprobs]),
    )


def step_flops(config: ModelConfig, recipe: Recipe, drawn: list[Group], trained: list[Group]) -> float:
    """Compute of a step in which `drawn` were rolled out and `trained` of them used: Eq. 23 (SFT), 24 and 25 (GRPO,
    DAPO and Prefix-RFT), 26 (LUFFY, SRFT), 27-29 (UPT)."""

    def mean_length(pairs: list[tuple[Group, Rollout]]) -> float:
        return float(np.mean([len(g.prompt) + len(r.tokens) for g, r in pairs])) if pairs else 0.0

    prompts = len(drawn)
    own = [(g, r) for g in drawn for r in g.tried]
    experts = [(g, r) for g in trained for r in g.rollouts if r.expert_tokens]
    if recipe.expert == "only":
        return flops.sft_step(config, len(trained), mean_length(experts))
    if recipe.expert == "beside":
        sizes = len(drawn[0].tried), mean_length(own), 1, mean_length(experts)
        return flops.mixed_step(config, prompts, *sizes, train_prompts=len(trained))
    if recipe.expert == "instead":
        trained_own = sum(not r.expert_tokens for g in trained for r in g.rollouts)
        group, own_length = len(drawn[0].tried), mean_length(own)
        return flops.upt_step(config, prompts, group, own_length, trained_own, len(experts), mean_length(experts))
    every = [(g, r) for g in drawn for r in g.rollouts]
    return flops.rl_step(config, prompts, len(drawn[0].rollouts), mean_length(every), train_prompts=len(trained))
