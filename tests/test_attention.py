"""Packed rows without a mask: the GPU's way through the model, on the CPU with a stand-in for the kernel."""

import itertools

import pytest
import torch
from torch import Tensor

from kernels import attention, paths
from nanopcf.model import ModelConfig, Transformer, attend_one_token
from nanopcf.packing import Sequence, pack
from nanopcf.run.cuda_graphs import graph_capture
from nanopcf.sampler import Sampler


def plain_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    longest_query: int,
    longest_key: int,
    used: Tensor | None = None,
) -> Tensor:
    """What the kernel is asked for, sequence by sequence."""
    for edges, line, longest in ((queries, q, longest_query), (keys, k, longest_key)):
        assert edges.dtype == torch.int32 and edges[0] == 0 and edges[-1] == len(line)
        assert edges.diff().min() > 0 and (edges.diff().max() == longest or used is not None)
    used = keys.diff() if used is None else used
    assert used.dtype == torch.int32 and used.min() > 0 and used.max() <= longest_key
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    found = []
    bounds = itertools.pairwise(queries.tolist())
    for (first, end), begin, count in zip(bounds, keys[:-1].tolist(), used.tolist(), strict=True):
        scores = torch.einsum("thd,shd->hts", q[first:end], k[begin : begin + count]) * q.shape[-1] ** -0.5
        later = torch.ones(end - first, count, dtype=torch.bool).triu(1 + count - (end - first))
        probabilities = scores.masked_fill(later, -torch.inf).softmax(-1)
        found.append(torch.einsum("hts,shd->thd", probabilities, v[begin : begin + count]))
    return torch.cat(found)


def lengths_of(*lengths: int) -> list[Sequence]:
    return [Sequence(torch.randint(0, 16, (n,)).tolist(), 1) for n in lengths]


