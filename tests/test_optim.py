"""The learning rate, and float32 masters below bfloat16."""

import pytest
import torch

from nanopcf import checkpoint
from nanopcf.model import ModelConfig, Transformer
from nanopcf.optim import Optimizer, learning_rate


def test_learning_rate():
    options = dict(peak=2.0, warmup=4)
    rates = [learning_rate(s, (s - 4) / 100, schedule="cosine", **options) for s in range(104)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[54] == pytest.approx(2.0 * 0.55) and rates[-1] == pytest.approx(0.2, abs=1e-3)
    assert learning_rate(80, 0.76, schedule="constant", **options) == 2.0
    # a run that ends by compute may overshoot: the rate stays at its end, the cosine doesn't come up again
    assert learning_rate(120, 1.4, schedule="cosine", **options) == pytest.approx(0.2)


def test_bfloat16_steps_accumulate_in_float32():
    """A hundred steps too small for bfloat16 to see one by one move a weight as far as they move a float32 one."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=8, width=8, layers=1, heads=2, kv_heads=1, mlp_width=16, max_length=8)
    full = Transformer(config)
    full.load_state_dict({k: v.bfloat16().float() for k, v in full.state_dict().items()})
    half = Transformer(config).bfloat16()
    half.load_state_dict(full.state_dict())
    start = full.blocks[0].mlp.down.weight.detach().clone()
    tokens, direction = torch.tensor([[1, 2, 3, 4]]), torch.randn(8)
    for m in (full, half):
        optimizer = Optimizer(m)
        for _ in range(100):
            for _ in range(2):  # two micro-batches
                (m(tokens).float() @ direction).sum().backward()
            optimizer.step(2e-6, 1.0)
        assert all(p.grad is None for p in m.parameters())
    master = checkpoint.optimizer_tensors(optimizer)
    after = next(m for p, m in optimizer.pairs if p is half.blocks[0].mlp.down.weight)
    want, got = (w.detach() - start for w in (full.blocks[0].mlp.down.weight, after))
    assert want.abs().median() > 1e-4  # a bfloat16 weight of 0.3 has steps of 1e-3
    assert ((got - want).norm() / want.norm()).item() < 0.1
    restored = Optimizer(half)
    checkpoint.fill_optimizer(restored, master)
    assert all(torch.equal(v, checkpoint.optimizer_tensors(restored)[k]) for k, v in master.items())
