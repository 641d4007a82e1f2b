"""The fused head against float64 autograd on the naive logits: fresh random inputs, odd sizes, both paths.

Every case with `path` runs on the PyTorch path, and on the Triton path in Triton's interpreter; where there is a GPU,
the Triton cases run there instead.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import paths, reference


def tolerance(dtype: torch.dtype, rows: int) -> float:
    """Relative norm error of a gradient. In half precision three numbers are rounded on the way to it: the softmax
    within the tile, dz, and the gradient itself. Each error is at most half a unit in the last place, u, and has a
    standard deviation of 0.43 u. The gradient of one row may hang on a single number: 3 u. Those of many rows average
    out to sqrt(3) 0.43 u = 0.75 u."""
    if dtype == torch.float32:
        return 1e-5
    u = torch.finfo(dtype).eps / 2
    return u * (1 + 2 / rows**0.5)


def on_triton(monkeypatch) -> dict:
    """Options of a call on the Triton path: interpreted on the CPU, or compiled where there is a GPU."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return dict(impl="triton", device="cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernels' files are imported, here for the first time
    return dict(impl="triton", device="cpu")


@pytest.fixture(params=["torch", pytest.param("triton", marks=[pytest.mark.cuda] * torch.cuda.is_available())])
def path(request, monkeypatch) -> dict:
    if request.param == "torch":
        monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1)  # 256 rows a chunk
        return dict(impl="torch", device="cpu")
    return on_triton(monkeypatch)


def with_tiles(monkeypatch, TMA: bool, M: int, N: int, K: int, chunk_rows: int = 4096) -> None:
    """The kernels in other tiles and chunks than the interpreter's own; descriptors or pointers."""
    from kernels.gpu import logprob as gpu_logprob

    tiling = dict(TMA=TMA, BLOCK_M=M, BLOCK_N=N, BLOCK_D=K, num_warps=4, num_stages=2)
    monkeypatch.setattr(gpu_logprob, "tiling", lambda *_: tiling)
    monkeypatch.setattr(gpu_logprob, "CHUNK_ROWS", chunk_rows)


def inputs(path, N, D, V, dtype=torch.float32, scale=None):
    """hidden, weight, targets; logits of standard deviation `scale`, 4 unless told."""
    device = path["device"]
    hidden = (torch.randn(N, D, device=device) * (scale or 4) / D**0.5).to(dtype).requires_grad_()
    weight = torch.randn(V, D, device=device).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), device=device)
    targets[: min(N, 2)] = torch.tensor([0, V - 1], device=device)[:N]
    return hidden, weight, targets


def naive(hidden, weight, targets, temperature=1.0):
    """(logprob, lse, entropy, leaves) in float64, through autograd."""
    x, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    z = x @ w.T / temperature
    logp = z.log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], z.logsumexp(-1), -(logp.exp() * logp).sum(-1), (x, w)


def relative(got, want, scale=0.0):
    """Relative norm error; `scale`: what counts as a small norm (one row's gradient can cancel to nearly nothing)."""
    return ((got.double() - want).norm() / max(want.norm().item(), float(scale), 1e-30)).item()


def gradient_scales(hidden, weight):
    """A third of what one row with a gradient of 1 by its log-prob gives hidden, and gives weight."""
    with torch.no_grad():
        return 0.3 * weight.float().norm() / len(weight) ** 0.5, 0.3 * hidden.float().norm() / len(hidden) ** 0.5


def assert_values(got, want, hidden, weight):
    """Log-probs and entropies within 1e-5 (1 + max|z| / 4)."""
    z = (hidden.detach().double() @ weight.detach().double().T).abs().max()
    assert got.dtype == torch.float32
    assert (got.double() - want).abs().max() <= 1e-5 * (1 + z / 4)


def ppo(logprob, lse, entropy, old, advantage):
    """PPO's clip, the k3 estimate of a KL, an entropy bonus and a z-loss, in the precision of its input."""
    old, advantage = old.to(logprob.dtype), advantage.to(logprob.dtype)
    ratio = torch.exp(logprob - old)
    surrogate = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    kl = torch.expm1(old - logprob) - (old - logprob)
    return (surrogate + 0.1 * kl - 0.05 * entropy + 1e-3 * lse**2).sum()


