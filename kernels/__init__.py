"""Output head fused with the loss: log-probs, entropies and losses of hidden [N, D] without an [N, V] tensor.

Every loss of the project goes through these three functions, in training and in scoring:

    linear_cross_entropy   -logprob of the targets (SFT)
    linear_token_loss      any sum over tokens of f(logprob, lse, entropy): 3 matrix products, gradients in forward
    linear_logprob         logprob and entropy for any later use: 4 matrix products

The maths stands in `reference.py`, which runs everywhere. `implementation` is the one place where a faster path for a
device is chosen; Triton kernels for CUDA come in there.

hidden and weight: float32, bfloat16 or float16; arithmetic and outputs float32; gradients in the inputs' types.
"""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from kernels import reference

__all__ = ["backend", "linear_cross_entropy", "linear_logprob", "linear_token_loss"]


def backend() -> str:
    """The path that runs unless a call asks for another: "torch" (the Triton kernels aren't part of this version)."""
    return "torch"


def implementation(impl: str | None) -> ModuleType:
    """The module that a call runs on. Raises ValueError for a path that isn't there."""
    impl = impl or backend()
    if impl != "torch":
        raise ValueError(f"kernels: no path {impl!r} in this version; impl=None or 'torch'")
    return reference


def check(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> None:
    """Raises ValueError on shapes or types that don't fit. Looks at no value, so it costs no device sync."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"kernels: need hidden [N, D] and weight [V, D], got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"kernels: need targets int64 [{len(hidden)}], got {targets.dtype} {list(targets.shape)}"
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"kernels: hidden and weight must both be float32, bfloat16 or float16, got {hidden.dtype} and {weight.dtype}"
        )
    if not temperature > 0:
        raise ValueError(f"kernels: temperature must be above 0, got {temperature}")


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_fn: Callable[..., Tensor],
    extras: Sequence[Tensor] = (),
    *,
    temperature: float = 1.0,
    entropy: bool = True,
    impl: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over tokens of a loss, and its inputs.

    hidden [N, D], weight [V, D], targets [N] int64. loss_fn(logprob, lse, entropy, *extras) -> scalar is called with
    chunks [C] of each and must return their *sum*; extras are [N]. entropy=False saves its passes and gives None.
    Returns the loss, differentiable once in hidden and weight, and {"logprob", "lse", "entropy"}: [N], detached.
    """
    check(hidden, weight, targets, temperature)
    if any(len(e) != len(hidden) for e in extras):
        raise ValueError(
            f"kernels: extras must have {len(hidden)} entries each, got {[len(e) for e in extras]}"
        )
    with torch.autocast(hidden.device.type, enabled=False):
        return implementation(impl).linear_token_loss(
            hidden, weight, targets, loss_fn, extras, temperature, entropy
        )


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature) at targets: [N] float32; with entropy=True also the entropy [N].

    Both differentiable in hidden [N, D] and weight [V, D].
    """
    check(hidden, weight, targets, temperature)
    with torch.autocast(hidden.device.type, enabled=False):
        return implementation(impl).linear_logprob(hidden, weight, targets, temperature, entropy)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Cross-entropy of targets [N]; rows whose target is ignore_index are dropped before any matrix product.

    reduction: "mean" over the rows that count (0 when there are none), "sum", or "none" ([N], 0 where ignored).
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"kernels: reduction must be mean, sum or none, got {reduction!r}")
    check(hidden, weight, targets, temperature)
    counts = targets != ignore_index
    options = dict(temperature=temperature, impl=impl)
    if reduction == "none":
        logprob = linear_logprob(hidden[counts], weight, targets[counts], **options)
        return torch.zeros(len(hidden), device=hidden.device).index_put((counts,), -logprob)
    loss, _ = linear_token_loss(
        hidden[counts], weight, targets[counts], lambda lp, *_: -lp.sum(), entropy=False, **options
    )
    return loss / counts.sum().clamp(min=1) if reduction == "mean" else loss
