"""One run on several processes, each with a GPU or some cores: torchrun --nproc_per_node=N train_sft.py ...

Every process holds the whole model and works on its share of the rows. Before an optimizer step the gradients are
summed over the processes. Losses are sums, divided by counts of the *whole* batch. So the summed gradient is the one
that a single process would have computed, up to rounding, and no process needs to know how the work was divided. Only
the process of rank 0 writes files and prints.

This is plain torch.distributed (NCCL on GPUs, gloo on CPUs). PyTorch's DistributedDataParallel would take the same sum
while the backward pass still runs. It is not used because it wraps `forward`, and here the head is outside of
`forward`, fused with the loss. Left out: sharded weights (FSDP). A model whose weights and optimizer do not fit on one
GPU (18 bytes per parameter) needs one of the frameworks that docs/real-models.md names.
"""

import atexit
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist


def start(device: torch.device) -> torch.device:
    """Join the other processes, if torchrun started this one. Returns the device; with CUDA this process's own."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
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
