"""The output head with its loss: time, memory and error of every way to compute it, side by side in one process.

    python benchmarks/kernels.py                     this machine's best device, default shapes
    python benchmarks/kernels.py --device cpu --shapes 2048,256,8192 --repeats 9
    python benchmarks/kernels.py --markdown          also writes docs/results/kernels-<device>.md
    python benchmarks/kernels.py --before 9514ccb^   today's kernels and those of a git revision, and no others

Three passes over hidden [N, D], weight [V, D], targets [N], all with float32 outputs:

    logprob   log-prob of the targets, no gradient
    sft       mean cross-entropy and both gradients
    rl        PPO clip + k3 KL, the entropy for the log, and both gradients

Times are medians over repeats in which the contestants take turns: process CPU time with one thread on the CPU, CUDA
events on a GPU. A matrix product counts 2 N D V FLOPs, and only those needed count (1 for logprob, 3 for training),
whatever a contestant recomputes. The floor is these FLOPs at the rate of one large matrix product measured here and
now, or the bytes of inputs and outputs at the measured copy bandwidth, whichever takes longer. On a GPU the "bare
products" stand beside it: products of the same shapes, all logits in memory and no loss. AIMS are times for an H100 or
H200. Memory is the peak of the allocator during the call, gradients included. Errors are against float64, over the
first 256 rows: log-probs absolute, gradients as a relative norm. Peers (extra `bench`) that are not installed or do not
run are left out, with a line.
"""

import argparse
import atexit
import importlib
import io
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from common import ROOT, Page, machine_rates, peak_bytes
from torch import Tensor

import kernels  # the package: common.py has put the repository before this folder on the path

CPU_SHAPES = [(2048, D, V) for D in (256, 576) for V in (512, 8192, 49152)]
GPU_SHAPES = [
    *((8192, D, 151936) for D in (896, 1536, 2048, 3584)),  # Qwen2.5 0.5B, 1.5B, 3B, 7B
    (4096, 4096, 128256),  # Llama-3 8B
    (8192, 4096, 131072),
]
PASSES = {"logprob": 1, "sft": 3, "rl": 3}  # matrix products needed
AIMS = {  # milliseconds of the Triton kernels in bfloat16
    ("sft", (8192, 896, 151936)): 12.5,
    ("sft", (4096, 4096, 128256)): 18.8,
    ("rl", (8192, 4096, 131072)): 39.5,
}


# ---- the contestants: f(hidden, weight, targets, extras) -> log-probs [N] or a scalar loss ----


def clipped(logprob: Tensor, lse: Tensor, entropy: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """Sum of PPO's clipped loss and 0.1 times the k3 estimate of the KL divergence."""
    ratio = torch.exp(logprob - old)
    kl = torch.expm1(old - logprob) - (old - logprob)
    return (0.1 * kl - torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)).sum()


def naive(which: str, hidden: Tensor, weight: Tensor, targets: Tensor, extras: tuple) -> Tensor:
    """All logits, in the type of hidden; softmax in float32."""
    logits = (hidden @ weight.T).float()
    if which == "sft":
        return F.cross_entropy(logits, targets)
    logp = logits.log_softmax(-1)
    logprob = logp.gather(1, targets[:, None]).squeeze(1)
    if which == "logprob":
        return logprob
    entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
    return clipped(logprob, None, entropy, *extras)


def ours(
    package: ModuleType, impl: str, which: str, hidden: Tensor, weight: Tensor, targets: Tensor, extras: tuple
) -> Tensor:
    """By today's `kernels`, or those of another revision."""
    if which == "logprob":
        return package.linear_logprob(hidden, weight, targets, impl=impl)
    if which == "sft":
        return package.linear_cross_entropy(hidden, weight, targets, impl=impl)
    return package.linear_token_loss(hidden, weight, targets, clipped, extras, impl=impl)[0]


@cache
def kernels_of(revision: str) -> ModuleType | None:
    """The package `kernels` of a git revision, to be used beside today's. None, with a line, where git finds none.

    It is imported from a copy that is named kernels_before, wherever the package imports from itself: some imports run
    only when a function is called. Its custom operations are renamed too, because torch allows one of each name.
    """
    command = ["git", "-C", str(ROOT), "archive", "--format=zip", revision, "kernels"]
    try:
        archive = subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        print(f"left out: kernels of {revision}; a git clone with its whole history would have them", file=sys.stderr)
        return None
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)  # not earlier: tracebacks show these files
    zipfile.ZipFile(io.BytesIO(archive)).extractall(folder)
    (folder / "kernels").rename(folder / "kernels_before")
    for path in (folder / "kernels_before").rglob("*.py"):
        source = re.sub(r"(?m)^( *(?:from|import) kernels)\b", r"\1_before", path.read_text(encoding="utf-8"))
        path.write_text(source.replace('"nanopcf::', '"nanopcf_before::'), encoding="utf-8")
    sys.path.append(str(folder))
    return importlib.import_module("kernels_before")