SIZES = [(1, 16, 64), (33, 40, 257), (130, 24, 1003), (5, 17, 4099), (300, 8, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_token_loss_matches_float64(path, size, dtype):
    """Value, statistics and both gradients of PPO with all terms, at a random temperature, times a factor of 3."""
    N = size[0]
    temperature = torch.empty(()).uniform_(0.6, 1.4).item()
    hidden, weight, targets = inputs(path, *size, dtype)
    logprob, lse, entropy, (x, w) = naive(hidden, weight, targets, temperature)
    # a ratio at the edge of the clip would be on another side in float32: keep clear of it
    log_ratio = torch.tensor([-0.6, -0.1, 0.1, 0.6], device=logprob.device)[torch.randint(0, 4, (N,))]
    extras = (logprob.detach().float() - log_ratio, torch.randn(N, device=logprob.device))
    loss, stats = kernels.linear_token_loss(
        hidden, weight, targets, ppo, extras, temperature=temperature, impl=path["impl"]
    )
    expected = ppo(logprob, lse, entropy, *extras)
    (loss * 3).backward()
    (expected * 3).backward()
    assert abs(loss.item() - expected.item()) < 1e-4 * N
    for name, want in (("logprob", logprob), ("lse", lse), ("entropy", entropy)):
        assert_values(stats[name], want, hidden, weight)
        assert not stats[name].requires_grad
    assert (stats["logprob"] <= 1e-6).all()
    for made, exact, scale in zip(
        (hidden.grad, weight.grad), (x.grad, w.grad), gradient_scales(hidden, weight), strict=True
    ):
        assert relative(made, exact, scale) < tolerance(dtype, size[0])
    assert hidden.grad.dtype == weight.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logprob_and_entropy_match_float64(path, size, dtype):
    hidden, weight, targets = inputs(path, *size, dtype)
    logprob, _, entropy, (x, w) = naive(hidden, weight, targets, 0.8)
    got, h = kernels.linear_logprob(hidden, weight, targets, temperature=0.8, entropy=True, impl=path["impl"])
    u, v = torch.randn(2, size[0], device=got.device)
    (got.sin() * u + h**2 * v).sum().backward()
    (logprob.sin() * u + entropy**2 * v).sum().backward()
    assert_values(got, logprob, hidden, weight)
    assert_values(h, entropy, hidden, weight)
    for made, exact, scale in zip(
        (hidden.grad, weight.grad), (x.grad, w.grad), gradient_scales(hidden, weight), strict=True
    ):
        assert relative(made, exact, scale) < tolerance(dtype, size[0])
    alone = kernels.linear_logprob(hidden, weight, targets, temperature=0.8, impl=path["impl"])
    assert torch.equal(alone, got)


def test_both_functions_agree_on_any_loss(path):
    """3 products or 4, the same numbers: cross-entropy and a loss that uses everything."""
    hidden, weight, targets = inputs(path, 70, 24, 300)
    old, advantage = torch.randn(2, 70, device=hidden.device)
    loss, _ = kernels.linear_token_loss(hidden, weight, targets, ppo, (old, advantage), impl=path["impl"])
    got = torch.autograd.grad(loss, (hidden, weight))
    logprob, h = kernels.linear_logprob(hidden, weight, targets, entropy=True, impl=path["impl"])
    lse = (hidden @ weight.T).logsumexp(-1)
    want = torch.autograd.grad(ppo(logprob, lse, h, old, advantage), (hidden, weight))
    assert all(relative(g, w.double()) < 1e-5 for g, w in zip(got, want, strict=True))


def test_logit_gradients_sum_to_zero_at_any_vocabulary(path):
    """With the identity for weight, hidden's gradient is that of the logits. A word past the end of V that counts as
    a logit of 0 (a zero-padded tile) takes probability from the others: the gradient of a row no longer sums to 0."""
    for V in (100, 129, 257):
        logits = (torch.randn(20, V, device=path["device"]) - 30).requires_grad_()
        targets = torch.randint(0, V, (20,), device=path["device"])
        eye = torch.eye(V, device=path["device"])
        for call in (
            lambda *a: kernels.linear_cross_entropy(*a, reduction="sum", impl=path["impl"]),
            lambda *a: -kernels.linear_logprob(*a, impl=path["impl"]).sum(),
        ):
            (dz,) = torch.autograd.grad(call(logits, eye, targets), logits)
            assert dz.sum(1).abs().max() < 1e-5
            want = logits.detach().softmax(-1) - F.one_hot(targets, V)
            torch.testing.assert_close(dz, want, atol=3e-6, rtol=1e-4)


def test_extreme_logits(path):
    """Peaked rows, and all logits very negative (softmax without its maximum gives NaN there)."""
    device = path["device"]
    hidden = torch.tensor([[100.0, 0.0], [-1e4, -1e4], [0.0, 0.0]], device=device, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], device=device, requires_grad=True)
    targets = torch.tensor([1, 2, 0], device=device)
    logprob, entropy = kernels.linear_logprob(hidden, weight, targets, entropy=True, impl=path["impl"])
    want, _, h, _ = naive(hidden, weight, targets)
    assert_values(logprob, want, hidden, weight)
    assert_values(entropy, h, hidden, weight)
    assert abs(entropy[2].item() - torch.tensor(3.0).log().item()) < 1e-6
    (logprob + entropy).sum().backward()
    loss, _ = kernels.linear_token_loss(hidden, weight, targets, lambda lp, lse, h: (lp + h).sum(), impl=path["impl"])
    loss.backward()
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_a_word_that_cannot_be_drawn_adds_nothing_to_the_entropy(path):
    """A logit that overflows to -inf: its p log p is 0, and once was 0 * -inf. As a target its log-prob is -inf."""
    device = path["device"]
    hidden = torch.tensor([[1e20, 0.0], [1e20, 0.0], [0.0, 0.0]], device=device, requires_grad=True)
    weight = torch.tensor([[0.0, 1.0], [-1e20, 0.0], [0.0, 0.5]], device=device, requires_grad=True)
    logprob, entropy = kernels.linear_logprob(
        hidden, weight, torch.tensor([0, 1, 1], device=device), entropy=True, impl=path["impl"]
    )
    want = torch.tensor([2.0, 2.0, 3.0]).log()
    torch.testing.assert_close(entropy.detach().cpu(), want, atol=1e-6, rtol=0)
    assert logprob[1] == -torch.inf and abs(logprob[0].item() + want[0].item()) < 1e-6
    targets = torch.tensor([0, 2, 1], device=device)
    loss, stats = kernels.linear_token_loss(
        hidden, weight, targets, lambda lp, lse, h: (lp + h).sum(), impl=path["impl"]
    )
    loss.backward()
    torch.testing.assert_close(stats["entropy"].cpu(), want, atol=1e-6, rtol=0)
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_a_word_whose_weights_are_minus_infinity_is_as_if_it_were_not_there(path):
    """With positive hidden states: of mixed signs its logit is inf - inf, NaN, in every head. (dx is NaN always: its dz
    of 0 meets a weight of -inf.) As a target it has a log-prob of -inf, and a gradient if the loss leaves it out."""
    hidden, weight, targets = inputs(path, 20, 24, 150)
    hidden = hidden.detach().abs()
    targets[targets == 149] = 0
    logprob, _, entropy, (_, w) = naive(hidden, weight[:-1], targets)
    (logprob + entropy)[1:].sum().backward()
    banned = weight.detach().clone()
    banned[-1] = -torch.inf
    banned.requires_grad_()
    targets[0] = 149
    loss, stats = kernels.linear_token_loss(
        hidden, banned, targets, lambda lp, lse, h: (lp + h)[1:].sum(), impl=path["impl"]
    )
    two = kernels.linear_logprob(hidden, banned, targets, entropy=True, impl=path["impl"])
    for got, h, total in ((stats["logprob"], stats["entropy"], loss), (*two, (two[0] + two[1])[1:].sum())):
        assert got[0] == -torch.inf
        assert_values(got.detach()[1:], logprob[1:], hidden, weight)
        assert_values(h.detach(), entropy, hidden, weight)
        (dw,) = torch.autograd.grad(total, banned)
        assert relative(dw[:-1], w.grad) < 1e-5 and not dw[-1].any()


def test_confident_tokens_keep_their_gradient_in_half_precision(path):
    """1 - p of a target with p = 0.999 is lost if p is rounded to bfloat16 on the way (8 bits: to 1, or to 0.996)."""
    hidden, weight, targets = inputs(path, 200, 32, 300, torch.bfloat16, scale=1)
    with torch.no_grad():  # turn each hidden state towards its target's row of the weight
        hidden += 0.38 * weight[targets]
    logprob, _, _, (x, w) = naive(hidden, weight, targets)
    assert 0.9 < logprob.exp().median() < 0.9999
    (-logprob).sum().backward()
    kernels.linear_cross_entropy(hidden, weight, targets, reduction="sum", impl=path["impl"]).backward()
    for made, exact in ((hidden.grad, x.grad), (weight.grad, w.grad)):
        assert relative(made, exact) < tolerance(torch.bfloat16, 200)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_equals_torch_and_ignored_rows_do_not_leak(path, reduction):
    """A NaN in a dropped row must not reach the loss or a gradient."""
    hidden, weight, targets = inputs(path, 50, 12, 37)
    targets[::3] = -100
    expected = F.cross_entropy(hidden @ weight.T / 0.9, targets, reduction=reduction)
    want = torch.autograd.grad(expected.sum(), (hidden, weight))
    poisoned = hidden.detach().clone()
    poisoned[::3] = float("nan")
    poisoned.requires_grad_()
    loss = kernels.linear_cross_entropy(
        poisoned, weight, targets, temperature=0.9, reduction=reduction, impl=path["impl"]
    )
    loss.sum().backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(poisoned.grad, want[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(weight.grad, want[1], atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch before 2.13")
def test_cross_entropy_equals_pytorchs_own(path):
    hidden, weight, targets = inputs(path, 60, 20, 130)
    targets[5:9] = -100
    want = F.linear_cross_entropy(hidden, weight, targets, ignore_index=-100)
    got = kernels.linear_cross_entropy(hidden, weight, targets, impl=path["impl"])
    torch.testing.assert_close(got, want.detach())
    for g, w in zip(*(torch.autograd.grad(t, (hidden, weight)) for t in (got, want)), strict=True):
        torch.testing.assert_close(g, w, atol=1e-6, rtol=1e-4)


def test_no_valid_rows_and_no_rows(path):
    hidden, weight, _ = inputs(path, 4, 8, 9)
    none = torch.full((4,), -100, device=hidden.device)
    loss = kernels.linear_cross_entropy(hidden, weight, none, impl=path["impl"])
    loss.backward()
    assert loss == 0 and not weight.grad.any() and not hidden.grad.any()
    logprob = kernels.linear_logprob(hidden[:0], weight, none[:0], impl=path["impl"])
    logprob.sum().backward()
    assert logprob.shape == (0,) and not weight.grad.any()


def test_frozen_inputs_second_backward_and_untouched_arguments(path):
    hidden, weight, targets = inputs(path, 20, 8, 33)
    copies = hidden.detach().clone(), weight.detach().clone(), targets.clone()

    def call(h, w):
        return kernels.linear_cross_entropy(h, w, targets, reduction="sum", impl=path["impl"])

    want = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets, reduction="sum"), (hidden, weight))
    for frozen_head in (
        lambda h, w: call(h, w.detach()),
        lambda h, w: -kernels.linear_logprob(h, w.detach(), targets, impl=path["impl"]).sum(),
    ):
        got = torch.autograd.grad(frozen_head(hidden, weight), hidden)[0]
        torch.testing.assert_close(got, want[0], atol=1e-5, rtol=1e-4)
    for frozen_hidden in (
        lambda h, w: call(h.detach(), w),
        lambda h, w: -kernels.linear_logprob(h.detach(), w, targets, impl=path["impl"]).sum(),
    ):
        got = torch.autograd.grad(frozen_hidden(hidden, weight), weight)[0]
        torch.testing.assert_close(got, want[1], atol=1e-5, rtol=1e-4)
    loss = call(hidden, weight)
    loss.backward()
    with pytest.raises(RuntimeError, match="used up"):
        loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(copies, (hidden, weight, targets), strict=True))


def test_tied_embeddings(path):
    """The weight is the embedding too: its gradient is the sum of both uses."""
    weight = torch.randn(40, 16, device=path["device"], requires_grad=True)
    tokens = torch.randint(0, 40, (30,), device=path["device"])
    targets = torch.randint(0, 40, (30,), device=path["device"])
    want = torch.autograd.grad(F.cross_entropy(weight[tokens] @ weight.T, targets), weight)[0]
    loss = kernels.linear_cross_entropy(weight[tokens], weight, targets, impl=path["impl"])
    got = torch.autograd.grad(loss, weight)[0]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


def test_no_gradient_is_made_when_none_is_asked_for(path, monkeypatch):
    """Under no_grad a custom function still sees requires_grad: validation would pay for three products."""
    hidden, weight, targets = inputs(path, 20, 8, 33)
    monkeypatch.setattr(reference, "logits_gradient", lambda *_: pytest.fail("made a gradient"))
    monkeypatch.setattr(torch, "mm", lambda *_, **__: pytest.fail("made a gradient"))
    with torch.no_grad():
        loss = kernels.linear_cross_entropy(hidden, weight, targets, impl=path["impl"])
    assert not loss.requires_grad


def test_a_loss_without_an_entropy_term_needs_no_logarithm():
    """c is None: then no kernel and no line of the reference takes log p of all words, though H may be asked for."""
    stats = list(torch.rand(3, 4))
    _, (a, b, c) = reference.loss_and_coefficients(lambda lp, lse, h: 2 * lp.sum() + lse.sum(), stats, [], True)
    assert c is None and torch.equal(a, torch.full((4,), 2.0)) and torch.equal(b, torch.full((4,), -1.0))
    _, (_, _, c) = reference.loss_and_coefficients(lambda lp, lse, h: (lp + h).sum(), stats, [], True)
    assert torch.equal(c, torch.full((4,), -1.0))


def test_strides_and_offsets(path):
    """Views of all kinds: every second column, rows from the middle, targets from an odd offset, upstream expanded."""
    device = path["device"]
    wide = torch.randn(41, 48, device=device)
    hidden = wide[1:, ::2].requires_grad_()
    weight = torch.randn(24, 50, device=device).T.requires_grad_()
    targets = torch.randint(0, 50, (81,), device=device)[1::2]
    assert not hidden.is_contiguous() and not weight.is_contiguous() and not targets.is_contiguous()
    for call in (
        lambda h, w, y: kernels.linear_logprob(h, w, y, impl=path["impl"]).sum(),
        lambda h, w, y: -kernels.linear_cross_entropy(h, w, y, reduction="sum", impl=path["impl"]),
    ):
        got = torch.autograd.grad(call(hidden, weight, targets), (hidden, weight))
        plain = [t.detach().clone(memory_format=torch.contiguous_format) for t in (hidden, weight)]
        for t in plain:
            t.requires_grad_()
        want = torch.autograd.grad(-F.cross_entropy(plain[0] @ plain[1].T, targets, reduction="sum"), plain)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)
    flat = torch.randn(40 * 24 + 1, device=device)[1:].view(40, 24)  # not on a 16-byte boundary
    assert flat.data_ptr() % 16
    got = kernels.linear_logprob(flat, weight, targets, impl=path["impl"])
    assert_values(got, naive(flat, weight, targets)[0], flat, weight)


