"""Models on disk: folders in Hugging Face's layout (config.json, model.safetensors, tokenizer.json), and the
training state beside them. Safetensors and JSON only: nothing in a checkpoint can run code.

Our q, k, v and gate, up matrices are stored fused; a folder holds them apart, under the names of Qwen3 (norm on q and
k), Qwen2 (bias on q, k, v) or Llama. Weights load strictly: every name and shape, nothing missing, nothing extra.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanopcf.interop.huggingface import find, from_hf_config, load_tokenizer, to_hf_config, to_hf_weights, weight_files
from nanopcf.model import Transformer
from nanopcf.optim import Optimizer
from nanopcf.run import files, parallel
from nanopcf.run.folder import checkpoints, prune
from nanopcf.tokenizer import TextTokenizer


def write_model(folder: Path, model: Transformer, tokenizer: TextTokenizer) -> None:
    """The files of a model, into a folder that is there."""
    ends = tokenizer.stop_ids
    hf = to_hf_config(model.config) | {
        "eos_token_id": ends if len(ends) > 1 else tokenizer.eos_id,
        "torch_dtype": str(model.head_weight.dtype).removeprefix("torch."),
    }
    files.write_json(folder / "config.json", hf)
    files.write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.end_token}
        | ({"bos_token": tokenizer.bos_token} if tokenizer.bos_token else {})
        | ({"chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}),
    )
    files.write_json(folder / "generation_config.json", {"eos_token_id": hf["eos_token_id"]})
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
    files.write_folder(Path(path), lambda folder: write_model(folder, model, tokenizer))


def load(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Transformer, TextTokenizer]:
    """The model and tokenizer of a folder, or of an Org/Name on the Hugging Face Hub.

    Raises ValueError saying what is missing, extra or of another shape.
    """
    path = find(path)
    hf = files.read_json(path / "config.json")
    config = from_hf_config(hf, path / "config.json")
    tokenizer = load_tokenizer(path, hf.get("eos_token_id"))
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {config.vocab_size}; they don't belong together"
        )
    shards = weight_files(path)  # before the model is made: a wrong folder is told at once
    with torch.device("meta"):
        shapes = {name: list(w.shape) for name, w in to_hf_weights(Transformer(config)).items()}
    problems, where = [], {}
    for file in shards:
        with open_safetensors(file) as weights:
            for name in weights.keys():
                where[name] = file
                if name not in shapes:
                    redundant = name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tied)
                    problems += [] if redundant else [f"extra {name}"]
                elif weights.get_slice(name).get_shape() != shapes[name]:
                    problems.append(f"{name} is {weights.get_slice(name).get_shape()}, expected {shapes[name]}")
    problems = [f"missing {name}" for name in shapes if name not in where] + problems
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{path}: weights don't match config.json: {'; '.join(problems[:8])}{more}")
    model = Transformer(config).to(device, dtype)
    views, head = to_hf_weights(model), None
    for file in shards:  # a tensor at a time: never two copies of the model
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
    return load_tokenizer(folder, files.read_json(folder / "config.json").get("eos_token_id"))


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
        files.write_json(temporary / "state.json", state)

    files.write_folder(folder, write)


def save_step(
    out: Path,
    step: int,
    model: Transformer,
    tokenizer: TextTokenizer,
    optimizer: Optimizer,
    state: dict,
    *,
    keep: int,
    goodness: dict[int, float],
) -> None:
    """The checkpoint of a run's step: rank 0 writes it, the others wait. Then `prune`; older checkpoints lose their
    optimizer: RL may start from any, training goes on from the last."""
    if parallel.rank() == 0:
        save_training(out / "checkpoints" / f"step-{step}", model, tokenizer, optimizer, state)
        prune(out, keep, goodness)
        for _, older in checkpoints(out)[:-1]:
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
    saved = files.read_json(folder / "state.json")
    if {k: type(v) for k, v in saved.items()} != {k: type(v) for k, v in state.items()}:
        raise ValueError(f"{folder / 'state.json'}: {saved}, expected values like {state}")
    return saved
