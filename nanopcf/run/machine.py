"""The machine a run finds: its device, dtype, threads and memory."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nanopcf.run.log import announce

try:
    import resource
except ImportError:  # Windows
    resource = None


def choose_device(name: str) -> torch.device:
    """auto -> cuda, mps or cpu, whichever is there first. Raises ValueError when the named one isn't."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(n for n, ok in there.items() if ok)
    if name not in there:
        raise ValueError(f"--device {name}: expected auto, cpu, cuda or mps")
    if not there[name]:
        raise ValueError(f"--device {name}: this machine or this build of torch has none; try --device cpu")
    if name == "cuda":
        # cuDNN's attention plans anew for every shape, which packed rows and generation have many of
        torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto -> bfloat16 on CUDA, float32 elsewhere (CPUs emulate bfloat16). Raises ValueError on another name."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype must be auto, float32 or bfloat16, got {name!r}")
    return getattr(torch, name)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(threads: int, model: torch.nn.Module) -> int:
    """Set torch's CPU threads, and return how many. 0: on a CPU, as many as a probe of the model finds worth it.

    Small models spend their time between operations, where a second thread on a busy machine costs up to 100 times: the
    fewest threads are taken that come within a quarter of the fastest. Large products always gain: all cores.
    """
    parameters = model.parameter_count()
    elsewhere = model.head_weight.device.type != "cpu"
    if not threads and (elsewhere or parameters > 20e6 or cores() == 1):
        threads = cores()
    if not threads:
        length = min(40, model.config.max_length)
        rows = min(32, max(1, int(3e9 / (6 * parameters * length))))  # some tens of milliseconds
        tokens = torch.zeros(rows, length, dtype=torch.long)
        tried = sorted({2**i for i in range(cores().bit_length())} | {cores()})
        seconds = {t: step_seconds(model, tokens, t) for t in tried}
        threads = next(t for t in tried if seconds[t] <= 1.25 * min(seconds.values()))
    torch.set_num_threads(threads)
    return threads


def step_seconds(model: torch.nn.Module, tokens: torch.Tensor, threads: int) -> float:
    """Time of a forward and backward pass with so many threads: the best of three after one that isn't counted."""
    torch.set_num_threads(threads)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        model(tokens).sum().backward()
        times.append(time.perf_counter() - began)
    model.zero_grad()
    return min(times[1:])


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on the device now; 4 GiB where the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 4 << 30


def compile_blocks(model: torch.nn.Module) -> None:
    """torch.compile every block of a Transformer for training and scoring; generation stays as it is.

    Raises ValueError on a CPU without a C++ compiler.
    """
    compilers = (os.environ.get("CXX"), "g++", "c++", "clang++")
    if model.head_weight.device.type == "cpu" and not any(shutil.which(name) for name in compilers if name):
        raise ValueError("--compile needs a C++ compiler on a CPU: install g++, or leave the flag out")
    # A block is compiled again with a mask, without a gradient, for a single row and so on. Beyond torch's limit of
    # such variants a block would run uncompiled without a word, so the limit is raised.
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, 64)
    for block in model.blocks:
        block.compile(dynamic=True)


def try_out(what: str, work: Callable[[], None], device: torch.device) -> None:
    """Run work(), the heaviest step of a run, and say what it took. Raises ValueError when memory doesn't hold it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        work()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ValueError(
            f"{what}: doesn't fit in memory; fewer --micro-rows or --slots, or --recompute, need less"
        ) from error
    if device.type == "cuda":
        peak, there = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
        memory = f"peak {peak / 2**30:.2f} of {there / 2**30:.1f} GiB"
    elif resource is not None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        memory = f"the process reached {peak / 2**30:.2f} GiB, {free_memory(device) / 2**30:.1f} GiB are free now"
    else:
        memory = "memory isn't known here"
    announce(f"{what}: fits; {memory}; {time.perf_counter() - began:.2f} s")
