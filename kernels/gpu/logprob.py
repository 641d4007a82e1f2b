"""Log-probs and entropies of hidden [N, D] under weight [V, D] in one Triton kernel: no logit ever reaches memory.

Logits z = x W^T / T, probabilities p = softmax(z), target y (`reference.py` derives the gradient). Softmax needs a
whole row, but a program of the grid sees only a tile of it, [BLOCK_M rows, BLOCK_N words]. The way out: the numbers of
a row follow from the numbers of its tiles. Take the softmax *within* tile t, and let lse_t be the log-sum-exp of the
tile and H_t its entropy. Drawing a word is the same as drawing a tile and then a word within it, and the probability of
the tile is s_t = exp(lse_t - lse). Hence

    lse = log sum_t exp lse_t        H = sum_t s_t (H_t - log s_t)        (the chain rule of entropy)

so each tile writes two floats per row, exact however large the logits are: no term is the difference of two big ones.
The one tile that holds the target writes a third: z_y. That is `stats_kernel`, one matrix product:

    1. z      = x W^T / T of the tile, summed over D in float32 registers
    2. lse_t  = max z + log sum exp(z - max z);  H_t likewise
    3. z_y, where the target's word lies in this tile

The gradient needs every logit again. To recompute one costs 2 D FLOP; to store and read one moves 4 bytes (bfloat16).
On an H200 (790 TFLOP/s, 4.3 TB/s) storing is faster above D = 4 / 4.3e12 * 790e12 / 2, about 370. But N V stored
numbers would have to be kept until backward, because the caller's loss comes only after this function. So backward
recomputes: `dlogits_kernel` computes the tile a second time and writes, for a chunk of rows,

    dz = a 1[v=y] + p (b + c log p)

from three floats per row; cuBLAS then does dx = dz W and dW += dz^T x. Cost: 1 matrix product (2 N D V FLOP) forward
and 3 backward; memory [chunk, V] once, in backward. `token_loss.py` saves the fourth product by asking for the loss
beforehand.

Tiles are loaded through tensor descriptors (TMA on Hopper): rows and columns past the end read as 0, so no load has a
mask. Words past the end would then count as logits of 0, so step 1 sets them to -1e30.

Whatever a program does after its products, it does for every logit while its tensor cores wait. So exp z is computed as
2^(z / log 2): the factor 1 / log 2 joins the 1 / T that each logit has to be multiplied by anyway.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.gpu import interpreter
from kernels.products import add_product, store_product

if triton.knobs.runtime.interpret:  # in Python, on CPU tensors; read once, as @triton.jit does
    interpreter.mend_bfloat16()

CHUNK_ROWS = 4096  # at least: every chunk reads and writes all of dW [V, D], in float32 if there are several
LOG_2 = tl.constexpr(math.log(2))  # exp2 is one instruction, exp two
LOWEST = tl.constexpr(-1e30)  # in place of -inf: a word without any probability would add 0 * -inf to the entropy


# ---- kernels ----


@triton.jit
def load_tile(t, row, col, rows, cols, TMA: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """The tile (BLOCK_R, BLOCK_C) at row, col of a contiguous [rows, cols], 0 past its ends. t: descriptor, pointer."""
    if TMA:
        return t.load([row, col])
    else:
        r, c = row + tl.arange(0, BLOCK_R), col + tl.arange(0, BLOCK_C)
        at = r[:, None].to(tl.int64) * cols + c[None, :]  # passes 2^31
        return tl.load(t + at, mask=(r[:, None] < rows) & (c[None, :] < cols), other=0.0)


@triton.jit
def store_tile(t, value, row, col, rows, cols, TMA: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write value to the tile at row, col of a contiguous [rows, cols], cut off at its ends."""
    if TMA:
        t.store([row, col], value.to(t.dtype))
    else:
        r, c = row + tl.arange(0, BLOCK_R), col + tl.arange(0, BLOCK_C)
        at = r[:, None].to(tl.int64) * cols + c[None, :]
        tl.store(t + at, value.to(t.dtype.element_ty), mask=(r[:, None] < rows) & (c[None, :] < cols))


