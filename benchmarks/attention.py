"""Attention in packed rows, forward and backward, and in decoding, in every way that torch offers: time and error.

    python benchmarks/attention.py                  16 rows of 1,024 tokens, heads of Qwen2.5 0.5B: 14 over 2, 64 wide
    python benchmarks/attention.py --markdown       also writes docs/results/attention-<device>.md
    python benchmarks/attention.py --dry            tiny, on the CPU: does it run?

    mask                the CPU's way: scores of all pairs, and on a GPU keys and values copied for every query head
    flash, documents    a GPU's way, `kernels/attention.py`
    cuDNN, mask         what `machine.choose_device` switches off: cuDNN plans for each shape, and runs have many. Rows
                        padded to one length would have one plan
    flash, causal       one document a row, for comparison; and the same by cuDNN

Decoding is one token in each of --decode-rows rows of a cache, filled to different lengths up to --length: with a mask,
or with the length of each row. Its floor is one read of the keys and values that are seen, at the rate of a copy.

Times are medians over turns. "A new shape" is the first forward and backward pass at another length of the rows, which
is slow where something is planned or compiled for each shape. Errors are relative norms, of the result and of the
queries' gradient, against the mask in float32. A way that doesn't run here is left out, with a line on stderr.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from common import Page, clock, wall_rates
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import attention
from nanopcf.model import attend, attend_one_token
from nanopcf.run import machine
from nanopcf.run.cuda_graphs import graph_capture


class Rows(NamedTuple):
    q: Tensor  # [B, T, H, hd]
    k: Tensor  # [B, T, KV, hd]
    v: Tensor  # [B, T, KV, hd]
    up: Tensor  # [B, T, H * hd] the gradient that arrives
    numbers: Tensor  # [B, T] each token's document
    mask: Tensor  # [B, 1, T, T] bool
    visible: Tensor | attention.Documents  # the same where flash attention doesn't run


def make_rows(a: argparse.Namespace, T: int) -> Rows:
    """Full rows of some five documents each, with a little padding; queries, keys, values are random."""
    torch.manual_seed(0)
    begins = torch.rand(a.rows, T) < 4 / T
    numbers = (1 + begins.cumsum(dim=1)).to(a.device)  # (B, T)
    numbers[:, T - T // 32 :] = 0
    heads = (a.heads, a.kv_heads, a.kv_heads, a.heads)
    q, k, v, up = (torch.randn(a.rows, T, h, a.head_dim, device=a.device, dtype=a.dtype) for h in heads)
    mask = (numbers[:, :, None] == numbers[:, None, :]).tril().unsqueeze(1)
    return Rows(q, k, v, up.flatten(2), numbers, mask, attention.visible(numbers, a.dtype, a.head_dim))


# ---- the ways: f(rows) -> [B, T, H * hd] ----


def by_mask(r: Rows) -> Tensor:
    return attend(r.q, r.k.transpose(1, 2), r.v.transpose(1, 2), r.mask)


def by_documents(r: Rows) -> Tensor:
    if not isinstance(r.visible, attention.Documents):
        raise RuntimeError(attention.refusal(r.q.device, r.q.dtype, r.q.shape[-1]))
    return attention.attend_documents(r.q, r.k, r.v, r.visible)


def by_backend(backend: SDPBackend, masked: bool) -> Callable[[Rows], Tensor]:
    def way(r: Rows) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (r.q, r.k, r.v))
        options = dict(attn_mask=r.mask) if masked else dict(is_causal=True)
        with sdpa_kernel(backend):  # nothing else may run in its place
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        return y.transpose(1, 2).flatten(2)

    return way


WAYS = {
    "mask": by_mask,
    "flash, documents": by_documents,
    "cuDNN, mask": by_backend(SDPBackend.CUDNN_ATTENTION, masked=True),
    "flash, causal": by_backend(SDPBackend.FLASH_ATTENTION, masked=False),
    "cuDNN, causal": by_backend(SDPBackend.CUDNN_ATTENTION, masked=False),
}


def decoding(a: argparse.Namespace, page: Page) -> None:
    """The table of a step's attention in one layer, over rows whose lengths lie evenly between none and all."""
    B, T, calls = a.decode_rows, a.length, 20
    q = torch.randn(B, 1, a.heads, a.head_dim, device=a.device, dtype=a.dtype)
    k, v = (torch.randn(B, a.kv_heads, T, a.head_dim, device=a.device, dtype=a.dtype) for _ in range(2))
    positions = torch.arange(B, device=a.device)[:, None] * T // B  # (B, 1)
    with mock.patch.object(attention, "refusal", lambda *_: "the mask is asked for"):
        _, mask = attention.visible_in_cache(positions, T, k)
    _, lengths = attention.visible_in_cache(positions, T, k)
    ways = {"mask": lambda: attend_one_token(q, k, v, mask)}
    if isinstance(lengths, attention.Lengths):
        ways["flash, lengths"] = lambda: attention.attend_lengths(q, k, v, lengths)
    else:
        print(f"left out: flash, lengths: {attention.refusal(a.device, a.dtype, a.head_dim)}", file=sys.stderr)
    exact = attend_one_token(q.float(), k.float(), v.float(), mask.float())
    floor = 2 * k[0, :, 0].nbytes * int((positions + 1).sum()) / wall_rates(a.device, a.dtype)[1]
    page.head(
        f"A step of decoding in one layer: {B} rows of 1 to {int(positions.max()) + 1} positions, the floor {floor * 1e3:.3g} ms:",
        "attention",
        "ms (of the floor)",
        "error",
    )

    def work(way: Callable[[], Tensor]) -> None:
        for _ in range(calls):
            way()

    capture = graph_capture() if a.device.type == "cuda" else lambda work: work  # as in the sampler
    times, runs = {name: [] for name in ways}, {}
    for name, way in ways.items():
        work(way)
        runs[name] = capture(partial(work, way))
    for _ in range(a.repeats):
        for name, run in runs.items():
            times[name].append(clock(run, a.device)[0] / calls)
    for name, way in ways.items():
        seconds, error = statistics.median(times[name]), ((way().float() - exact).norm() / exact.norm()).item()
        page.row(name, f"{seconds * 1e3:.3g} ({floor / seconds:.0%})", f"{error:.0e}")


