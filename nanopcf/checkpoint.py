"""Models on disk: folders in Hugging Face's layout (config.json, model.safetensors, tokenizer.json).

    python -m nanopcf.checkpoint verify DIR         a checkpoint, or all of a run: is every file as it was saved?

A checkpoint of a run holds more, which training needs to continue: optimizer.safetensors; state.json, with the SHA-256
of every other file of the model; and metrics.json, which says how far metrics.jsonl went.

Weights load strictly, in both directions: each weight of the model must be in the folder, in its shape, and the folder
must hold no other. A wrong folder is an error then, and not a model that writes fluent nonsense. How our names and
settings become Hugging Face's is told in `nanopcf/interop/huggingface.py`, and there stand the readers of single files.

Left out: pickled weights (.bin, .pt), because opening one can run code. Safetensors and JSON cannot.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nanopcf.interop import huggingface
from nanopcf.interop.huggingface import open_safetensors, read_safetensors, to_hf_weights, write_safetensors
from nanopcf.model import ModelConfig, Transformer
from nanopcf.optim import Optimizer
from nanopcf.run import config, files, machine, parallel
from nanopcf.run.config import Argument
from nanopcf.run.folder import check_still_ours, checkpoints, digest, fingerprint, prune, read_metrics
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
    # Names and shapes come first: a wrong folder is told at once, before memory is taken. The weights of such a model
    # take hardly any, as long as they are not filled, but the angles of its positions do: one position is enough here.
    shapes = to_hf_weights(Transformer(replace(config, max_length=1), initialise=False))
    check_weights(folder, shards, config, {name: list(weight.shape) for name, weight in shapes.items()})
    needed, free = 16 * config.max_length * config.head_dim, machine.free_memory(torch.device("cpu"))
    if needed > free:
        raise ValueError(
            f"{folder}: {config.max_length:,} positions, as config.json has them, need {needed / 2**30:.1f} GiB of "
            f"memory, {free / 2**30:.1f} GiB are free; with a smaller max_position_embeddings they need less"
        )
    model = Transformer(config, initialise=False).to(device, dtype)
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


# ---- the checkpoints of a run ----

SUMS = "sha256"  # in state.json: file -> its SHA-256; "state.json" stands for the state itself
OPTIMIZER = "optimizer.safetensors"


def save_training(
    folder: Path, model: Transformer, tokenizer: TextTokenizer, optimizer: dict[str, Tensor], state: dict
) -> None:
    """Write a model with the tensors of its optimizer and `state`; whole or not at all.

    Raises OSError when it cannot be written.
    """

    def write(temporary: Path) -> None:
        write_model(temporary, model, tokenizer)
        write_safetensors(optimizer, temporary / OPTIMIZER)
        sums = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        files.write_json(temporary / "state.json", state | {SUMS: sums | {"state.json": sha256_of_state(state)}})
        metrics = folder.parents[1] / "metrics.jsonl"  # of the run, if the folder is a checkpoint in one
        if metrics.exists():
            files.write_json(temporary / "metrics.json", digest(metrics.read_bytes()))

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

    Training continues from the newest checkpoint, and from the one before if the newest is damaged. Older ones are
    models for RL to start from, and lose their optimizer, which is at least twice as large as the model.
    """
    tensors = optimizer_tensors(optimizer)  # each process may keep a part of them
    if parallel.rank() == 0:
        check_still_ours(out)
        folder = out / "checkpoints" / f"step-{step}"
        # A run that was killed after its last save comes here again. To replace the checkpoint would only risk it.
        if not folder.exists() or read_state(folder)[0] != state:
            save_training(folder, model, tokenizer, tensors, state)
        prune(out, keep, goodness)
        for _, older in checkpoints(out)[:-2]:
            (older / OPTIMIZER).unlink(missing_ok=True)
    parallel.wait()


def resume(out: Path, model: Transformer, optimizer: Optimizer, state: dict) -> dict | None:
    """`load_training` from the newest checkpoint of a run; None if the run has just begun.

    Raises ValueError when the newest checkpoint is damaged, saying from which one the run can go on, or when it is lost
    and --resume would train again what is trained.
    """
    saved = checkpoints(out)
    step = saved[-1][0] if saved else -1
    path = out / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    logged = max((row["step"] for row in rows if isinstance(row.get("step"), int)), default=-1)
    for result in ("checkpoints.json", "curve.json"):
        if (out / result).exists() and logged > step:
            raise ValueError(
                f"{out} has ended, yet its last checkpoint, step-{logged}, is gone; put it back, or remove {result} "
                "to train its steps again"
            )
    if not saved:
        if logged > files.read_json(out / "config.json")["checkpoint_every"]:
            raise ValueError(f"{out}: {path.name} goes up to step {logged}, yet there is no checkpoint; put them back")
        return None
    _, newest = saved[-1]
    try:
        return load_training(newest, model, optimizer, state)
    except (ValueError, OSError) as error:
        older = [folder for _, folder in saved[:-1] if (folder / OPTIMIZER).exists()]
        advice = "older checkpoints hold no optimizer, so the run can't go on; they serve as --model of another run"
        if older:
            advice = f"remove {newest}, and --resume goes on from {older[-1].name}"
        raise ValueError(f"{error}; {advice}") from error


