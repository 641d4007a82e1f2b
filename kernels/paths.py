"""Which path a call of `kernels` takes, PyTorch or Triton, a line on stderr that says so, and what a call refuses."""

import sys
from functools import cache

import torch
from torch import Tensor

from kernels import gpu


def backend() -> str:
    """The default path on this machine's best device: "triton", "triton-interpreter" or "torch"."""
    if gpu.missing():
        return "torch"
    return "triton-interpreter" if gpu.interpreted() else "triton"


def path(impl: str | None, device: torch.device) -> str:
    """Which path a call takes, "torch" or "triton": `impl` if given, else Triton's wherever it runs.

    The first use of each is announced on stderr. Raises ValueError when impl cannot run here.
    """
    if impl not in (None, "torch", "triton"):
        raise ValueError(f"kernels: no path {impl!r}; impl is None, 'torch' or 'triton'")
    reason = gpu.missing()
    if reason is None and not (device.type == "cuda" or (device.type == "cpu" and gpu.interpreted())):
        reason = f"they don't run on {device.type} tensors"
    if impl == "triton" and reason:
        raise ValueError(f"kernels: impl='triton' can't run here: {reason} (on the CPU: set TRITON_INTERPRET=1 first)")
    chosen = impl or ("torch" if reason else "triton")
    name = "triton-interpreter" if chosen == "triton" and gpu.interpreted() else chosen
    announce(name, device.type, reason if impl is None and device.type == "cuda" else None)
    return chosen


def announce_path(device: torch.device) -> None:
    """Say on stderr which path calls on this device take, if it has not been said yet."""
    path(None, device)


@cache
def announce(name: str, device: str, reason: str | None) -> None:
    """Print a choice; the cache makes it once per process. `reason`: why a GPU must do without the Triton kernels."""
    print(f"kernels: {name} on {device}" + (f", since {reason}" if reason else ""), file=sys.stderr, flush=True)


def check(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> None:
    """Raises ValueError on shapes or types that do not fit. Reads no value, so a GPU need not be waited for."""
    shapes, types = f"{list(hidden.shape)} and {list(weight.shape)}", f"{hidden.dtype} and {weight.dtype}"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"kernels: need hidden [N, D] and weight [V, D], got {shapes}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"kernels: need targets int64 [{len(hidden)}], got {targets.dtype} {list(targets.shape)}")
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"kernels: hidden and weight must both be float32, bfloat16 or float16, got {types}")
    if not temperature > 0:
        raise ValueError(f"kernels: temperature must be above 0, got {temperature}")
