"""AdamW as the training loops use it: float32 master weights for a bfloat16 model, gradients summed over processes.

A bfloat16 number has eight significant bits, so a step of 1e-6 on a weight of 0.1 would be rounded away. Yet the model
is kept in bfloat16, so that sampling, scoring and training share one copy of it. Therefore the optimizer keeps a
float32 copy of each parameter, its "master": it adds up the gradients there, takes the step there, and rounds the
result into the model. With a float32 model the masters are the parameters themselves, and nothing is copied.

Sharded (ZeRO-1, Rajbhandari et al., 2020), each process keeps moments and master of some parameters, and updates them.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from nanopcf.run import parallel

SCHEDULES = ("constant", "cosine")


def move_gradient(master: Tensor, parameter: Tensor) -> None:
    """Add a parameter's fresh gradient to its master's, in float32, and free it, so that they never exist all at once:
    autograd calls this as soon as a gradient is complete."""
    master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
    parameter.grad = None


class Optimizer:
    """AdamW (Loshchilov & Hutter, 2019) with betas (0.9, 0.95).

    Weight decay acts on matrices only: norms and biases have no scale that it should shrink.
    """

    def __init__(self, model: nn.Module, weight_decay: float = 0.0, shard: bool = False) -> None:
        parameters = sorted(model.parameters(), key=lambda p: p.dim() < 2)  # matrices first
        self.owners = parallel.owners([p.numel() for p in parameters], shard)
        self.pairs: list[tuple[Tensor, Tensor]] = []  # (parameter, master)
        for p, owner in zip(parameters, self.owners, strict=True):
            master = p
            if p.dtype != torch.float32:
                # In place of another process's master stands one number, expanded: here only its gradient is needed.
                master = p.detach().float() if parallel.owns(owner) else p.new_zeros(1).float().expand_as(p)
                p.register_post_accumulate_grad_hook(partial(move_gradient, master))
            self.pairs.append((p, master))
        self.masters = [master for _, master in self.pairs]
        own = [m for m, owner in zip(self.masters, self.owners, strict=True) if parallel.owns(owner)]
        matrices = {"params": [m for m in own if m.dim() >= 2], "weight_decay": weight_decay}
        others = {"params": [m for m in own if m.dim() < 2], "weight_decay": 0.0}
        self.adamw = torch.optim.AdamW([matrices, others], lr=0.0, betas=(0.9, 0.95), fused=True)  # `step` sets lr

    @torch.no_grad()
    def step(self, lr: float, clip: float) -> float:
        """Sum the gradients over the processes, clip their norm, update, clear. Returns the norm before it was clipped.

        When the norm is not finite no weight changes, and the caller must stop.
        """
        parallel.total_gradients(self.masters)
        norm = nn.utils.clip_grad_norm_(self.masters, clip).item()
        if not math.isfinite(norm):
            return norm
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for (p, master), owner in zip(self.pairs, self.owners, strict=True):
            master.grad = None
            if master is not p and parallel.owns(owner):
                p.copy_(master)  # rounds to bfloat16
            parallel.broadcast(p, owner)
        return norm


def learning_rate(step: int, progress: float, *, peak: float, warmup: int, schedule: str) -> float:
    """Learning rate of optimizer step `step` (from 0): a linear warm-up to the peak, then a schedule.

    `constant` stays at the peak. `cosine` falls to a tenth of it while `progress` through the run goes from 0 to 1.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
