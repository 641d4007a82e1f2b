"""What tokens of packed rows may see: the mask that defines it, and on a GPU attention without one.

Documents of one row do not see each other. The mask [B, 1, T, T] says so for every pair of tokens, and every pair has
its score computed, seen or not. On a GPU it costs twice: the flash kernel takes no mask, and it alone knows grouped
queries, so that keys and values are copied once per query head. But that kernel takes documents of any lengths, all
B * T tokens in one line and where in it each document begins, and computes the scores within documents only.

So on CUDA in half precision the documents go to the kernel, as `Documents`. On the CPU, in float32, and where the
kernel doesn't run, there is a mask. Which of the two a GPU takes, and why, is announced on stderr.
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


def attend_documents(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """q [B, T, H, hd], k and v [B, T, KV, hd] -> [B, T, H * hd]: causal attention within documents, on views."""
    B, T = q.shape[:2]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))  # (B * T, heads, hd)
    return flash(q, k, v, documents.edges, documents.longest).reshape(B, T, -1)


def flash(q: Tensor, k: Tensor, v: Tensor, edges: Tensor, longest: int) -> Tensor:
    """q [N, H, hd], k and v [N, KV, hd], edges [n + 1] int32 -> [N, H, hd], each document causal by itself.

    The operation under torch's scaled_dot_product_attention and its public varlen_attn. The latter is younger than
    torch 2.6 and its arguments still change; these ten have stayed.
    """
    return torch.ops.aten._flash_attention_forward(q, k, v, edges, edges, longest, longest, 0.0, True, False)[0]


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
    announce("attention of packed rows by " + ("a mask" if reason else "flash attention"), device.type, reason)
    return reason


def trial(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Two documents through `flash`, forward and backward. Raises what the kernel raises."""
    edges = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
    with torch.inference_mode(False), torch.enable_grad():
        q = torch.zeros(8, 1, head_dim, dtype=dtype, device=device, requires_grad=True)
        flash(q, q, q, edges, 5).sum().backward()