@triton.jit
def product_tile(
    x, w, row, col, N, V, D, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The tile of x W^T that begins at (row, col): float32 (BLOCK_M, BLOCK_N), 0 past the ends, -1e30 for -inf."""
    tl.assume(D > 0)  # a loop that may have no step would make Triton 3.6 wait after each tensor-core instruction
    z = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        x_tile = load_tile(x, row, d, N, D, TMA, BLOCK_M, BLOCK_D)
        w_tile = load_tile(w, col, d, V, D, TMA, BLOCK_N, BLOCK_D)
        z = tl.dot(x_tile, w_tile.T, z, input_precision="tf32x3")  # float32 by three TF32 products
    return tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def stats_kernel(
    x,
    w,
    p_out,
    y_ptr,
    z_y_ptr,
    lse_ptr,
    entropy_ptr,
    N,
    V,
    D,
    width,
    scale,
    ENTROPY: tl.constexpr,
    STORE: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of x [N, D], w [V, D]: writes lse_t and H_t to lse_ptr and entropy_ptr [tiles, N], z_y to z_y_ptr [N].
    With STORE also the softmax within the tile to p_out [N, width]. x, w, p_out: descriptors (TMA) or pointers."""
    row, tile = tl.program_id(0) * BLOCK_M, tl.program_id(1)  # neighbours in the grid share the tile of W
    rows, words = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    col = tile * BLOCK_N
    y = tl.load(y_ptr + rows, mask=rows < N, other=-1)
    # 1. x W^T; times `scale`, which is 1 / (T log 2), these are the logits in units of log 2
    z = product_tile(x, w, row, col, N, V, D, TMA, BLOCK_M, BLOCK_N, BLOCK_D)
    z = tl.where(words[None, :] < V - col, z, LOWEST)
    # 2. the target's logit, if it is here; most tiles hold no row's target
    here = (y >= col) & (y < col + BLOCK_N) & (y < V)
    if tl.max(here.to(tl.int32), 0) > 0:
        hit = words[None, :] == (y - col).to(tl.int32)[:, None]
        z_y = tl.sum(tl.where(hit, z, 0.0), 1)
        z_y = tl.where(z_y <= LOWEST, -float("inf"), z_y * scale * LOG_2)  # a target that cannot be drawn shows
        tl.store(z_y_ptr + rows, z_y, mask=here)
    # 3. log-sum-exp and entropy within the tile
    top = tl.max(z, 1) * scale
    z = z * scale - top[:, None]
    p = tl.exp2(z)
    total = tl.sum(p, 1)
    log_total = tl.log2(total)
    tl.store(lse_ptr + tile * N + rows, (top + log_total) * LOG_2, mask=rows < N)
    if ENTROPY:
        h = (log_total - tl.sum(p * z, 1) / total) * LOG_2
        tl.store(entropy_ptr + tile * N + rows, h, mask=rows < N)
    if STORE:
        store_tile(p_out, p * (1 / total)[:, None], row, col, N, width, TMA, BLOCK_M, BLOCK_N)


@triton.jit
def dlogits_kernel(
    x,
    w,
    dz_out,
    y_ptr,
    lse_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    N,
    V,
    D,
    width,
    scale,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes one tile of dz = a 1[v=y] + p (b + c log p) to dz_out [N, width]; lse, a, b, c are [N] float32."""
    row, col = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    rows, words = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    there = rows < N
    y = (tl.load(y_ptr + rows, mask=there, other=-1) - col).to(tl.int32)  # the target's place in the tile
    lse = tl.load(lse_ptr + rows, mask=there, other=0.0) / LOG_2  # in units of log 2, as the logits are below
    a = tl.load(a_ptr + rows, mask=there, other=0.0)
    b = tl.load(b_ptr + rows, mask=there, other=0.0)
    c = tl.load(c_ptr + rows, mask=there, other=0.0) * LOG_2
    z = product_tile(x, w, row, col, N, V, D, TMA, BLOCK_M, BLOCK_N, BLOCK_D)
    logp = z * scale - lse[:, None]
    dz = tl.exp2(logp) * (b[:, None] + c[:, None] * logp)
    dz = tl.where(words[None, :] == y[:, None], dz + a[:, None], dz)
    store_tile(dz_out, dz, row, col, N, width, TMA, BLOCK_M, BLOCK_N)


# ---- launching them ----


def tiling(dtype: torch.dtype, major: int) -> dict:
    """Tile sizes and pipeline stages for a GPU of compute capability major.x (0: the interpreter).

    Chosen so that no register spills to memory, and shared memory is enough on the smallest card of each kind
    (tests/test_kernels.py compiles and checks that).
    """
    tma = major in (9, 10)  # Hopper and data-centre Blackwell
    if dtype == torch.float32 and major:
        return dict(TMA=tma, BLOCK_M=64, BLOCK_N=64, BLOCK_D=32, num_warps=4, num_stages=3)
    if tma:
        return dict(TMA=True, BLOCK_M=128, BLOCK_N=256, BLOCK_D=64, num_warps=8, num_stages=4)
    return dict(TMA=False, BLOCK_M=128, BLOCK_N=128, BLOCK_D=64, num_warps=8, num_stages=3)


def tiling_for(x: Tensor) -> dict:
    return tiling(x.dtype, torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0)


def describe(t: Tensor, TMA: bool, *block: int) -> TensorDescriptor | Tensor:
    """What a kernel is given for t: with TMA a descriptor of its blocks, else t itself, which becomes a pointer."""
    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block)) if TMA else t


def prepare(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All contiguous, rows beginning at multiples of 16 bytes, as descriptors need; copies only what is not so yet."""
    extra = -hidden.shape[1] % 8
    if extra:
        hidden, weight = F.pad(hidden, (0, extra)), F.pad(weight, (0, extra))
    # A view of one row counts as contiguous whatever its stride is: flattened and back, the stride is its length.
    hidden, weight = (t.contiguous().view(-1).view(t.shape) for t in (hidden, weight))
    return *(t if t.data_ptr() % 16 == 0 else t.clone() for t in (hidden, weight)), targets.contiguous()


def device_of(t: Tensor):
    """A context in which the tensor's device is the current one: Triton launches on the current device."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def chunks(rows: int, width: int) -> list[slice]:
    """Equal slices of rows: below 2 * width rows, the logits would take less memory than dW in float32."""
    n = -(-rows // max(CHUNK_ROWS, 2 * width))
    return [slice(i * rows // n, (i + 1) * rows // n) for i in range(n)]


def logits_buffer(pieces: list[slice], vocab: int, like: Tensor) -> Tensor:
    """Empty [longest chunk, V rounded up to a multiple of 64]: V = 50257 would misalign every row but the first."""
    rows = max((r.stop - r.start for r in pieces), default=0)
    return torch.empty(rows, -(-vocab // 64) * 64, dtype=like.dtype, device=like.device)


def tiled_stats(x: Tensor, w: Tensor, y: Tensor, temperature: float, entropy: bool, p: Tensor | None = None):
    """x [C, D], w [V, D], y [C] -> logprob, lse, H (or None), each [C], and lse_t [tiles, C].

    p [C, V rounded up], if given, receives the softmax within each tile.
    """
    (C, D), V, t = x.shape, len(w), tiling_for(x)
    M, N, K = t["BLOCK_M"], t["BLOCK_N"], t["BLOCK_D"]
    grid = (triton.cdiv(C, M), triton.cdiv(V, N))
    z_y = x.new_full((C,), math.nan, dtype=torch.float32)  # stays NaN for a target outside of 0..V-1
    lse_t = x.new_empty(grid[1], C, dtype=torch.float32)
    h_t = torch.empty_like(lse_t) if entropy else None
    with device_of(x):
        stats_kernel[grid](
            describe(x, t["TMA"], M, K),
            describe(w, t["TMA"], N, K),
            None if p is None else describe(p, t["TMA"], M, N),
            y,
            z_y,
            lse_t,
            h_t,
            C,
            V,
            D,
            0 if p is None else p.shape[1],
            1 / (temperature * math.log(2)),
            ENTROPY=entropy,
            STORE=p is not None,
            **t,
        )
    lse = lse_t.logsumexp(0)
    h = None
    if entropy:
        log_share = lse_t - lse
        h = (h_t.sub_(log_share)).mul_(log_share.exp_()).sum(0)
    return z_y - lse, lse, h, lse_t


def dlogits(
    x: Tensor, w: Tensor, y: Tensor, lse: Tensor, a: Tensor, b: Tensor, c: Tensor, temperature: float, out: Tensor
) -> None:
    """Writes dz to out [C, V rounded up]; the logits are computed again from x [C, D] and w [V, D]."""
    (C, D), V, t = x.shape, len(w), tiling_for(x)
    M, N, K = t["BLOCK_M"], t["BLOCK_N"], t["BLOCK_D"]
    with device_of(x):
        dlogits_kernel[(triton.cdiv(C, M), triton.cdiv(V, N))](
            describe(x, t["TMA"], M, K),
            describe(w, t["TMA"], N, K),
            describe(out, t["TMA"], M, N),
            y,
            lse,
            a,
            b,
            c,
            C,
            V,
            D,
            out.shape[1],
            1 / (temperature * math.log(2)),
            **t,
        )


def weight_gradient(w: Tensor, pieces: list[slice]) -> Tensor:
    """[V, D], empty until the first chunk fills it. float32 for several chunks: a sum of rounded sums drifts."""
    make = torch.empty_like if pieces else torch.zeros_like
    return make(w, dtype=w.dtype if len(pieces) == 1 else torch.float32)


# ---- the differentiable function ----


class Logprob(torch.autograd.Function):
    """(logprob [N], entropy [N] or None), differentiable; the logits are computed again in backward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy):
        x, w, targets = prepare(hidden, weight, targets)
        logprob, lse = (torch.empty(len(x), device=x.device) for _ in range(2))
        h = torch.empty_like(lse) if entropy else None
        for rows in chunks(*x.shape):
            logprob[rows], lse[rows], h_rows, _ = tiled_stats(x[rows], w, targets[rows], temperature, entropy)
            if entropy:
                h[rows] = h_rows
        ctx.save_for_backward(hidden, weight, targets, lse, h)
        ctx.temperature = temperature
        return logprob, h

    @staticmethod
    def backward(ctx, g_lp, g_h):
        hidden, weight, targets, lse, h = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad[:2]
        x, w, targets = prepare(hidden, weight, targets)
        pieces = chunks(*x.shape)
        dx = torch.empty_like(x) if need_x else None  # (N, D)
        dw = weight_gradient(w, pieces) if need_w else None  # (V, D)
        # dl/dz = a 1[v=y] + p (b + c log p), divided once more by T because z = x W^T / T
        a = (g_lp if g_lp is not None else torch.zeros_like(lse)) / ctx.temperature
        c = -g_h / ctx.temperature if h is not None and g_h is not None else torch.zeros_like(lse)
        b = c * h - a if h is not None else -a
        buffer = logits_buffer(pieces, len(w), x)
        for rows in pieces:
            padded = buffer[: rows.stop - rows.start]  # (C, V rounded up)
            dlogits(x[rows], w, targets[rows], lse[rows], a[rows], b[rows], c[rows], ctx.temperature, padded)
            dz = padded[:, : len(w)]  # (C, V)
            if need_x:
                store_product(dx[rows], dz, w)
            if need_w:
                add_product(dw, dz, x[rows], first=rows.start == 0)
        return restore(dx, hidden), restore(dw, weight), None, None, None


def restore(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    """The gradient in the shape and type of its tensor: `prepare` may have changed both."""
    return None if gradient is None else gradient[:, : like.shape[1]].to(like.dtype)
