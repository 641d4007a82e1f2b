"""The first number that isn't finite ends a run. What led to it is kept, and can be run again:

    python -m nanopcf.tools.replay runs/sft/not-finite

The folder holds the weights before the step (as a model folder), the packed batch, and what the loss took besides. The
replay runs it a row at a time and names the sequences, the first module and the parameters where numbers go wrong.
"""

import argparse
import math
from dataclasses import asdict, fields
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
from nanopcf.tokenizer import TextTokenizer

FOLDER = "not-finite"


def stop(
    out: Path,
    found: str,
    model: Transformer,
    tokenizer: TextTokenizer,
    rows: Rows,
    *,
    recipe: Recipe | None = None,
    extras: list[Tensor] | None = None,
    temperature: float = 1.0,
) -> NoReturn:
    """Keep the weights and the batch in out/not-finite, and raise ValueError with `found` and how to replay it.

    rows: the batch of the optimizer step. recipe and extras: what `rl_loss` took, without them the loss is SFT's.
    """
    folder = out / FOLDER
    tensors = {f"rows.{f.name}": getattr(rows, f.name) for f in fields(Rows)}
    tensors |= {f"extras.{i}": e for i, e in enumerate(extras or [])}
    state = dict(found=found, recipe=asdict(recipe) if recipe else None, temperature=temperature)

    def write(temporary: Path) -> None:
        checkpoint.write_model(temporary, model, tokenizer)
        batch = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
        checkpoint.write_safetensors(batch, temporary / "batch.safetensors")
        files.write_json(temporary / "state.json", state)

    if parallel.rank() == 0:
        files.write_folder(folder, write)
    raise ValueError(
        f"{found}; the weights before it and its batch are kept, look with: python -m nanopcf.tools.replay {folder}"
        " (a lower --lr often helps)"
    )


def replay(folder: Path, device: torch.device) -> dict:
    """Forward and backward of a kept batch. Returns dict(found, rows, module, gradients, gradient_norm):

    rows: (row, loss, worst log-prob, its place) of each; module: the first whose output isn't finite, or None;
    gradients: names of the parameters whose gradient isn't finite.
    """
    state = files.read_json(folder / "state.json")
    batch = checkpoint.read_safetensors(folder / "batch.safetensors")
    dtype = machine.choose_dtype(files.read_json(folder / "config.json")["torch_dtype"], device)
    model, _ = checkpoint.load(folder, device, dtype)
    rows = Rows(*(batch[f"rows.{f.name}"].to(device) for f in fields(Rows)))
    extras = [batch[f"extras.{i}"].to(device) for i in range(sum(k.startswith("extras.") for k in batch))]
    first: list[str] = []

    def look(name: str, _module, _inputs, output) -> None:
        tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(t)]
        if not first and not all(t.isfinite().all() for t in tensors):
            first.append(name)

    for name, module in model.named_modules():
        module.register_forward_hook(partial(look, name or "the last norm"))
    table = []
    for r, row in enumerate(rows.split(1)):
        hidden, targets = trained_hidden(model, row)
        logprob = kernels.linear_logprob(hidden.detach(), model.head_weight, targets, temperature=state["temperature"])
        if state["recipe"]:
            at = row.index[row.trained]
            loss, _ = kernels.linear_token_loss(
                hidden,
                model.head_weight,
                targets,
                partial(rl_loss, recipe=Recipe(**state["recipe"])),
                [e[at] for e in extras],
                temperature=state["temperature"],
            )
        else:
            loss = kernels.linear_cross_entropy(hidden, model.head_weight, targets, reduction="sum")
            loss = loss / rows.trained.sum()
        loss.backward()
        worst = torch.where(logprob.isfinite(), logprob, -math.inf).argmin().item()
        table.append((r, loss.item(), logprob[worst].item(), row.trained[0].nonzero()[worst].item()))
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return dict(
        found=state["found"],
        rows=table,
        module=first[0] if first else None,
        gradients=[n for n, g in gradients.items() if not g.isfinite().all()],
        gradient_norm=math.hypot(*(g.norm().item() for g in gradients.values())),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="nanopcf.tools.replay", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, metavar="RUN/not-finite")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default auto)")
    args = parser.parse_args()
    if not args.folder.is_dir():
        raise ValueError(f"{args.folder}: no such folder; a run that met a number that isn't finite makes one")
    seen = replay(args.folder, machine.choose_device(args.device))
    print(f"the run said: {seen['found']}\n")
    print(f"{'row':>4} {'loss':>12} {'worst logprob':>14} {'at token':>9}")
    for r, loss, worst, at in seen["rows"]:
        print(f"{r:>4} {loss:>12.4g} {worst:>14.4g} {at:>9}")
    print(f"\nfirst module with an output that isn't finite: {seen['module'] or 'none'}")
    wrong = seen["gradients"]
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    print(
        f"gradients that aren't finite: {', '.join(wrong[:5]) + more if wrong else 'none'}; the norm is {seen['gradient_norm']:.4g}"
    )
    if seen["module"] is None and not wrong:
        print("all is finite here: what went wrong depends on the device, the dtype or the packing of that run")


if __name__ == "__main__":
    config.run_cli(main)
