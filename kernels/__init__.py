"""The output head fused with the loss: log-probs, entropies and losses of hidden [N, D] without an [N, V] tensor.

Every loss of the project goes through one of three functions, in training and in scoring:

    linear_token_loss      the sum over tokens of any f(logprob, lse, entropy): 3 matrix products, gradients in forward
    linear_cross_entropy   -logprob of the targets (SFT), by one of the two others
    linear_logprob         logprob and entropy for any later use: 4 matrix products

Two paths do the arithmetic, and `paths.py` is the one place that chooses between them:

    "torch"    `reference.py`: PyTorch in chunks of rows, the specification. On the CPU, and wherever Triton cannot run.
    "triton"   `gpu/`: on CUDA. With TRITON_INTERPRET=1 set before Python starts these kernels also run on CPU tensors,
               slowly, to be tested or stepped through.

hidden and weight are float32, bfloat16 or float16. Arithmetic and outputs are float32; gradients have the types of the
inputs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.paths import announce_path, backend, check, path

__all__ = ["announce_path", "backend", "linear_cross_entropy", "linear_logprob", "linear_token_loss"]


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
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """A loss summed over tokens, and the numbers per token that it was made of.

    hidden [N, D], weight [V, D], targets [N] int64. loss_fn(logprob, lse, entropy, *extras) -> scalar gets chunks of
    tokens, [C] of each argument, and must return the *sum* over them; extras are [N]. With entropy=False no entropy is
    computed, and loss_fn gets None for it. Returns the loss, which can be differentiated once in hidden and weight, and
    {"logprob", "lse", "entropy"}: [N] float32, detached.
    """
    check(hidden, weight, targets, temperature)
    if any(len(e) != len(hidden) for e in extras):
        raise ValueError(f"kernels: extras must have {len(hidden)} entries each, got {[len(e) for e in extras]}")
    if path(impl, hidden.device) == "triton":
        from kernels.gpu.token_loss import TokenLoss
    else:
        from kernels.reference import TokenLoss
    if not torch.is_grad_enabled():
        # Inside a custom function gradients always seem off, so it goes by requires_grad of its inputs.
        hidden, weight = hidden.detach(), weight.detach()
    with torch.autocast(hidden.device.type, enabled=False):
        loss, *stats = TokenLoss.apply(hidden, weight, targets, loss_fn, tuple(extras), temperature, entropy)
    return loss, {"logprob": stats[0], "lse": stats[1], "entropy": stats[2] if entropy else None}


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature) at targets [N]: [N] float32. With entropy=True also the entropy [N].

    Both can be differentiated in hidden [N, D] and weight [V, D].
    """
    check(hidden, weight, targets, temperature)
    if path(impl, hidden.device) == "triton":
        from kernels.gpu.logprob import Logprob
    else:
        from kernels.reference import Logprob
    with torch.autocast(hidden.device.type, enabled=False):
        logprob, h = Logprob.apply(hidden, weight, targets, temperature, entropy)
    return (logprob, h) if entropy else logprob


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
    """Cross-entropy of targets [N]. Rows whose target is ignore_index are dropped before any matrix product.

    reduction: "mean" over the rows that count (0 when there are none), "sum", or "none" ([N], 0 where ignored).
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"kernels: reduction must be mean, sum or none, got {reduction!r}")
    check(hidden, weight, targets, temperature)
    counted = (targets != ignore_index).nonzero().squeeze(1)  # (M,), the indices of the rows that count
    kept = targets
    if len(counted) < len(targets):
        hidden, kept = hidden[counted], targets[counted]  # (M, D), (M,)
    if reduction == "none":
        logprob = linear_logprob(hidden, weight, kept, temperature=temperature, impl=impl)
        return torch.zeros(len(targets), device=hidden.device).index_put((counted,), -logprob)
    loss, _ = linear_token_loss(
        hidden, weight, kept, cross_entropy_sum, entropy=False, temperature=temperature, impl=impl
    )
    return loss / max(len(counted), 1) if reduction == "mean" else loss


def cross_entropy_sum(logprob: Tensor, lse: Tensor, entropy: None) -> Tensor:
    return -logprob.sum()
