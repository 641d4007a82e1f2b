"""Packed rows: several sequences one after the other in a row, kept exact."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from nanopcf.run import parallel

IGNORE = -100


@dataclass(frozen=True)
class Sequence:
    tokens: list[int]
    prompt_length: int  # tokens[prompt_length:] are trained


@dataclass(frozen=True)
class Rows:
    """Packed sequences, all int64 [rows, length]."""

    tokens: Tensor
    positions: Tensor  # restart at 0 with every sequence
    documents: Tensor  # 1, 2, ... within a row; 0 is padding
    targets: Tensor  # the token that this position must predict, or -100
    index: Tensor  # that token's place among all trained ones, in the order of the sequences given; or -100

    def map(self, f: Callable[[Tensor], Tensor]) -> "Rows":
        return Rows(*(f(getattr(self, field.name)) for field in fields(self)))

    def to(self, device: torch.device) -> "Rows":
        return self.map(lambda t: t.to(device))

    def own(self, device: torch.device) -> "Rows":
        """This process's share of the rows, where there are several processes."""
        return self.map(parallel.share).to(device)

    def split(self, rows: int) -> list["Rows"]:
        """Micro-batches of at most `rows` rows."""
        return [self.map(lambda t, i=i: t[i : i + rows]) for i in range(0, len(self.tokens), rows)]

    @property
    def trained(self) -> Tensor:
        return self.targets != IGNORE


def trained_hidden(model: torch.nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
    """(hidden [N, D], targets [N]) at the N trained tokens of packed rows: the head sees no other."""
    hidden = model(rows.tokens, positions=rows.positions, documents=rows.documents)  # (R, S, D)
    return hidden[rows.trained], rows.targets[rows.trained]


def pack(sequences: list[Sequence], length: int) -> Rows:
    """First-fit decreasing into rows of `length` tokens (longer when one sequence is)."""
    length = max(length, max(len(s.tokens) for s in sequences))
    # the place of each sequence's first trained token
    first = np.cumsum([0] + [len(s.tokens) - s.prompt_length for s in sequences])
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i].tokens)):
        size = len(sequences[i].tokens)
        b = next((b for b, r in enumerate(room) if r >= size), len(bins))
        if b == len(bins):
            bins.append([])
            room.append(length)
        bins[b].append(i)
        room[b] -= size
    length -= min(room)  # no column that every row leaves empty
    tokens, positions, documents = (np.zeros((len(bins), length), dtype=np.int64) for _ in range(3))
    targets, index = (np.full((len(bins), length), IGNORE, dtype=np.int64) for _ in range(2))
    for b, row in enumerate(bins):
        at = 0
        for d, i in enumerate(row, 1):
            s = sequences[i]
            end = at + len(s.tokens)
            tokens[b, at:end], positions[b, at:end] = s.tokens, np.arange(len(s.tokens))
            documents[b, at:end] = d
            trained = slice(at + s.prompt_length - 1, end - 1)  # position t predicts token t + 1
            targets[b, trained] = s.tokens[s.prompt_length :]
            index[b, trained] = np.arange(first[i], first[i + 1])
            at = end
    return Rows(*(torch.from_numpy(a) for a in (tokens, positions, documents, targets, index)))


def batch_indices(count: int, batch: int, step: int, seed: int) -> np.ndarray:
    """The examples of optimizer step `step` (from 0): epochs of fresh permutations, cut into batches.

    A function of (seed, step) alone, so that a resumed run sees the data that an uninterrupted one would.
    """
    start = step * batch
    order = [
        np.random.default_rng((seed, epoch)).permutation(count)
        for epoch in range(start // count, (start + batch - 1) // count + 1)
    ]
    return np.concatenate(order)[start % count :][:batch]
