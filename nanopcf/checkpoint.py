"""Models on disk: folders in Hugging Face's layout (config.json, model.safetensors, tokenizer.json), and the
training state beside them. Safetensors and JSON only: nothing in a checkpoint can run code.

Our q, k, v and gate, up matrices are stored fused; a folder holds them apart, under the names of Qwen3 (norm on q and
k), Qwen2 (bias on q, k, v) or Llama. Weights load strictly: every name and shape, nothing missing, nothing extra.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanopcf import runs
from nanopcf.model import ModelConfig, Transformer
from nanopcf.tokenizer import TextTokenizer, load_tokenizer

HF_FIELDS = {  # ours -> Hugging Face's
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_width": "intermediate_size",
    "max_length": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}


def to_hf_config(c: ModelConfig) -> dict:
    if c.qkv_bias and c.qk_norm:
        raise ValueError("checkpoint: no published architecture has both a bias and a norm on q and k")
    kind = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
    architecture = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[
        kind
    ]
    values = {theirs: asdict(c)[ours] for ours, theirs in HF_FIELDS.items()}
    return {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "float32",
        **values,
    }


def from_hf_config(values: dict, source: Path) -> ModelConfig:
    kind = values.get("model_type")
    if kind not in ("qwen3", "qwen2", "llama"):
        raise ValueError(f"{source}: model_type {kind!r} isn't supported; qwen3, qwen2 and llama are")
    missing = [name for name in HF_FIELDS.values() if name not in values]
    if missing:
        raise ValueError(f"{source}: no field {missing[0]!r}")
    try:
        own = {ours: values[theirs] for ours, theirs in HF_FIELDS.items()}
        return ModelConfig(**own, qk_norm=kind == "qwen3", qkv_bias=kind == "qwen2")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from error


def to_hf_weights(model: Transformer) -> dict[str, Tensor]:
    """Views of the model's weights, under Hugging Face's names."""
    c, weights = model.config, {"model.embed_tokens.weight": model.embedding.weight}
    sizes = (c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim)
    for i, block in enumerate(model.blocks):
        at, attention = f"model.layers.{i}.", block.attention
        weights[at + "input_layernorm.weight"] = block.attention_norm.weight
        weights[at + "post_attention_layernorm.weight"] = block.mlp_norm.weight
        for name, w in zip("qkv", attention.qkv.weight.split(sizes), strict=True):
            weights[at + f"self_attn.{name}_proj.weight"] = w
        if c.qkv_bias:
            for name, b in zip("qkv", attention.qkv.bias.split(sizes), strict=True):
                weights[at + f"self_attn.{name}_proj.bias"] = b
        if c.qk_norm:
            weights[at + "self_attn.q_norm.weight"] = attention.q_norm.weight
            weights[at + "self_attn.k_norm.weight"] = attention.k_norm.weight
        weights[at + "self_attn.o_proj.weight"] = attention.out.weight
        for name, w in zip(("gate", "up"), block.mlp.gate_up.weight.chunk(2), strict=True):
            weights[at + f"mlp.{name}_proj.weight"] = w
        weights[at + "mlp.down_proj.weight"] = block.mlp.down.weight
    weights["model.norm.weight"] = model.norm.weight
    if not c.tied:
        weights["lm_head.weight"] = model.head.weight
    return weights


def write_model(folder: Path, model: Transformer, tokenizer: TextTokenizer) -> None:
    """The files of a model, into a folder that is there."""
    hf = to_hf_config(model.config) | {"eos_token_id": tokenizer.eos_id}
    runs.write_json(folder / "config.json", hf)
    runs.write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.end_token},
    )
    tokenizer.save(folder / "tokenizer.json")
    weights = {k: v.detach().contiguous().cpu() for k, v in to_hf_weights(model).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save(model: Transformer, tokenizer: TextTokenizer, path: str | Path) -> None:
    """Write a folder that `load` and transformers open; whole or not at all."""
    runs.write_folder(Path(path), lambda folder: write_model(folder, model, tokenizer))


def load(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Transformer, TextTokenizer]:
    """The model and tokenizer of a folder. Raises ValueError saying what is missing, extra or of another shape."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such model folder")
    config = from_hf_config(runs.read_json(path / "config.json"), path / "config.json")
    end_token = runs.read_json(path / "tokenizer_config.json").get("eos_token")
    tokenizer = load_tokenizer(path, end_token)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {config.vocab_size}; they don't belong together"
        )
    found = read_safetensors(path / "model.safetensors")
    model = Transformer(config)
    expected = to_hf_weights(model)
    problems = [f"missing {n}" for n in expected if n not in found]
    problems += [f"extra {n}" for n in found if n not in expected]
    problems += [
        f"{n} is {list(found[n].shape)}, expected {list(w.shape)}"
        for n, w in expected.items()
        if n in found and found[n].shape != w.shape
    ]
    if problems:
        raise ValueError(
            f"{path / 'model.safetensors'}: doesn't match config.json: {'; '.join(problems[:8])}"
        )
    with torch.no_grad():
        for name, w in expected.items():
            w.copy_(found[name])
    return model.to(device, dtype), tokenizer


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def save_training(
    folder: Path, model: Transformer, tokenizer: TextTokenizer, optimizer: torch.optim.Optimizer, state: dict
) -> None:
    """A checkpoint that training can continue from: a model folder with the optimizer's tensors and `state` beside."""

    def write(temporary: Path) -> None:
        write_model(temporary, model, tokenizer)
        moments = {
            f"{i}.{name}": value.cpu()
            for i, parameter in optimizer.state_dict()["state"].items()
            for name, value in parameter.items()
        }
        save_file(moments, temporary / "optimizer.safetensors")
        runs.write_json(temporary / "state.json", state)

    runs.write_folder(folder, write)


def load_training(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> dict:
    """Fill model and optimizer from a checkpoint written by `save_training`; returns its state."""
    loaded, _ = load(folder)
    model.load_state_dict(loaded.state_dict())
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in read_safetensors(folder / "optimizer.safetensors").items():
        i, name = key.split(".", 1)
        moments.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return runs.read_json(folder / "state.json")
