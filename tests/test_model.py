"""The transformer against a plain reference, its cache against a full pass, packed rows against separate ones."""

import math

import pytest
import torch
from conftest import character_tokenizer

from nanopcf import checkpoint
from nanopcf.model import KVCache, ModelConfig, Transformer


def reference_forward(model: Transformer, tokens: list[int]) -> torch.Tensor:
    """The architecture again, in float64 and plain loops over heads and positions: hidden [T, D]."""
    c = model.config
    w = {k: v.double() for k, v in model.state_dict().items()}

    def norm(x, g):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * g

    def rope(x, t):
        y = x.clone()
        half = c.head_dim // 2
        for i in range(half):
            angle = t / c.rope_theta ** (2 * i / c.head_dim)
            y[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
            y[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
        return y

    x = w["embedding.weight"][tokens]
    T, hd = len(tokens), c.head_dim
    for i in range(c.layers):
        at = f"blocks.{i}."
        h = norm(x, w[at + "attention_norm.weight"])
        qkv = h @ w[at + "attention.qkv.weight"].T
        if c.qkv_bias:
            qkv = qkv + w[at + "attention.qkv.bias"]
        heads = qkv.view(T, -1, hd)
        out = torch.zeros(T, c.heads, hd, dtype=torch.float64)
        for head in range(c.heads):
            group = head // (c.heads // c.kv_heads)
            for t in range(T):
                scores = []
                for s in range(t + 1):
                    q, k = heads[t, head], heads[s, c.heads + group]
                    if c.qk_norm:
                        q = norm(q, w[at + "attention.q_norm.weight"])
                        k = norm(k, w[at + "attention.k_norm.weight"])
                    scores.append(rope(q, t) @ rope(k, s) / math.sqrt(hd))
                p = torch.stack(scores).softmax(0)
                out[t, head] = p @ heads[: t + 1, c.heads + c.kv_heads + group]
        x = x + out.view(T, -1) @ w[at + "attention.out.weight"].T
        h = norm(x, w[at + "mlp_norm.weight"])
        gate, up = (h @ w[at + "mlp.gate_up.weight"].T).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ w[at + "mlp.down.weight"].T
    return norm(x, w["norm.weight"])


@pytest.mark.parametrize(
    "options",
    [{}, {"qk_norm": False, "qkv_bias": True}, {"qk_norm": False, "tied": False, "kv_heads": 4}, {"head_dim": 12}],
)
def test_forward_matches_a_loop_in_float64(options):
    """Every option of the architecture against its definition; catches wrong head groups or rotary convention."""
    torch.manual_seed(1)
    c = ModelConfig(
        **{"vocab_size": 11, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 40, "max_length": 16} | options
    )
    model = Transformer(c)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 2 else 1))
    tokens = torch.randint(0, 11, (9,)).tolist()
    expected = reference_forward(model, tokens)
    got = model(torch.tensor([tokens]))[0]
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_cached_decoding_equals_full_forward(model):
    tokens = torch.randint(0, 16, (3, 20))
    full = model(tokens)
    cache = KVCache(model.config, 3, 20, tokens.device, torch.float32)
    cache.keys.fill_(float("nan"))  # poison: what wasn't written must not be read
    cache.values.fill_(0.0)
    parts = []
    for chunk in (range(0, 7), range(7, 8), range(8, 13), *(range(t, t + 1) for t in range(13, 20))):
        positions = torch.tensor(list(chunk)).expand(3, -1)
        parts.append(model(tokens[:, chunk.start : chunk.stop], positions=positions, kv_cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-5)


def test_packed_equals_separate(model):
    """Documents in one row must not see each other, and padding must not matter."""
    a, b = torch.randint(0, 16, (9,)), torch.randint(0, 16, (5,))
    tokens = torch.cat([a, b, torch.zeros(3, dtype=torch.long)])[None]
    positions = torch.tensor([[*range(9), *range(5), 0, 0, 0]])
    documents = torch.tensor([[1] * 9 + [2] * 5 + [0] * 3])
    packed = model(tokens, positions=positions, documents=documents)[0]
    torch.testing.assert_close(packed[:9], model(a[None])[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed[9:14], model(b[None])[0], rtol=1e-4, atol=1e-5)


def test_a_row_of_one_token_needs_no_cache(model):
    """Decoding has one token per row as well; without a cache there is nothing to read back."""
    tokens = torch.randint(0, 16, (5, 7))
    torch.testing.assert_close(model(tokens[:, :1]), model(tokens)[:, :1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"width": 30}, "heads"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"layers": 0}, "layers"),
        ({"width": 20, "heads": 4}, "head_dim"),
    ],
)
def test_impossible_sizes_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        ModelConfig(**{"vocab_size": 16, "width": 32, "heads": 4, "kv_heads": 2} | options)


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": False}, {"qk_norm": False, "qkv_bias": True}, {"tied": False}, {"head_dim": 16}]
)
def test_save_and_load_gives_the_same_hidden_states(options, tmp_path):
    model = Transformer(ModelConfig(vocab_size=16, **options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    checkpoint.save(model, character_tokenizer(), tmp_path / "m")
    loaded, tokenizer = checkpoint.load(tmp_path / "m")
    tokens = torch.randint(0, 16, (2, 12))
    assert torch.equal(loaded(tokens), model(tokens))
    assert torch.equal(loaded.head_weight, model.head_weight)
    assert tokenizer.decode(tokenizer.encode("12+34=")) == "12+34="


def test_weights_load_strictly(model_dir):
    from safetensors.torch import load_file, save_file

    path = model_dir / "model.safetensors"
    weights = load_file(path)
    w = weights.pop("model.norm.weight")
    save_file(weights | {"stray": w}, path)
    with pytest.raises(ValueError, match=r"missing model\.norm\.weight; extra stray"):
        checkpoint.load(model_dir)
    save_file(weights | {"model.norm.weight": w[:5]}, path)
    with pytest.raises(ValueError, match=r"\[5\], expected \[32\]"):
        checkpoint.load(model_dir)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="not a whole safetensors"):
        checkpoint.load(model_dir)


def test_logits_equal_those_of_transformers(tmp_path):
    """Our folder, opened by transformers (when it is installed): same logits for all three architectures."""
    transformers = pytest.importorskip("transformers")
    for options in ({}, {"qk_norm": False}, {"qk_norm": False, "qkv_bias": True}):
        model = Transformer(ModelConfig(vocab_size=16, **options))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.2)
        checkpoint.save(model, character_tokenizer(), tmp_path / "m")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        tokens = torch.randint(0, 16, (2, 12))
        torch.testing.assert_close(model.logits(model(tokens)), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_a_gpu_gives_the_hidden_states_and_gradients_of_the_cpu(model, dtype, tolerance):
    """Plain rows, and packed ones, which take another attention kernel. The loss is a random projection: the mean
    square of what an RMSNorm returns is constant, and the gradient of that is rounding errors."""
    tokens, probe = torch.randint(0, 16, (3, 14)), torch.randn(3, 14, 32)
    packed = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4]).expand(3, 14)
    documents = torch.tensor([1] * 9 + [2] * 5).expand(3, 14)
    for options in ({}, dict(positions=packed, documents=documents)):
        model.float().cpu().zero_grad()
        hidden = model(tokens, **options)
        (hidden * probe).sum().backward()
        want = model.blocks[0].attention.qkv.weight.grad.clone()
        model.cuda().to(dtype).zero_grad()
        got = model(tokens.cuda(), **{k: v.cuda() for k, v in options.items()})
        (got.float() * probe.cuda()).sum().backward()
        torch.testing.assert_close(got.float().cpu(), hidden, rtol=tolerance, atol=tolerance)
        found = model.blocks[0].attention.qkv.weight.grad.float().cpu()
        torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance * want.abs().max().item())
