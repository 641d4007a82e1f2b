"""nanopcf.flops against the paper's Table 4 and against a count made weight by weight."""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanopcf import flops

# The models of the paper's curves, with the numbers of their configs on Hugging Face.
MODELS = {
    "Qwen2.5-7B": SimpleNamespace(
        layers=28, width=3584, mlp_width=18944, vocab_size=152064, heads=28, kv_heads=4, head_dim=128
    ),
    "Qwen2.5-14B": SimpleNamespace(
        layers=48, width=5120, mlp_width=13824, vocab_size=152064, heads=40, kv_heads=8, head_dim=128
    ),
    "Llama-3.2-3B": SimpleNamespace(
        layers=28, width=3072, mlp_width=8192, vocab_size=128256, heads=24, kv_heads=8, head_dim=128
    ),
}
QWEN_7B = MODELS["Qwen2.5-7B"]


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


@pytest.mark.parametrize(("model", "billions"), [("Qwen2.5-7B", 7.62), ("Qwen2.5-14B", 14.77), ("Llama-3.2-3B", 3.61)])
def test_models_have_their_parameters(model: str, billions: float) -> None:
    """Eq. 20 counts every weight twice in FLOPs, head and embedding both: the published parameter counts follow.
    (Llama-3.2-3B ties the two: 3.21 billion as published, 3.61 with the head counted.)"""
    dense = flops.forward_per_token(MODELS[model], 0) / 2
    assert dense / 1e9 == pytest.approx(billions, rel=0.002)


def test_synchronized_methods_eqs_26_29() -> None:
    """Hand counts; LUFFY without experts is GRPO; UPT trains 3 x on what it keeps and generates everything once."""
    F = flops.forward_per_token
    assert flops.mixed_step(QWEN_7B, 128, 8, 1000, 0, 1) == pytest.approx(flops.rl_step(QWEN_7B, 128, 8, 1000))
    tokens = 128 * (7 * 1000 + 1 * 3000)
    assert flops.mixed_step(QWEN_7B, 128, 7, 1000, 1, 3000) == pytest.approx(4 * tokens * F(QWEN_7B, 1250))
    everything = flops.upt_step(QWEN_7B, 128, 8, 1000, 128 * 8, 0, 1)
    assert everything == pytest.approx(flops.rl_step(QWEN_7B, 128, 8, 1000))
    half = flops.upt_step(QWEN_7B, 2, 8, 100, 8, 1, 300)
    assert half == pytest.approx((1600 + 3 * (800 + 300)) * F(QWEN_7B, (1600 + 1100) / 25))


def test_all_of_table_4() -> None:
    """Every x_sft of the published table, where it is at hand; Easy102K with the length that reproduces it."""
    table = Path(__file__).parents[2] / "shared" / "paper" / "retu_table4.csv"
    if not table.exists():
        pytest.skip("the paper's table is not beside the repository")
    lengths = {
        "SFT889K": 78 + 3693,
        "Uniform102K": 74 + 3673,
        "Hard102K": 101 + 8532,
        "Easy102K": 64 + 2153,
        "S1K": 127 + 9884,
    }
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        batch = 16 if row["dataset"] == "S1K" else 512
        step = flops.sft_step(QWEN_7B, batch, lengths[row["dataset"]]) / 1e18
        x_sft = float(row["x_sft"])
        assert int(row["sft_step"]) * step == pytest.approx(x_sft, abs=max(0.06, 2e-4 * x_sft)), row
    assert len(rows) == 33
