"""The SFT loop: its loss and gradient, resume, compute."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import last_weights, stop_after, sums
from safetensors.torch import load_file

import train_sft
from nanopcf import flops
from nanopcf.packing import Sequence, pack
from nanopcf.run.folder import checkpoints, read_metrics


def test_sft_loss_is_the_mean_over_answer_tokens_of_unpacked_sequences(model):
    """Packing and masks against one sequence at a time; the end token counts, the prompt doesn't."""
    sequences = [Sequence([1, 2, 3, 4, 15], 2), Sequence([5, 6, 15], 2), Sequence([7, 8, 9, 10, 11, 15], 1)]
    expected = 0.0
    for s in sequences:
        logp = model.logits(model(torch.tensor([s.tokens]))[0]).double().log_softmax(-1)
        expected -= sum(logp[t - 1, s.tokens[t]].item() for t in range(s.prompt_length, len(s.tokens)))
    assert train_sft.sft_loss(model, pack(sequences, 9)).item() == pytest.approx(expected, rel=1e-5)
    assert train_sft.validation_loss(model, pack(sequences, 9), 1) == pytest.approx(expected / 9, rel=1e-5)


def test_gradient_does_not_depend_on_micro_batches(sft, tmp_path):
    """The denominator is the whole batch's token count: a mean of micro-batch means differs when lengths do."""
    for rows in (1, 2, 64):
        train_sft.main(replace(sft, out=str(tmp_path / f"m{rows}"), micro_rows=rows, steps=3))
    one, two, whole = (last_weights(tmp_path / f"m{rows}") for rows in (1, 2, 64))
    for name in whole:
        torch.testing.assert_close(one[name], whole[name], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(two[name], whole[name], atol=1e-5, rtol=1e-4)


def test_sft_resume_is_bit_identical(sft, tmp_path, monkeypatch):
    """k steps, stop, resume, n - k steps == n steps: weights, optimizer, metrics."""
    whole = train_sft.main(sft)
    cut = replace(sft, out=str(tmp_path / "cut"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, train_sft, 3)  # steps 0, 2, 4
        train_sft.main(cut)
    assert train_sft.main(replace(cut, resume=True)) == whole
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(checkpoints(tmp_path / n)[-1][1] / file) for n in ("sft", "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a | b)
    a, b = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("sft", "cut"))
    assert [r["step"] for r in a] == [r["step"] for r in b]
    assert [r.get("train_loss") for r in a] == [r.get("train_loss") for r in b]


def test_compute_and_seed(sft, tmp_path, model):
    table = train_sft.main(sft)
    tokens = np.mean([len(e.prompt + e.trajectory) + 1 for e in sums(40, 0)])
    assert table[-1]["x_sft"] == pytest.approx(6 * flops.sft_step(model.config, 8, tokens))
    other = train_sft.main(replace(sft, out=str(tmp_path / "other"), seed=1))
    assert other[0]["val_loss"] == table[0]["val_loss"]  # the seed doesn't touch the model it starts from
    assert other[-1]["val_loss"] != table[-1]["val_loss"]


def test_divergence_stops_with_the_step(sft):
    with pytest.raises(ValueError, match=r"step \d: the .* is (nan|inf).*a lower --lr"):
        train_sft.main(replace(sft, lr=1e30, warmup=0))
