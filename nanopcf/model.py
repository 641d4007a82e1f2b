"""The transformer: one decoder-only architecture that covers Llama 3.2, Qwen2.5, Qwen3, SmolLM2 and our nano sizes.

RMSNorm, rotary positions, grouped-query attention, SwiGLU; options for a bias on q, k, v (Qwen2), a norm on q and k
(Qwen3), tied or untied embeddings. The model returns *hidden states*, not logits: every loss goes through `kernels`,
which fuses the output head with the loss and never holds a [tokens, vocabulary] tensor.

One rule serves training, packing, prefill and decoding: a query sees a key iff the key stands at the same or an
earlier position (and, when packed, in the same document).

q, k, v and the two halves of the SwiGLU are stored as one matrix each, since small models on a CPU are held back by
the number of operations and by their passes over memory; `checkpoint.py` splits them into the names that other libraries use.

Left out: sliding windows, mixtures of experts, dropout. None of them is part of the paper.
"""

import math
import os
import shutil
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.products import Linear, linear, sums_leave_in_float32


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Raises ValueError when the sizes can't fit together."""

    vocab_size: int
    width: int = 64  # D, the hidden size
    layers: int = 2  # L
    heads: int = 4  # H, query heads
    kv_heads: int = 2  # KV, key and value heads; heads % kv_heads == 0
    head_dim: int = 0  # 0: width // heads
    mlp_width: int = 176  # SwiGLU's inner width
    max_length: int = 256  # the longest sequence, in tokens
    rope_theta: float = 10_000.0
    rope_factor: float = 1.0  # Llama 3's stretching of the slow rotations (1: none), and its three other numbers
    rope_low_freq: float = 1.0
    rope_high_freq: float = 4.0
    rope_original_length: int = 8192
    norm_eps: float = 1e-6
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = True  # Qwen3
    tied: bool = True  # the output head is the embedding matrix

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("vocab_size", "width", "heads", "kv_heads", "mlp_width"), 2**24)
        for name, most in (sizes | dict(layers=1000, max_length=2**22)).items():  # more is a broken file, not a model
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"model: {name} must be a whole number from 1 to {most}, got {value}")
        for name in ("rope_theta", "rope_factor", "rope_low_freq", "rope_high_freq", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"model: {name} must be above 0 and finite, got {getattr(self, name)}")
        if self.head_dim == 0:
            if self.width % self.heads:
                raise ValueError(f"model: heads ({self.heads}) must divide width ({self.width}), or set head_dim")
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if not isinstance(self.head_dim, int) or self.head_dim % 2 or not 2 <= self.head_dim <= 2**16:
            raise ValueError(f"model: head_dim must be even for rotary positions, got {self.head_dim}")
        if self.heads % self.kv_heads:
            raise ValueError(f"model: kv_heads ({self.kv_heads}) must divide heads ({self.heads})")


NANO = {  # sizes to play with, parameters counted with a vocabulary of 32
    "0.1M": dict(width=64, layers=2, heads=4, kv_heads=2, mlp_width=176),
    "0.4M": dict(width=128, layers=2, heads=4, kv_heads=2, mlp_width=352),
    "0.8M": dict(width=128, layers=4, heads=4, kv_heads=2, mlp_width=352),
    "3M": dict(width=256, layers=4, heads=8, kv_heads=4, mlp_width=704),
    "10M": dict(width=384, layers=6, heads=6, kv_heads=3, mlp_width=1056),
}