def test_views_of_one_row_or_column(path, monkeypatch):
    """PyTorch calls them contiguous whatever their stride is; a descriptor wants it to be a multiple of 16 bytes."""
    if path == dict(impl="triton", device="cpu"):
        with_tiles(monkeypatch, True, 16, 64, 16)
    for N, V, D in [(1, 1, 8), (1, 30, 8), (3, 1, 8), (3, 30, 1), (1, 1, 1)]:
        hidden, weight = (torch.randn(n, 41, device=path["device"])[:, :D].requires_grad_() for n in (N, V))
        targets = torch.randint(0, V, (N, 3), device=path["device"])[:, 0]
        want = F.cross_entropy(hidden @ weight.T, targets)
        got = kernels.linear_cross_entropy(hidden, weight, targets, impl=path["impl"])
        logprob = kernels.linear_logprob(hidden, weight, targets, impl=path["impl"])
        expected = torch.autograd.grad(want, (hidden, weight))
        for loss in (got, -logprob.mean()):
            torch.testing.assert_close(loss, want.detach(), atol=1e-6, rtol=1e-5)
            for g, e in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
                torch.testing.assert_close(g, e, atol=1e-6, rtol=1e-4)


def test_bits_repeat(path):
    def once():
        h, w = (t.detach().requires_grad_() for t in (hidden, weight))
        loss, stats = kernels.linear_token_loss(h, w, targets, ppo, extras, impl=path["impl"])
        loss.backward()
        return loss.detach(), *stats.values(), h.grad, w.grad

    hidden, weight, targets = inputs(path, 70, 24, 300)
    extras = tuple(torch.randn(2, 70, device=hidden.device))
    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_extra_rows_and_words_beyond_the_inputs_are_never_written(path, monkeypatch):
    """Every buffer starts as NaN: whatever a kernel leaves unwritten, or reads before it is written, shows."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return wrapper

    hidden, weight, targets = inputs(path, 70, 24, 300)
    extras = tuple(torch.randn(2, 70, device=hidden.device))
    logprob, lse, entropy, leaves = naive(hidden, weight, targets)
    want = torch.autograd.grad(ppo(logprob, lse, entropy, *extras), leaves)
    if path["impl"] == "triton":
        monkeypatch.setattr("kernels.gpu.logprob.CHUNK_ROWS", 10)  # two chunks of 35 rows
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    loss, _ = kernels.linear_token_loss(hidden, weight, targets, ppo, extras, impl=path["impl"])
    got = torch.autograd.grad(loss, (hidden, weight))
    assert all(relative(g, w) < 1e-5 for g, w in zip(got, want, strict=True))
    h2, w2 = (t.detach().requires_grad_() for t in (hidden, weight))
    got = torch.autograd.grad(kernels.linear_logprob(h2, w2, targets, impl=path["impl"]).sum(), (h2, w2))
    assert all(torch.isfinite(g).all() for g in got)


# ---- Triton ----


def test_tiles_chunks_and_ways_of_loading_agree(monkeypatch):
    """One tile or many, short last tiles in every direction, descriptors or pointers, one chunk or five: one result."""
    options = on_triton(monkeypatch)
    if options["device"] == "cuda":
        pytest.skip("other tiles in the interpreter; the GPU's own run in every other case")
    hidden, weight, targets = inputs(options, 50, 24, 203)
    extras = tuple(torch.randn(2, 50))
    logprob, lse, entropy, leaves = naive(hidden, weight, targets, 0.7)
    want = torch.autograd.grad(ppo(logprob, lse, entropy, *extras), leaves)
    for tiles in [
        (False, 64, 256, 64),
        (True, 64, 256, 64),
        (True, 16, 32, 16, 10),  # two chunks: each has at least twice as many rows as there are columns
        (False, 16, 64, 32, 10),
    ]:
        with_tiles(monkeypatch, *tiles)
        loss, stats = kernels.linear_token_loss(hidden, weight, targets, ppo, extras, temperature=0.7, impl="triton")
        got = torch.autograd.grad(loss, (hidden, weight))
        assert_values(stats["logprob"], logprob, hidden, weight)
        assert_values(stats["entropy"], entropy, hidden, weight)
        assert all(relative(g, w) < 1e-5 for g, w in zip(got, want, strict=True))
        again = kernels.linear_logprob(hidden, weight, targets, temperature=0.7, impl="triton")
        assert_values(again, logprob, hidden, weight)
        grads = torch.autograd.grad(again.sum(), (hidden, weight))
        x, w = leaves
        check = torch.autograd.grad((x @ w.T / 0.7).log_softmax(-1).gather(1, targets[:, None]).sum(), leaves)
        assert all(relative(g, c) < 1e-5 for g, c in zip(grads, check, strict=True))
    from kernels.gpu import token_loss

    assert token_loss.tiling_for(hidden)["BLOCK_N"] == 64 and len(token_loss.chunks(50, 24)) == 2  # both files see them


@pytest.mark.parametrize("TMA", [False, True])
def test_bfloat16_tiles_are_rounded_to_nearest_when_they_are_stored(monkeypatch, TMA):
    """Triton's interpreter cuts bfloat16 off, and multiplies its bit patterns; `interpreter.py` mends both."""
    options = on_triton(monkeypatch)
    from kernels.gpu import logprob as gpu_logprob

    if options["device"] == "cpu":
        with_tiles(monkeypatch, TMA, 16, 64, 16)
    hidden, weight, targets = (t.detach() for t in inputs(options, 40, 24, 256, torch.bfloat16))
    stored = gpu_logprob.logits_buffer([slice(0, 40)], 256, hidden)
    logprob, _, _, _ = gpu_logprob.tiled_stats(hidden, weight, targets, 1.0, False, stored)
    assert_values(logprob, naive(hidden, weight, targets)[0].detach(), hidden, weight)
    tile = gpu_logprob.tiling_for(hidden)["BLOCK_N"]
    exact = (hidden.double() @ weight.double().T).view(40, -1, tile).softmax(-1).view(40, 256)
    error = (stored.double() - exact) / exact
    assert stored.dtype == torch.bfloat16 and error.abs().max() < 2**-8 + 1e-5
    assert error.mean().abs() < 2e-4  # cut off, it would be 0.0027 too small


