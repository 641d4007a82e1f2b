"""Drawing words from probabilities by uniform numbers, also from a large vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 512  # words of a large vocabulary that stand together


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """One word per row, by uniform numbers [B, 1] in [0, 1) and probabilities p [B, V]: [B, 1] int64.

    A long cumulative sum is slow, so with a large vocabulary first a block of words is drawn, then a word of it.
    """
    blocks = F.pad(p, (0, -p.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)) if p.shape[-1] > 8 * BLOCK else None
    cumulative = (p if blocks is None else blocks.sum(-1)).cumsum(-1)  # (B, V or V / BLOCK)
    # The uniform number is scaled by the last entry, since a float32 sum seldom ends at exactly 1.
    threshold = uniform * cumulative[:, -1:]  # (B, 1)
    found = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=cumulative.shape[-1] - 1)  # (B, 1)
    if blocks is None:
        return found
    words = blocks[torch.arange(len(p), device=p.device), found[:, 0]]  # (B, BLOCK)
    rest = (threshold - cumulative.gather(-1, found)) / words.sum(-1, keepdim=True) + 1  # how far into the block
    word = found * BLOCK + draw(words, rest.clamp(0, 1 - 2**-24))
    return word.clamp_(max=p.shape[-1] - 1)  # of probabilities that are NaN too, a word that exists
