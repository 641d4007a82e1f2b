"""Several processes, one run: `torchrun --nproc_per_node=N train_sft.py ...` (and train_rl.py), a GPU or some cores each.

Every process holds the whole model and works on its share of the rows; before an optimizer step the gradients are summed
over the processes. The losses are sums divided by counts of the *whole* batch, so the sum is the gradient that one
process would have had, up to rounding, and no process needs to know how the work was cut. Rank 0 alone writes and speaks.

Plain torch.distributed (NCCL on GPUs, gloo on CPUs). DDP's wrapper does the same sum overlapped with the backward pass,
but it wraps `forward`, and here the head stands outside of it, fused with the loss. Left out: sharded weights (FSDP); a
model that doesn't fit one GPU with its optimizer (18 bytes a parameter) is a case for the frameworks that the README names.
"""

import atexit
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist


def start(device: torch.device) -> torch.device:
    """Join the other processes when torchrun started this one; returns the device, on CUDA this process's own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    atexit.register(dist.destroy_process_group)
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Until every process is here: after rank 0 has written what the others read."""
    if world() > 1:
        dist.barrier()


def share(items: Sequence) -> Sequence:
    """This process's part of a list, or of a tensor's first dimension, that all of them hold: every world()-th item."""
    return items[rank() :: world()]


def total(tensors: list[torch.Tensor]) -> None:
    """Sum each tensor over the processes, in place."""
    if world() > 1:
        for t in tensors:
            dist.all_reduce(t)


def summed(value: float) -> float:
    """The sum of a number over the processes."""
    tensor = torch.tensor(value, dtype=torch.float64)
    total([tensor])
    return tensor.item()


def gathered(items: list) -> list:
    """The inverse of `share`: each process gives its part, all get the whole list in its order."""
    if world() == 1:
        return items
    parts: list = [None] * world()
    dist.all_gather_object(parts, items)
    return [parts[i % world()][i // world()] for i in range(sum(map(len, parts)))]
