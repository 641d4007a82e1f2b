"""Hugging Face's layout of a model: how its names and settings map to ours, and readers of the files of a folder.

Three architectures of theirs are one transformer of ours: Llama, Qwen2 (with a bias on q, k and v) and Qwen3 (with a
norm on q and k). Our q, k and v are stored as one matrix, and so are the two halves of the SwiGLU; a folder holds them
apart.

Nothing in a config.json is ignored that would change what the model computes: what our transformer cannot do is refused
by name. `nanopcf/checkpoint.py` opens and writes whole folders with these parts.
"""

import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from nanopcf.interop.turns import begin_ids, choose_end
from nanopcf.model import ModelConfig, Transformer
from nanopcf.run.files import read_json, write_json
from nanopcf.run.untrusted import panicked
from nanopcf.tokenizer import TextTokenizer

# ---- config.json ----

# A field of ModelConfig -> its name in config.json.
HF_NAMES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_length": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
# The same for Llama 3's stretched rotary positions, which config.json holds in an object of their own.
HF_ROPE_NAMES = {
    "rope_factor": "factor",
    "rope_low_freq": "low_freq_factor",
    "rope_high_freq": "high_freq_factor",
    "rope_original_length": "original_max_position_embeddings",
}
# What transformers takes where a config.json says nothing. A field that is not here must be given, except for kv_heads,
# which is then the number of heads. A head_dim of 0 stands for width // heads.
HF_DEFAULTS = {"head_dim": 0, "max_length": 2048, "rope_theta": 10_000.0, "norm_eps": 1e-6, "tied": False}
QWEN3_HEAD_DIM = 128


def to_hf_config(config: ModelConfig) -> dict:
    """The config.json of a model. Raises ValueError when no architecture of theirs computes what it does."""
    if config.qkv_bias and config.qk_norm:
        raise ValueError("checkpoint: no published architecture has both a bias and a norm on q and k")
    if config.qk_norm:
        model_type, architecture = "qwen3", "Qwen3ForCausalLM"
    elif config.qkv_bias:
        model_type, architecture = "qwen2", "Qwen2ForCausalLM"
    else:
        model_type, architecture = "llama", "LlamaForCausalLM"
    own = asdict(config)
    hf_config = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "attention_bias": False,
        **{theirs: own[ours] for ours, theirs in HF_NAMES.items()},
    }
    if config.rope_factor != 1:
        rope = {theirs: own[ours] for ours, theirs in HF_ROPE_NAMES.items()}
        hf_config["rope_scaling"] = {"rope_type": "llama3", **rope}
    return hf_config


def from_hf_config(hf_config: dict, source: Path) -> ModelConfig:
    """The shape of a model from its config.json; `source` is the file's path, for messages.

    Raises ValueError naming what is missing, what is no number, and what this transformer does not do.
    """
    model_type = hf_config.get("model_type")
    if model_type not in ("qwen3", "qwen2", "llama"):
        raise ValueError(f"{source}: model_type {model_type!r} isn't supported; qwen3, qwen2 and llama are")
    for name, kind in (("rope_scaling", dict), ("rope_parameters", dict), ("layer_types", list)):
        value = hf_config.get(name)
        if value and not isinstance(value, kind):
            expected = "a JSON object" if kind is dict else "a JSON list"
            raise ValueError(f"{source}: {name!r} is {value!r:.60}, must be {expected}")
    # Older files say rope_scaling, newer ones rope_parameters.
    rope = {**(hf_config.get("rope_scaling") or {}), **(hf_config.get("rope_parameters") or {})}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    refuse_unsupported(hf_config, rope, rope_type, source)

    fields = {}
    for ours, theirs in HF_NAMES.items():
        value = hf_config.get(theirs)
        if ours == "rope_theta" and "rope_theta" in rope:
            value = rope["rope_theta"]
        if value is None and ours == "kv_heads":
            value = fields["heads"]
        if value is None and ours == "head_dim" and model_type == "qwen3":
            value = QWEN3_HEAD_DIM
        if value is None:
            value = HF_DEFAULTS.get(ours)
        if value is None:
            raise ValueError(f"{source}: no field {theirs!r}")
        fields[ours] = value
    if rope_type == "llama3":
        for ours, theirs in HF_ROPE_NAMES.items():
            if theirs not in rope:
                raise ValueError(f"{source}: rope type 'llama3' without {theirs!r}")
            fields[ours] = rope[theirs]
    for ours, value in fields.items():
        # JSON's true is a number in Python; here the two are kept apart.
        right = isinstance(value, bool) if ours == "tied" else type(value) in (int, float)
        if not right:
            theirs = (HF_NAMES | HF_ROPE_NAMES)[ours]
            expected = "true or false" if ours == "tied" else "a number"
            raise ValueError(f"{source}: {theirs!r} is {value!r}, must be {expected}")
    try:
        return ModelConfig(**fields, qk_norm=model_type == "qwen3", qkv_bias=model_type == "qwen2")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from error