class KVCache:
    """Static cache of keys and values, one row a sequence, allocated once.

    keys, values: [L, rows, KV, max_length, head_dim]. A position holds garbage until it is written; that is harmless
    because a query only sees positions up to its own, and every one of those has been written by then.
    """

    def __init__(
        self, config: ModelConfig, rows: int, max_length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.layers, rows, config.kv_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def places(self, positions: Tensor) -> Tensor:
        """Where keys at positions [B, T] of rows 0..B-1 go: [B * T * KV] rows of `keys[layer]` seen as [*, head_dim]."""
        _, _, KV, length, _ = self.keys.shape
        head = torch.arange(positions.shape[0] * KV, device=positions.device).view(-1, 1, KV)  # (B, 1, KV)
        return (head * length + positions.unsqueeze(2)).flatten()

    def update(self, layer: int, places: Tensor, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Write k, v [B, T, KV, hd] at `places`; return the first `length` positions, [B, KV, length, hd]."""
        for cached, new in ((self.keys[layer], k), (self.values[layer], v)):
            cached.view(-1, new.shape[-1]).index_copy_(0, places, new.reshape(-1, new.shape[-1]))
        B = k.shape[0]
        return self.keys[layer, :B, :, :length], self.values[layer, :B, :, :length]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021), halves convention: x [B, T, heads, hd], cos/sin [B or 1, T, 1, hd].

    The first half of `sin` is negative: (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def rope_frequencies(c: ModelConfig) -> Tensor:
    """Radians a position, [hd / 2] float64. Llama 3.1 and later divide those that turn less than rope_low_freq times in the
    original context by rope_factor, keep those that turn more than rope_high_freq times, and blend in between."""
    frequency = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    if c.rope_factor == 1:
        return frequency
    turns = c.rope_original_length * frequency / (2 * torch.pi)
    keep = ((turns - c.rope_low_freq) / (c.rope_high_freq - c.rope_low_freq)).clamp(0, 1)
    return frequency * (keep + (1 - keep) / c.rope_factor)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim
        self.qkv = Linear(c.width, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=c.qkv_bias)
        self.out = Linear(c.heads * c.head_dim, c.width, bias=False)
        self.q_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps) if c.qk_norm else None
        self.k_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps) if c.qk_norm else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, store=None) -> Tensor:
        """x [B, T, D]; mask [B, 1, T, S], bool or added to the scores, or None for plain causal; store(k, v) -> cached k, v."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim)  # (B, T, H + 2 KV, hd)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        if self.q_norm is not None:  # one operation for both
            scale = torch.cat((self.q_norm.weight.expand(self.heads, -1), self.k_norm.weight.expand(self.kv_heads, -1)))
            qk = F.rms_norm(qk, (self.head_dim,), eps=self.q_norm.eps) * scale
        q, k = rotate(qk, *rope).split((self.heads, self.kv_heads), dim=2)
        if store is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, KV, T, hd)
        else:
            k, v = store(k, v)  # (B, KV, S, hd)
        if T > 1 or store is None:
            # on CUDA only the flash kernel knows of groups, and it takes neither a mask nor float32
            if x.is_cuda and (mask is not None or x.dtype == torch.float32):
                k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.heads != k.shape[1]
            )
            return self.out(y.transpose(1, 2).reshape(B, T, -1))
        # decoding: the query heads of a key head are rows of one product, and no key is repeated
        q = q.reshape(B, self.kv_heads, -1, self.head_dim)
        if x.device.type == "cpu" and x.dtype == torch.float32:  # the fused kernel uses one core for this
            scores = (q * self.head_dim**-0.5) @ k.transpose(-1, -2)  # (B, KV, H / KV, S)
            y = scores.add_(mask).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, KV, H / KV, hd)
        return self.out(y.reshape(B, 1, -1))


