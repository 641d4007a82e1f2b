"""Groups of answers to a prompt: written by the policy, by the expert, or begun by the expert and continued by the policy.

Which of them a group holds is the first choice of a `Recipe` (`expert`). Every token knows who wrote it: the first
`expert` tokens of a rollout are the expert's. Their log-prob is 0, the probability 1 that LUFFY divides by.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nanopcf import flops, rewards
from nanopcf.data import PLAIN, Example, Format
from nanopcf.model import ModelConfig, Transformer
from nanopcf.objectives import Recipe, has_signal, prefix_share
from nanopcf.rewards import verify
from nanopcf.sampler import Completion, Sampler
from nanopcf.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Problem:
    prompt: list[int]
    answer: str
    # tokens of the trajectory, the end token included unless it was cut
    expert: list[int] = field(default_factory=list)


@dataclass
class Rollout:
    tokens: list[int]  # of the answer
    logprobs: list[float]  # of the sampler; 0 for the expert's tokens
    expert: int  # tokens at the start that the expert wrote
    correct: float  # 1 or 0
    truncated: bool  # the policy came to the limit


@dataclass
class Group:
    prompt: list[int]
    tried: list[Rollout]  # what the policy wrote by itself
    rollouts: list[Rollout]  # what is trained

    @property
    def rewards(self) -> Tensor:
        """[G] of 0/1."""
        return torch.tensor([r.correct for r in self.rollouts])

    @property
    def has_signal(self) -> bool:
        return has_signal(self.rewards[None]).item()


def roll_out(
    sampler: Sampler,
    recipe: Recipe,
    problems: list[Problem],
    *,
    places: Sequence[int],
    group: int,
    decode: Callable[[list[int]], str],
    max_new_tokens: int,
    temperature: float,
    stop_ids: set[int] | list[int],
    seed: tuple[int, int],
    progress: float,
) -> list[Group]:
    """One group a problem. What is drawn depends on `seed` and the problem's place in the round (`places`) alone.

    group: G, rollouts a prompt where no expert takes a place; progress: of the run, 0 to 1, for the prefix.
    """

    def judged(problem: Problem, answer: Completion, begun: Sequence[int] = ()) -> Rollout:
        tokens = [*begun, *answer.tokens]
        correct = verify(decode(tokens), problem.answer)
        logprobs = [0.0] * len(begun) + answer.logprobs
        return Rollout(tokens, logprobs, len(begun), correct, answer.finish_reason == "length")

    def expert(problem: Problem) -> Rollout:
        tokens = problem.expert
        correct = verify(decode(tokens), problem.answer)  # the verifier decides, as for any answer
        return Rollout(tokens, [0.0] * len(tokens), len(tokens), correct, False)

    common = dict(temperature=temperature, stop_ids=stop_ids, places=places)
    own = {"only": 0, "beside": group - 1, "prefix": group - 1}.get(recipe.expert, group)
    answers: list[Completion] = []
    if own:
        prompts = [p.prompt for p in problems]
        answers = sampler.generate(prompts, n=own, max_new_tokens=max_new_tokens, seed=hash(seed), **common)
    groups = []
    for k, p in enumerate(problems):
        tried = [judged(p, a) for a in answers[k * own : (k + 1) * own]]
        rollouts = list(tried)
        if recipe.expert == "instead" and sum(r.correct for r in tried) <= recipe.gate:
            rollouts = [expert(p)]
        elif recipe.expert in ("only", "beside"):
            rollouts.append(expert(p))
        groups.append(Group(p.prompt, tried, rollouts))
    if recipe.expert == "prefix":
        draws = [np.random.default_rng((*seed, place)).random() for place in places]
        begun = [
            p.expert[: min(len(p.expert) - 1, int(prefix_share(progress, u) * len(p.expert)))]
            for p, u in zip(problems, draws, strict=True)
        ]
        answers = sampler.generate(
            [p.prompt + b for p, b in zip(problems, begun, strict=True)],
            max_new_tokens=[max_new_tokens - len(b) for b in begun],
            seed=hash((*seed, 1)),
            **common,
        )
        for g, p, a, b in zip(groups, problems, answers, begun, strict=True):
            g.rollouts.append(judged(p, a, b))
    return groups


def step_flops(config: ModelConfig, recipe: Recipe, seen: list[Group], trained: list[Group]) -> float:
    """Compute of a step in which `seen` were drawn and `trained` of them used: Eq. 23 (SFT), 24 and 25 (GRPO, DAPO and
    Prefix-RFT), 26 (LUFFY, SRFT), 27-29 (UPT)."""
    length = lambda g, r: len(g.prompt) + len(r.tokens)  # noqa: E731
    mean = lambda lengths: float(np.mean(lengths)) if lengths else 0.0  # noqa: E731
    own = [length(g, r) for g in seen for r in g.tried]
    experts = [length(g, r) for g in trained for r in g.rollouts if r.expert]
    if recipe.expert == "only":
        return flops.sft_step(config, len(seen), mean(experts))
    if recipe.expert == "beside":
        return flops.mixed_step(config, len(seen), len(seen[0].tried), mean(own), 1, mean(experts))
    if recipe.expert == "instead":
        trained_own = sum(not r.expert for g in trained for r in g.rollouts)
        return flops.upt_step(
            config, len(seen), len(seen[0].tried), mean(own), trained_own, len(experts), mean(experts)
        )
    every = [length(g, r) for g in seen for r in g.rollouts]
    return flops.rl_step(config, len(seen), len(seen[0].rollouts), mean(every), train_prompts=len(trained))


def complete(
    model: Transformer,
    tokenizer: TextTokenizer,
    examples: list[Example],
    *,
    format: Format = PLAIN,
    samples: int = 1,
    temperature: float = 0.7,
    top_p: float = 1.0,
    max_new_tokens: int,
    slots: int = 256,
    seed: int = 0,
    places: Sequence[int] | None = None,
    judge=rewards.verify,
) -> tuple[np.ndarray, list[str]]:
    """(correct [problems, samples] of 0/1, responses as text, problem by problem)."""
    sampler = Sampler(model, slots=slots, max_length=model.config.max_length)
    completions = sampler.generate(
        [format.prompt(e, tokenizer) for e in examples],
        n=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_ids=tokenizer.stop_ids,
        seed=seed,
        places=places,
    )
    texts = [tokenizer.decode(c.tokens) for c in completions]
    correct = [judge(t, examples[c.prompt_index].answer) for t, c in zip(texts, completions, strict=True)]
    return np.array(correct).reshape(len(examples), samples), texts
