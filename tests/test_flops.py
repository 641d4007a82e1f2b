"""nanopcf.flops against the paper's Table 4 and against a count made weight by weight."""

from types import SimpleNamespace

import pytest

from nanopcf import flops

QWEN_7B = SimpleNamespace(
    layers=28, width=3584, mlp_width=18944, vocab_size=152064, heads=28, kv_heads=4, head_dim=128
)


@pytest.mark.parametrize(
    ("batch", "seq_len", "steps", "exaflops"),
    [
        (512, 78 + 3693, 14080, 1365.8),  # SFT889K: Table 3's prompt + response length, Table 4's x_sft
        (512, 74 + 3673, 1800, 173.4),  # Uniform102K
        (512, 101 + 8532, 1800, 446.3),  # Hard102K
        (512, 64 + 2153, 1800, 98.8),  # Easy102K: Table 3 prints 2253, which does not give Table 4's column
        (16, 127 + 9884, 310, 2.9),  # S1K
    ],
)
def test_sft_compute_of_table_4(batch: int, seq_len: int, steps: int, exaflops: float) -> None:
    """Any wrong factor or missing term in Eqs. 20-23 shows. (Table 4 multiplies up a rounded cost, so its
    long runs are off by up to 2e-4; S1K has one digit after the point.)"""
    computed = steps * flops.sft_step(QWEN_7B, batch, seq_len) / 1e18
    assert computed == pytest.approx(exaflops, abs=max(0.05, 2e-4 * exaflops))


def test_forward_counts_every_matrix() -> None:
    """A model whose queries are wider than its hidden state (Qwen3): catches H for heads * head_dim."""
    tiny = SimpleNamespace(layers=3, width=8, mlp_width=20, vocab_size=50, heads=4, kv_heads=2, head_dim=6)
    q, k, v, o = (8, 24), (8, 12), (8, 12), (24, 8)
    gate, up, down = (8, 20), (8, 20), (20, 8)
    layer = sum(a * b for a, b in (q, k, v, o, gate, up, down))
    scores_and_mix = 2 * 2 * 10 * 24  # q.k and p.v, each 10 positions wide, a multiply and an add
    assert flops.forward_per_token(tiny, 10) == 2 * (3 * layer + 2 * 50 * 8) + 3 * scores_and_mix


def test_rl_step_eqs_24_25() -> None:
    """GRPO is 4 B G S F; DAPO pays for every generated round but trains on B_train only (3 x, not 4 x)."""
    unit = 8 * 1000 * flops.forward_per_token(QWEN_7B, 1000)
    assert flops.rl_step(QWEN_7B, 128, 8, 1000) == pytest.approx(4 * 128 * unit)
    dapo = flops.rl_step(QWEN_7B, 128, 8, 1000, train_prompts=64, rounds=2.5)
    assert dapo == pytest.approx((2.5 * 128 + 3 * 64) * unit)
    assert flops.rl_step(QWEN_7B, 320, 8, 1000, train_prompts=64) == pytest.approx(dapo)
