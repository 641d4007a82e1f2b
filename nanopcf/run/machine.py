"""What this machine offers to a run: device, dtype, CPU threads and memory.

Every script asks here before it starts. Nothing in this file is about the paper.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nanopcf.run import parallel
from nanopcf.run.config import out_of_memory
from nanopcf.run.folder import kept
from nanopcf.run.log import announce

try:
    import resource
except ImportError:  # Windows
    resource = None


def choose_device(name: str) -> torch.device:
    """The device of that name. auto: the first of cuda, mps and cpu that exists. Raises ValueError without it."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, exists in available.items() if exists)
    if name not in available:
        raise ValueError(f"--device {name}: expected auto, cpu, cuda or mps")
    if not available[name]:
        raise ValueError(f"--device {name}: this machine or this build of torch has none; try --device cpu")
    if name == "cuda":
        # cuDNN's attention makes a new plan for every shape, and packed rows and generation have many shapes. What it
        # would bring where all rows have one length, benchmarks/attention.py measures.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # long sums stay in float32
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name. auto: bfloat16 on CUDA, float32 elsewhere, since most CPUs only emulate bfloat16.

    Raises ValueError for any other name.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype must be auto, float32 or bfloat16, got {name!r}")
    return getattr(torch, name)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(threads: int, model: torch.nn.Module) -> int:
    """Set the number of torch's CPU threads and return it. 0 means: choose it for this model.

    Large matrix products always gain from another core, so a large model gets all of them, and so does a model on a
    GPU, where the number hardly matters. Only for a small model on a CPU is it worth measuring. Of several processes
    each gets what the first one chose.
    """
    if not threads and (model.head_weight.device.type != "cpu" or model.parameter_count() > 20e6 or cores() == 1):
        threads = cores()
    if not threads:
        threads = fewest_good_threads(time_threads(model))
    threads = parallel.gathered([threads])[0]
    torch.set_num_threads(threads)
    return threads


def share_cores(
    threads: int, workers: int, device: torch.device, small_model: torch.nn.Module | None, out: Path
) -> tuple[int, int]:
    """(threads of a process that runs alone, number of processes in parallel) for many runs on one machine.

    threads, workers: what the user asked for; 0 means: choose. small_model: an example of the models that will be
    trained, which is measured here; None for large models, of which one at a time gets all cores. out: the run folder,
    which keeps the number of threads: it changes how sums are rounded, and the clock would not choose it again.
    """

    def probe() -> int:
        seconds = time_threads(small_model)
        times = ", ".join(f"{s * 1e3:.0f} ms with {t}" for t, s in seconds.items())
        announce(f"probe: a step takes, by number of threads, {times}")
        return fewest_good_threads(seconds)

    if small_model is None:
        workers = workers or 1
    else:
        # small models run in parallel with one thread each, unless they share one GPU
        workers = workers or (1 if device.type != "cpu" else max(1, cores() // (threads or 1)))
    threads = threads or kept(out, "threads", cores if small_model is None else probe)
    announce(f"a process that runs alone gets {threads} thread(s); {workers} run(s) at a time")
    return threads, workers


def time_threads(model: torch.nn.Module) -> dict[int, float]:
    """Seconds that a small training step takes with 1, 2, 4, ... CPU threads, and with as many as there are cores.

    A small model spends most of its time between operations. If other programs use the cores, waiting for a second
    thread there can make it 100 times slower; on an idle machine the second thread pays. So the number is measured.
    """
    length = min(40, model.config.max_length)
    # so many sequences that a step takes some tens of milliseconds
    sequences = min(32, max(1, int(3e9 / (6 * model.parameter_count() * length))))
    tokens = torch.zeros(sequences, length, dtype=torch.long)  # (B, T)
    counts = sorted({2**i for i in range(cores().bit_length())} | {cores()})
    return {threads: step_seconds(model, tokens, threads) for threads in counts}


def fewest_good_threads(seconds: dict[int, float]) -> int:
    """The smallest number of threads whose time is at most a quarter above the shortest: cores are left for others."""
    return min(threads for threads in seconds if seconds[threads] <= 1.25 * min(seconds.values()))


def step_seconds(model: torch.nn.Module, tokens: torch.Tensor, threads: int) -> float:
    """Seconds of a forward and backward pass with this number of threads: the shortest of three, after a warm-up."""
    torch.set_num_threads(threads)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        model(tokens).sum().backward()
        times.append(time.perf_counter() - started)
    model.zero_grad()
    return min(times[1:])


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device; 4 GiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 4 << 30


@contextmanager
def on_device(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """The model on this device inside the block, and back where it was after it."""
    home = model.head_weight.device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


def compile_blocks(model: torch.nn.Module) -> None:
    """torch.compile every block of a Transformer: for training, scoring, and decoding on a GPU with flash attention.

    Decoding on a CPU stays as it is, since its shapes change with every token.
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
    """Run work(), the heaviest step of a run, and announce the memory and time it took.

    what: names the step in the message. Raises ValueError if the step does not fit into memory.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
        work()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ValueError(
            f"{what}: doesn't fit in memory; fewer --micro-rows or --slots, or --recompute, need less"
        ) from error
    if device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
        memory = f"peak {peak / 2**30:.2f} of {total / 2**30:.1f} GiB"
    elif resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        memory = f"the process reached {peak / 2**30:.2f} GiB, {free_memory(device) / 2**30:.1f} GiB are free now"
    else:
        memory = "memory isn't known here"
    announce(f"{what}: fits; {memory}; {time.perf_counter() - started:.2f} s")


def check_room(sequences: int, tokens: int) -> None:
    """Raises ValueError when memory can't hold so many answers of up to so many tokens while they are sampled."""
    needed, free = 60 * sequences * tokens, free_memory(torch.device("cpu"))
    if needed > free:
        raise ValueError(
            f"{sequences:,} answers of up to {tokens:,} tokens at a time need {needed / 2**30:,.1f} GiB of memory, "
            f"{free / 2**30:,.1f} GiB are free; fewer --samples, or a smaller --group or --round-prompts, need less"
        )


def slots_that_fit(model: torch.nn.Module, length: int) -> int:
    """How many sequences of `length` tokens have keys and values that fit in a quarter of the free memory: 1 to 512.

    The number changes how sums are rounded, so a run keeps it. Of several processes each gets the smallest.
    """
    c, dtype = model.config, model.head_weight.dtype
    bytes_per_slot = 2 * c.layers * c.kv_heads * c.head_dim * length * dtype.itemsize
    slots = min(512, max(1, free_memory(model.head_weight.device) // 4 // bytes_per_slot))
    return min(parallel.gathered([slots]))
