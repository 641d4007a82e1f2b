"""Models on disk: folders in Hugging Face's layout (config.json, model.safetensors, tokenizer.json).

A checkpoint of a run holds two more files, which training needs to continue: optimizer.safetensors and state.json.

Weights load strictly, in both directions: each weight of the model must be in the folder, in its shape, and the folder
must hold no other. A wrong folder is an error then, and not a model that writes fluent nonsense. How our names and
settings become Hugging Face's is told in `nanopcf/interop/huggingface.py`, and there stand the readers of single files.

Left out: pickled weights (.bin, .pt), because opening one can run code. Safetensors and JSON cannot.
"""

from pathlib import Path

import torch
from torch import Tensor

from nanopcf.interop import huggingface
from nanopcf.interop.huggingface import open_safetensors, read_safetensors, to_hf_weights, write_safetensors
from nanopcf.model import ModelConfig, Transformer
from nanopcf.optim import Optimizer
from nanopcf.run import files, parallel
from nanopcf.run.folder import checkpoints, prune
from nanopcf.tokenizer import TextTokenizer


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    finite: bool = True,
    **ends: bool | str,
) -> tuple[Transformer, TextTokenizer]:
    """The model and the tokenizer of a folder, or of an Org/Name on the Hugging Face Hub.

    finite: the weights must be finite numbers. ends: `chat` and `end_token`, which say how an answer ends
    (`huggingface.load_tokenizer`).
    Raises ValueError saying which file is missing or broken, and which weights are missing, extra, of another shape or
    no finite numbers.
    """
    folder = huggingface.find(path)
    hf_config = files.read_json(folder / "config.json")
    config = huggingface.from_hf_config(hf_config, folder / "config.json")
    tokenizer = huggingface.load_tokenizer(folder, hf_config.get("eos_token_id"), **ends)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {config.vocab_size}; "
            "they don't belong together"
        )
    shards = huggingface.weight_files(folder)
    model = Transformer(config, initialise=False)
    # Names and shapes come first: a wrong folder is told at once, before the weights take memory.
    check_weights(folder, shards, config, {name: list(w.shape) for name, w in to_hf_weights(model).items()})
    model = model.to(device, dtype)
    # Views of the model's own memory, under Hugging Face's names: copying into them fills the model.
    views = to_hf_weights(model)
    head = None
    for shard in shards:
        with open_safetensors(shard) as tensors, torch.no_grad():
            # One tensor at a time: two copies of the model are never in memory.
            for name in tensors.keys():
                tensor = tensors.get_tensor(name)
                if not tensor.is_floating_point():
                    raise ValueError(f"{shard}: {name} is {tensor.dtype}; weights are floating-point numbers")
                if finite and not tensor.isfinite().all():
                    raise ValueError(f"{shard}: the model is broken, its {name} holds a number that is not finite")
                if name in views:
                    views[name].copy_(tensor)
                elif name == "lm_head.weight":
                    head = tensor.to(dtype)
    if head is not None and not torch.equal(head, model.embedding.weight.detach().cpu()):
        raise ValueError(f"{folder}: tie_word_embeddings is set, yet lm_head.weight differs from the embedding")
    return model, tokenizer


def check_weights(folder: Path, shards: list[Path], config: ModelConfig, expected: dict[str, list[int]]) -> None:
    """Raises ValueError unless the files hold every weight of such a model, {name: shape}, and no other."""
    found: list[tuple[str, list[int]]] = []
    for shard in shards:
        with open_safetensors(shard) as tensors:
            found += [(name, tensors.get_slice(name).get_shape()) for name in tensors.keys()]
    names = {name for name, _ in found}
    problems = [f"missing {name}" for name in expected if name not in names]
    for name, shape in found:
        # Some folders hold what the model computes itself: rotary frequencies, and the head of a tied model.
        redundant = name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tied)
        if name not in expected and not redundant:
            problems.append(f"extra {name}")
        elif name in expected and shape != expected[name]:
            problems.append(f"{name} is {shape}, expected {expected[name]}")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{folder}: weights don't match config.json: {'; '.join(problems[:8])}{more}")


def load_tokenizer_of(path: str | Path, **ends: bool | str) -> TextTokenizer:
    """The tokenizer alone of what `load` opens. Raises ValueError when one of its files is missing or broken."""
    folder = huggingface.find(path)
    return huggingface.load_tokenizer(folder, files.read_json(folder / "config.json").get("eos_token_id"), **ends)


def save(model: Transformer, tokenizer: TextTokenizer, path: str | Path) -> None:
    """Write a folder that `load`, transformers and vLLM open; whole or not at all. Raises OSError when it cannot."""
    files.write_folder(Path(path), lambda folder: write_model(folder, model, tokenizer))


