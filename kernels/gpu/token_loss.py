"""A loss of log-probs and its gradients in three matrix products: cross-entropy, PPO, GRPO, with KL and entropy terms.

`logprob.py` must compute the logits twice, since it cannot know what the caller will do with the log-probs. Here the
caller hands over the loss itself, a sum over tokens of f(logprob, lse, entropy), so that a chunk of rows is finished
while its probabilities exist. For each chunk of C rows:

    1. stats_kernel    z = x W^T / T in tiles -> lse_t, H_t, z_y, and the softmax within the tile, p_t -> memory [C, V]
    2. torch           combines the tiles to logprob, lse, H; evaluates the loss; autograd gives g_lp, g_lse, g_H of
                       each row, and with them a, b, c of dz = a 1[v=y] + p (b + c log p)   (see `reference.py`)
    3. scale_kernel    p_t -> dz, in place: p = p_t exp(lse_t - lse); log p only if the loss has an entropy term
    4. cuBLAS          dx = dz W;   dW += dz^T x

The softmax within the tile is stored, not the logits, because of precision. A bfloat16 keeps 8 bits: for a logit of 40
that is an error of 0.08, or 8 % of the probability; for a probability it is 0.2 %, whatever its size. And logprob, lse
and H do not come from what is stored: they are exact to float32, from the registers of step 1. (With bfloat16 logits
5-12 % of tokens get a policy ratio more than 2 % away from 1 though the weights have not changed, as
tests/test_kernels.py shows.)

Cost: 3 matrix products (6 N D V FLOP) in place of 4; in bfloat16 6 bytes of traffic per logit (store, read, store)
besides what the products read; memory [C, V] in the type of hidden, and dW in float32 when there is more than one
chunk. C is 4096 or more: each chunk reads and writes all of dW, which at C = 128 takes twice as long as the products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.gpu.logprob import (
    LOWEST,
    chunks,
    device_of,
    logits_buffer,
    prepare,
    restore,
    tiled_stats,
    tiling_for,
    weight_gradient,
)
from kernels.products import add_product, store_product


@triton.jit
def scale_kernel(
    p_ptr,
    width,
    y_ptr,
    logprob_ptr,
    lse_t_ptr,
    lse_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    N,
    T,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_T tiles of one row of p [N, width]: p_t becomes dz = a 1[v=y] + p (b + c log p), in place; c may be None.
    lse_t is [T, N], a row for each tile."""
    row = tl.program_id(0)
    tiles = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    words = tiles[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # (BLOCK_T, BLOCK_N)
    # Unlike V, the width is a multiple of 64: words are loaded and stored eight at a time.
    p_ptrs = p_ptr + row.to(tl.int64) * width + words  # row * width passes 2^31
    p_t = tl.load(p_ptrs, mask=words < width, other=0.0).to(tl.float32)
    # p = p_t s_t, with s_t = exp(lse_t - lse)
    log_share = tl.load(lse_t_ptr + tiles * N + row, mask=tiles < T, other=0.0) - tl.load(lse_ptr + row)
    share = tl.exp(log_share)
    # At the target of a confident model a + b p is 1 - p, nearly 0: only the exact p is precise enough there.
    logprob = tl.load(logprob_ptr + row)
    slope = tl.load(b_ptr + row)  # b + c log p
    slope_y = slope
    if c_ptr is not None:
        c = tl.load(c_ptr + row)
        logp = log_share[:, None] + tl.log(tl.maximum(p_t, 1e-37))  # where p_t is 0, so is p log p
        slope, slope_y = slope + c * logp, slope + c * tl.maximum(logprob, LOWEST)
    dz = p_t * share[:, None] * slope
    dz_y = tl.load(a_ptr + row) + tl.exp(logprob) * slope_y
    dz = tl.where(words == tl.load(y_ptr + row).to(tl.int32), dz_y, dz)
    tl.store(p_ptrs, dz.to(p_ptr.dtype.element_ty), mask=words < width)


def softmax_to_dlogits(
    p: Tensor, y: Tensor, logprob: Tensor, lse: Tensor, lse_t: Tensor, a: Tensor, b: Tensor, c: Tensor | None
) -> None:
    """p [C, V rounded up], the softmax within each tile, becomes dz. A kernel that works in place must never be
    autotuned, because autotuning runs it several times."""
    (C, width), (T, _), BLOCK_N = p.shape, lse_t.shape, tiling_for(p)["BLOCK_N"]
    BLOCK_T = 4096 // BLOCK_N
    with device_of(p):
        scale_kernel[(C, triton.cdiv(T, BLOCK_T))](
            p, width, y, logprob, lse_t, lse, a, b, c, C, T, BLOCK_T=BLOCK_T, BLOCK_N=BLOCK_N, num_warps=8
        )


class TokenLoss(reference.TokenLoss):
    """The sum over chunks of loss_fn(logprob, lse, entropy, *extras); its gradients are computed in forward, and the
    backward of the reference scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, loss_fn, extras, temperature, entropy):
        need_x, need_w = ctx.needs_input_grad[:2]
        x_all, w, targets = prepare(hidden, weight, targets)
        pieces = chunks(*x_all.shape)
        dx = torch.empty_like(x_all) if need_x else None  # (N, D)
        dw = weight_gradient(w, pieces) if need_w else None  # (V, D)
        all_stats = [torch.empty(len(x_all), device=x_all.device) for _ in range(3 if entropy else 2)]
        loss = torch.zeros((), device=x_all.device)
        buffer = logits_buffer(pieces, len(w), x_all) if need_x or need_w else None
        for rows in pieces:
            # 1. the statistics of each row, and the softmax within each tile
            x, y = x_all[rows], targets[rows]
            p = None if buffer is None else buffer[: len(x)]  # (C, V rounded up)
            logprob, lse, h, lse_t = tiled_stats(x, w, y, temperature, entropy, p)
            stats = [logprob, lse, h] if entropy else [logprob, lse]
            for whole, part in zip(all_stats, stats, strict=True):
                whole[rows] = part
            # 2. the loss, and its derivatives by the statistics
            terms = [e[rows] for e in extras]
            chunk_loss, abc = reference.loss_and_coefficients(loss_fn, stats, terms, buffer is not None)
            loss += chunk_loss
            if buffer is None:
                continue
            # 3. the gradient by the logits, divided once more by T because z = x W^T / T
            softmax_to_dlogits(p, y, logprob, lse, lse_t, *(None if g is None else g / temperature for g in abc))
            # 4. the two products
            dz = p[:, : len(w)]  # (C, V)
            if need_x:
                store_product(dx[rows], dz, w)
            if need_w:
                add_product(dw, dz, x, first=rows.start == 0)
        ctx.grads = [restore(dx, hidden), restore(dw, weight)]
        ctx.mark_non_differentiable(*all_stats)
        return loss, *all_stats
