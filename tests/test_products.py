"""Matrix products on a CPU against float64, by both libraries, with every memory layout that the callers pass."""

import pytest
import torch
import torch.nn.functional as F

from kernels import products


@pytest.fixture(
    params=[
        False,
        pytest.param(True, marks=pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")),
    ]
)
def by_onednn(request, monkeypatch) -> bool:
    monkeypatch.setattr(products, "ONEDNN", request.param)
    monkeypatch.setattr(products, "SMALL", 1)
    return request.param


def layouts(t: torch.Tensor) -> list[torch.Tensor]:
    """The same numbers in several layouts: dense, transposed, with gaps between rows, with gaps between all numbers."""
    rows, columns = t.shape
    gaps = torch.full((2 * rows, 2 * columns), float("nan"))
    gaps[::2, ::2] = t
    wide = torch.full((rows, columns + 3), float("nan"))
    wide[:, :columns] = t
    return [t, t.T.contiguous().T, wide[:, :columns], gaps[::2, ::2]]


@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (7, 33, 130), (257, 5, 64), (0, 4, 3)])
def test_product_and_sum_against_float64(by_onednn, M, N, K):
    a, b = torch.randn(M, K), torch.randn(N, K)
    want = a.double() @ b.double().T
    for x in layouts(a):
        for y in layouts(b):
            torch.testing.assert_close(products.product(x, y).double(), want, rtol=1e-4, atol=1e-4)
    total = torch.randn(M, N)
    for x in layouts(a.T.contiguous()):
        got = total.clone()
        products.add_product(got, x, b.T.contiguous())
        torch.testing.assert_close(got.double(), total + want, rtol=1e-4, atol=1e-4)
        got.fill_(float("nan"))
        products.add_product(got, x, b.T.contiguous(), first=True)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_sums_of_half_types_are_asked_for_in_float32(monkeypatch, dtype):
    """By default a GPU may cut a sum over the vocabulary in parts, and round each of them to the half type."""
    a, b, out = torch.randn(3, 500).to(dtype), torch.randn(500, 5).to(dtype), torch.empty(3, 5, dtype=dtype)
    want = (a.double() @ b.double()).to(dtype)
    products.store_product(out, a, b)
    torch.testing.assert_close(out, want)
    mm, asked = torch.mm, []

    def like_a_gpu(a, b, out_dtype):
        asked.append(out_dtype)
        return mm(a.float(), b.float())

    monkeypatch.setattr(products, "can_return_float32_sums", lambda a: True)
    monkeypatch.setattr(torch, "mm", like_a_gpu)
    products.store_product(out.fill_(float("nan")), a, b)
    torch.testing.assert_close(out, want)
    assert asked == [torch.float32]


@pytest.mark.cuda
def test_long_sums_on_a_gpu():
    """Few outputs and a long sum, the shape that cuBLAS cuts in parts: rounded once, by half a unit at most."""
    a, b = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((64, 151936), (151936, 128)))
    out, total = torch.empty(64, 128, device="cuda", dtype=torch.bfloat16), torch.empty(64, 128, device="cuda")
    products.store_product(out, a, b)
    products.add_product(total, a.T.contiguous(), b, first=True)
    want = a.double() @ b.double()
    torch.testing.assert_close(out.double(), want, rtol=2**-8, atol=0.05)
    torch.testing.assert_close(total.double(), want, rtol=1e-5, atol=0.05)


def test_a_large_sum_is_added_in_parts(by_onednn):
    a, b, total = (torch.randn(6, 2 * products.ROWS + 17), torch.randn(6, 8), torch.zeros(2 * products.ROWS + 17, 8))
    products.add_product(total, a, b)
    torch.testing.assert_close(total, a.T @ b)


@pytest.mark.parametrize("shape", [(10,), (3, 10), (2, 5, 10), (2, 0, 10)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out", [4, 24])  # the weight's gradient is made differently when it is the longer side
def test_linear_and_its_gradients_are_those_of_torch(by_onednn, shape, bias, out):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(out, 10, requires_grad=True)
    inputs = [x, weight] + ([torch.randn(out, requires_grad=True)] if bias else [])
    got, want = products.linear(*inputs), F.linear(*inputs)
    torch.testing.assert_close(got, want)
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, inputs, g), torch.autograd.grad(want, inputs, g), strict=True):
        torch.testing.assert_close(a, b)
    # The gradient of a sum is a single number, expanded.
    (dx,) = torch.autograd.grad(products.linear(x, weight.detach()).sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad(F.linear(x, weight).sum(), x)[0])
    with torch.inference_mode():
        torch.testing.assert_close(products.linear(*inputs), want)


def test_packed_weights(monkeypatch):
    """The same product for every number of rows; packed once, and a weight that has changed since is packed anew."""
    monkeypatch.setattr(products, "LARGE", 700)
    large, small = torch.randn(24, 33), torch.randn(5, 33)
    for _ in range(2):
        with torch.inference_mode(), products.packed_weights():
            for rows in (1, 5, 64, 300):
                x, bias = torch.randn(2, rows, 33), torch.randn(24)
                torch.testing.assert_close(products.linear(x, large, bias), F.linear(x, large, bias))
                torch.testing.assert_close(products.linear(x, small), F.linear(x, small))
                torch.testing.assert_close(
                    products.linear(x.bfloat16(), large.bfloat16()).float(),
                    F.linear(x.bfloat16(), large.bfloat16()).float(),
                )
            assert set(products.packed) == ({large.data_ptr()} if products.HAS_ONEDNN else set())
        assert products.packed is None
        large += 1


def test_only_large_float32_products_of_a_cpu_go_to_onednn(monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", True)
    large = torch.randn(1024, 64)
    assert products.by_onednn(large, large) and not products.by_onednn(large[:1], large)
    assert not products.by_onednn(large.bfloat16(), large.bfloat16())
    assert not products.by_onednn(large.to("meta"), large.to("meta"))
