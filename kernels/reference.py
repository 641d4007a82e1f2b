"""The output head fused with the loss, in plain PyTorch: the specification of the Triton kernels, and the CPU path.

The logits z = x W^T / T of N tokens over V words are the largest tensor of language-model training, yet a loss needs
only three numbers per token. With p = softmax(z) and target y:

    lse = log sum_v exp z_v        logprob = z_y - lse        H = -sum_v p_v log p_v = lse - sum_v p_v z_v

Take any loss l(logprob, lse, H), with the derivatives g_lp, g_lse, g_H of one token. Its gradient by the logits is

    dl/dz_v = g_lp (1[v=y] - p_v) + g_lse p_v - g_H p_v (log p_v + H)
            = a 1[v=y] + p_v (b + c log p_v),     a = g_lp,  b = g_lse - g_lp - g_H H,  c = -g_H

and from it dx = dz W / T and dW = dz^T x / T. So cross-entropy, PPO's clip, a KL term and an entropy bonus all need the
same code, with three floats per token.

The work goes in chunks of rows, so that only [chunk, V] logits exist at any time. A chunked loop under plain autograd
would save nothing, because autograd would keep the logits of every chunk. Hence two custom functions:

- `TokenLoss` evaluates the loss and its gradients chunk by chunk in *forward*, while the logits of the chunk exist:
  3 matrix products (z, dx, dW). It serves losses that are sums over tokens: SFT, and everything like GRPO.
- `Logprob` returns logprob and entropy for any later use, and computes the logits again in backward: 4 products.

Arithmetic is float32 whatever the inputs are: log-probs from bfloat16 logits are wrong by 1 %, too much for a policy
ratio (and bfloat16 products on a CPU are 100 times slower).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.products import add_product, product

CHUNK_ELEMENTS = 2**18  # logits per chunk: 1 MiB, about the cache of one core
WORDS_PER_BLOCK = 4096  # words at a time, where a temporary tensor is needed


def chunks(rows: int, vocab: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows: as many as CHUNK_ELEMENTS logits allow, but not so few that W is read again and again."""
    size = max(256 if device.type == "cpu" else 2048, CHUNK_ELEMENTS // vocab)
    return (slice(i, min(i + size, rows)) for i in range(0, rows, size))


def softmax_stats(
    x: Tensor, w: Tensor, y: Tensor, temperature: float, entropy: bool
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """One chunk, x [C, D], w [V, D], y [C]: the statistics [logprob, lse] or [logprob, lse, H], each [C]; p [C, V]; and
    log p [C, V], or None without the entropy.

    Everything is computed in place: one tensor of size [C, V] exists, and two with the entropy.
    """
    z = product(x, w)  # (C, V)
    if temperature != 1:
        z.div_(temperature)
    top = z.amax(dim=1, keepdim=True)  # (C, 1), subtracted so that exp cannot overflow
    z.sub_(top)
    z_y = z.gather(1, y[:, None]).squeeze(1)  # (C,)
    p = z.exp() if entropy else z.exp_()  # (C, V)
    total = p.sum(dim=1, keepdim=True)  # (C, 1)
    p.div_(total)
    log_total = total.log()
    lse = (top + log_total).squeeze(1)  # (C,)
    logprob = z_y - log_total.squeeze(1)  # (C,)
    if not entropy:
        return [logprob, lse], p, None
    logp = z.sub_(log_total).clamp_(min=-1e30)  # (C, V); where p is 0, p log p is 0 and not 0 * -inf
    # Block by block: the product p * logp of all words would be a third tensor of size [C, V].
    blocks = zip(p.split(WORDS_PER_BLOCK, dim=1), logp.split(WORDS_PER_BLOCK, dim=1), strict=True)
    h = -sum(torch.linalg.vecdot(p_block, logp_block) for p_block, logp_block in blocks)  # (C,)
    return [logprob, lse, h], p, logp


def loss_and_coefficients(
    loss_fn: Callable[..., Tensor], stats: list[Tensor], extras: list[Tensor], need_grad: bool
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None] | None]:
    """The loss of a chunk, detached, and the a, b, c [C] of its gradient by the logits. stats: as in softmax_stats."""
    with torch.set_grad_enabled(need_grad):
        leaves = [s.detach().requires_grad_(need_grad) for s in stats]
        loss = loss_fn(*leaves, *([None] * (3 - len(leaves))), *extras)
    if not need_grad:
        return loss, None
    g_lp, g_lse, g_h = (*torch.autograd.grad(loss, leaves, allow_unused=True), None)[:3]
    g_lp, g_lse = (torch.zeros_like(stats[0]) if g is None else g for g in (g_lp, g_lse))
    if g_h is None:
        return loss.detach(), (g_lp, g_lse - g_lp, None)
    return loss.detach(), (g_lp, g_lse - g_lp - g_h * stats[2], -g_h)


def logits_gradient(p: Tensor, logp: Tensor | None, y: Tensor, a: Tensor, b: Tensor, c: Tensor | None) -> Tensor:
    """dz [C, V] = a 1[v=y] + p (b + c log p), written over p (and over log p). c is None: no entropy term."""
    if c is None:
        dz = p.mul_(b[:, None])
    else:
        dz = p.mul_(logp.mul_(c[:, None]).add_(b[:, None]))
    return dz.scatter_add_(1, y[:, None], a[:, None])


class TokenLoss(torch.autograd.Function):
    """The sum over chunks of loss_fn(logprob, lse, entropy, *extras); its gradients are computed in forward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, loss_fn, extras, temperature, entropy):
        N, V = len(hidden), len(weight)
        need_x, need_w = ctx.needs_input_grad[:2]
        x_all, w = hidden.float(), weight.float()  # no copies if they are float32
        dx = torch.empty_like(x_all) if need_x else None  # (N, D)
        dw = torch.zeros_like(w) if need_w else None  # (V, D)
        all_stats = [torch.empty(N, device=hidden.device) for _ in range(3 if entropy else 2)]
        loss = torch.zeros((), device=hidden.device)
        for rows in chunks(N, V, hidden.device):
            # 1. the logits of the chunk, and the statistics of each row
            x, y = x_all[rows], targets[rows]  # (C, D), (C,)
            stats, p, logp = softmax_stats(x, w, y, temperature, entropy)
            for whole, part in zip(all_stats, stats, strict=True):
                whole[rows] = part
            # 2. the loss, and its derivatives by the statistics
            chunk_loss, abc = loss_and_coefficients(loss_fn, stats, [e[rows] for e in extras], need_x or need_w)
            loss += chunk_loss
            # 3. the gradient by the logits, and the two products
            dz = logits_gradient(p, logp, y, *abc) if abc else None  # (C, V)
            if need_x:
                dx[rows] = product(dz, w.T)
            if need_w:
                add_product(dw, dz, x)
            del p, logp, dz  # their memory is free before the next chunk's is taken
        for g in (dx, dw):
            if g is not None and temperature != 1:
                g.div_(temperature)
        ctx.grads = [None if g is None else g.to(t.dtype) for g, t in ((dx, hidden), (dw, weight))]
        ctx.mark_non_differentiable(*all_stats)
        return loss, *all_stats

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if ctx.grads is None:
            raise RuntimeError("linear_token_loss: its gradients were used up by the first backward; call it again")
        grads, ctx.grads = ctx.grads, None
        # Scaled in place: a copy would be another [V, D].
        return (*(None if g is None else g.mul_(grad_loss.to(g.dtype)) for g in grads), None, None, None, None, None)


class Logprob(torch.autograd.Function):
    """(logprob [N], entropy [N] or None), differentiable; the logits are computed again in backward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy):
        logprob = torch.empty(len(hidden), device=hidden.device)
        h = torch.empty_like(logprob) if entropy else None
        w = weight.float()
        for rows in chunks(len(hidden), len(weight), hidden.device):
            stats, _, _ = softmax_stats(hidden[rows].float(), w, targets[rows], temperature, entropy)
            logprob[rows] = stats[0]
            if entropy:
                h[rows] = stats[2]
        ctx.save_for_backward(hidden, weight, targets, h)
        ctx.temperature = temperature
        return logprob, h

    @staticmethod
    def backward(ctx, g_lp, g_h):
        hidden, weight, targets, h = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad[:2]
        w = weight.float()
        dx = torch.empty_like(hidden) if need_x else None  # (N, D)
        dw = torch.zeros_like(w) if need_w else None  # (V, D)
        with_entropy = h is not None and g_h is not None
        for rows in chunks(len(hidden), len(weight), hidden.device):
            x, y = hidden[rows].float(), targets[rows]  # (C, D), (C,)
            _, p, logp = softmax_stats(x, w, y, ctx.temperature, with_entropy)
            # (a, b, c) with g_lse = 0, divided once more by T because z = x W^T / T
            a = g_lp[rows] / ctx.temperature
            b, c = -a, None
            if with_entropy:
                c = -g_h[rows] / ctx.temperature
                b = b + c * h[rows]
            dz = logits_gradient(p, logp, y, a, b, c)  # (C, V)
            if need_x:
                dx[rows] = product(dz, w.T).to(dx.dtype)
            if need_w:
                add_product(dw, dz, x)
            del p, logp, dz  # their memory is free before the next chunk's is taken
        return dx, None if dw is None else dw.to(weight.dtype), None, None, None
