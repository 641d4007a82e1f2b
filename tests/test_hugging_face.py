"""Folders written and read by transformers, where it is installed; configs and indices that must be refused,
everywhere."""

import json

import pytest
import torch
from conftest import change, character_tokenizer
from safetensors.torch import load_file, save_file

from nanopcf import checkpoint
from nanopcf.model import ModelConfig, rope_frequencies

SIZES = dict(
    vocab_size=60,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=256,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=5000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
CONFIGS = {
    "llama": ("Llama", dict(rms_norm_eps=1e-5)),
    "llama3 rope, tied": ("Llama", dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)),
    "qwen2, tied": ("Qwen2", dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen3, its own head_dim": ("Qwen3", dict(head_dim=16)),
}


def add_tokenizer(folder) -> None:
    character_tokenizer().save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')


@pytest.mark.parametrize("name", CONFIGS)
def test_parity_with_transformers(name, tmp_path):
    """Logits, greedy tokens and gradients of its random model; then ours saved, opened by it: the same logits."""
    transformers = pytest.importorskip("transformers")
    family, options = CONFIGS[name]
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():  # biases and norms start at 0 and 1: their places would go untested
            p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    add_tokenizer(tmp_path / "theirs")
    ours, tokenizer = checkpoint.load(tmp_path / "theirs")
    tokens = torch.randint(0, 60, (2, 200))
    want = theirs(tokens, labels=tokens)
    got = ours.logits(ours(tokens))
    assert ((got - want.logits).norm() / want.logits.norm()).item() < 1e-5
    assert torch.equal(got.argmax(-1), want.logits.argmax(-1))
    want.loss.backward()
    torch.nn.functional.cross_entropy(got[:, :-1].reshape(-1, 60), tokens[:, 1:].reshape(-1)).backward()
    gradient = theirs.model.embed_tokens.weight.grad
    assert ((ours.embedding.weight.grad - gradient).norm() / gradient.norm()).item() < 1e-4

    checkpoint.save(ours, tokenizer, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert ((again(tokens).logits - want.logits).norm() / want.logits.norm()).item() < 1e-5


def test_llama3_rope_by_hand():
    """Slow rotations slowed by the factor, fast ones kept, the middle between: Llama 3.1's published rule, one at a
    time."""
    c = ModelConfig(vocab_size=9, head_dim=64, rope_theta=500_000.0, rope_factor=8.0, rope_original_length=8192)
    plain = rope_frequencies(ModelConfig(vocab_size=9, head_dim=64, rope_theta=500_000.0))
    for was, now in zip(plain.tolist(), rope_frequencies(c).tolist(), strict=True):
        wavelength = 2 * torch.pi / was
        if wavelength < 8192 / 4:
            expected = was
        elif wavelength > 8192 / 1:
            expected = was / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * was / 8 + smooth * was
        assert now == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(model_type="mixtral"), "model_type 'mixtral' isn't supported"),
        (dict(use_sliding_window=True), "sliding-window"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "sliding-window"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(mlp_bias=True), "mlp_bias"),
        (dict(quantization_config={"bits": 4}), "quantised"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (dict(rope_scaling={"type": "yarn", "factor": 4}), "rope type 'yarn'"),
        (dict(rope_parameters={"rope_type": "llama3", "factor": 8.0}), "llama3' without 'low_freq_factor'"),
        (dict(partial_rotary_factor=0.5), "partial rotary"),
        (dict(rope_scaling=LLAMA3_ROPE | dict(factor="8")), "'factor' is '8', must be a number"),
        (dict(hidden_size=None), "no field 'hidden_size'"),
        (dict(hidden_size="16"), "'hidden_size' is '16', must be a number"),
        (dict(num_key_value_heads=3), "kv_heads"),
        (dict(intermediate_size=25), r"is \[24, 16\], expected \[25, 16\]"),
        (dict(vocab_size=8), "don't belong together"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(folder, values, message):
    change(folder, **values)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(folder)


def test_sharded_files_and_redundant_tensors(folder):
    """Two shards load like one file; a tied head that repeats the embedding is fine, one that differs isn't."""
    weights = load_file(folder / "model.safetensors")
    whole = checkpoint.load(folder)[0].state_dict()
    names = sorted(weights)
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, mine in parts.items():
        save_file({n: weights[n] for n in mine}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: f for f, mine in parts.items() for n in mine}}))
    loaded = checkpoint.load(folder, dtype=torch.bfloat16)[0].state_dict()
    assert all(torch.equal(loaded[k], v.bfloat16()) for k, v in whole.items())
    head = weights["model.embed_tokens.weight"].clone()
    save_file({n: weights[n] for n in names[::2]} | {"lm_head.weight": head}, folder / "a.safetensors")
    checkpoint.load(folder)
    save_file({n: weights[n] for n in names[::2]} | {"lm_head.weight": head + 1}, folder / "a.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "../../etc/passwd.safetensors"}, "not the name of a safetensors file in this folder"),
        ({"x": "/tmp/x.safetensors"}, "not the name"),
        ({"x": "pytorch_model.bin"}, "not the name"),
        ({"x": "gone.safetensors"}, "no such file, though the index names it"),
        ({}, "no 'weight_map'"),
        ([1], "no 'weight_map'"),
    ],
)
def test_a_bad_index_touches_no_file_outside(folder, weight_map, message):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        checkpoint.load(folder)


def test_one_file_of_weights_beside_an_index_of_others_is_refused(folder):
    """Which of the two is the model? transformers takes one, we took the other."""
    save_file(load_file(folder / "model.safetensors"), folder / "a.safetensors")
    names = load_file(folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}))
    with pytest.raises(ValueError, match=r"model\.safetensors, and model\.safetensors\.index\.json of other files"):
        checkpoint.load(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    checkpoint.load(folder)


def test_a_hub_name_says_what_to_do_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"Nobody/nothing: .*ConnectionError.*give the folder"):
        checkpoint.load("Nobody/nothing")
    with pytest.raises(ValueError, match=r"\./nothing/here/x: no such model folder"):
        checkpoint.load("./nothing/here/x")