def test_a_target_outside_of_the_vocabulary_shows(path):
    hidden, weight, targets = inputs(path, 5, 8, 30)
    targets[3] = 30
    if path["impl"] == "torch":
        with pytest.raises(RuntimeError, match="out of bounds"):
            kernels.linear_logprob(hidden, weight, targets, impl="torch")
    else:
        logprob = kernels.linear_logprob(hidden, weight, targets, impl="triton")
        assert logprob.isnan().tolist() == [False, False, False, True, False]


def test_bfloat16_logits_would_move_the_policy_ratio():
    """Why logits stay in float32 registers: the same weights and tokens, log-probs from bfloat16 logits."""
    hidden, weight, targets = inputs(dict(device="cpu"), 400, 64, 2000, torch.bfloat16)
    exact = naive(hidden, weight, targets)[0].detach()
    rounded = (hidden.float() @ weight.float().T).bfloat16().float().log_softmax(-1)
    rounded = rounded.gather(1, targets[:, None])[:, 0].double()
    ours = kernels.linear_logprob(hidden, weight, targets).detach().double()
    rounded_error, our_error = (((logprob - exact).exp() - 1).abs() for logprob in (rounded, ours))
    assert 0.02 < (rounded_error > 0.02).float().mean() < 0.4  # about one token in ten
    assert our_error.max() < 1e-4