def load_training(folder: Path, model: Transformer, optimizer: Optimizer, state: dict) -> dict:
    """Fill the model and the optimizer from a checkpoint that `save_training` wrote, and return its saved state.

    `state` is a run's state at its start: the saved one must have the same names, with values of the same types.
    Raises ValueError naming the file that does not fit, or that is not as it was saved.
    """
    verify(folder)
    saved, _ = read_state(folder)
    if "slots" in state:
        saved = {"slots": state["slots"]} | saved  # older checkpoints hold no slots
    if {name: type(value) for name, value in saved.items()} != {name: type(value) for name, value in state.items()}:
        raise ValueError(f"{folder / 'state.json'}: {saved}, expected values like {state}")
    if folder.name.startswith("step-") and folder.name != f"step-{saved['step']}":
        raise ValueError(f"{folder / 'state.json'}: it is the state of step {saved['step']}")
    loaded, _ = load(folder, dtype=model.head_weight.dtype)
    model.load_state_dict(loaded.state_dict())
    tensors = read_safetensors(folder / OPTIMIZER)
    try:
        fill_optimizer(optimizer, tensors)
    except ValueError as error:
        raise ValueError(f"{folder / OPTIMIZER}: {error}") from error
    return saved


def read_state(folder: Path) -> tuple[dict, dict[str, str]]:
    """(state, {file: SHA-256}) of a checkpoint; those of older versions have no sums. Raises ValueError if broken."""
    state = files.read_json(folder / "state.json")
    sums = state.pop(SUMS, {})
    if not isinstance(sums, dict):
        raise ValueError(f"{folder / 'state.json'}: {SUMS} is {sums!r}, expected the sum of each file")
    return state, sums


def verify(folder: Path) -> bool:
    """Is every file of a checkpoint as it was saved? False if it holds no sums, because an older version wrote it.

    The optimizer may be missing, as older checkpoints lose it. Raises ValueError that names a file which is damaged.
    """
    state, sums = read_state(folder)
    for name, was in sums.items():
        path = folder / name
        if name == OPTIMIZER and not path.exists():
            continue
        if not path.is_file():
            raise ValueError(f"{path}: missing")
        if was != (sha256_of_state(state) if name == "state.json" else sha256(path)):
            raise ValueError(f"{path}: damaged, it is not what was saved (another SHA-256)")
    return bool(sums)


def sha256(path: Path) -> str:
    return fingerprint(path).partition(":")[2]


def sha256_of_state(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


# ---- the tensors of an optimizer ----


def optimizer_shapes(optimizer: Optimizer, stepped: bool) -> dict[str, torch.Size]:
    """Name -> shape of all that a resumed run needs of an optimizer: the float32 masters of a bfloat16 model, such as
    "3.master", and AdamW's "3.step", "3.exp_avg" and "3.exp_avg_sq", which it has after its first step."""
    shapes = {f"{i}.master": p.shape for i, (p, master) in enumerate(optimizer.pairs) if master is not p}
    for i, (p, _) in enumerate(optimizer.pairs) if stepped else []:
        shapes |= {f"{i}.step": torch.Size(), f"{i}.exp_avg": p.shape, f"{i}.exp_avg_sq": p.shape}
    return shapes


@torch.no_grad()
def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The tensors that `optimizer_shapes` names, on the CPU of rank 0; nothing in the other processes, which take part
    because each may keep a share of them."""
    adamw, tensors = optimizer.adamw.state, {}
    for key, shape in optimizer_shapes(optimizer, parallel.summed(len(adamw)) > 0).items():
        i, name = key.split(".")
        (p, master), owner = optimizer.pairs[int(i)], optimizer.owners[int(i)]
        if parallel.owns(owner):
            tensor = master if name == "master" else adamw[master][name]
        else:
            tensor = torch.empty(shape, device=p.device)
        parallel.broadcast(tensor, owner)
        if parallel.rank() == 0:
            tensors[key] = tensor.cpu()
    return tensors


@torch.no_grad()
def fill_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take over what `optimizer_tensors` gave, each process its share of it.

    Raises ValueError when it came from the optimizer of another model.
    """
    expected = optimizer_shapes(optimizer, stepped=any(name.endswith(".step") for name in tensors))
    wrong = {name: tensor.shape for name, tensor in tensors.items()}.items() ^ expected.items()
    if wrong:
        name = min(name for name, _ in wrong)
        raise ValueError(f"not the optimizer of this model: {name!r} is missing, extra or of another shape")
    own = [i for i, owner in enumerate(optimizer.owners) if parallel.owns(owner)]  # in the order of AdamW's
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        i, name = key.split(".")
        if int(i) in own and name == "master":
            optimizer.masters[int(i)].copy_(tensor)
        elif int(i) in own:
            state.setdefault(own.index(int(i)), {})[name] = tensor
    adamw = optimizer.adamw
    adamw.load_state_dict({"state": state, "param_groups": adamw.state_dict()["param_groups"]})


# ---- the command ----


@dataclass(frozen=True)
class VerifyConfig(config.Config):
    action: Argument  # verify
    folder: Argument  # a checkpoint, or a run with checkpoints

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.action != "verify":
            raise ValueError(f"no {self.action!r}; there is: python -m nanopcf.checkpoint verify DIR")


def main(c: VerifyConfig) -> None:
    """Print what `verify` finds of each checkpoint. Raises ValueError after the last one if any is damaged."""
    folders = [folder for _, folder in checkpoints(Path(c.folder))] or [Path(c.folder)]
    if folders == [Path(c.folder)] and not (folders[0] / "state.json").exists():
        raise ValueError(f"{c.folder} is neither a run with checkpoints nor a checkpoint, which has a state.json")
    damaged = []
    for folder in folders:
        try:
            found = "whole" if verify(folder) else "holds no sums: an older version wrote it"
        except ValueError as error:
            found, damaged = f"damaged: {error}", [*damaged, folder]
        print(f"{folder}: {found}")
    if damaged:
        raise ValueError(f"{len(damaged)} of {len(folders)} checkpoints are damaged")


if __name__ == "__main__":
    config.run_cli(lambda: main(config.parse(VerifyConfig, __doc__)))