def in_chunks(size: int, impl: str, which: str, *data) -> Tensor:
    """Ours in chunks of so many rows, whatever it would choose."""
    names = ["kernels.reference"] if impl == "torch" else ["kernels.gpu.logprob", "kernels.gpu.token_loss"]
    with ExitStack() as stack:
        for module in map(importlib.import_module, names):
            slices = lambda rows, *_: [slice(i, min(i + size, rows)) for i in range(0, rows, size)]  # noqa: E731
            stack.enter_context(mock.patch.object(module, "chunks", slices))
        return ours(kernels, impl, which, *data)


class Bare(torch.autograd.Function):
    """The matrix products of a pass and nothing else: no way to compute the loss can be faster."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        ctx.save_for_backward(hidden, weight, logits)
        return logits[0, 0].float()

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.T @ hidden


def bare(hidden: Tensor, weight: Tensor, targets: Tensor, extras: tuple) -> Tensor:
    return Bare.apply(hidden, weight)


def native(hidden: Tensor, weight: Tensor, targets: Tensor, extras: tuple) -> Tensor:
    """PyTorch's own (2.13), with a fair chunk: its default of 8 to 64 rows is several times slower."""
    rows = 256 if hidden.device.type == "cpu" else 4096
    options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=rows)
    return F.linear_cross_entropy(hidden, weight, targets, options=options)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor, extras: tuple) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets)


def cce(reduction: str, hidden: Tensor, weight: Tensor, targets: Tensor, extras: tuple) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    return -loss if reduction == "none" else loss


def contestants(which: str, args: argparse.Namespace) -> dict[str, tuple[Callable, int | str]]:
    """Name -> (function, matrix products it does); naive first: it is what the others are compared with."""
    products, device = PASSES[which], args.device
    impl = "triton" if device.type == "cuda" else "torch"
    name = f"nanopcf, {impl}"
    if args.before:
        packages = {name: kernels, f"{name}, {args.before}": kernels_of(args.before)}
        return {row: (partial(ours, package, impl, which), products) for row, package in packages.items() if package}
    if args.chunk_rows:
        return {f"{name}, {n} rows": (partial(in_chunks, n, impl, which), products) for n in args.chunk_rows}
    found = {"naive": (partial(naive, which), products)}
    if not args.no_compile:
        found["naive, torch.compile"] = (torch.compile(partial(naive, which), dynamic=False), products)
    if which == "sft":
        if hasattr(F, "linear_cross_entropy"):
            found["torch F.linear_cross_entropy"] = (native, 3)
        if device.type == "cuda":
            found["Liger"] = (liger, 3)
    if which != "rl" and device.type == "cuda":
        found["cut-cross-entropy"] = (
            partial(cce, "none" if which == "logprob" else "mean"),
            "1" if which == "logprob" else "4 (filtered)",
        )
    found["nanopcf, torch"] = (partial(ours, kernels, "torch", which), products)
    if device.type == "cuda":
        found["bare products"] = (bare, products)
        found["nanopcf, triton"] = (partial(ours, kernels, "triton", which), products)
    return found


# ---- measuring ----


def seconds(call: Callable, device: torch.device) -> float:
    """CUDA events, or this process's CPU time: on a shared machine the wall clock counts the others' work."""
    if device.type == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def inputs(N: int, D: int, V: int, device: torch.device, dtype: torch.dtype) -> tuple:
    """Random data with the spread of a language model's logits, about 2.5; old log-probs near the current ones."""
    hidden = (torch.randn(N, D, device=device) * 2.5 / D**0.5).to(dtype).requires_grad_()
    weight = torch.randn(V, D, device=device).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), device=device)
    with torch.no_grad():
        old = kernels.linear_logprob(hidden, weight, targets) + 0.05 * torch.randn(N, device=device)
    return hidden, weight, targets, (old, torch.randn(N, device=device))


def once(which: str, function: Callable, data: tuple) -> tuple[Tensor, ...]:
    """(output,) of a log-prob pass, or (loss, dhidden, dweight)."""
    hidden, weight, targets, extras = data
    if which == "logprob":
        with torch.no_grad():
            return (function(hidden, weight, targets, extras),)
    loss = function(hidden, weight, targets, extras)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def errors(which: str, function: Callable, data: tuple) -> tuple[float, float, float]:
    """Errors over the first 256 rows: log-prob (absolute; NaN for a loss), dhidden, dweight (relative norm)."""
    hidden, weight, targets, extras = data
    if function is bare:
        return math.nan, math.nan, math.nan
    rows = slice(0, 256)
    h, w = (t.detach().requires_grad_() for t in (hidden[rows], weight))
    few = (h, w, targets[rows], tuple(e[rows] for e in extras))
    got = once(which, function, few)
    h64, w64 = (t.detach().double().requires_grad_() for t in (h, w))
    logprob = (h64 @ w64.T).log_softmax(-1).gather(1, few[2][:, None]).squeeze(1)
    if which == "logprob":
        return (got[0].double() - logprob).abs().max().item(), math.nan, math.nan
    loss = -logprob.mean() if which == "sft" else clipped(logprob, None, None, *(e.double() for e in few[3]))
    want = torch.autograd.grad(loss, (h64, w64))
    return math.nan, *(((g.double() - t).norm() / t.norm()).item() for g, t in zip(got[1:], want, strict=True))


