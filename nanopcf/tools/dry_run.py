"""--dry-run of the training scripts: the heaviest work of a run, tried first, so that it cannot fail hours later.

The functions of the scripts are given as arguments: what is tried is what the run will do.
"""

from collections.abc import Callable

from nanopcf.model import Transformer
from nanopcf.optim import Optimizer
from nanopcf.packing import Sequence, pack
from nanopcf.rollouts import Group, Rollout
from nanopcf.run import machine
from nanopcf.sampler import Sampler


def try_sft(model: Transformer, optimizer: Optimizer, sft_loss: Callable, longest: int, c: object) -> None:
    """One optimizer step on --micro-rows full rows, with every token trained: no step of the run needs more memory.

    longest: tokens of the longest example; c: the SFTConfig. Raises ValueError when it does not fit.
    """
    device = model.head_weight.device
    length = max(longest, c.pack_length)
    example = min(length, model.config.max_length)  # a row can be longer than the context: then it holds several
    count = length // example * min(c.micro_rows, c.batch)
    rows = pack([Sequence([0] * example, 1)] * count, length).to(device)

    def step() -> None:
        sft_loss(model, rows).backward()
        optimizer.step(0.0, c.clip)

    machine.try_out(f"a step of {len(rows.tokens)} rows of {length} tokens", step, device)


def try_rl(
    model: Transformer,
    optimizer: Optimizer,
    sampler: Sampler,
    judge: Callable,
    update: Callable,
    prompt: list[int],
    c: object,
) -> None:
    """The longest prompt in every slot, answered to the limit, then an update on --micro-rows full rows.

    prompt: the longest one; c: the RLConfig. Raises ValueError when one of the two does not fit.
    """
    length = max(len(prompt) + c.max_new_tokens, c.pack_length)
    longest = min(length, model.config.max_length)  # a row can be longer than the context: then it holds several
    count = min(c.micro_rows, c.update_prompts * c.group)
    response = Rollout([0] * (longest - 1), [0.0] * (longest - 1), expert_tokens=0, correct=0.0, truncated=False)
    groups = [Group([0], [], [response] * (length // longest))] * count

    def generate() -> None:
        prompts = [prompt] * sampler.slots
        sampler.generate(prompts, max_new_tokens=c.max_new_tokens, temperature=c.temperature)

    def train() -> None:
        batch = judge(groups, model, model, c, require_finite=lambda *_: None)
        update(model, optimizer, batch, 0.0, c, require_finite=lambda *_: None)

    device = model.head_weight.device
    machine.try_out(f"generating {sampler.slots} answers of {c.max_new_tokens} tokens", generate, device)
    machine.try_out(f"an update of {count} rows of {length} tokens", train, device)
