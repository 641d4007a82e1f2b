"""The transformer: one decoder-only architecture that covers Llama 3.2, Qwen2.5, Qwen3, SmolLM2 and our nano sizes.

    x = embedding(tokens)                   (B, T, D)
    in each of the L blocks:
        x = x + attention(rms_norm(x))      grouped-query attention, rotary positions
        x = x + mlp(rms_norm(x))            SwiGLU
    hidden = rms_norm(x)                    (B, T, D), where rms_norm(x) = g * x / sqrt(mean(x^2) + eps), g is learnt

Options: a bias on q, k, v (Qwen2), a norm on q and k (Qwen3), an output head of its own in place of the embedding
matrix. The model returns *hidden states*, not logits: every loss goes through `kernels`, which fuses the output head
with the loss and never holds a [tokens, vocabulary] tensor.

One rule serves training, packing, prefill and decoding: a query sees a key if and only if the key stands at the same
or an earlier position (and, when sequences are packed, in the same document).

q, k and v are one matrix, and so are the two inner halves of the SwiGLU, because a small model on a CPU is limited by
the number of its operations. `checkpoint.py` splits them into the names that other libraries use.

Left out: sliding windows, mixtures of experts, dropout. None of them is part of the paper.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import Documents, Lengths, attend_documents, attend_lengths, visible, visible_in_cache
from kernels.products import Linear, can_return_float32_sums, linear

Rope = tuple[Tensor, Tensor]  # cosines and sines: each [T, 1, hd], or [B, T, 1, hd] where positions are given
Mask = Tensor | Documents | None  # [B, 1, T, S]: bool (True: is seen) or added to the scores; None: causal


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Raises ValueError when the sizes cannot fit together."""

    vocab_size: int  # V
    width: int = 64  # D, the hidden size
    layers: int = 2  # L
    heads: int = 4  # H, query heads
    kv_heads: int = 2  # KV, key and value heads; must divide heads
    head_dim: int = 0  # hd; 0 means width // heads
    mlp_width: int = 176  # inner width of the SwiGLU
    max_length: int = 256  # the longest sequence, in tokens
    rope_theta: float = 10_000.0  # the slowest pair of dimensions turns about this many times slower than the fastest
    rope_factor: float = 1.0  # Llama 3 slows its slow rotations down by this factor (1: not at all)
    rope_low_freq: float = 1.0  # the other three numbers of Llama 3's rule: see rope_frequencies
    rope_high_freq: float = 4.0
    rope_original_length: int = 8192
    norm_eps: float = 1e-6
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = True  # Qwen3
    tied: bool = True  # the output head is the embedding matrix

    def __post_init__(self) -> None:
        # The upper bounds are far above any real model: they catch a damaged config.json before it asks for all memory.
        for name in "vocab_size width layers heads kv_heads mlp_width max_length".split():
            value, most = getattr(self, name), {"layers": 1000, "width": 2**17, "max_length": 2**22}.get(name, 2**24)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"model: {name} must be a whole number from 1 to {most}, got {value}")
        for name in ("rope_theta", "rope_factor", "rope_low_freq", "rope_high_freq", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"model: {name} must be above 0 and finite, got {getattr(self, name)}")
        if self.head_dim == 0:
            if self.width % self.heads:
                raise ValueError(f"model: heads ({self.heads}) must divide width ({self.width}), or set head_dim")
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if not isinstance(self.head_dim, int) or self.head_dim % 2 or not 2 <= self.head_dim <= 2**10:
            raise ValueError(f"model: head_dim must be even (rotary positions) and from 2 to 1024, got {self.head_dim}")
        if self.heads % self.kv_heads:
            raise ValueError(f"model: kv_heads ({self.kv_heads}) must divide heads ({self.heads})")


# Small sizes to experiment with. The names count the parameters with a vocabulary of 32.
NANO = {
    "0.1M": dict(width=64, layers=2, heads=4, kv_heads=2, mlp_width=176),
    "0.4M": dict(width=128, layers=2, heads=4, kv_heads=2, mlp_width=352),
    "0.8M": dict(width=128, layers=4, heads=4, kv_heads=2, mlp_width=352),
    "3M": dict(width=256, layers=4, heads=8, kv_heads=4, mlp_width=704),
    "10M": dict(width=384, layers=6, heads=6, kv_heads=3, mlp_width=1056),
}


