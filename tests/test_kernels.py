"""The fused head against float64 autograd on the naive logits, with fresh random inputs and odd sizes."""

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import reference


def inputs(N, D, V, dtype=torch.float32, scale=1.0):
    hidden = (torch.randn(N, D) * scale).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,))


def naive(hidden, weight, targets, temperature):
    """(logprob, lse, entropy, leaves) in float64, through autograd."""
    x, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    z = x @ w.T / temperature
    logp = z.log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], z.logsumexp(-1), -(logp.exp() * logp).sum(-1), (x, w)


def relative(a, b):
    return ((a.double() - b).norm() / (b.norm() + 1e-30)).item()


def ppo(logprob, lse, entropy, old, advantage):
    ratio = torch.exp(logprob - old.to(logprob.dtype))
    A = advantage.to(logprob.dtype)
    surrogate = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.28) * A)
    kl = torch.expm1(old.to(logprob.dtype) - logprob) - (old.to(logprob.dtype) - logprob)
    return (surrogate + 0.1 * kl - 0.05 * entropy + 1e-3 * lse**2).sum()


SIZES = [(1, 16, 64), (33, 40, 257), (130, 24, 1003), (700, 17, 16)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_token_loss_matches_float64(size, temperature, monkeypatch):
    """PPO clip + k3 + entropy bonus + z-loss: value, statistics and both gradients, under an upstream factor."""
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1)  # 256 rows a chunk: the largest case takes three
    hidden, weight, targets = inputs(*size)
    logprob, lse, entropy, (x, w) = naive(hidden, weight, targets, temperature)
    extras = (logprob.detach().float() + 0.3 * torch.randn(size[0]), torch.randn(size[0]))
    loss, stats = kernels.linear_token_loss(hidden, weight, targets, ppo, extras, temperature=temperature)
    expected = ppo(logprob, lse, entropy, *extras)
    (loss * 3).backward()
    (expected * 3).backward()
    assert relative(loss.detach(), expected.detach()) < 1e-5
    for got, want in zip(
        (stats["logprob"], stats["lse"], stats["entropy"]), (logprob, lse, entropy), strict=True
    ):
        torch.testing.assert_close(got.double(), want.detach(), atol=2e-5, rtol=1e-5)
    assert relative(hidden.grad, x.grad) < 1e-5
    assert relative(weight.grad, w.grad) < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_logprob_and_entropy_match_float64(size):
    hidden, weight, targets = inputs(*size)
    logprob, _, entropy, (x, w) = naive(hidden, weight, targets, 0.8)
    got, h = kernels.linear_logprob(hidden, weight, targets, temperature=0.8, entropy=True)
    u, v = torch.randn(size[0]), torch.randn(size[0])
    (got.sin() * u + h**2 * v).sum().backward()
    (logprob.sin() * u + entropy**2 * v).sum().backward()
    torch.testing.assert_close(got.double(), logprob.detach(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(h.double(), entropy.detach(), atol=2e-5, rtol=1e-5)
    assert relative(hidden.grad, x.grad) < 1e-5 and relative(weight.grad, w.grad) < 1e-5
    assert (got <= 1e-6).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_equals_torch_and_ignored_rows_do_not_leak(reduction):
    """A NaN in a dropped row must not reach the loss or a gradient."""
    hidden, weight, targets = inputs(50, 12, 37)
    targets[::3] = -100
    expected = F.cross_entropy(hidden @ weight.T / 0.9, targets, reduction=reduction)
    want = torch.autograd.grad(expected.sum(), (hidden, weight))
    poisoned = hidden.detach().clone()
    poisoned[::3] = float("nan")
    poisoned.requires_grad_()
    loss = kernels.linear_cross_entropy(poisoned, weight, targets, temperature=0.9, reduction=reduction)
    loss.sum().backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(poisoned.grad, want[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(weight.grad, want[1], atol=1e-5, rtol=1e-4)


def test_no_valid_rows_and_no_rows():
    hidden, weight, _ = inputs(4, 8, 9)
    loss = kernels.linear_cross_entropy(hidden, weight, torch.full((4,), -100))
    loss.backward()
    assert loss == 0 and not weight.grad.any() and not hidden.grad.any()
    assert kernels.linear_logprob(hidden[:0], weight, torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_extreme_logits():
    """Peaked rows, and all logits very negative (softmax without its maximum gives NaN there)."""
    hidden = torch.tensor([[100.0, 0.0], [-1e4, -1e4]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    logprob, entropy = kernels.linear_logprob(hidden, weight, torch.tensor([1, 2]), entropy=True)
    (logprob + entropy).sum().backward()
    want = (hidden.detach().double() @ weight.double().T).log_softmax(-1)[[0, 1], [1, 2]]
    torch.testing.assert_close(logprob.detach().double(), want, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(hidden.grad).all()


def test_frozen_inputs_second_backward_and_untouched_arguments():
    hidden, weight, targets = inputs(20, 8, 33)
    copies = hidden.detach().clone(), weight.detach().clone(), targets.clone()
    loss, _ = kernels.linear_token_loss(hidden, weight.detach(), targets, lambda lp, *_: -lp.sum())
    loss.backward()
    want = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets, reduction="sum"), hidden)[0]
    torch.testing.assert_close(hidden.grad, want, atol=1e-5, rtol=1e-4)
    with pytest.raises(RuntimeError, match="used up"):
        loss.backward()
    loss, _ = kernels.linear_token_loss(hidden.detach(), weight, targets, lambda lp, *_: -lp.sum())
    loss.backward()
    assert weight.grad is not None
    assert all(torch.equal(a, b) for a, b in zip(copies, (hidden, weight, targets), strict=True))


def test_no_gradient_is_made_when_none_is_asked_for(monkeypatch):
    """Under no_grad a custom function still sees requires_grad: validation would pay for three products."""
    hidden, weight, targets = inputs(20, 8, 33)
    monkeypatch.setattr(reference, "logits_gradient", lambda *_: pytest.fail("made a gradient"))
    with torch.no_grad():
        loss = kernels.linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad


def test_non_contiguous_and_bfloat16():
    hidden, weight, targets = inputs(40, 24, 50)
    strided = hidden.detach().repeat(1, 2)[:, ::2]
    assert not strided.is_contiguous()
    want = kernels.linear_logprob(strided.contiguous(), weight, targets)
    torch.testing.assert_close(kernels.linear_logprob(strided, weight, targets), want)
    hidden, weight, targets = inputs(40, 24, 50, torch.bfloat16)
    logprob, _, _, (x, w) = naive(hidden, weight, targets, 1.0)
    got = kernels.linear_logprob(hidden, weight, targets)
    (-got.sum()).backward()
    (-logprob.sum()).backward()
    assert got.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), logprob.detach(), atol=1e-4, rtol=1e-5)
    assert relative(hidden.grad, x.grad) < 4e-3 and relative(weight.grad, w.grad) < 4e-3


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
    hidden, weight, targets = inputs(N, D, V)
    logits = 4 * N * V
    fused = peak_bytes(lambda: kernels.linear_cross_entropy(hidden, weight, targets).backward())
    scored = peak_bytes(lambda: (-kernels.linear_logprob(hidden, weight, targets).sum()).backward())
    control = peak_bytes(lambda: F.cross_entropy(hidden @ weight.T, targets).backward())
    assert control > 1.9 * logits
    assert fused < 0.35 * control and fused < 0.6 * logits
    assert scored < 0.35 * control


def test_bad_arguments_are_one_clear_sentence():
    hidden, weight, targets = inputs(4, 8, 9)
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
