"""Where the time of generation and of a training step goes: shares by kind of operation, and of the roofline.

    python benchmarks/breakdown.py                          this machine's best device, default models
    python benchmarks/breakdown.py --models 135M --rows 32
    python benchmarks/breakdown.py --markdown               also writes docs/results/breakdown-<device>.md

Three stages, on random weights: prefill (--rows prompts of 64 tokens), generation (--new-tokens more for each of them)
and training (forward, backward and optimizer on --rows packed rows of --length tokens, two documents per row). Shares
are torch.profiler's self times of the device that does the work. The profiler slows small operations down, so tokens
per second come from runs without it.

The roofline of prefill and training is 2 and 6 FLOPs per parameter and token at this machine's rate of a large product,
attention not counted; that of generation is `roofline` in sampler.py. On a GPU generation is profiled step by step, and
timed as a captured graph.
"""

import argparse
import statistics
from collections import Counter
from collections.abc import Callable
from functools import cache, partial

import torch
from common import SHAPES, Page, clock, make_model, profiled, wall_rates
from sampler import roofline

import train_sft
from nanopcf.model import Transformer
from nanopcf.optim import Optimizer
from nanopcf.packing import Sequence, pack
from nanopcf.run import machine
from nanopcf.sampler import Sampler, prefill

# The kind of an operation, by how its name begins. What matches nothing is a pass over memory.
KINDS = {
    "products": ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise", "nanopcf::onednn"),
    "attention": (
        "aten::bmm",
        "aten::baddbmm",
        "aten::_softmax",
        "aten::_scaled_dot_product",
        "aten::_flash_attention",
        "aten::_efficient_attention",
        "aten::_cudnn_attention",
    ),
    "fused head": ("TokenLoss", "Logprob"),  # the Triton kernels; on a CPU the head is products and passes
}
PROMPT = 64
# shares of the roofline that an H100 or H200 should reach with the 0.5B shape
AIMS = {"generation": 0.5, "generation --compile": 0.5, "training": 0.45, "training --compile": 0.55}


def operations(work: Callable, device: torch.device) -> Counter:
    """Name of each operation in work() -> the seconds spent in it and in nothing that it called."""
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU] + [activity.CUDA] * (device.type == "cuda")
    profile = profiled(lambda: clock(work, device), activities=activities)
    field = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # The kernels of a GPU are in the list too, under their own names; their time is also that of the operation that
    # launched them, so they are left out here.
    calls = (e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CPU)
    found = Counter()
    for e in calls:  # the parts of a compiled block have a hash in their names
        found["compiled" if "CompiledFxGraph" in e.key else e.key] += getattr(e, field) / 1e6
    return found


def kind_of(name: str) -> str:
    return next((kind for kind, heads in KINDS.items() if name.startswith(heads)), "memory")


def stages(model: Transformer, a: argparse.Namespace, rates: tuple[float, float]) -> dict[str, tuple]:
    """Name -> (work, tokens it counts, seconds of its roofline). work(profiled=True) runs without a captured graph, so
    that the profiler sees its parts."""
    c, device = model.config, model.head_weight.device
    inner = model.parameter_count() - c.vocab_size * c.width * (1 if c.tied else 2)  # without embedding and head
    tokens = torch.randint(c.vocab_size, (a.rows, a.length)).tolist()
    prompts = [row[:PROMPT] for row in tokens]
    sampler, plain = (Sampler(model, slots=a.rows, max_length=PROMPT + a.new_tokens) for _ in range(2))
    plain.capture = None
    cut = 3 * a.length // 8
    rows = pack([Sequence(part, 1) for row in tokens for part in (row[:cut], row[cut:])], a.length)
    optimizer = Optimizer(model)

    @torch.inference_mode()
    def fill(profiled: bool = False) -> None:
        for first in range(0, len(prompts), 32):
            prefill(model, prompts[first : first + 32])

    def generate(profiled: bool = False) -> None:
        (plain if profiled else sampler).generate(prompts, max_new_tokens=a.new_tokens)

    def train(profiled: bool = False) -> None:
        for part in rows.map(lambda t: t.to(device)).split(a.micro):
            (train_sft.sft_loss(model, part) / rows.tokens.numel()).backward()
        optimizer.step(1e-5, 1.0)

    def at_product_rate(passes: int, count: int) -> float:
        head = 0 if passes == 1 else c.vocab_size * c.width
        return 2 * passes * (inner + head) * count / rates[0]

    prefilled, made, trained = a.rows * PROMPT, a.rows * a.new_tokens, a.rows * a.length
    found = {
        "prefill": (fill, prefilled, at_product_rate(1, prefilled)),
        "generation": (generate, made, roofline(model, prompts, [a.new_tokens] * a.rows, 1, rates)),
        "training": (train, trained, at_product_rate(3, trained)),
    }
    if a.compile:

        @cache
        def compile_once() -> None:
            machine.compile_blocks(model)
            sampler.kept = None  # its graphs are those of blocks that weren't compiled

        def compiled(work: Callable[..., None], profiled: bool = False) -> None:
            compile_once()
            work(profiled)

        for stage in ("training", "generation") if model.head_weight.is_cuda else ("training",):
            work, *rest = found[stage]
            found[f"{stage} --compile"] = (partial(compiled, work), *rest)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", metavar="SIZE", choices=SHAPES, help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rows", type=int, default=256, help="prompts, and rows of a training step")
    parser.add_argument("--length", type=int, default=256, help="training: tokens of a row")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--micro", type=int, default=16, help="training: rows a forward pass")
    parser.add_argument(
        "--compile", action="store_true", help="also training, and decoding on a GPU, with compiled blocks"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--markdown", action="store_true", help="write docs/results/breakdown-<device>.md")
    a = parser.parse_args()
    device = machine.choose_device(a.device)
    dtype = machine.choose_dtype(a.dtype, device)
    page = Page("Where the time goes", device)
    limits = wall_rates(device, dtype)
    page.add(f"Measured here: a large product {limits[0] / 1e9:,.0f} GFLOP/s, a copy {limits[1] / 1e9:,.1f} GB/s.")
    page.head(
        f"{a.rows} rows, {str(dtype).removeprefix('torch.')}; a share below 3 % isn't named:",
        "parameters",
        "stage",
        "tokens/s",
        "of the roofline",
        *KINDS,
        "passes over memory",
        "of which",
    )
    for size in a.models or (["0.1M", "0.8M", "10M"] if device.type == "cpu" else ["135M", "0.5B"]):
        model = make_model(size, max(a.length, PROMPT + a.new_tokens), device, dtype)
        for stage, (work, tokens, bound) in stages(model, a, limits).items():
            work()
            seconds = statistics.median(clock(work, device)[0] for _ in range(a.repeats))
            found = operations(lambda work=work: work(profiled=True), device)
            total = sum(found.values())
            shares = Counter()
            for name, spent in found.items():
                shares[kind_of(name)] += spent / total
            aim = f", aim {AIMS[stage]:.0%}" if size == "0.5B" and device.type == "cuda" and stage in AIMS else ""
            largest = [(n, s / total) for n, s in found.most_common() if kind_of(n) == "memory"]
            page.row(
                f"{model.parameter_count() / 1e6:.1f}M",
                stage,
                f"{tokens / seconds:,.0f}",
                f"{bound / seconds:.0%}{aim}",
                *(f"{shares[kind]:.0%}" for kind in (*KINDS, "memory")),
                ", ".join(f"{n.removeprefix('aten::')} {s:.0%}" for n, s in largest if s >= 0.03),
            )
    if a.markdown:
        page.write("breakdown")


if __name__ == "__main__":
    main()