@pytest.mark.parametrize("folder", [None, *filter(None, os.environ.get("OTHER_TRITON", "").split(os.pathsep))])
def test_kernels_compile_for_gpus_without_spills(folder):
    """The assembler's word: no register goes to memory, shared memory fits every card of the kind, and the products of
    a step run together. On Hopper that takes one wait a step; a wait for each is what ptxas warns of as C7515.

    OTHER_TRITON: folders with other versions, made by `pip install --no-deps --target FOLDER triton==3.6.0`.
    """
    pytest.importorskip("triton")
    script = Path(__file__).with_name("compile_kernels.py")
    environment = os.environ | ({"PYTHONPATH": folder} if folder else {})
    command = [sys.executable, script, "sm_90", "sm_80"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(compiled) == 28
    for k in compiled:
        assert k["spills"] == 0, k
        assert k["shared"] <= (232_448 if k["arch"] == 90 else 101_376), k  # H100; A10, RTX 3090, 4090
        if not k["kernel"].startswith("scale"):
            assert k["tensor_core"] > 0, k
            assert (k["tma"] > 0 and k["wgmma"] > 0) == (k["arch"] == 90), k
            assert k["waits"] < k["wgmma"] or k["arch"] == 80, k
            # bfloat16 on Hopper: all else happens while the tensor cores wait. 128 logits a thread.
            assert k["instructions"] < 2_400 or (k["arch"], k["dtype"]) != (90, "bf16"), k
        elif k["kernel"] == "scale":
            assert k["instructions"] < 300, k  # for 16 words


@pytest.mark.cuda
@pytest.mark.parametrize("size", [(8192, 896, 151936), (3000, 64, 50257), (70_001, 16, 1003)], ids=str)
def test_large_sizes_and_memory_on_a_gpu(size):
    """More than 2^31 logits, odd vocabularies, more than 65536 rows; no [N, V] tensor."""
    N, D, V = size
    hidden, weight, targets = inputs(dict(device="cuda"), N, D, V, torch.bfloat16)
    z = torch.cat([(h.float() @ weight.float().T).logsumexp(-1) for h in hidden.detach().split(512)])
    want = (hidden.detach().float() * weight.detach()[targets].float()).sum(-1) - z
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        got = kernels.linear_logprob(hidden, weight, targets, impl="triton")
    assert torch.cuda.max_memory_allocated() - before < 100 * 2**20
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-4)
    got, _ = kernels.linear_token_loss(hidden, weight, targets, lambda lp, *_: -lp.sum(), entropy=False, impl="triton")
    grads = torch.autograd.grad(got, (hidden, weight))
    assert torch.cuda.max_memory_allocated() - before < 0.35 * 16 * N * V + 3 * sum(g.nbytes for g in grads)
    rows = torch.randint(0, N, (64,), device="cuda")
    p = (hidden.detach()[rows].float() @ weight.detach().float().T).softmax(-1)
    p[torch.arange(64), targets[rows]] -= 1
    assert relative(grads[0][rows], (p @ weight.detach().float()).double()) < tolerance(torch.bfloat16, 64)