def measure(which: str, shape: tuple, args: argparse.Namespace, rates: tuple[float, float]) -> list[dict]:
    """A row for each contestant that runs."""
    N, D, V = shape
    device, dtype = args.device, args.dtype
    data = inputs(N, D, V, device, dtype)
    running: dict[str, tuple[Callable, int | str]] = {}
    rows = {}
    for name, (function, products) in contestants(which, args).items():
        try:
            once(which, function, data)  # compiles, warms up
            error = errors(which, function, data)
            peak = peak_bytes(lambda f=function: once(which, f, data), device)
        except Exception as problem:  # a peer that isn't there, or can't do this shape
            reason = str(problem).strip().splitlines()[0][:100] if str(problem).strip() else ""
            print(f"  left out: {name}: {type(problem).__name__}: {reason}", file=sys.stderr)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        running[name] = (function, products)
        rows[name] = dict(impl=name, shape=shape, which=which, products=products, peak=peak, error=error, times=[])
    for _ in range(args.repeats):
        for name, (function, _) in running.items():
            rows[name]["times"].append(seconds(lambda f=function: once(which, f, data), device))
    flops = 2 * N * D * V * PASSES[which]
    moved = (N * D + V * D) * data[0].element_size() * (2 if which != "logprob" else 1)
    floor = max(flops / rates[0], moved / rates[1])
    for row in rows.values():
        row["ms"] = statistics.median(row["times"]) * 1e3
        row["spread"] = [t * 1e3 for t in quantiles(row["times"])]
        row["rate"] = flops / statistics.median(row["times"])
        row["floor"] = floor / statistics.median(row["times"])
    return list(rows.values())


def quantiles(times: list[float]) -> tuple[float, float]:
    """20th and 80th percentile."""
    t = torch.tensor(times, dtype=torch.float64)
    return t.quantile(0.2).item(), t.quantile(0.8).item()


# ---- the table ----

HEAD = [
    "implementation",
    "products",
    "ms, p50 (p20-p80)",
    "/ naive",
    "TFLOP/s",
    "of floor",
    "peak MiB",
    "/ naive",
    "logprob error",
    "dhidden, dweight error",
]


def cells(row: dict, base: dict | None) -> list[str]:
    logprob, dx, dw = row["error"]
    aim = AIMS.get((row["which"], row["shape"])) if row["impl"].startswith("nanopcf, triton") else None
    return [
        row["impl"],
        str(row["products"]),
        f"{row['ms']:.4g} ({row['spread'][0]:.4g}-{row['spread'][1]:.4g})" + (f", aim {aim}" if aim else ""),
        f"{row['ms'] / base['ms']:.2f}" if base else "-",
        f"{row['rate'] / 1e12:.3g}",
        f"{row['floor']:.0%}",
        f"{row['peak'] / 2**20:.1f}",
        f"{row['peak'] / base['peak']:.2f}" if base else "-",
        "-" if math.isnan(logprob) else f"{logprob:.0e}",
        "-" if math.isnan(dx) else f"{dx:.0e}, {dw:.0e}",
    ]


def parse_shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", nargs="+", type=parse_shape, help="N,D,V; several allowed")
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="float32 on CPU, else bfloat16")
    parser.add_argument("--chunk-rows", nargs="+", type=int, help="ours alone, in chunks of so many rows each")
    parser.add_argument("--before", metavar="REVISION", help="ours alone, and ours of this git revision")
    parser.add_argument("--no-compile", action="store_true", help="leave out naive with torch.compile")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    parser.add_argument("--markdown", action="store_true", help="write docs/results/kernels-<device>.md")
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    args.device = torch.device(args.device)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for what torch.compile builds
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    rates = machine_rates(args.device, args.dtype, lambda call: seconds(call, args.device))
    page = Page("The fused head, measured", args.device)
    threads = f"{args.threads} thread(s), " if args.device.type == "cpu" else ""
    page.add(
        f"{threads}{str(args.dtype).removeprefix('torch.')}. Measured here: "
        f"matrix product {rates[0] / 1e12:.4g} TFLOP/s, copy {rates[1] / 1e9:.4g} GB/s."
    )
    for shape in args.shapes or (CPU_SHAPES if args.device.type == "cpu" else GPU_SHAPES):
        for which in args.passes:
            torch._dynamo.reset()
            rows = measure(which, shape, args, rates)
            page.head("## {}: N = {}, D = {}, V = {}".format(which, *shape), *HEAD)
            for row in rows:
                page.row(*cells(row, rows[0] if rows[0]["impl"] == "naive" else None))
    if args.markdown:
        page.write("kernels")


if __name__ == "__main__":
    main()
