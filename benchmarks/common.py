"""What the benchmarks share: model shapes, contestants that take turns, and the page that a table is written to."""

import datetime
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kernels import products  # noqa: E402
from nanopcf.model import NANO, ModelConfig, Transformer  # noqa: E402
from nanopcf.run import machine  # noqa: E402

Run = Callable[[], float]  # does the work once, returns its rate: tokens or steps a second

QWEN = dict(vocab_size=151936, kv_heads=2, qk_norm=False, qkv_bias=True)
# The shapes of SmolLM2 (135M) and Qwen2.5, used with random weights.
REAL = {
    "135M": dict(vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, mlp_width=1536, qk_norm=False),
    "0.5B": dict(width=896, layers=24, heads=14, mlp_width=4864, **QWEN),
    "1.5B": dict(width=1536, layers=28, heads=12, mlp_width=8960, **QWEN),
}
SHAPES = {name: dict(vocab_size=512, **shape) for name, shape in NANO.items()} | REAL


def make_model(size: str, max_length: int, device: torch.device, dtype: torch.dtype, **changed: int) -> Transformer:
    """Random weights, the same ones each time."""
    torch.manual_seed(0)
    return Transformer(ModelConfig(max_length=max_length, **(SHAPES[size] | changed))).to(device, dtype)


def machine_rates(
    device: torch.device, dtype: torch.dtype, seconds: Callable[[Callable], float]
) -> tuple[float, float]:
    """(FLOP/s of one large matrix product, bytes/s of a copy, counting both read and write), the best of ten.

    seconds(call) runs the call and returns how long it took.
    """
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    size = 2**30 if device.type == "cuda" else 2**26
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    multiply = products.product if device.type == "cpu" else torch.mm  # on a CPU, the faster of its two libraries

    def product() -> None:
        multiply(a, b)

    def copy() -> None:
        target.copy_(source)

    product()
    copy()
    return 2 * n**3 / min(seconds(product) for _ in range(10)), 2 * size / min(seconds(copy) for _ in range(10))


def wall_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """machine_rates with all cores, by wall-clock time."""
    if device.type == "cpu":
        torch.set_num_threads(machine.cores())
    return machine_rates(device, dtype, lambda call: clock(call, device)[0])


def clock(work: Callable, device: torch.device) -> tuple[float, object]:
    """(wall-clock seconds, what work() returned)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def timed(work: Callable[[], int], device: torch.device) -> Run:
    """A run from work() that returns how many tokens count."""

    def run() -> float:
        seconds, tokens = clock(work, device)
        return tokens / seconds

    return run


def compare(contestants: dict[str, Run], device: torch.device, repeats: int) -> dict[str, tuple[list[float], int]]:
    """Name -> (rate of each repeat, threads). Contestants take turns, since the speed of a machine drifts. On the CPU
    each uses one thread or all cores, whichever was faster in a trial run, after a first run that only warms up."""
    threads = {}
    for name, run in contestants.items():
        run()
        tried = {}
        for count in sorted({1, machine.cores()}) if device.type == "cpu" else [torch.get_num_threads()]:
            torch.set_num_threads(count)
            tried[count] = run()
        threads[name] = max(tried, key=tried.get)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            torch.set_num_threads(threads[name])
            rates[name].append(run())
    return {name: (rates[name], threads[name]) for name in contestants}


def ratio(rates: list[float], base: list[float]) -> float:
    """The median, over the turns, of one contestant's rate divided by another's in the same turn."""
    return statistics.median(a / b for a, b in zip(rates, base, strict=True))


def peak_bytes(call: Callable, device: torch.device) -> int:
    """The most memory that call() held at once beyond what was held before, by the allocator's own record."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    profile = profiled(call, profile_memory=True)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def profiled(call: Callable, **options) -> torch.profiler.profile:
    """What torch.profiler saw of call(); its own notes on stderr are not shown."""
    saved = os.dup(2)
    with open(os.devnull, "w") as silent:
        os.dup2(silent.fileno(), 2)
        try:
            with torch.profiler.profile(**options) as profile:
                call()
        finally:
            os.dup2(saved, 2)
            os.close(saved)
    return profile


def short_name(device: torch.device) -> str:
    """A device in the name of a page: "cpu", or the GPU's model, such as "h100" of "NVIDIA H100 80GB HBM3"."""
    if device.type != "cuda":
        return device.type
    found = re.search(r"\b[A-Z]+\d+[A-Z]*\b|\b\d{4}\b", torch.cuda.get_device_name(device))
    return found[0].lower() if found else "cuda"


def spread(rates: list[float]) -> str:
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


def versions(device: torch.device) -> str:
    """Hardware, versions and date, as a line of the page."""
    from importlib.metadata import PackageNotFoundError, version

    def of(package: str) -> str:
        try:
            return f", {package} {version(package)}"
        except PackageNotFoundError:
            return ""

    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        names = [
            line.split(":")[1].strip() for line in products.processor().splitlines() if line.startswith("model name")
        ]
        where = f"{machine.cores()} cores of {names[0] if names else platform.machine()}"
    others = "".join(
        of(p) for p in ("triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "openvino-genai")
    )
    return f"{where}; Python {platform.python_version()}, torch {torch.__version__}{others}; {datetime.date.today()}"


class Page:
    """Prints what is added to it, and can be written to docs/results/."""

    def __init__(self, title: str, device: torch.device) -> None:
        command = " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        self.device = device
        self.lines = [f"# {title}", "", f"    python {command}", "", versions(device), ""]
        print("\n".join(self.lines[2:]), flush=True)

    def add(self, *lines: str) -> None:
        self.lines += lines
        print("\n".join(lines), flush=True)

    def head(self, intro: str, *columns: str) -> None:
        self.add("", intro, "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns))

    def row(self, *cells: str) -> None:
        self.add("| " + " | ".join(cells) + " |")

    def write(self, name: str) -> None:
        path = ROOT / "docs" / "results" / f"{name}-{short_name(self.device)}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(self.lines) + "\n", encoding="utf-8")
        print(f"\n{path.relative_to(ROOT)} written")
