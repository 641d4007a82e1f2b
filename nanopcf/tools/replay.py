"""A number that is not finite ends a training run. This command runs the failed step again, to see where it came from.

    python -m nanopcf.tools.replay runs/sft/not-finite

The run kept the weights before that step in the folder (as a model folder), the packed batch, and the other inputs of
its loss. The replay takes the batch row by row, and names the sequences, the first module and the parameters where the
numbers go wrong.
"""

import math
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

import kernels
from nanopcf import checkpoint
from nanopcf.model import Transformer
from nanopcf.objectives import Recipe, rl_loss
from nanopcf.packing import Rows, trained_hidden
from nanopcf.run import config, files, machine, parallel
from nanopcf.run.config import Argument, Device
from nanopcf.run.untrusted import printable
from nanopcf.tokenizer import TextTokenizer

FOLDER = "not-finite"


@dataclass(frozen=True)
class ReplayConfig(config.Config):
    folder: Argument  # RUN/not-finite
    device: Device = "auto"  # auto, cpu, cuda or mps


# ---- in the training run ----


def stop(
    out: Path,
    problem: str,
    model: Transformer,
    tokenizer: TextTokenizer,
    rows: Rows,
    *,
    recipe: Recipe | None = None,
    extras: list[Tensor] | None = None,
    temperature: float = 1.0,
) -> NoReturn:
    """Keep the weights and the batch in out/not-finite. Raises ValueError with `problem` and how to replay it.

    rows: the packed batch of the optimizer step. recipe and extras: the inputs of `rl_loss`; without them the loss is
    that of SFT.
    """
    folder = out / FOLDER
    tensors = {f"rows.{field.name}": getattr(rows, field.name) for field in fields(Rows)}
    tensors |= {f"extras.{i}": extra for i, extra in enumerate(extras or [])}
    state = {"found": problem, "recipe": asdict(recipe) if recipe else None, "temperature": temperature}

    def write(temporary: Path) -> None:
        checkpoint.write_model(temporary, model, tokenizer)
        batch = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        checkpoint.write_safetensors(batch, temporary / "batch.safetensors")
        files.write_json(temporary / "state.json", state)

    if parallel.rank() == 0:
        files.write_folder(folder, write)
    raise ValueError(
        f"{problem}; the weights before it and its batch are kept, look with: python -m nanopcf.tools.replay {folder}"
        " (a lower --lr often helps)"
    )


# ---- in the replay ----


def watch_outputs(model: Transformer) -> list[str]:
    """A list that the next forward passes fill with the names of modules whose output is not finite, in order."""
    names: list[str] = []

    def look(name: str, _module: torch.nn.Module, _inputs: tuple, output: Tensor | tuple) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        if not all(tensor.isfinite().all() for tensor in outputs if torch.is_tensor(tensor)):
            names.append(name)

    for name, module in model.named_modules():
        module.register_forward_hook(partial(look, name or "the last norm"))
    return names


def replay(folder: Path, device: torch.device) -> dict:
    """Forward and backward pass of a kept batch. Returns dict(found, rows, module, gradients, gradient_norm):

    found: what the run said; rows: (row, loss, worst log-prob, its position) of each packed row;
    module: the first whose output is not finite, or None; gradients: names of the parameters whose gradient is not
    finite.
    """
    state = files.read_json(folder / "state.json")
    batch = checkpoint.read_safetensors(folder / "batch.safetensors")
    dtype = machine.choose_dtype(files.read_json(folder / "config.json")["torch_dtype"], device)
    model, _ = checkpoint.load(folder, device, dtype, finite=False)
    rows = Rows(*(batch[f"rows.{field.name}"].to(device) for field in fields(Rows)))
    count = sum(name.startswith("extras.") for name in batch)
    extras = [batch[f"extras.{i}"].to(device) for i in range(count)]
    loss_fn = partial(rl_loss, recipe=Recipe(**state["recipe"])) if state["recipe"] else None
    bad_modules = watch_outputs(model)
    table = []
    for r, row in enumerate(rows.split(1)):
        hidden, targets = trained_hidden(model, row)  # (N, D), (N,)
        head = model.head_weight
        logprobs = kernels.linear_logprob(hidden.detach(), head, targets, temperature=state["temperature"])  # (N,)
        if loss_fn:
            places = row.index[row.trained]  # of this row's tokens in the flat order of `extras`
            inputs = [extra[places] for extra in extras]
            loss, _ = kernels.linear_token_loss(
                hidden, head, targets, loss_fn, inputs, temperature=state["temperature"]
            )
        else:
            loss = kernels.linear_cross_entropy(hidden, head, targets, reduction="sum") / rows.trained.sum()
        loss.backward()
        # a log-prob that is not finite is the worst there can be
        worst = torch.where(logprobs.isfinite(), logprobs, -math.inf).argmin().item()
        position = row.trained[0].nonzero()[worst].item()
        table.append((r, loss.item(), logprobs[worst].item(), position))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        "found": state["found"],
        "rows": table,
        "module": bad_modules[0] if bad_modules else None,
        "gradients": [name for name, gradient in gradients.items() if not gradient.isfinite().all()],
        "gradient_norm": math.hypot(*(gradient.norm().item() for gradient in gradients.values())),
    }


def main() -> None:
    c = config.parse(ReplayConfig, __doc__)
    folder = Path(c.folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a run that met a number that isn't finite makes one")
    result = replay(folder, machine.choose_device(c.device))
    print(f"the run said: {printable(result['found'])}\n")
    print(f"{'row':>4} {'loss':>12} {'worst logprob':>14} {'at token':>9}")
    for row, loss, logprob, position in result["rows"]:
        print(f"{row:>4} {loss:>12.4g} {logprob:>14.4g} {position:>9}")
    print(f"\nfirst module with an output that isn't finite: {result['module'] or 'none'}")
    names = result["gradients"]
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    print(f"gradients that aren't finite: {listed or 'none'}; the norm is {result['gradient_norm']:.4g}")
    if result["module"] is None and not names:
        print("all is finite here: what went wrong depends on the device, the dtype or the packing of that run")


if __name__ == "__main__":
    config.run_cli(main)