def refuse_unsupported(hf_config: dict, rope: dict, rope_type: object, source: Path) -> None:
    """Raises ValueError naming a setting with which the model would compute something that our transformer does not."""
    sliding = hf_config.get("use_sliding_window") or "sliding_attention" in (hf_config.get("layer_types") or [])
    activation = hf_config.get("hidden_act", "silu")
    rotated_share = rope.get("partial_rotary_factor", hf_config.get("partial_rotary_factor", 1))
    for is_set, what in [
        (sliding, "sliding-window attention"),
        (hf_config.get("attention_bias"), "attention_bias"),
        (hf_config.get("mlp_bias"), "mlp_bias"),
        (hf_config.get("quantization_config"), "quantised weights (quantization_config)"),
        (activation != "silu", f"hidden_act {activation!r}"),
        (rope_type not in ("default", "llama3"), f"rope type {rope_type!r}"),
        (rotated_share != 1, "partial rotary positions"),
    ]:
        if is_set:
            raise ValueError(f"{source}: {what} isn't supported")


# ---- the names of the weights ----


def to_hf_weights(model: Transformer) -> dict[str, Tensor]:
    """Views of the model's weights under Hugging Face's names: to write into a view is to write into the model."""
    config = model.config
    # The rows of q, k and v in the matrix that holds all three.
    qkv_rows = (config.heads * config.head_dim, config.kv_heads * config.head_dim, config.kv_heads * config.head_dim)
    weights = {"model.embed_tokens.weight": model.embedding.weight}
    for i, block in enumerate(model.blocks):
        prefix, attention = f"model.layers.{i}.", block.attention
        weights[prefix + "input_layernorm.weight"] = block.attention_norm.weight
        weights[prefix + "post_attention_layernorm.weight"] = block.mlp_norm.weight
        for name, weight in zip("qkv", attention.qkv.weight.split(qkv_rows), strict=True):
            weights[prefix + f"self_attn.{name}_proj.weight"] = weight
        if config.qkv_bias:
            for name, bias in zip("qkv", attention.qkv.bias.split(qkv_rows), strict=True):
                weights[prefix + f"self_attn.{name}_proj.bias"] = bias
        if config.qk_norm:
            weights[prefix + "self_attn.q_norm.weight"] = attention.q_norm.weight
            weights[prefix + "self_attn.k_norm.weight"] = attention.k_norm.weight
        weights[prefix + "self_attn.o_proj.weight"] = attention.out.weight
        for name, weight in zip(("gate", "up"), block.mlp.gate_up.weight.chunk(2), strict=True):
            weights[prefix + f"mlp.{name}_proj.weight"] = weight
        weights[prefix + "mlp.down_proj.weight"] = block.mlp.down.weight
    weights["model.norm.weight"] = model.norm.weight
    if not config.tied:
        weights["lm_head.weight"] = model.head.weight
    return weights


# ---- the folder and its files of weights ----


def find(path: str | Path) -> Path:
    """The folder of a model. What is no folder but an Org/Name is downloaded from the hub, or taken from its cache.

    Raises ValueError when there is neither.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    # Org/Name: letters, digits, "_", "-" and "." on both sides of one slash, as in "Qwen/Qwen2.5-0.5B".
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or str(path).startswith("."):
        raise ValueError(f"{path}: no such model folder")
    from huggingface_hub import snapshot_download  # installed with tokenizers

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:  # offline, unknown, private: the library has an exception for each
        raise ValueError(
            f"{path}: no such model folder, and it couldn't be had from the Hugging Face Hub ({type(error).__name__}); "
            "download it where there is a network, and give the folder"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the several files ("shards") that an index names.

    Raises ValueError when one is missing, when there are both, and when the index names a file outside of the folder.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if not (folder / "model.safetensors").is_file():
            raise ValueError(f"{folder}: no model.safetensors in it, nor an index of several")
        return [folder / "model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise ValueError(f"{index}: no 'weight_map' of names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {name!r} is not the name of a safetensors file in this folder")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: no such file, though the index names it")
    if "model.safetensors" not in names and (folder / "model.safetensors").exists():
        raise ValueError(
            f"{folder}: model.safetensors, and {index.name} of other files; move away what isn't the model"
        )
    return [folder / name for name in names]


def open_safetensors(path: Path) -> safe_open:
    """Open a file to read its tensors one by one. Raises ValueError when it is missing or not whole."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name. Raises ValueError when it is missing or not whole."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises OSError when the file cannot be written, for instance because the disk is full."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: can't be written ({error})") from error


