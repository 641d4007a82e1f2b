"""The fused head against float64 autograd on the naive logits: fresh random inputs, odd sizes, both paths.

Every case with `path` runs on the PyTorch path, and on the Triton path in Triton's interpreter; where there is a GPU,
the Triton cases run there instead.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import paths, reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # gradients, relative norm


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
        assert relative(made, exact, scale) < TOLERANCE[dtype]
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
        assert relative(made, exact, scale) < TOLERANCE[dtype]
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


def test_confident_tokens_keep_their_gradient_in_half_precision(path):
    """1 - p of a target with p = 0.999 is lost if p is rounded to bfloat16 on the way (8 bits: to 1, or to 0.996)."""
    hidden, weight, targets = inputs(path, 200, 32, 300, torch.bfloat16, scale=1)
    with torch.no_grad():  # turn each hidden state towards its target's row of the weight
        hidden += 0.38 * weight[targets]
    logprob, _, _, (x, w) = naive(hidden, weight, targets)
    assert 0.9 < logprob.exp().median() < 0.9999
    (-logprob).sum().backward()
    kernels.linear_cross_entropy(hidden, weight, targets, reduction="sum", impl=path["impl"]).backward()
    assert relative(hidden.grad, x.grad) < 4e-3 and relative(weight.grad, w.grad) < 4e-3


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
    from kernels.gpu import logprob as gpu_logprob
    from kernels.gpu import token_loss as gpu_token_loss

    hidden, weight, targets = inputs(options, 45, 40, 203)
    extras = tuple(torch.randn(2, 45))
    logprob, lse, entropy, leaves = naive(hidden, weight, targets, 0.7)
    want = torch.autograd.grad(ppo(logprob, lse, entropy, *extras), leaves)
    for rows, TMA, M, N, K in [
        (4096, False, 64, 256, 64),
        (4096, True, 64, 256, 64),
        (10, True, 16, 32, 16),
        (10, False, 16, 64, 32),
    ]:
        tiling = dict(TMA=TMA, BLOCK_M=M, BLOCK_N=N, BLOCK_D=K, num_warps=4, num_stages=2)
        monkeypatch.setattr(gpu_logprob, "tiling", lambda *_, t=tiling: t)
        monkeypatch.setattr(gpu_logprob, "CHUNK_ROWS", rows)
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
    assert gpu_token_loss.tiling_for(hidden)["BLOCK_N"] == 64  # the patch reached both files


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


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    pytest.importorskip("triton")
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run([sys.executable, script, "sm_90", "sm_80"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_kernels_compile_for_gpus_without_spills(compiled):
    """The assembler's word: no register goes to memory, shared memory fits every card of the kind."""
    assert len(compiled) == 24
    for k in compiled:
        assert k["spills"] == 0, k
        assert k["shared"] <= (232_448 if k["arch"] == 90 else 101_376), k  # H100; A10, RTX 3090, 4090
        if k["kernel"] != "scale":
            assert k["tensor_core"] > 0, k
            assert (k["tma"] > 0 and k["wgmma"] > 0) == (k["arch"] == 90), k


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
    assert relative(grads[0][rows], (p @ weight.detach().float()).double()) < 4e-3


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
