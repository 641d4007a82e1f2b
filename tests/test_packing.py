"""Packed rows against one sequence at a time, and the order of the data."""

import numpy as np
import torch

from nanopcf.packing import IGNORE, Sequence, pack


def random_sequences(count: int) -> list[Sequence]:
    rng = np.random.default_rng(0)
    return [
        Sequence(rng.integers(0, 16, (n := int(rng.integers(4, 20)))).tolist(), int(rng.integers(1, n - 1)))
        for _ in range(count)
    ]


def test_pack_trains_every_answer_token_once_and_nothing_else():
    """The end token is trained, the token after it and the prompt are not; `index` finds each token's own place."""
    sequences = random_sequences(40)
    rows = pack(sequences, 32)
    flat = [t for s in sequences for t in s.tokens[s.prompt_length :]]
    at = rows.index[rows.trained]
    assert sorted(at.tolist()) == list(range(len(flat)))
    assert rows.targets[rows.trained].tolist() == [flat[i] for i in at]
    assert torch.equal(rows.index == IGNORE, rows.targets == IGNORE)
    # each document of a row is one of the sequences, whole, with positions from 0
    found = []
    for b in range(len(rows.tokens)):
        for d in range(1, int(rows.documents[b].max()) + 1):
            own = rows.documents[b] == d
            found.append(rows.tokens[b][own].tolist())
            assert rows.positions[b][own].tolist() == list(range(int(own.sum())))
            assert rows.targets[b][own][-1] == IGNORE  # nothing is predicted after the end
    assert sorted(found) == sorted(s.tokens for s in sequences)
    assert (rows.documents > 0).float().mean() > 0.8  # and it does pack
