"""Peak memory of the RL update: the fused head against naive logits, alone and within a whole model.

    python benchmarks/memory.py                    this machine's best device, default shapes
    python benchmarks/memory.py --width 1536 --vocab 151936 --tokens 4096 8192
    python benchmarks/memory.py --markdown         also writes docs/results/memory-<device>.md

Measured is the most that the allocator held during forward and backward beyond what it held before, gradients included.
The naive update computes all logits, their log-softmax and the entropy, and lets autograd keep what it wants. To learn
whether a run of your own fits, use --dry-run of the training scripts.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from common import SHAPES, Page, make_model, peak_bytes

import kernels
from nanopcf.model import Transformer
from nanopcf.objectives import RECIPES, rl_loss
from nanopcf.packing import Rows, Sequence, pack
from nanopcf.run import machine

LOSS = partial(rl_loss, recipe=RECIPES["grpo"])


def mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def terms(count: int, device: torch.device) -> list[torch.Tensor]:
    numbers = [torch.randn(count, device=device) for _ in range(4)]
    return [*numbers, torch.zeros(count, dtype=torch.bool, device=device)]


def fused(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return kernels.linear_token_loss(hidden, weight, targets, LOSS, terms(len(hidden), hidden.device))[0]


def naive(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logp = (hidden @ weight.T).float().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    logprob = logp.gather(1, targets[:, None]).squeeze(1)
    return LOSS(logprob, None, entropy, *terms(len(hidden), hidden.device))


def head_peak(head: Callable, count: int, width: int, vocab: int, device: torch.device, dtype: torch.dtype) -> int:
    hidden = torch.randn(count, width, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, device=device, dtype=dtype).requires_grad_()
    targets = torch.randint(0, vocab, (count,), device=device)
    return peak_bytes(lambda: head(hidden, weight, targets).backward(), device)


def model_peak(model: Transformer, head: Callable, rows: Rows, recompute: bool) -> int:
    def update() -> None:
        hidden = model(rows.tokens, positions=rows.positions, documents=rows.documents)[rows.trained]
        head(hidden, model.head_weight, rows.targets[rows.trained]).backward()

    model.zero_grad()
    model.recompute = recompute
    return peak_bytes(update, rows.tokens.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--model", default="135M", choices=SHAPES, metavar="SIZE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--markdown", action="store_true", help="write docs/results/memory-<device>.md")
    a = parser.parse_args()
    device = machine.choose_device(a.device)
    dtype = machine.choose_dtype(a.dtype, device)
    page = Page("Memory of the RL update", device)

    intro = f"The head alone, width {a.width}, vocabulary {a.vocab:,}, {str(dtype).removeprefix('torch.')}:"
    page.head(intro, "tokens", "naive logits", "nanopcf", "ratio", "of it the gradients")
    for count in a.tokens:
        peaks = [head_peak(head, count, a.width, a.vocab, device, dtype) for head in (naive, fused)]
        gradients = (count + a.vocab) * a.width * dtype.itemsize
        page.row(f"{count:,}", mib(peaks[0]), mib(peaks[1]), f"{peaks[1] / peaks[0]:.2f}x", mib(gradients))

    model = make_model(a.model, 1024, device, dtype)
    weights = model.parameter_count() * dtype.itemsize
    intro = f"The whole {a.model} model ({mib(weights)} of weights), rows of 256 tokens:"
    page.head(intro, "tokens", "naive logits", "nanopcf", "nanopcf --recompute", "of it the gradients")
    for count in a.tokens:
        rows = pack([Sequence([0] * 256, 1)] * max(1, count // 256), 256).map(lambda t: t.to(device))
        peaks = [model_peak(model, *case) for case in ((naive, rows, False), (fused, rows, False), (fused, rows, True))]
        page.row(f"{rows.tokens.numel():,}", *map(mib, peaks), mib(weights))
    if a.markdown:
        page.write("memory")


if __name__ == "__main__":
    main()