class MLP(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(c.width, 2 * c.mlp_width, bias=False)
        self.down = Linear(c.mlp_width, c.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.attention = Attention(c)
        self.mlp_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, store=None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, store)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """tokens [B, T] -> hidden [B, T, D]. The head is `head_weight` [V, D]; give both to `kernels`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocab_size, c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.head = None if c.tied else Linear(c.width, c.vocab_size, bias=False)
        # float64 angles: at position 100,000 a float32 product is off by a hundredth of a turn
        frequency = rope_frequencies(c)
        angle = torch.outer(torch.arange(c.max_length, dtype=torch.float64), frequency)
        cos, sin = angle.cos().float(), angle.sin().float()
        self.register_buffer("cos", torch.cat((cos, cos), dim=1), persistent=False)  # (max_length, hd)
        self.register_buffer("sin", torch.cat((-sin, sin), dim=1), persistent=False)
        self.recompute = False  # activations of a block again in backward: less memory, a third more compute
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """normal(0, 1 / sqrt(fan in)), the two matrices that write to the residual stream divided by sqrt(2L) as in GPT-2.

        GPT-2's fixed 0.02 is this at a width of 2,500; at a width of 64 it makes learning several times slower.
        """
        for name, p in self.named_parameters():
            if p.dim() == 2:
                writes_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                scale = (2 * self.config.layers) ** -0.5 if writes_residual else 1.0
                nn.init.normal_(p, std=scale * p.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def compile_blocks(self) -> None:
        """torch.compile every block for training and scoring; generation stays as it is.

        Raises ValueError on a CPU without a C++ compiler.
        """
        compilers = (os.environ.get("CXX"), "g++", "c++", "clang++")
        if self.head_weight.device.type == "cpu" and not any(shutil.which(name) for name in compilers if name):
            raise ValueError("--compile needs a C++ compiler on a CPU: install g++, or leave the flag out")
        # with and without a mask, a gradient, a second row ...: past the limit a block would silently run uncompiled
        limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
        setattr(torch._dynamo.config, limit, 64)
        for block in self.blocks:
            block.compile(dynamic=True)

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> float32 logits [..., V]; for the sampler and for reading: losses go through `kernels`."""
        if sums_leave_in_float32(hidden) and hidden.dim() == 2:
            # not through bfloat16's eight bits
            return torch.mm(hidden, self.head_weight.T, out_dtype=torch.float32)
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
        length: int | None = None,
    ) -> Tensor:
        """Hidden states of tokens [B, T].

        positions [B, T]: default 0..T-1. documents [B, T]: an id per token; tokens of different documents don't see
        each other (packing; positions must restart with each document). kv_cache: keys and values are written at
        `positions` of its rows 0..B-1 and the first `length` are read back (default: up to the highest one written, which
        costs a GPU a wait): work grows with the live length.
        """
        T = tokens.shape[1]
        mask, store = None, None
        if positions is None:
            assert T <= self.config.max_length, f"{T} tokens, the model's context is {self.config.max_length}"
            cos, sin = self.cos[:T, None], self.sin[:T, None]  # (T, 1, hd)
        else:
            cos, sin = self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)  # (B, T, 1, hd)
        # a lone document a row is plain causal: half the work
        if documents is not None and documents.max() > 1:
            same = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
            mask = same.tril().unsqueeze(1)  # in a packed row, earlier in the document = earlier in the row
        if kv_cache is not None:
            assert positions is not None and documents is None
            S = int(positions.max()) + 1 if length is None else length
            if T == 1 or T < S:  # else every row begins at 0: plain causal
                hidden_keys = torch.arange(S, device=tokens.device) > positions[:, :, None]  # (B, T, S)
                # floats, made once: from bools every layer would make its own
                mask = torch.zeros_like(hidden_keys, dtype=self.head_weight.dtype).masked_fill_(hidden_keys, -torch.inf)
                mask = mask.unsqueeze(1)
            places = kv_cache.places(positions)
        x = self.embedding(tokens)
        rope = cos.to(x.dtype), sin.to(x.dtype)
        for i, block in enumerate(self.blocks):
            if kv_cache is not None:
                store = lambda k, v, i=i: kv_cache.update(i, places, k, v, S)  # noqa: E731
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            elif kv_cache is None:
                x = block(x, rope, mask)
            else:  # never compiled: its shapes change with every token
                x = block.forward(x, rope, mask, store)
        return self.norm(x)
