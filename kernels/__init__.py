"""Output head fused with the loss: log-probs, entropies and losses of hidden [N, D] without an [N, V] tensor.

Every loss of the project goes through these three functions, in training and in scoring:

    linear_cross_entropy   -logprob of the targets (SFT): one line around linear_token_loss
    linear_token_loss      any sum over tokens of f(logprob, lse, entropy): 3 matrix products, gradients in forward
    linear_logprob         logprob and entropy for any later use: 4 matrix products

Two paths do the arithmetic, and `path` below is the one place that chooses:

    "torch"    `reference.py`: chunked PyTorch, the specification. On the CPU, and wherever Triton isn't.
    "triton"   `gpu/`: on CUDA; with TRITON_INTERPRET=1 set before the start of
               Python they run on CPU tensors, slowly, to be tested or stepped through.

hidden and weight: float32, bfloat16 or float16; arithmetic and outputs float32; gradients in the inputs' types.
"""

import sys
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

__all__ = ["backend", "linear_cross_entropy", "linear_logprob", "linear_token_loss"]

OLDEST_TRITON = (3, 6)  # tensor descriptors made on the host, with a lowering for GPUs without TMA


def no_triton() -> str | None:
    """Why the Triton kernels can't run in this process; None when they can."""
    try:
        import triton
    except ImportError:
        return "triton isn't installed"
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}"
    if triton.knobs.runtime.interpret:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    return None


def interpreted() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def backend() -> str:
    """The path that a call takes by default on this machine's best device: "triton", "triton-interpreter" or "torch"."""
    if no_triton():
        return "torch"
    return "triton-interpreter" if interpreted() else "triton"


def path(impl: str | None, device: torch.device) -> str:
    """Which path a call takes: impl if given, else the kernels where they run. Raises ValueError when impl can't run."""
    if impl not in (None, "torch", "triton"):
        raise ValueError(f"kernels: no path {impl!r}; impl is None, 'torch' or 'triton'")
    reason = no_triton()
    if reason is None and not (device.type == "cuda" or (device.type == "cpu" and interpreted())):
        reason = f"they don't run on {device.type} tensors"
    if impl == "triton" and reason:
        raise ValueError(f"kernels: impl='triton' can't run here: {reason} (on the CPU: set TRITON_INTERPRET=1 first)")
    chosen = impl or ("torch" if reason else "triton")
    name = "triton-interpreter" if chosen == "triton" and interpreted() else chosen
    announce(name, device.type, reason if impl is None and device.type == "cuda" else None)
    return chosen


@cache  # each once a process
def announce(chosen: str, device: str, reason: str | None) -> None:
    print(f"kernels: {chosen} on {device}" + (f", since {reason}" if reason else ""), file=sys.stderr, flush=True)


def check(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> None:
    """Raises ValueError on shapes or types that don't fit. Looks at no value, so it costs no device sync."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"kernels: need hidden [N, D] and weight [V, D], got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"kernels: need targets int64 [{len(hidden)}], got {targets.dtype} {list(targets.shape)}")
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
        raise ValueError(f"kernels: extras must have {len(hidden)} entries each, got {[len(e) for e in extras]}")
    if path(impl, hidden.device) == "triton":
        from kernels.gpu.token_loss import TokenLoss
    else:
        from kernels.reference import TokenLoss
    if not torch.is_grad_enabled():  # which a custom function can't see: inside it grad mode is always off
        hidden, weight = hidden.detach(), weight.detach()
    with torch.autocast(hidden.device.type, enabled=False):
        loss, *stats = TokenLoss.apply(hidden, weight, targets, loss_fn, tuple(extras), temperature, entropy)
    return loss, dict(zip(("logprob", "lse", "entropy"), [*stats, None], strict=False))


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
    """Cross-entropy of targets [N]; rows whose target is ignore_index are dropped before any matrix product.

    reduction: "mean" over the rows that count (0 when there are none), "sum", or "none" ([N], 0 where ignored).
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"kernels: reduction must be mean, sum or none, got {reduction!r}")
    check(hidden, weight, targets, temperature)
    counts = (targets != ignore_index).nonzero().squeeze(1)  # indices of the rows that count
    if len(counts) < len(targets):
        hidden, kept = hidden[counts], targets[counts]
    else:
        kept = targets
    options = dict(temperature=temperature, impl=impl)
    if reduction == "none":
        logprob = linear_logprob(hidden, weight, kept, **options)
        return torch.zeros(len(targets), device=hidden.device).index_put((counts,), -logprob)
    loss, _ = linear_token_loss(hidden, weight, kept, lambda lp, *_: -lp.sum(), entropy=False, **options)
    return loss / max(len(counts), 1) if reduction == "mean" else loss
