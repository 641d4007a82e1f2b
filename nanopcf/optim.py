"""AdamW as the training loops use it: float32 master weights below a bfloat16 model, gradients summed over processes.

The model's parameters may be bfloat16: sampling, scoring and training then share one copy of the weights, in one dtype.
A step of 1e-6 is lost in bfloat16's eight bits, so the optimizer keeps float32 copies (its "masters"), adds the gradients
of micro-batches in float32, and rounds the result back into the model. With a float32 model the masters *are* the
parameters, and nothing is copied.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from nanopcf.run import parallel

SCHEDULES = ("constant", "cosine")


def add_gradient(master: Tensor, parameter: Tensor) -> None:
    """Move a parameter's fresh gradient to its master, as soon as autograd has it: never two gradients of the model."""
    master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
    parameter.grad = None


class Optimizer:
    """AdamW (Loshchilov & Hutter, 2019), betas (0.9, 0.95); decay on matrices only: norms and biases have no scale to shrink."""

    def __init__(self, model: nn.Module, weight_decay: float = 0.0) -> None:
        parameters = sorted(model.parameters(), key=lambda p: p.dim() < 2)  # matrices first
        self.pairs = []  # (parameter, master)
        for p in parameters:
            master = p
            if p.dtype != torch.float32:
                master = p.detach().float()
                p.register_post_accumulate_grad_hook(partial(add_gradient, master))
            self.pairs.append((p, master))
        self.masters = [m for _, m in self.pairs]
        groups = [
            {"params": [m for m in self.masters if m.dim() >= 2], "weight_decay": weight_decay},
            {"params": [m for m in self.masters if m.dim() < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)

    @torch.no_grad()
    def step(self, lr: float, clip: float) -> float:
        """Sum the gradients over the processes, clip their norm, update, clear; returns the norm before clipping.

        When it isn't finite no weight changes: the caller is to stop.
        """
        for m in self.masters:
            if m.grad is None:  # a process without a row in this batch
                m.grad = torch.zeros_like(m)
        parallel.total([m.grad for m in self.masters])
        norm = nn.utils.clip_grad_norm_(self.masters, clip).item()
        if not math.isfinite(norm):
            return norm
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad()
        for p, m in self.pairs:
            if m is not p:
                p.copy_(m)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs: "3.exp_avg", ..., and "3.master" below a bfloat16 model."""
        state = self.adamw.state_dict()["state"]
        named = {f"{i}.{name}": value.cpu() for i, own in state.items() for name, value in own.items()}
        return named | {f"{i}.master": m.cpu() for i, (p, m) in enumerate(self.pairs) if m is not p}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """What `tensors` gave, into an optimizer of the same model. Raises ValueError when it is another's."""
        shapes = {f"{i}.{name}": m.shape for i, m in enumerate(self.masters) for name in ("exp_avg", "exp_avg_sq")}
        shapes |= {f"{i}.step": torch.Size() for i in range(len(self.masters))}
        if not any(k.endswith(".step") for k in tensors):  # before the first step there are none
            shapes = {}
        shapes |= {f"{i}.master": m.shape for i, (p, m) in enumerate(self.pairs) if m is not p}
        wrong = [
            k
            for k in shapes.keys() | tensors.keys()
            if k not in shapes or k not in tensors or tensors[k].shape != shapes[k]
        ]
        if wrong:
            raise ValueError(f"not the optimizer of this model: {min(wrong)!r} is missing, extra or of another shape")
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            i, name = key.split(".")
            if name == "master":
                self.masters[int(i)].copy_(value)
            else:
                state.setdefault(int(i), {})[name] = value
        self.adamw.load_state_dict({"state": state, "param_groups": self.adamw.state_dict()["param_groups"]})


def learning_rate(step: int, progress: float, *, peak: float, warmup: int, schedule: str) -> float:
    """Learning rate of optimizer step `step` (from 0) at `progress` (0 to 1) of the run: linear warm-up, then constant or a
    cosine down to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