# ---- the tokenizer's files ----


# The special tokens that have a name in tokenizer_config.json and in chat templates.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_tokenizer(
    folder: Path, eos_token_id: int | list[int] | None = None, *, chat: bool = False, end_token: str = ""
) -> TextTokenizer:
    """The tokenizer of a folder, with its end tokens, begin token and chat template.

    The end token that is trained is the one that tokenizer_config.json names; with `chat` the one with which the chat
    template ends an answer; and `end_token`, if it is given. Generation stops there, and at those of config.json
    (`eos_token_id`) and of generation_config.json.

    Raises ValueError when a file is missing or broken, or when there is no end token.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a model folder needs its tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        with suppress(Exception):  # it may have no token for this
            tokenizer.encode("0")
    except BaseException as error:  # the library raises a bare Exception, or panics
        if not (isinstance(error, Exception) or panicked(error)):
            raise
        raise ValueError(f"{path}: not a tokenizer file ({error})") from error
    # transformers stores with a tokenizer how it last cut and filled texts; here a text is encoded as it is.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    generation_config = read_json_if_there(folder / "generation_config.json")
    tokenizer_config = read_json_if_there(folder / "tokenizer_config.json")
    stop_ids = token_ids(eos_token_id) + token_ids(generation_config.get("eos_token_id"))
    # Older folders name special tokens in a file of their own, which transformers reads in this case.
    older = {} if "added_tokens_decoder" in tokenizer_config else read_json_if_there(folder / "special_tokens_map.json")
    named = {name: token_text(older.get(name) or tokenizer_config.get(name)) for name in NAMED_TOKENS}
    eos_token = named["eos_token"]
    if eos_token is None and stop_ids:
        eos_token = tokenizer.id_to_token(stop_ids[0])
    if not isinstance(eos_token, str) or tokenizer.token_to_id(eos_token) is None:
        raise ValueError(
            f"{folder}: no end token of this tokenizer: eos_token in tokenizer_config.json is {eos_token!r}"
        )
    named = {name: token for name, token in named.items() if isinstance(token, str)}
    loaded = TextTokenizer(
        tokenizer,
        eos_token,
        tuple(i for i in stop_ids if tokenizer.id_to_token(i) is not None),
        find_chat_template(folder, tokenizer_config),
        begin_ids(tokenizer),
        named,
    )
    choose_end(loaded, chat, end_token, folder)
    return loaded


def save_tokenizer(folder: Path, tokenizer: TextTokenizer) -> None:
    """Write tokenizer.json and tokenizer_config.json. Raises OSError when one cannot be written."""
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.end_token}
    tokenizer_config |= tokenizer.named
    if tokenizer.chat_template:
        tokenizer_config["chat_template"] = tokenizer.chat_template
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    tokenizer.save(folder / "tokenizer.json")


def read_json_if_there(path: Path) -> dict:
    """The object in a file that a folder may lack, then {}. Raises ValueError when it is broken."""
    return read_json(path) if path.exists() else {}


def token_ids(value: object) -> list[int]:
    """The ids in an `eos_token_id`, which is one number, a list of them, or absent."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and 0 <= v < 2**31]


def token_text(value: object) -> object:
    """The text of a token in tokenizer_config.json: "</s>", or {"content": "</s>", ...}; None where there is none."""
    return value.get("content") if isinstance(value, dict) else value


def find_chat_template(folder: Path, tokenizer_config: dict) -> str | None:
    """The template in chat_template.jinja, or else in tokenizer_config.json, which may hold several by name.

    Raises ValueError when the file is not UTF-8.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error})") from error
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # [{"name": "default", "template": "..."}, {"name": "tool_use", ...}]
        named = [t for t in template if isinstance(t, dict)]
        template = next((t.get("template") for t in named if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None
