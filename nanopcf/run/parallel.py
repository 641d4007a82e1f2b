"""One run on several processes, each with a GPU or some cores: torchrun --nproc_per_node=N train_sft.py ...

Every process holds the whole model and works on its share of the rows. Before an optimizer step the gradients are
summed over the processes. Losses are sums, divided by counts of the *whole* batch. So the summed gradient is the one
that a single process would have computed, up to rounding, and no process needs to know how the work was divided. Only
the process of rank 0 writes files and prints.

With --shard-optimizer each process keeps the optimizer's state and the float32 weights of its share of the parameters
alone (ZeRO stage 1, Rajbhandari et al., 2020). It updates these parameters and sends them to the others. The arithmetic
is the same, bit for bit. torch's own ZeroRedundancyOptimizer shards the moments, but not float32 weights beside a
bfloat16 model.

This is plain torch.distributed (NCCL on GPUs, gloo on CPUs). PyTorch's DistributedDataParallel would take the same sum
while the backward pass still runs. It is not used because it wraps `forward`, and here the head is outside of
`forward`, fused with the loss. Left out: sharded weights and gradients (FSDP). A model whose weights, gradients and
share of the optimizer do not fit on one GPU (6 bytes per parameter, and 12 divided by the number of GPUs) needs one of
the frameworks that docs/real-models.md names.
"""

import atexit
import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

# How long a process waits for the others before it ends with an error. The longest wait is for rank 0 to save: 107 GB
# for a model of 7B, written and then read again for their SHA-256, take 2 hours at 30 MB/s. By default torch waits for
# 30 minutes. Nobody waits for a process that has died: torchrun ends the others.
TIMEOUT = timedelta(hours=2)


def start(device: torch.device) -> torch.device:
    """Join the other processes, if torchrun started this one. Returns the device; with CUDA this process's own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    atexit.register(dist.destroy_process_group)
    return device


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Wait until every process has come here, for example until rank 0 has written what the others read."""
    if world() > 1:
        dist.barrier()


def share(items: Sequence) -> Sequence:
    """This process's share of a list that all processes hold, or a tensor's first dimension: every world()-th item."""
    return items[rank() :: world()]


def total(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its sum over the processes."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def total_gradients(parameters: list[torch.Tensor]) -> None:
    """Replace each parameter's gradient by its sum over the processes; one that had no row of the batch adds zeros."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    total([p.grad for p in parameters])


def summed(value: float) -> float:
    """The sum of a number over the processes."""
    tensor = torch.tensor(value, dtype=torch.float64)
    total([tensor])
    return tensor.item()


def gathered(items: list) -> list:
    """The inverse of `share`: each process gives its share, and all get the whole list in its original order."""
    if world() == 1:
        return items
    shares: list = [None] * world()
    dist.all_gather_object(shares, items)
    return [shares[i % world()][i // world()] for i in range(sum(map(len, shares)))]


# ---- tensors that one process keeps for all ----

EVERYONE = -1  # the owner of what each process keeps for itself


def owners(sizes: list[int], shard: bool) -> list[int]:
    """Which process keeps each tensor of so many numbers: EVERYONE, or sharded so that all keep about as many."""
    found, kept = [EVERYONE] * len(sizes), [0] * world()
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]) if shard else []:
        found[i] = kept.index(min(kept))  # the largest that is left goes to whom has least
        kept[found[i]] += sizes[i]
    return found


def owns(owner: int) -> bool:
    """Does this process keep what `owner` keeps?"""
    return owner in (EVERYONE, rank())


def broadcast(tensor: torch.Tensor, owner: int) -> None:
    """Replace a tensor by its owner's, in every process."""
    if owner != EVERYONE and world() > 1:
        dist.broadcast(tensor, owner)
