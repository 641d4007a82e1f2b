"""Output head fused with the loss, in plain PyTorch: the specification of the kernels, and the CPU path.

The logits z = x W^T / T of N tokens over V words are the largest tensor of language-model training, and nothing but
three numbers a row is wanted of them. With p = softmax(z) and target y:

    lse = log sum_v exp z_v        logprob = z_y - lse        H = -sum_v p_v log p_v = lse - sum_v p_v z_v

For any loss l(logprob, lse, H), with its three derivatives g_lp, g_lse, g_H in a row,

    dl/dz_v = g_lp (1[v=y] - p_v) + g_lse p_v - g_H p_v (log p_v + H)
            = a 1[v=y] + p_v (b + c log p_v),     a = g_lp,  b = g_lse - g_lp - g_H H,  c = -g_H

and then dx = dz W / T, dW = dz^T x / T. So cross-entropy, PPO's clip, a KL term and an entropy bonus are one kernel
with three floats a row. Rows are worked in chunks, so that only [chunk, V] exists at any time. A chunked loop alone
would save nothing: autograd would keep every chunk's logits. Hence the two custom functions:

- `TokenLoss` evaluates the loss and its gradients chunk by chunk in *forward*, while the chunk's logits are there:
  3 matrix products (z, dx, dW). For losses that are sums over tokens: SFT and everything like GRPO.
- `Logprob` returns logprob and entropy for any later use, and recomputes the logits in backward: 4 products.

Arithmetic is float32 whatever comes in: log-probs from bfloat16 logits are off by 1 %, which a policy ratio can't bear
(and bfloat16 products on a CPU are 100 times slower).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.products import add_product, product

CHUNK_ELEMENTS = 2**18  # logits at a time: 1 MiB, about a core's cache
BLOCK = 4096  # words at a time, where a product needs a place of its own


def chunks(rows: int, vocab: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows: as many as CHUNK_ELEMENTS logits allow, but not so few that W is read again and again."""
    size = max(256 if device.type == "cpu" else 2048, CHUNK_ELEMENTS // vocab)
    return (slice(i, min(i + size, rows)) for i in range(0, rows, size))


def softmax_stats(x: Tensor, w: Tensor, y: Tensor, temperature: float, entropy: bool):
    """One chunk: x [C, D], w [V, D], y [C] -> p [C, V], logprob, lse, H (or None) [C], and log p [C, V] for H."""
    z = product(x, w)  # (C, V); all below is in place: one tensor of this size, two with entropy
    if temperature != 1:
        z.div_(temperature)
    top = z.amax(dim=1, keepdim=True)
    z.sub_(top)
    z_y = z.gather(1, y[:, None]).squeeze(1)
    p = z.exp() if entropy else z.exp_()
    total = p.sum(dim=1, keepdim=True)
    p.div_(total)
    log_total = total.log()
    lse = (top + log_total).squeeze(1)
    logprob = z_y - log_total.squeeze(1)
    if not entropy:
        return p, logprob, lse, None, None
    logp = z.sub_(log_total)
    # in blocks of words: p * logp of all of them would be a third tensor of this size
    blocks = zip(p.split(BLOCK, dim=1), logp.split(BLOCK, dim=1), strict=True)
    h = -sum(torch.linalg.vecdot(p_block, logp_block) for p_block, logp_block in blocks)
    return p, logprob, lse, h, logp


def loss_and_coefficients(
    loss_fn: Callable[..., Tensor], values: list[Tensor], extras: list[Tensor], need_grad: bool
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """The loss of a chunk, detached, and (a, b, c) [C] of its logits' gradient; values: logprob, lse[, entropy] [C]."""
    with torch.set_grad_enabled(need_grad):
        leaves = [v.detach().requires_grad_(need_grad) for v in values]
        loss = loss_fn(*leaves, *([None] * (3 - len(leaves))), *extras)
    if not need_grad:
        return loss, None
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    g_lp, g_lse, *g_h = (torch.zeros_like(v) if g is None else g for v, g in zip(values, grads, strict=True))
    if not g_h:
        return loss.detach(), (g_lp, g_lse - g_lp, torch.zeros_like(g_lp))
    return loss.detach(), (g_lp, g_lse - g_lp - g_h[0] * values[2], -g_h[0])


def logits_gradient(p: Tensor, logp: Tensor | None, y: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """dz = a 1[v=y] + p (b + c log p), written over p (and log p; without it, c is 0)."""
    if logp is None:
        dz = p.mul_(b[:, None])
    else:
        dz = p.mul_(logp.mul_(c[:, None]).add_(b[:, None]))
    return dz.scatter_add_(1, y[:, None], a[:, None])


class TokenLoss(torch.autograd.Function):
    """Sum over chunks of loss_fn(logprob, lse, entropy, *extras), its gradients made in forward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, loss_fn, extras, temperature, entropy):
        N, V = len(hidden), len(weight)
        need_x, need_w = ctx.needs_input_grad[:2]
        x_all, w = hidden.float(), weight.float()  # no copy when they are float32
        dx = torch.empty_like(x_all) if need_x else None  # (N, D)
        dw = torch.zeros_like(w) if need_w else None  # (V, D)
        stats = [torch.empty(N, device=hidden.device) for _ in range(3 if entropy else 2)]
        loss = torch.zeros((), device=hidden.device)
        for rows in chunks(N, V, hidden.device):
            # 1. the chunk's logits and what is wanted of them
            x, y = x_all[rows], targets[rows]
            p, *values, logp = softmax_stats(x, w, y, temperature, entropy)
            values = [v for v in values if v is not None]  # logprob, lse[, entropy]
            for whole, part in zip(stats, values, strict=True):
                whole[rows] = part
            # 2. the loss, and its derivatives by them
            part, abc = loss_and_coefficients(loss_fn, values, [e[rows] for e in extras], need_x or need_w)
            loss += part
            # 3. the logits' gradient, and the two products
            dz = logits_gradient(p, logp, y, *abc) if abc else None
            if need_x:
                dx[rows] = product(dz, w.T)
            if need_w:
                add_product(dw, dz, x)
            del p, logp, dz  # before the next chunk's are made
        for g in (dx, dw):
            if g is not None and temperature != 1:
                g.div_(temperature)
        ctx.grads = [None if g is None else g.to(t.dtype) for g, t in ((dx, hidden), (dw, weight))]
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if ctx.grads is None:
            raise RuntimeError("linear_token_loss: its gradients were used up by the first backward; call it again")
        grads, ctx.grads = ctx.grads, None
        # scaled in place: a copy would be another [V, D]
        return (*(None if g is None else g.mul_(grad_loss.to(g.dtype)) for g in grads), None, None, None, None, None)


class Logprob(torch.autograd.Function):
    """(logprob [N], entropy [N] or None), differentiable; logits recomputed in backward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy):
        logprob = torch.empty(len(hidden), device=hidden.device)
        h = torch.empty_like(logprob) if entropy else None
        w = weight.float()
        for rows in chunks(len(hidden), len(weight), hidden.device):
            _, lp, _, h_rows, _ = softmax_stats(hidden[rows].float(), w, targets[rows], temperature, entropy)
            logprob[rows] = lp
            if entropy:
                h[rows] = h_rows
        ctx.save_for_backward(hidden, weight, targets, h)
        ctx.temperature = temperature
        return logprob, h

    @staticmethod
    def backward(ctx, g_lp, g_h):
        hidden, weight, targets, h = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad[:2]
        w = weight.float()
        dx = torch.empty_like(hidden) if need_x else None
        dw = torch.zeros_like(w) if need_w else None
        with_entropy = h is not None and g_h is not None
        for rows in chunks(len(hidden), len(weight), hidden.device):
            x, y = hidden[rows].float(), targets[rows]
            p, _, _, _, logp = softmax_stats(x, w, y, ctx.temperature, with_entropy)
            a = g_lp[rows] / ctx.temperature
            b, c = -a, a
            if with_entropy:
                c = -g_h[rows] / ctx.temperature
                b = b + c * h[rows]
            dz = logits_gradient(p, logp, y, a, b, c)
            if need_x:
                dx[rows] = product(dz, w.T).to(dx.dtype)
            if need_w:
                add_product(dw, dz, x)
            del p, logp, dz  # before the next chunk's are made
        return dx, None if dw is None else dw.to(weight.dtype), None, None, None