def rope_frequencies(c: ModelConfig) -> Tensor:
    """How far each pair of dimensions turns per position, in radians: [hd / 2] float64.

    Llama 3.1 and later divide by rope_factor the frequencies that turn less than rope_low_freq times within the
    original context, keep those that turn more than rope_high_freq times, and blend linearly in between.
    """
    frequency = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)  # (hd / 2)
    if c.rope_factor == 1:
        return frequency
    turns = c.rope_original_length * frequency / (2 * torch.pi)
    keep = ((turns - c.rope_low_freq) / (c.rope_high_freq - c.rope_low_freq)).clamp(0, 1)
    return frequency * (keep + (1 - keep) / c.rope_factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021) of x [B, T, heads, hd], with cos and sin [T, 1, hd] or [B, T, 1, hd].

    Dimensions i and i + hd / 2 form a pair (a, b), which becomes (a cos - b sin, b cos + a sin). The first half of
    `sin` is stored with a minus sign, so that one operation does both.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class KVCache:
    """The keys and values of every layer, [L, rows, KV, length, hd], allocated once; one row per sequence.

    A position holds any finite number until it is written. That is harmless: a query sees only positions up to its own,
    and all of those have been written by then.
    """

    def __init__(self, c: ModelConfig, rows: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (c.layers, rows, c.kv_heads, length, c.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def places(self, positions: Tensor) -> Tensor:
        """Where keys at positions [B, T] of rows 0..B-1 belong in a layer's keys, seen as [*, hd]: [B * T * KV]."""
        _, _, KV, length, _ = self.keys.shape
        head = torch.arange(positions.shape[0] * KV, device=positions.device).view(-1, 1, KV)  # (B, 1, KV)
        return (head * length + positions.unsqueeze(2)).flatten()  # (B * T * KV)


@dataclass
class LayerCache:
    """One layer's part of a KVCache during one forward pass."""

    keys: Tensor  # (rows * KV * length, hd), a view of the KVCache
    values: Tensor  # (rows * KV * length, hd)
    shape: torch.Size  # (rows, KV, length, hd)
    places: Tensor  # (B * T * KV), where the new keys and values are written
    spans: list[tuple[slice, int, Tensor | Lengths | None]]  # (rows, S, what they see of positions 0..S-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the new k, v [B, T, KV, hd]; then every row of q [B, T, H, hd] reads its own: [B, T, H * hd]."""
        # Before torch 2.13, compiled code that writes to a view which it has made itself copies the whole cache.
        self.keys.index_copy_(0, self.places, k.flatten(0, 2))
        self.values.index_copy_(0, self.places, v.flatten(0, 2))
        keys, values = self.keys.view(self.shape), self.values.view(self.shape)
        of_kind = attend_one_token if q.shape[1] == 1 else attend
        parts = [of_kind(q[rows], keys[rows, :, :S], values[rows, :, :S], mask) for rows, S, mask in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q [B, T, H, hd], k and v [B, KV, S, hd] -> [B, T, H * hd]. Without a mask: causal, and S = T.

    Grouped queries (Ainslie et al., 2023): H / KV query heads share each key and value head.
    """
    B, T, H, _ = q.shape
    # On CUDA only the flash kernel knows about groups, and it accepts neither a mask nor float32.
    if q.is_cuda and (mask is not None or q.dtype == torch.float32):
        k, v = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k, v))  # (B, H, S, hd)
    q, groups = q.transpose(1, 2), k.shape[1] != H  # (B, H, T, hd)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=groups)
    return y.transpose(1, 2).reshape(B, T, -1)  # (B, H, T, hd) -> (B, T, H * hd)


def attend_one_token(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Lengths) -> Tensor:
    """Decoding: q [B, 1, H, hd], k and v [B, KV, S, hd], mask [B, 1, 1, S] added to the scores -> [B, 1, H * hd].

    The query heads of a group take the place of T, so that each key is read once for all of them and never copied.
    """
    if isinstance(mask, Lengths):
        return attend_lengths(q, k, v, mask)
    B, KV, S, hd = k.shape
    q = q.reshape(B, KV, -1, hd)  # (B, KV, H / KV, hd)
    if q.device.type == "cpu" and q.dtype == torch.float32:  # the fused kernel would use one core only
        q, k, v, mask = (t.flatten(0, 1) for t in (q, k, v, mask.expand(B, KV, 1, S)))  # (B * KV, ...)
        scores = torch.baddbmm(mask, q, k.mT, alpha=hd**-0.5)  # (B * KV, H / KV, S)
        y = scores.softmax(-1) @ v  # (B * KV, H / KV, hd)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, KV, H / KV, hd)
    return y.reshape(B, 1, -1)  # (B, 1, H * hd)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim
        self.qkv = Linear(c.width, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=c.qkv_bias)
        self.out = Linear(c.heads * c.head_dim, c.width, bias=False)
        self.q_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps) if c.qk_norm else None
        self.k_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps) if c.qk_norm else None

    def forward(self, x: Tensor, rope: Rope, mask: Mask, cache: LayerCache | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]. The cache holds the keys and values of the tokens before x."""
        B, T, _ = x.shape
        H, KV = self.heads, self.kv_heads
        qkv = self.qkv(x).view(B, T, H + 2 * KV, self.head_dim)  # (B, T, H + 2 KV, hd)
        qk, v = qkv.split((H + KV, KV), dim=2)  # (B, T, H + KV, hd), (B, T, KV, hd)
        if self.q_norm is not None:
            # Queries and keys are normalised in one operation, so their learnt vectors become one factor.
            scale = torch.cat((self.q_norm.weight.expand(H, -1), self.k_norm.weight.expand(KV, -1)))  # (H + KV, hd)
            qk = F.rms_norm(qk, (self.head_dim,), eps=self.q_norm.eps) * scale
        q, k = rotate(qk, *rope).split((H, KV), dim=2)  # (B, T, H, hd), (B, T, KV, hd)
        if cache:
            y = cache.attend(q, k, v)
        elif isinstance(mask, Documents):
            y = attend_documents(q, k, v, mask)
        else:
            y = attend(q, k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.out(y)  # (B, T, D)


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(c.width, 2 * c.mlp_width, bias=False)
        self.down = Linear(c.mlp_width, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, mlp_width) each
        return self.down(F.silu(gate) * up)  # (B, T, D)


class Block(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.attention = Attention(c)
        self.mlp_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, rope: Rope, mask: Mask, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, cache)  # (B, T, D)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """tokens [B, T] -> hidden [B, T, D]. The output head is `head_weight` [V, D]: hand both to a loss of `kernels`.

    initialise=False leaves the weights unset, for one who will fill them: until then they take hardly any memory.
    """

    def __init__(self, config: ModelConfig, initialise: bool = True) -> None:
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding.from_pretrained(torch.empty(c.vocab_size, c.width), freeze=False)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.head = None if c.tied else Linear(c.width, c.vocab_size, bias=False)
        # The angles are made in float64: at position 100,000 a float32 product is wrong by a hundredth of a turn.
        position = torch.arange(c.max_length, dtype=torch.float64)
        angle = torch.outer(position, rope_frequencies(c))  # (max_length, hd / 2)
        cos, sin = angle.cos().float(), angle.sin().float()
        self.register_buffer("cos", torch.cat((cos, cos), dim=1), persistent=False)  # (max_length, hd)
        self.register_buffer("sin", torch.cat((-sin, sin), dim=1), persistent=False)  # (max_length, hd)
        self.recompute = False  # True: backward computes each block anew; less memory, a third more compute
        if initialise:
            self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """normal(0, 1 / sqrt(fan in)); as in GPT-2, what writes to the residual stream is divided by sqrt(2 L).

        GPT-2's fixed 0.02 equals this at a width of 2,500. At a width of 64 it would slow learning down several times.
        """
        for name, p in self.named_parameters():
            if p.dim() == 2:
                writes_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                scale = (2 * self.config.layers) ** -0.5 if writes_residual else 1.0
                nn.init.normal_(p, std=scale * p.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> float32 logits [..., V], for sampling and for inspection. Losses go through `kernels`."""
        if can_return_float32_sums(hidden) and hidden.dim() == 2:
            return torch.mm(hidden, self.head_weight.T, out_dtype=torch.float32)  # never rounded to bfloat16
        return linear(hidden, self.head_weight).float()

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        kv_cache: KVCache | None = None,
        spans: list[tuple[int, int]] = (),
    ) -> Tensor:
        """Hidden states [B, T, D] of tokens [B, T].

        positions [B, T]: 0..T-1 by default. documents [B, T]: the number of each token's document, when several are
        packed in a row: they do not see each other, and positions restart with each. kv_cache: keys and values are
        written at `positions` of its rows 0..B-1. spans: pairs (rows, S), neighbouring rows and how many positions of
        the cache they read, so that work grows with the cache in use and short rows do not pay for long ones (default:
        one span up to the highest position written, for which the host must wait for a GPU).
        """
        T = tokens.shape[1]
        x = self.embedding(tokens)  # (B, T, D)
        mask = None if documents is None else visible(documents, x.dtype, self.config.head_dim)
        if positions is None:
            assert T <= self.config.max_length, f"{T} tokens, the model's context is {self.config.max_length}"
            cos, sin = self.cos[:T, None], self.sin[:T, None]  # (T, 1, hd)
        else:
            cos, sin = self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)  # (B, T, 1, hd)
        if kv_cache is not None:
            assert positions is not None and documents is None
            layer, bounds, first = kv_cache.keys[0], [], 0
            for count, S in spans or [(len(tokens), int(positions.max()) + 1)]:
                rows, first = slice(first, first + count), first + count
                bounds.append((rows, *visible_in_cache(positions[rows], S, layer[rows])))
            places = kv_cache.places(positions)  # (B * T * KV), the same in every layer
        rope = cos.to(x.dtype), sin.to(x.dtype)
        for i, block in enumerate(self.blocks):
            if kv_cache is not None:
                flat = (t[i].view(-1, t.shape[-1]) for t in (kv_cache.keys, kv_cache.values))
                cache = LayerCache(*flat, layer.shape, places, bounds)
                # .forward goes around torch.compile: with a mask the shapes change with every token.
                run = block if isinstance(bounds[0][2], Lengths) else block.forward
                x = run(x, rope, mask, cache)
            elif self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask)
        return self.norm(x)  # (B, T, D)
