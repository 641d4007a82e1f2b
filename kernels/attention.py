"""What tokens may see in packed rows and in a cache: the mask that defines it, and on a GPU attention without one.

Documents of one row do not see each other. The mask [B, 1, T, T] says so for every pair of tokens, and every pair has
its score computed, seen or not. In decoding, each row of the cache has keys up to its own position, and with a mask
every row reads as many as the longest. On a GPU a mask costs twice: the flash kernel takes none, and it alone knows
grouped queries, so that keys and values of packed rows are copied once per query head. But that kernel takes sequences
of any lengths, all their tokens in one line and where in it each sequence begins, and computes nothing beyond them.

So on CUDA in half precision it gets `Documents` of packed rows and `Lengths` of a cache's rows. On the CPU, in float32,
and where the kernel doesn't run, there is a mask. Which of the two a GPU takes, and why, is announced on stderr.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.paths import announce


class Documents(NamedTuple):
    """The documents of B rows of T tokens, all tokens in one line of B * T. The padding of a row is one of them."""

    edges: Tensor  # [n + 1] int32, on the device: where each document begins, and B * T
    longest: int  # tokens of the longest document


class Lengths(NamedTuple):
    """How far rows of a cache are read in decoding, where key head h of row i is sequence i * KV + h of B * KV."""

    queries: Tensor  # [B * KV + 1] int32, on the device: where each sequence's queries begin, one token each
    keys: Tensor  # [B * KV + 1] int32, on the device: where its keys begin in the cache
    used: Tensor  # [B * KV] int32, on the device: how many of its keys are read
    longest: int  # no sequence reads more


def visible(documents: Tensor, dtype: torch.dtype, head_dim: int) -> Tensor | Documents | None:
    """The `mask` for attention in packed rows. documents [B, T]: each token's document, numbered from 1 in every row.

    None if each row is one document: plain causal attention is right then, and half the work. Otherwise Documents for
    `attend_documents`, or bool [B, 1, T, T], True where a key is seen. The host waits for the GPU once.
    """
    if refusal(documents.device, dtype, head_dim) is None:
        numbers = documents.cpu()
        if numbers.max() <= 1:
            return None
        before = numbers.new_full((len(numbers), 1), -1)  # no document: every row begins a new one
        begins = numbers.diff(dim=1, prepend=before) != 0  # (B, T)
        starts = begins.flatten().nonzero().flatten()  # (n,)
        edges = torch.cat((starts, starts.new_tensor([numbers.numel()])))  # (n + 1,)
        return Documents(edges.int().to(documents.device), int(edges.diff().max()))
    if documents.max() <= 1:
        return None
    same_document = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
    return same_document.tril().unsqueeze(1)  # (B, 1, T, T); earlier in the row is earlier in the document


def visible_in_cache(positions: Tensor, S: int, keys: Tensor) -> tuple[int, Tensor | Lengths | None]:
    """For queries at positions [B, T] that read at most S of a cache's keys [B, KV, length, hd]: how many keys of each
    row to hand over, and which of them are seen.

    T = S > 1 is a prefill, whose rows all begin at position 0: None, since plain causal attention is right. In decoding
    (T = 1) Lengths for `attend_lengths`, which takes whole rows. Otherwise a mask to be added to the scores, 0 or -inf
    of the keys' dtype [B, 1, T, S]: in floats, since from a bool mask every layer would make floats of its own.
    """
    (B, KV, length, head_dim), T = keys.shape, positions.shape[1]
    if T == S > 1:
        return S, None
    # The kernel counts sequences in a direction in which a GPU can number only 65,535 blocks.
    if T == 1 and B * KV < 2**16 and refusal(keys.device, keys.dtype, head_dim) is None:
        sequence = torch.arange(B * KV + 1, dtype=torch.int32, device=keys.device)
        used = (positions + 1).clamp(max=S).expand(B, KV).flatten()
        return length, Lengths(sequence, sequence * length, used.int(), S)
    later = torch.arange(S, device=keys.device) > positions[:, None, :, None]  # (B, 1, T, S)
    return S, torch.zeros_like(later, dtype=keys.dtype).masked_fill_(later, -torch.inf)


def attend_documents(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """q [B, T, H, hd], k and v [B, T, KV, hd] -> [B, T, H * hd]: causal attention within documents, on views."""
    B, T = q.shape[:2]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))  # (B * T, heads, hd)
    edges, longest = documents
    return flash(q, k, v, edges, edges, longest, longest).reshape(B, T, -1)


def attend_lengths(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
    """Decoding: q [B, 1, H, hd], k and v [B, KV, length, hd], whole rows of a cache -> [B, 1, H * hd].

    A sequence is one key head of one row, with one token of the H / KV query heads that share it. So the cache, where
    the keys of a head stand side by side, is read as it lies.
    """
    B, KV, _, head_dim = k.shape
    q, k, v = q.reshape(B * KV, -1, head_dim), k.view(-1, 1, head_dim), v.view(-1, 1, head_dim)
    return flash(q, k, v, lengths.queries, lengths.keys, 1, lengths.longest, lengths.used).reshape(B, 1, -1)


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    longest_query: int,
    longest_key: int,
    used: Tensor | None = None,
) -> Tensor:
    """q [N, H, hd], k and v [M, KV, hd] -> [N, H, hd]: causal attention within each of n sequences.

    queries and keys [n + 1] int32: where the sequences begin in q and in k. used [n] int32: how many of its keys a
    sequence reads (default: all); the last of its queries sees them all.

    The operation under torch's scaled_dot_product_attention and its public varlen_attn. The latter is younger than
    torch 2.6 and its arguments still change; these have stayed.
    """
    operation, places = torch.ops.aten._flash_attention_forward, (queries, keys, longest_query, longest_key)
    return operation(q, k, v, *places, 0.0, True, False, seqused_k=used)[0]


@cache
def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why `flash` can't run, or None. Found out once, and on CUDA announced.

    The kernel itself is asked: which GPUs, types and sizes it takes depends on the version and the build of torch.
    """
    if device.type != "cuda":
        return f"it doesn't run on {device.type} tensors"
    reason = None
    try:
        trial(device, dtype, head_dim)
    except (AttributeError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
    way = "a mask" if reason else "flash attention"
    announce(f"attention of packed rows and in decoding by {way}", device.type, reason)
    return reason


def trial(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Two documents, forward and backward, and a step of decoding. Raises what the kernel raises."""
    edges = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
    with torch.inference_mode(False), torch.enable_grad():
        q = torch.zeros(1, 8, 1, head_dim, dtype=dtype, device=device, requires_grad=True)
        attend_documents(q, q, q, Documents(edges, 5)).sum().backward()
    keys = torch.zeros(2, 1, 8, head_dim, dtype=dtype, device=device)  # two rows of a cache of 8 positions
    rows = torch.arange(3, dtype=torch.int32, device=device)
    attend_lengths(keys[:, :, :2], keys, keys, Lengths(rows, 8 * rows, rows[1:], 8))
