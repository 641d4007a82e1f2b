"""Matrix products in float32 on a CPU: by oneDNN where it is faster than MKL. Both libraries come with PyTorch.

PyTorch gives such products to MKL, which leaves half of an AMD processor with AVX-512 idle; oneDNN uses all of it. But
each call of oneDNN costs about 12 microseconds, so small products stay with MKL (`benchmarks/products.py` measures the
limit). On other processors, on GPUs and in other types, everything here is PyTorch's plain product. The exception is
generation in float32: any CPU that has oneDNN multiplies by large weights in packed form (`packed_weights`).
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = 2**21  # multiplications; below this number a call of oneDNN costs more than it saves
ROWS = 1024  # rows of a large total that are added to at a time
TORCH = tuple(int(n) for n in torch.__version__.split(".")[:2])


def processor() -> str:
    """The system's description of the processor, with the name of its maker."""
    try:
        return Path("/proc/cpuinfo").read_text()[:1000]
    except OSError:
        return platform.processor()


HAS_ONEDNN = torch.backends.mkldnn.is_available()
ONEDNN = HAS_ONEDNN and torch.backends.cpu.get_cpu_capability() == "AVX512" and "AMD" in processor()
# Numbers of a weight from which packing it pays: generation as a whole is then as fast as by MKL, or faster.
LARGE = 2**17
packed: dict[int, Tensor] | None = None  # data_ptr of a weight -> the same numbers in the order that oneDNN reads


@contextmanager
def packed_weights() -> Iterator[None]:
    """Within the block `linear` packs each large weight once, at its first use, and not again in every product.

    For inference: the weights must not change meanwhile. Packing costs about as much as one product of few rows, and a
    copy of the weights.
    """
    global packed
    packed = {}
    try:
        yield
    finally:
        packed = None


@torch.library.custom_op("nanopcf::onednn", mutates_args=())
def onednn(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K], b [N, K] -> a @ b.T [M, N]. A custom operation, so that torch.compile does not look inside."""
    # With any other strides oneDNN falls back to a loop that is a thousand times slower.
    a, b = (t if t.is_contiguous() or t.T.is_contiguous() else t.contiguous() for t in (a, b))
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


@onednn.register_fake
def onednn_shape(a: Tensor, b: Tensor) -> Tensor:
    """What torch.compile needs to know of the result: its shape and type."""
    return a.new_empty(a.shape[0], b.shape[0])


def by_onednn(a: Tensor, b: Tensor) -> bool:
    """Is oneDNN the faster one for a product of a [M, K] with all of b, [N, K] or [K, N]?"""
    fits = a.device.type == "cpu" and a.dtype == b.dtype == torch.float32
    return ONEDNN and fits and a.shape[0] * b.numel() >= SMALL


def can_return_float32_sums(a: Tensor) -> bool:
    """Can products of half-precision `a` return the float32 sums that a GPU computes anyway (out_dtype)?"""
    return a.is_cuda and a.dtype != torch.float32 and TORCH >= (2, 10)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K], b [N, K] -> a @ b.T [M, N]. Has no gradient; `linear` has."""
    return onednn(a, b) if by_onednn(a, b) else a @ b.T


def store_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out [M, N] = a [M, K] @ b [K, N], rounded once. (By itself a GPU may also round the parts of a long sum.)"""
    if can_return_float32_sums(a):
        out.copy_(torch.mm(a, b, out_dtype=torch.float32))
    else:
        torch.mm(a, b, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """total [M, N] += a.T @ b, of a [K, M] and b [K, N]; with `first`, = instead, so that total may be uninitialized.

    A float32 total gets float32 sums, also of half types.
    """
    beta = 0 if first else 1  # with 0, what is in total is not read
    if by_onednn(a.T, b):
        for part, columns in zip(total.split(ROWS), a.split(ROWS, dim=1), strict=True):
            (part.copy_ if first else part.add_)(onednn(columns.contiguous().T, b.T))
    elif total.dtype == torch.float32 and can_return_float32_sums(a):
        torch.addmm(total, a.T, b, beta=beta, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.T.to(total.dtype), b.to(total.dtype), beta=beta)


class Product(torch.autograd.Function):
    """x [M, D], weight [N, D] -> x @ weight.T [M, N]; its gradients use `product` too."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        dx = product(g, weight.T) if ctx.needs_input_grad[0] else None  # (M, D)
        if not ctx.needs_input_grad[1]:
            return dx, None
        # Many tokens are summed into a small matrix [N, D]: that is faster with its longer side last.
        longer = weight.shape[0] > weight.shape[1]
        return dx, product(x.T, g.T).T if longer else product(g.T, x.T)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., D], weight [N, D], bias [N] -> x @ weight.T + bias [..., N], differentiable."""
    rows = x.reshape(-1, x.shape[-1])  # (M, D)
    if packed is not None and HAS_ONEDNN and x.is_cpu and x.dtype == torch.float32 and weight.numel() >= LARGE:
        if weight.data_ptr() not in packed:
            packed[weight.data_ptr()] = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 64)
        y = torch.ops.mkldnn._linear_pointwise(rows, packed[weight.data_ptr()], None, "none", [], "")  # (M, N)
    elif not by_onednn(rows, weight):
        return F.linear(x, weight, bias)
    else:
        y = Product.apply(rows, weight) if torch.is_grad_enabled() else onednn(rows, weight)  # (M, N)
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing: the model draws its own weights, or a checkpoint fills them."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
