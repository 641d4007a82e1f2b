"""Matrix products in float32 on a CPU: oneDNN's where they are faster than MKL's. Both come with PyTorch.

PyTorch gives such products to MKL, which leaves half of an AMD processor with AVX-512 idle; oneDNN uses all of it. But
oneDNN takes some 12 microseconds a call, so small products stay with MKL (`benchmarks/products.py`). On other processors
and devices, and in other types, everything here is the plain product.
"""

import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = 2**21  # multiplications; below it oneDNN's start takes longer than it saves
ROWS = 1024  # of a large sum that are added to at a time


def processor() -> str:
    """Its description by the system, with the maker's name."""
    try:
        return Path("/proc/cpuinfo").read_text()[:1000]
    except OSError:
        return platform.processor()


HAS_AVX512 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
ONEDNN = HAS_AVX512 and "AMD" in processor()


@torch.library.custom_op("nanopcf::onednn", mutates_args=())
def onednn(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T, as an operation that torch.compile takes as it is."""
    # other strides fall to a loop that is a thousand times slower
    a, b = (t if t.is_contiguous() or t.T.is_contiguous() else t.contiguous() for t in (a, b))
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


@onednn.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0])


def by_onednn(a: Tensor, b: Tensor) -> bool:
    fits = a.device.type == "cpu" and a.dtype == b.dtype == torch.float32
    return ONEDNN and fits and a.shape[0] * b.numel() >= SMALL


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K], b [N, K] -> a @ b.T [M, N]. Without a gradient; `linear` has it."""
    return onednn(a, b) if by_onednn(a, b) else a @ b.T


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [M, N] += a.T @ b, of a [K, M] and b [K, N]."""
    if not by_onednn(a.T, b):
        total.addmm_(a.T, b)
        return
    for part, columns in zip(total.split(ROWS), a.split(ROWS, dim=1), strict=True):
        part.add_(onednn(columns.contiguous().T, b.T))


class Product(torch.autograd.Function):
    """x [M, D], weight [N, D] -> x @ weight.T, its gradients by `product` too."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        dx = product(g, weight.T) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        # a sum over many tokens in a small matrix: faster with the longer side last
        longer = weight.shape[0] > weight.shape[1]
        return dx, product(x.T, g.T).T if longer else product(g.T, x.T)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., D], weight [N, D], bias [N] -> x @ weight.T + bias [..., N], differentiable."""
    rows = x.reshape(-1, x.shape[-1])
    if not by_onednn(rows, weight):
        return F.linear(x, weight, bias)
    y = (Product.apply if torch.is_grad_enabled() else onednn)(rows, weight)
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def sums_leave_in_float32(a: Tensor) -> bool:
    """Can a product of half-precision `a` give the float32 sums that a GPU makes anyway? (mm and addmm with out_dtype.)"""
    version = tuple(int(n) for n in torch.__version__.split(".")[:2])
    return a.is_cuda and a.dtype != torch.float32 and version >= (2, 10)
