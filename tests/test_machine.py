"""Threads, memory, compiled blocks: what a run finds on its machine."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import last_weights

import train_rl
import train_sft
from kernels.attention import Documents
from nanopcf.model import ModelConfig, Transformer
from nanopcf.packing import Sequence, pack
from nanopcf.run import machine
from nanopcf.sampler import Sampler


def test_dry_runs_take_the_longest_step_and_write_nothing(sft, rl, tmp_path, capfd):
    assert train_sft.main(replace(sft, dry_run=True, pack_length=48, micro_rows=3, batch=8)) == []
    assert train_rl.main(replace(rl, dry_run=True, slots=5, micro_rows=7, pack_length=9)) == []
    said = capfd.readouterr().err
    assert "a step of 3 rows of 48 tokens: fits" in said
    assert "generating 5 answers of 3 tokens: fits" in said and "an update of 7 rows of 9 tokens: fits" in said
    assert not (tmp_path / "sft").exists() and not (tmp_path / "rl").exists()


def test_a_dry_run_that_does_not_fit_says_so(sft, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_sft, "sft_loss", full)
    with pytest.raises(ValueError, match="doesn't fit in memory; fewer --micro-rows"):
        train_sft.main(replace(sft, dry_run=True))


def test_recomputed_activations_change_no_gradient_and_are_fewer(sft, rl, tmp_path, model):
    """Bit for bit on the CPU; and what autograd keeps of a forward pass shrinks to the blocks' inputs."""
    for c, module in (
        (replace(sft, steps=3), train_sft),
        (replace(rl, steps=2, algo="srft", train=sft.train), train_rl),
    ):
        folders = [tmp_path / f"{module.__name__}-{recompute}" for recompute in (False, True)]
        for recompute, out in zip((False, True), folders, strict=True):
            module.main(replace(c, recompute=recompute, out=str(out)))
        a, b = (last_weights(out) for out in folders)
        assert all(torch.equal(a[k], b[k]) for k in a)

    def kept() -> int:
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
        ):
            model(torch.zeros(4, 32, dtype=torch.long))
        return sum(sizes.values())

    everything = kept()
    model.recompute = True
    assert kept() < everything / 3


def test_threads_are_the_fewest_within_a_quarter_of_the_fastest(monkeypatch, model):
    seconds = {1: 1.0, 2: 0.9, 4: 0.5, 6: 0.45}
    monkeypatch.setattr(machine, "cores", lambda: 6)
    monkeypatch.setattr(machine, "step_seconds", lambda _model, _tokens, threads: seconds[threads])
    big = Transformer(ModelConfig(vocab_size=700_000, width=32, layers=1, mlp_width=32))
    try:
        assert machine.set_threads(0, model) == 4 == torch.get_num_threads()
        seconds[1] = 0.55
        assert machine.set_threads(0, model) == 1 == torch.get_num_threads()
        assert machine.set_threads(3, model) == 3 == torch.get_num_threads()
        assert machine.set_threads(0, big) == 6  # large products gain from every core
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("script", [train_sft, train_rl])
def test_a_resumed_run_keeps_its_threads(script, sft, rl, monkeypatch):
    """They decide how sums are rounded: a probe that finds another number later must not change a run's bits."""
    c = sft if script is train_sft else rl
    faster = [2]
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr(machine, "step_seconds", lambda _m, _t, threads: 1.0 if threads in faster else 2.0)
    try:
        script.main(c)
        faster[:] = [1]
        torch.set_num_threads(1)
        script.main(replace(c, resume=True))
        assert torch.get_num_threads() == 2
        script.main(replace(c, out=c.out + "-fresh"))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


def test_compiled_blocks_change_no_gradient_and_leave_generation_alone(tiny_config, monkeypatch):
    """torch.compile, up to where it would call the C++ compiler for half a minute, against the plain model; the
    sampler, whose shapes change with every token, must not compile anything. Flash attention of packed rows, traced on
    the meta device, is one graph for all lengths."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain = Transformer(replace(tiny_config, layers=1))
    compiled = copy.deepcopy(plain)
    machine.compile_blocks(compiled)
    ids = [[1] * 20, [2, 3, 4], [5] * 9, [7, 8] * 10]
    rows = pack([Sequence(s, 1) for s in ids], 24)
    for model in (plain, compiled):
        train_sft.sft_loss(model, rows).backward()
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before > 0
    answers = [Sampler(m, slots=3, max_length=40).generate(ids, max_new_tokens=9) for m in (plain, compiled)]
    assert answers[0] == answers[1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before

    attention = torch.compile(plain.blocks[0].attention.to("meta"), backend="eager", dynamic=True, fullgraph=True)
    for B, T, count, longest in ((2, 20, 3, 9), (2, 20, 6, 12), (4, 40, 7, 30)):
        x = torch.zeros(B, T, tiny_config.width, device="meta")
        rope = (torch.zeros(B, T, 1, tiny_config.head_dim, device="meta"),) * 2
        edges = torch.zeros(count + 1, dtype=torch.int32, device="meta")
        attention(x, rope, Documents(edges, longest))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_a_model_visits_a_device_and_goes_home(model, monkeypatch):
    places = []
    monkeypatch.setattr(model, "to", places.append)
    with pytest.raises(RuntimeError), machine.on_device(model, torch.device("meta")):
        assert places == [torch.device("meta")]
        raise RuntimeError
    assert places == [torch.device("meta"), torch.device("cpu")]


def test_compiling_without_a_compiler_is_refused(monkeypatch, model):
    monkeypatch.setattr("shutil.which", lambda _name: None)
    with pytest.raises(ValueError, match=r"--compile needs a C\+\+ compiler"):
        machine.compile_blocks(model)
