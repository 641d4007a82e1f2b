"""Matrix products on a CPU by MKL and by oneDNN (`kernels/products.py`): speed of both, and where oneDNN pays.

    python benchmarks/products.py
    python benchmarks/products.py --markdown                also writes docs/results/products-cpu.md

The three products of a layer [D, N] on M tokens in float32: forward, gradient of the input, gradient of the weight. All
cores; medians over repeats. `kernels.products.SMALL` and the way the gradient of the weight is computed come from here.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from common import Page, clock
from torch import Tensor

from kernels import products
from nanopcf.run import machine

LAYERS = [(64, 352), (128, 256), (128, 704), (384, 2112), (1056, 384), (576, 3072)]


def median_seconds(calls: list[Callable], repeats: int) -> list[float]:
    """The median time of each call. The calls take turns, after a first turn that is not counted."""
    device, times = torch.device("cpu"), [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, own in zip(calls, times, strict=True):
            seconds, _ = clock(call, device)
            if turn:
                own.append(seconds)
    return [statistics.median(own) for own in times]


def six_products(x: Tensor, w: Tensor, g: Tensor) -> list[Callable[[], Tensor]]:
    """The three products of a layer (forward, input's gradient, weight's gradient), each by MKL and by oneDNN."""
    onednn, wide = products.onednn, len(w) > w.shape[1]
    return [
        lambda: x @ w.T,
        lambda: onednn(x, w),
        lambda: g @ w,
        lambda: onednn(g, w.T),
        lambda: g.T @ x,
        lambda: onednn(x.T, g.T) if wide else onednn(g.T, x.T),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8, 64, 256, 4096])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--markdown", action="store_true", help="write docs/results/products-cpu.md")
    a = parser.parse_args()
    torch.set_num_threads(machine.cores())
    page = Page("Products of a CPU", torch.device("cpu"))
    page.add(f"Training here takes {'oneDNN for large products' if products.ONEDNN else 'MKL'}.")
    page.head(
        "GFLOP/s by MKL, by oneDNN:",
        "layer",
        "tokens",
        "multiplications",
        "forward",
        "input's gradient",
        "weight's gradient",
    )
    for D, N in LAYERS:
        for M in a.tokens:
            x, w, g = torch.randn(M, D), torch.randn(N, D), torch.randn(M, N)
            rates = [f"{2 * M * N * D / s / 1e9:,.0f}" for s in median_seconds(six_products(x, w, g), a.repeats)]
            pairs = [", ".join(rates[i : i + 2]) for i in (0, 2, 4)]
            page.row(f"{D} x {N}", str(M), f"{M * N * D / 2**20:.1f} Mi", *pairs)
    if a.markdown:
        page.write("products")


if __name__ == "__main__":
    main()
