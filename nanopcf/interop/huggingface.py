"""Hugging Face's layout."""

import re
from dataclasses import asdict
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from nanopcf.model import ModelConfig, Transformer
from nanopcf.run.files import read_json
from nanopcf.tokenizer import TextTokenizer

HF_FIELDS = {  # ours -> Hugging Face's, and what that library takes where a config.json says nothing
    "vocab_size": ("vocab_size", None),
    "width": ("hidden_size", None),
    "layers": ("num_hidden_layers", None),
    "heads": ("num_attention_heads", None),
    "mlp_width": ("intermediate_size", None),
    "kv_heads": ("num_key_value_heads", "num_attention_heads"),
    "head_dim": ("head_dim", 0),  # width // heads
    "max_length": ("max_position_embeddings", 2048),
    "rope_theta": ("rope_theta", 10_000.0),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tied": ("tie_word_embeddings", False),
}
ROPE_FIELDS = {
    "rope_factor": "factor",
    "rope_low_freq": "low_freq_factor",
    "rope_high_freq": "high_freq_factor",
    "rope_original_length": "original_max_position_embeddings",
}


def to_hf_config(c: ModelConfig) -> dict:
    if c.qkv_bias and c.qk_norm:
        raise ValueError("checkpoint: no published architecture has both a bias and a norm on q and k")
    kind = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
    architecture = dict(qwen3="Qwen3ForCausalLM", qwen2="Qwen2ForCausalLM", llama="LlamaForCausalLM")[kind]
    own = asdict(c)
    values = {theirs: own[ours] for ours, (theirs, _) in HF_FIELDS.items()}
    if c.rope_factor != 1:
        values["rope_scaling"] = {"rope_type": "llama3"} | {v: own[k] for k, v in ROPE_FIELDS.items()}
    return {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_act": "silu",
        "attention_bias": False,
        **values,
    }


def from_hf_config(values: dict, source: Path) -> ModelConfig:
    """Raises ValueError for what is missing, and by name for what this transformer doesn't do: nothing is ignored."""
    kind = values.get("model_type")
    if kind not in ("qwen3", "qwen2", "llama"):
        raise ValueError(f"{source}: model_type {kind!r} isn't supported; qwen3, qwen2 and llama are")
    for name, kind_of in dict(rope_scaling=dict, rope_parameters=dict, layer_types=list).items():
        if not isinstance(values.get(name) or kind_of(), kind_of):
            raise ValueError(
                f"{source}: {name!r} is {values[name]!r:.60}, must be a JSON {'object' if kind_of is dict else 'list'}"
            )
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}  # older and newer spelling
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    sliding = values.get("use_sliding_window") or "sliding_attention" in (values.get("layer_types") or [])
    for refused, what in [
        (sliding, "sliding-window attention"),
        (values.get("attention_bias"), "attention_bias"),
        (values.get("mlp_bias"), "mlp_bias"),
        (values.get("quantization_config"), "quantised weights (quantization_config)"),
        (values.get("hidden_act", "silu") != "silu", f"hidden_act {values.get('hidden_act')!r}"),
        (rope_type not in ("default", "llama3"), f"rope type {rope_type!r}"),
        (rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1)) != 1, "partial rotary positions"),
    ]:
        if refused:
            raise ValueError(f"{source}: {what} isn't supported")
    values = values | ({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})
    own = {}
    for ours, (theirs, default) in HF_FIELDS.items():
        value = values.get(theirs)
        if value is None:
            value = values.get(default) if isinstance(default, str) else default
        if value is None:
            raise ValueError(f"{source}: no field {theirs!r}")
        own[ours] = value
    if rope_type == "llama3":
        missing = [v for v in ROPE_FIELDS.values() if v not in rope]
        if missing:
            raise ValueError(f"{source}: rope type 'llama3' without {missing[0]!r}")
        own |= {ours: rope[theirs] for ours, theirs in ROPE_FIELDS.items()}
    if kind == "qwen3" and values.get("head_dim") is None:
        own["head_dim"] = 128
    wrong = [k for k, v in own.items() if isinstance(v, bool) != (k == "tied") or not isinstance(v, (bool, int, float))]
    if wrong:
        raise ValueError(
            f"{source}: {HF_FIELDS.get(wrong[0], wrong)[0]!r} is {own[wrong[0]]!r}, must be {'true or false' if wrong[0] == 'tied' else 'a number'}"
        )
    try:
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


def find(path: str | Path) -> Path:
    """A folder as it is; an Org/Name that is no folder is downloaded through huggingface_hub, or found in its cache."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or str(path).startswith("."):
        raise ValueError(f"{path}: no such model folder")
    from huggingface_hub import snapshot_download  # comes with tokenizers

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # offline, unknown or private: the library has an exception for each
        raise ValueError(
            f"{path}: no such model folder, and it couldn't be had from the Hugging Face Hub ({type(error).__name__}); "
            "download it where there is a network, and give the folder"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that its index names; all of them inside the folder."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if not (folder / "model.safetensors").is_file():
            raise ValueError(f"{folder}: no model.safetensors in it, nor an index of several")
        return [folder / "model.safetensors"]
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(n, str) for n in listed.values()):
        raise ValueError(f"{index}: no 'weight_map' of names to files")
    names = sorted(set(listed.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {name!r} is not the name of a safetensors file in this folder")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: no such file, though the index names it")
    return [folder / name for name in names]


def load_tokenizer(folder: Path, eos_token_id: int | list[int] | None = None) -> TextTokenizer:
    """Reads folder/tokenizer.json, and the end tokens: tokenizer_config.json names the one that is trained, config.json
    (`eos_token_id`) and generation_config.json those that stop generation. Raises ValueError when one is missing."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a model folder needs its tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer file ({error})") from error
    stops = as_ids(eos_token_id)
    if (folder / "generation_config.json").exists():
        stops += as_ids(read_json(folder / "generation_config.json").get("eos_token_id"))
    named = {}
    if (folder / "tokenizer_config.json").exists():
        named = read_json(folder / "tokenizer_config.json")
    end = named.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if end is None and stops:
        end = tokenizer.id_to_token(stops[0])
    if not isinstance(end, str) or tokenizer.token_to_id(end) is None:
        raise ValueError(f"{folder}: no end token of this tokenizer: eos_token in tokenizer_config.json is {end!r}")
    template = named.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        try:
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except UnicodeError as error:
            raise ValueError(f"{folder / 'chat_template.jinja'}: not UTF-8 ({error})") from error
    if isinstance(template, list):  # several, by name
        several = [t for t in template if isinstance(t, dict)]
        template = next((t.get("template") for t in several if t.get("name") == "default"), None)
    stops = [i for i in stops if tokenizer.id_to_token(i) is not None]
    bos = named.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    return TextTokenizer(tokenizer, end, tuple(stops), template if isinstance(template, str) else None, bos or "")


def as_ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and 0 <= v < 2**31]