def hidden_and_gradients(model: Transformer, rows, probe: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states, and the gradients of (hidden * probe).sum(). The mean square of what the final RMSNorm returns is
    constant: its gradient would be rounding errors."""
    model.zero_grad()
    hidden = model(rows.tokens, positions=rows.positions, documents=rows.documents)
    (hidden.float() * probe).sum().backward()
    return hidden.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


PACKED = {
    "padding at the ends of rows": (17, [9, 5, 8, 7, 3]),
    "many rows": (12, [3, 8, 5, 11, 2, 6, 6, 4, 7, 9, 2, 2]),
    "one row": (20, [9, 5, 4]),
    "one document a row": (9, [9, 8, 9]),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", PACKED)
def test_documents_without_a_mask_equal_the_mask(model, case, recompute, monkeypatch):
    """Hidden states, padding included, and all gradients; the kernel is called for every layer, with grouped heads."""
    torch.manual_seed(1)
    length, lengths = PACKED[case]
    rows = pack(lengths_of(*lengths), length)
    probe = torch.randn(*rows.tokens.shape, model.config.width)
    want, want_gradients = hidden_and_gradients(model, rows, probe)

    calls = []

    def flash(q: Tensor, k: Tensor, *rest) -> Tensor:
        calls.append((q.shape[1:], k.shape[1:]))
        return plain_flash(q, k, *rest)

    monkeypatch.setattr(attention, "refusal", lambda *_: None)
    monkeypatch.setattr(attention, "flash", flash)
    model.recompute = recompute
    got, gradients = hidden_and_gradients(model, rows, probe)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, want_gradients[name], rtol=1e-4, atol=1e-4)
    layers = 0 if case == "one document a row" else model.config.layers * (1 + recompute)
    assert calls == [((4, 8), (2, 8))] * layers


@pytest.mark.parametrize(("compiled", "count"), [(False, 5), (True, 3)])
def test_decoding_without_a_mask_equals_the_mask(model, compiled, count, monkeypatch):
    """A GPU's decoding step on the CPU, with torch's own operation filled in: every row reads up to its own position,
    rows that are idle or have ended included. With compiled blocks all layers and steps of as many rows share a
    graph."""
    prompts = [[1], [2, 3, 4, 5, 6], [7] * 20, [8, 9], [5] * 11][:count]
    options = dict(n=3, max_new_tokens=[32, 32, 32, 1, 25][:count], stop_ids=[], seed=5)
    slots = 3 * count
    want = Sampler(model, slots=slots, max_length=64).generate(prompts, **options)
    used, graphs = [], []

    def operation(q, k, v, queries, keys, longest_query, longest_key, *_, seqused_k):
        used.append(seqused_k.tolist())
        nothing = q.new_empty(0)
        return plain_flash(q, k, v, queries, keys, longest_query, longest_key, seqused_k), *[nothing] * 4

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(attention, "refusal", lambda *_: None)
    sampler = Sampler(model, slots=slots, max_length=64)
    sampler.check_every, sampler.capture = 8, lambda: lambda work: work
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", operation, "CPU")
        if compiled:
            for block in model.blocks:
                block.compile(dynamic=True, backend=backend)
        got = sampler.generate(prompts, **options)
    assert [(c.tokens, c.finish_reason) for c in got] == [(c.tokens, c.finish_reason) for c in want]
    for a, b in zip(got, want, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    calls_per_position = model.config.layers * model.config.kv_heads
    read = sum(map(sum, used)) / calls_per_position
    needed = sum(len(prompts[c.prompt_index]) + t + 1 for c in got for t in range(len(c.tokens)))
    assert needed <= read < 1.4 * needed  # more, since what has ended is noticed at every eighth step
    assert len(graphs) == compiled  # one more with a part of the slots, and one with a single row
    for graph in graphs:  # written in place: to write to a view made inside would copy the cache before torch 2.13
        written = [node.args[0].op for node in graph.graph.nodes if node.target == "index_copy_"]
        assert written == ["placeholder"] * 2


def test_edges_of_documents():
    """A row's padding is one document, two rows never share one, and the numbers start anew in each row."""
    documents = torch.tensor([[1, 1, 2, 0, 0], [1, 1, 1, 1, 1], [1, 2, 2, 2, 2]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "refusal", lambda *_: None)
        found = attention.visible(documents, torch.bfloat16, 64)
        assert attention.visible(documents.clamp(max=1), torch.bfloat16, 64) is None
    assert found.edges.tolist() == [0, 2, 3, 5, 10, 11, 15] and found.longest == 5
    mask = attention.visible(documents, torch.bfloat16, 64)  # on the CPU
    assert mask.shape == (3, 1, 5, 5) and mask[0, 0].int().tolist()[:3] == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
    ]


def test_torch_has_the_operation_with_these_arguments_and_a_gradient():
    """On the meta device, which knows shapes alone: the call that a GPU gets."""
    q, k = (torch.empty(8, heads, 16, device="meta", requires_grad=True) for heads in (4, 2))
    edges = torch.empty(3, dtype=torch.int32, device="meta")
    out = attention.flash(q, k, k, edges, edges, 5, 5)
    out.sum().backward()
    assert out.shape == q.shape and k.grad.shape == k.shape
    attention.trial(torch.device("meta"), torch.bfloat16, 64)


def test_a_gpu_that_must_take_the_mask_says_why(monkeypatch, capsys):
    """The kernel fails on the CPU, as it would on an old GPU: the reason stands on stderr, once."""
    trial = attention.trial
    monkeypatch.setattr(attention, "trial", lambda _device, *rest: trial(torch.device("cpu"), *rest))
    attention.refusal.cache_clear()
    paths.announce.cache_clear()
    for _ in range(2):
        assert "aten::_flash_attention_forward" in attention.refusal(torch.device("cuda"), torch.bfloat16, 64)
    attention.refusal.cache_clear()
    said = capsys.readouterr().err
    assert said.startswith("kernels: attention of packed rows and in decoding by a mask on cuda, since Could not run")
    assert said.count("\n") == 1


@pytest.mark.cuda
@pytest.mark.parametrize(("rows", "heads", "kv_heads"), [(8, 14, 2), (256, 14, 2), (8, 2, 2)])
def test_a_gpu_decodes_by_flash_attention(rows, heads, kv_heads):
    """The kernel itself against the mask, at once and from a captured graph. Of few rows it splits the keys."""
    S, hd = 1024, 64
    torch.manual_seed(0)
    q = torch.randn(rows, 1, heads, hd, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(rows, kv_heads, S, hd, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    positions = torch.randint(S, (rows, 1), device="cuda")
    positions[0], positions[1] = 0, S - 1
    _, mask = attention.visible_in_cache(positions, S, k.float())
    want = attend_one_token(q.float(), k.float(), v.float(), mask)
    _, lengths = attention.visible_in_cache(positions, S, k)
    found = [attention.attend_lengths(q, k, v, lengths)]
    replay = graph_capture()(lambda: found.append(attention.attend_lengths(q, k, v, lengths)))
    replay()
    for got in found:
        assert ((got.float() - want).norm() / want.norm()).item() < 0.01


@pytest.mark.cuda
@pytest.mark.parametrize("recompute", [False, True])
def test_a_gpu_runs_documents_by_flash_attention(recompute, monkeypatch):
    """The kernel itself, at the heads of Qwen2.5 0.5B, against the mask, both in bfloat16 and near float32."""
    config = ModelConfig(vocab_size=16, width=896, layers=2, heads=14, kv_heads=2, mlp_width=64, max_length=1024)
    torch.manual_seed(0)
    model = Transformer(config).cuda()
    rows = pack(lengths_of(700, 300, 513, 128, 64, 17, 2, 400, 1000), 1024).to(torch.device("cuda"))
    probe = torch.randn(*rows.tokens.shape, config.width, device="cuda")
    exact, exact_gradients = hidden_and_gradients(model, rows, probe)
    model = model.bfloat16()
    assert attention.refusal(rows.tokens.device, torch.bfloat16, 64) is None
    model.recompute = recompute
    flash = hidden_and_gradients(model, rows, probe)
    monkeypatch.setattr(attention, "refusal", lambda *_: "the mask is asked for")
    mask = hidden_and_gradients(model, rows, probe)

    def error(got: Tensor, want: Tensor) -> float:
        return ((got.float() - want).norm() / want.norm()).item()

    assert error(flash[0], exact) < 1.2 * error(mask[0], exact) + 1e-3
    for name, want in exact_gradients.items():
        assert error(flash[1][name], want) < 1.5 * error(mask[1][name], want) + 1e-3, name