def peak_bytes(run) -> int:
    """Peak memory of run() by the profiler's allocation log: every allocation and release of the CPU allocator."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    total = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def test_memory_is_bounded_by_the_chunk():
    """Forward and backward at N = 2048, V = 8192: the logits alone would be 64 MiB. The naive loss is the control."""
    N, D, V = 2048, 32, 8192
    hidden, weight, targets = inputs(dict(device="cpu"), N, D, V)
    logits = 4 * N * V
    fused = peak_bytes(lambda: kernels.linear_cross_entropy(hidden, weight, targets).backward())
    scored = peak_bytes(lambda: (-kernels.linear_logprob(hidden, weight, targets).sum()).backward())
    control = peak_bytes(lambda: F.cross_entropy(hidden @ weight.T, targets).backward())
    assert control > 1.9 * logits
    assert fused < 0.35 * control and fused < 0.6 * logits
    assert scored < 0.35 * control


# ---- the choice of path, and bad arguments ----


def test_the_path_is_chosen_and_said_once(monkeypatch, capsys):
    hidden, weight, targets = inputs(dict(device="cpu"), 4, 8, 9)
    paths.announce.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels.announce_path(hidden.device)
    for _ in range(2):
        kernels.linear_logprob(hidden, weight, targets)
    if not torch.cuda.is_available():
        assert kernels.backend() == "torch"
        assert capsys.readouterr().err == "kernels: torch on cpu\n"
    with pytest.raises(ValueError, match=r"impl='triton' can't run here: .*TRITON_INTERPRET=1"):
        kernels.linear_logprob(hidden, weight, targets, impl="triton")
    options = on_triton(monkeypatch)
    if options["device"] == "cpu":
        assert kernels.backend() == "triton-interpreter"
        kernels.linear_logprob(hidden, weight, targets)
        assert capsys.readouterr().err == "kernels: triton-interpreter on cpu\n"


def test_bad_arguments_are_one_clear_sentence():
    hidden, weight, targets = inputs(dict(device="cpu"), 4, 8, 9)
    for call, message in [
        (lambda: kernels.linear_logprob(hidden[:, :7], weight, targets), "need hidden"),
        (lambda: kernels.linear_logprob(hidden, weight, targets[:3]), "need targets"),
        (lambda: kernels.linear_logprob(hidden, weight, targets.int()), "int64"),
        (lambda: kernels.linear_logprob(hidden, weight.half(), targets), "must both be"),
        (lambda: kernels.linear_logprob(hidden, weight, targets, temperature=0.0), "above 0"),
        (lambda: kernels.linear_logprob(hidden, weight, targets, impl="cuda"), "no path 'cuda'"),
        (lambda: kernels.linear_cross_entropy(hidden, weight, targets, reduction="avg"), "reduction"),
        (lambda: kernels.linear_token_loss(hidden, weight, targets, ppo, (targets[:2],)), "extras"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
