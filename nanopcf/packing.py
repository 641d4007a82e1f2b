"""Packed rows: from sequences of tokens to the tensors that the loops train on, and to their log-probs.

A row holds several sequences one after the other, so that little is wasted on padding. Two of them in a row of 12, each
a prompt p, a response r and the end token e (a dot is IGNORE):

    tokens      p p p r r e   p p r e   0 0
    positions   0 1 2 3 4 5   0 1 2 3   0 0     they restart with every sequence, for the rotary embedding
    documents   1 1 1 1 1 1   2 2 2 2   0 0     no token sees one of another document
    targets     . . r r e .   . r e .   . .     the token that this position must predict, if it is trained
    index       . . 0 1 2 .   . 3 4 .   . .     the target's place among all trained tokens of the batch

Masks come from lengths and never from token ids: the end token is part of the response and is trained like any other
token, and nothing after it is. SFT and RL share this file: the way from sequences to log-probs is one.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

import kernels
from nanopcf.run import parallel

IGNORE = -100


@dataclass(frozen=True)
class Sequence:
    tokens: list[int]
    prompt_length: int  # tokens[prompt_length:] are trained


@dataclass(frozen=True)
class Rows:
    """Packed sequences: R rows of S tokens, all int64 [R, S]. The docstring of the file draws one."""

    tokens: Tensor
    positions: Tensor  # restart at 0 with every sequence
    documents: Tensor  # 1, 2, ... within a row; 0 is padding
    targets: Tensor  # the token that this position must predict, or IGNORE
    index: Tensor  # that token's place among all trained ones, in the order of the sequences given; or IGNORE

    def map(self, f: Callable[[Tensor], Tensor]) -> "Rows":
        return Rows(*(f(getattr(self, field.name)) for field in fields(self)))

    def to(self, device: torch.device) -> "Rows":
        return self.map(lambda t: t.to(device))

    def own(self, device: torch.device) -> "Rows":
        """This process's share of the rows, where there are several processes."""
        return self.map(parallel.share).to(device)

    def split(self, rows: int) -> list["Rows"]:
        """Micro-batches of at most `rows` rows."""
        starts = range(0, len(self.tokens), rows)
        return [Rows(*(getattr(self, field.name)[i : i + rows] for field in fields(self))) for i in starts]

    @property
    def trained(self) -> Tensor:
        """[R, S] bool: the positions whose prediction is trained."""
        return self.targets != IGNORE


def pack(sequences: list[Sequence], length: int) -> Rows:
    """First-fit decreasing into rows of `length` tokens, or longer when one sequence is."""
    length = max(length, max(len(s.tokens) for s in sequences))
    # 1. Which sequences share a row: the longest first, each into the first row that has room for it.
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i].tokens)):
        size = len(sequences[i].tokens)
        row = next((row for row, left in enumerate(room) if left >= size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(i)
        room[row] -= size
    length -= min(room)  # columns that every row leaves empty
    # 2. Fill the five tensors. first_trained[i] is the place of sequence i's first trained token.
    first_trained = np.cumsum([0] + [len(s.tokens) - s.prompt_length for s in sequences])
    shape = (len(rows), length)
    tokens, positions, documents = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    targets, index = (np.full(shape, IGNORE, dtype=np.int64) for _ in range(2))
    for row, members in enumerate(rows):
        start = 0
        for document, i in enumerate(members, 1):
            s = sequences[i]
            end = start + len(s.tokens)
            tokens[row, start:end], positions[row, start:end] = s.tokens, np.arange(len(s.tokens))
            documents[row, start:end] = document
            predicting = slice(start + s.prompt_length - 1, end - 1)  # position t predicts token t + 1
            targets[row, predicting] = s.tokens[s.prompt_length :]
            index[row, predicting] = np.arange(first_trained[i], first_trained[i + 1])
            start = end
    return Rows(*(torch.from_numpy(a) for a in (tokens, positions, documents, targets, index)))


def trained_hidden(model: torch.nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
    """(hidden [n, D], targets [n]) at the n trained positions of packed rows: the output head sees no other."""
    hidden = model(rows.tokens, positions=rows.positions, documents=rows.documents)  # (R, S, D)
    return hidden[rows.trained], rows.targets[rows.trained]  # (n, D), (n,)


@torch.no_grad()
def token_logprobs(model: torch.nn.Module, rows: Rows, micro_rows: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of all N trained tokens of packed rows, in the order of their sequences: each [N] float32
    on the CPU. Each process scores its share of the rows."""
    device = model.head_weight.device
    scores = torch.zeros(2, int(rows.trained.sum()), device=device)  # (2, N)
    for micro in rows.own(device).split(micro_rows):
        hidden, targets = trained_hidden(model, micro)
        found = kernels.linear_logprob(hidden, model.head_weight, targets, temperature=temperature, entropy=True)
        scores[:, micro.index[micro.trained]] = torch.stack(found)
    parallel.total([scores])
    return tuple(scores.cpu())
