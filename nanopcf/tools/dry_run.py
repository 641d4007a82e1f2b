"""`train_rl.py --dry-run`: the heaviest work of a run, tried out before the run, so that it cannot fail hours later."""

from functools import partial

import torch

import kernels
from nanopcf.model import Transformer
from nanopcf.objectives import rl_loss
from nanopcf.optim import Optimizer
from nanopcf.packing import Sequence, pack, trained_hidden
from nanopcf.run import machine
from nanopcf.sampler import Sampler


def try_rl(model: Transformer, optimizer: Optimizer, sampler: Sampler, c: object, prompt: list[int]) -> None:
    """The longest prompt in every slot, answered to the limit; then one update on --micro-rows rows of that length.

    c: the RLConfig. Raises ValueError when one of the two does not fit in memory.
    """
    device = model.head_weight.device
    length = max(len(prompt) + c.max_new_tokens, c.pack_length)
    rows = pack([Sequence([0] * length, 1)] * min(c.micro_rows, c.update_prompts * c.group), length).to(device)
    zeros = torch.zeros(rows.tokens.numel(), device=device)

    def generate() -> None:
        prompts = [prompt] * sampler.slots
        sampler.generate(prompts, max_new_tokens=c.max_new_tokens, temperature=c.temperature)

    def update() -> None:
        hidden, targets = trained_hidden(model, rows)
        extras = [zeros[: len(hidden)]] * 4 + [zeros[: len(hidden)].bool()]
        loss_fn = partial(rl_loss, recipe=c.recipe)
        loss, _ = kernels.linear_token_loss(hidden, model.head_weight, targets, loss_fn, extras)
        loss.backward()
        optimizer.step(0.0, c.clip)

    machine.try_out(f"generating {sampler.slots} answers of {c.max_new_tokens} tokens", generate, device)
    machine.try_out(f"an update of {len(rows.tokens)} rows of {length} tokens", update, device)