def forward_and_backward(way: Callable[[Rows], Tensor], r: Rows) -> tuple[Tensor, Tensor]:
    """(result, gradient of q)."""
    leaves = [t.detach().requires_grad_() for t in (r.q, r.k, r.v)]
    y = way(r._replace(q=leaves[0], k=leaves[1], v=leaves[2]))
    return y.detach(), torch.autograd.grad(y, leaves, r.up)[0]


def forward(way: Callable[[Rows], Tensor], r: Rows) -> None:
    with torch.no_grad():
        way(r)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--heads", type=int, default=14)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--decode-rows", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--dry", action="store_true", help="a few rows of 64 tokens on the CPU")
    parser.add_argument("--markdown", action="store_true", help="write docs/results/attention-<device>.md")
    a = parser.parse_args()
    if a.dry:
        a.rows, a.length, a.heads, a.kv_heads, a.head_dim, a.repeats, a.device = 2, 64, 4, 2, 16, 2, "cpu"
        a.decode_rows = 8
    a.device = machine.choose_device(a.device)
    a.dtype = machine.choose_dtype(a.dtype, a.device)
    page = Page("Attention in packed rows and in decoding, measured", a.device)
    rows, others = make_rows(a, a.length), make_rows(a, a.length - a.length // 8)

    full = {name: getattr(rows, name).float() for name in ("q", "k", "v", "up")}
    exact = forward_and_backward(by_mask, rows._replace(**full))
    found: dict[str, dict] = {}
    for name, way in WAYS.items():
        try:
            got = forward_and_backward(way, rows)
            new = clock(lambda way=way: forward_and_backward(way, others), a.device)[0]
        except RuntimeError as problem:
            print(f"left out: {name}: {str(problem).strip().splitlines()[0][:150]}", file=sys.stderr)
            continue
        errors = [((g.float() - e).norm() / e.norm()).item() for g, e in zip(got, exact, strict=True)]
        found[name] = dict(new=new, errors="-" if "causal" in name else "{:.0e}, {:.0e}".format(*errors), f=[], fb=[])
    for _ in range(a.repeats):
        for name, row in found.items():
            row["f"].append(clock(lambda: forward(WAYS[name], rows), a.device)[0])  # noqa: B023
            row["fb"].append(clock(lambda: forward_and_backward(WAYS[name], rows), a.device)[0])  # noqa: B023
    documents = int(rows.numbers.amax(dim=1).sum())
    shape = f"{a.rows} rows of {a.length} tokens, {documents} documents, {a.heads} heads over {a.kv_heads}"
    page.head(
        f"{shape}, {a.head_dim} wide, {str(a.dtype).removeprefix('torch.')}:",
        "attention",
        "forward, ms",
        "forward and backward, ms",
        "/ mask",
        "a new shape, ms",
        "error: result, dq",
    )
    for name, row in found.items():
        f, fb = (statistics.median(row[key]) for key in ("f", "fb"))
        ratio = fb / statistics.median(found["mask"]["fb"])
        page.row(name, f"{f * 1e3:.3g}", f"{fb * 1e3:.3g}", f"{ratio:.2f}", f"{row['new'] * 1e3:.3g}", row["errors"])
    look = lambda: attention.visible(rows.numbers, a.dtype, a.head_dim)  # noqa: E731
    seconds = statistics.median(clock(look, a.device)[0] for _ in range(a.repeats))
    page.add("", f"Finding the documents, once for all layers: {seconds * 1e3:.2g} ms.")
    decoding(a, page)
    if a.markdown:
        page.write("attention")


if __name__ == "__main__":
    main()