def write_model(folder: Path, model: Transformer, tokenizer: TextTokenizer) -> None:
    """Write the files of a model into a folder that exists. Raises OSError when one cannot be written."""
    hf_config = huggingface.to_hf_config(model.config)
    hf_config["eos_token_id"] = tokenizer.stop_ids if len(tokenizer.stop_ids) > 1 else tokenizer.eos_id
    hf_config["torch_dtype"] = str(model.head_weight.dtype).removeprefix("torch.")
    files.write_json(folder / "config.json", hf_config)
    files.write_json(folder / "generation_config.json", {"eos_token_id": hf_config["eos_token_id"]})
    huggingface.save_tokenizer(folder, tokenizer)
    # The views of q, k and v share one matrix: a file needs each of them in memory of its own.
    weights = {name: view.detach().contiguous().cpu() for name, view in to_hf_weights(model).items()}
    write_safetensors(weights, folder / "model.safetensors")


def save_training(
    folder: Path, model: Transformer, tokenizer: TextTokenizer, optimizer: Optimizer, state: dict
) -> None:
    """Write a model with its optimizer and `state`; whole or not at all. Raises OSError when it cannot be written."""

    def write(temporary: Path) -> None:
        write_model(temporary, model, tokenizer)
        write_safetensors(optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
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
    """Write the checkpoint of a run's step and `prune` older ones: rank 0 does, the others wait. Raises OSError.

    Training continues from the newest checkpoint alone. Older ones are models for RL to start from, and lose their
    optimizer, which is at least twice as large as the model.
    """
    if parallel.rank() == 0:
        save_training(out / "checkpoints" / f"step-{step}", model, tokenizer, optimizer, state)
        prune(out, keep, goodness)
        for _, older in checkpoints(out)[:-1]:
            (older / "optimizer.safetensors").unlink(missing_ok=True)
    parallel.wait()


def load_training(folder: Path, model: Transformer, optimizer: Optimizer, state: dict) -> dict:
    """Fill the model and the optimizer from a checkpoint that `save_training` wrote, and return its saved state.

    `state` is a run's state at its start: the saved one must have the same names, with values of the same types.
    Raises ValueError naming the file that does not fit.
    """
    loaded, _ = load(folder, dtype=model.head_weight.dtype)
    model.load_state_dict(loaded.state_dict())
    tensors = read_safetensors(folder / "optimizer.safetensors")
    try:
        fill_optimizer(optimizer, tensors)
    except ValueError as error:
        raise ValueError(f"{folder / 'optimizer.safetensors'}: {error}") from error
    saved = files.read_json(folder / "state.json")
    if {name: type(value) for name, value in saved.items()} != {name: type(value) for name, value in state.items()}:
        raise ValueError(f"{folder / 'state.json'}: {saved}, expected values like {state}")
    return saved


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """All that a resumed run needs of an optimizer, on the CPU: "3.step", "3.exp_avg", "3.exp_avg_sq" of AdamW, and the
    float32 masters of a bfloat16 model, "3.master"."""
    state = optimizer.adamw.state_dict()["state"]  # {3: {"step": ..., "exp_avg": ...}}; empty before the first step
    named = {f"{i}.{name}": tensor for i, moments in state.items() for name, tensor in moments.items()}
    return {name: tensor.cpu() for name, tensor in (named | master_copies(optimizer)).items()}


def master_copies(optimizer: Optimizer) -> dict[str, Tensor]:
    """The masters that are not parameters themselves, by names such as "3.master"; none with a float32 model."""
    return {f"{i}.master": master for i, (p, master) in enumerate(optimizer.pairs) if master is not p}


@torch.no_grad()
def fill_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take over what `optimizer_tensors` gave. Raises ValueError when it came from the optimizer of another model."""
    expected = {name: master.shape for name, master in master_copies(optimizer).items()}
    if any(name.endswith(".step") for name in tensors):
        for i, master in enumerate(optimizer.masters):
            expected |= {f"{i}.step": torch.Size(), f"{i}.exp_avg": master.shape, f"{i}.exp_avg_sq": master.shape}
    wrong = {name: tensor.shape for name, tensor in tensors.items()}.items() ^ expected.items()
    if wrong:
        name = min(name for name, _ in wrong)
        raise ValueError(f"not the optimizer of this model: {name!r} is missing, extra or of another shape")
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        i, name = key.split(".")
        if name == "master":
            optimizer.masters[int(i)].copy_(tensor)
        else:
            state.setdefault(int(i), {})[name] = tensor
    adamw = optimizer.adamw
    adamw.load_state_dict({"state": state, "param_groups": adamw.state_dict()["param_groups"]})
