"""Generation: new tokens per second against transformers' `generate`, on the same weights, prompts and stop tokens.

    python benchmarks/sampler.py                            this machine's best device, default models
    python benchmarks/sampler.py --models 0.8M 135M --new-tokens 64 --repeats 5
    python benchmarks/sampler.py --markdown                 also writes docs/results/sampler-<device>.md

Prompts of 8 to 64 tokens, several samples each, temperature 1, and answers that end at random: one token in 64 is a
stop token, so lengths are about geometric up to --new-tokens. Weights are random: it does not matter what is drawn,
only how fast. transformers gets all sequences in one left-padded batch with its dynamic cache. Neither it nor OpenVINO
GenAI (--openvino, on a CPU) returns log-probs; ours always does. A token counts until its sequence ends. Contestants
take turns. The tables show medians, with the lowest and the highest, and the ratio is the median over the turns. On the
CPU each side first tries one thread and all cores, and keeps what was faster. `roofline` below computes the roofline
from the rates of this machine that the page names.

Three more tables: the same work four times (cost must grow in proportion), one model with contexts of four sizes
(decoding must not pay for positions that are not used), and short sequences beside a long one (they must not pay for
each other).
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import SHAPES, Page, Run, compare, make_model, ratio, spread, timed, wall_rates

from nanopcf import checkpoint
from nanopcf.model import Transformer
from nanopcf.run import machine
from nanopcf.sampler import Sampler
from nanopcf.tokenizer import word_tokenizer


def work(vocab: int, prompts: int, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """(prompts of 8 to 64 tokens, stop tokens: one token of the vocabulary in 64)."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(vocab // 64, vocab, rng.integers(8, 65)).tolist() for _ in range(prompts)]
    return texts, list(range(max(1, vocab // 64)))


def ours(model: Transformer, prompts: list, stop: list, samples: int, new: int, slots: int, lengths: list[int]) -> Run:
    """Our sampler. `lengths` is filled with the lengths of the answers."""
    sampler = Sampler(model, slots=slots, max_length=model.config.max_length)

    def work() -> int:
        answers = sampler.generate(prompts, n=samples, max_new_tokens=new, stop_ids=stop, seed=0)
        lengths[:] = [len(a.tokens) for a in answers]
        return sum(lengths)

    return timed(work, model.head_weight.device)


def beside(model: Transformer, lengths: list[int], new: list[int]) -> Run:
    """Generations per second of prompts of these lengths, with answers of exactly these lengths."""
    sampler = Sampler(model, slots=len(lengths), max_length=model.config.max_length)
    prompts = [[1 + i % 9] * n for i, n in enumerate(lengths)]
    return timed(lambda: len(sampler.generate(prompts, max_new_tokens=new)) // len(prompts), model.head_weight.device)


def roofline(model: Transformer, prompts: list, lengths: list[int], samples: int, rates: tuple[float, float]) -> float:
    """The time in seconds that no sampler could beat on this machine. Each step multiplies every weight with every live
    row, and reads the weights and the live part of the cache once; the longer of the two counts. Prompts go through
    once.
    """
    c, size = model.config, model.head_weight.dtype.itemsize
    weights = model.parameter_count() - (0 if c.tied else c.vocab_size * c.width)  # those that multiply
    cached = 2 * c.layers * c.kv_heads * c.head_dim * size  # bytes per position
    attention = 4 * c.layers * c.heads * c.head_dim  # FLOPs per position and row
    product_rate, bandwidth = rates
    total = 2 * (weights - c.vocab_size * c.width) * sum(map(len, prompts)) / product_rate
    begun, made = np.repeat([len(p) for p in prompts], samples), np.array(lengths)
    for step in range(max(lengths)):
        live = made > step
        seen = (begun[live] + step).sum()  # positions that attention reads, summed over the live rows
        products = (2 * weights * live.sum() + attention * seen) / product_rate
        total += max(products, (weights * size + cached * seen) / bandwidth)
    return total


def theirs(model: Transformer, prompts: list, stop: list, samples: int, new: int) -> Run:
    """transformers, from a folder that we saved. Raises ImportError where it isn't installed."""
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device, dtype = model.head_weight.device, model.head_weight.dtype
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(model, word_tokenizer("0123456789"), Path(folder) / "m")
        peer = AutoModelForCausalLM.from_pretrained(Path(folder) / "m", dtype=dtype).to(device).eval()
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts for _ in range(samples)], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts for _ in range(samples)], device=device)
    options = dict(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new, pad_token_id=0, eos_token_id=stop
    )
    ends = torch.tensor(stop, device=device)

    def work() -> int:
        torch.manual_seed(0)
        new_ids = peer.generate(input_ids=ids, attention_mask=mask, **options)[:, width:]
        ended = torch.isin(new_ids, ends).long()
        return int((ended.cumsum(1) - ended == 0).sum())  # up to the first stop token, which counts

    return timed(work, device)


def openvino(model: Transformer, prompts: list, stop: list, samples: int, new: int) -> Run:
    """OpenVINO GenAI's continuous batching, a dedicated engine for CPUs: weights, arithmetic and cache in float32, and
    no log-probs. Raises ImportError where it isn't installed."""
    import openvino
    import openvino_genai as genai
    from optimum.exporters.openvino import main_export

    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(model, word_tokenizer("0123456789"), Path(folder) / "m")
        main_export(f"{folder}/m", f"{folder}/exported", task="text-generation-with-past", dtype="fp32")
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs = len(prompts) * samples
        precision = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        engine = genai.ContinuousBatchingPipeline(f"{folder}/exported", scheduler, "CPU", precision)
    config = genai.GenerationConfig()
    config.do_sample, config.temperature, config.top_p, config.top_k = True, 1.0, 1.0, model.config.vocab_size
    config.max_new_tokens, config.num_return_sequences = new, samples
    config.stop_token_ids, config.eos_token_id = set(stop), -1
    inputs = [openvino.Tensor(np.array([p], dtype=np.int64)) for p in prompts]

    def work() -> int:
        results = engine.generate(inputs, [config] * len(prompts))
        return sum(len(ids) for result in results for ids in result.m_generation_ids)

    return timed(work, model.head_weight.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", metavar="SIZE", choices=SHAPES, help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4, help="of each prompt")
    parser.add_argument("--new-tokens", type=int, default=96, help="longest answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--openvino", action="store_true", help="against OpenVINO GenAI too (extra `openvino`)")
    parser.add_argument("--only-peers", action="store_true", help="leave the two tables about growth out")
    parser.add_argument("--markdown", action="store_true", help="write docs/results/sampler-<device>.md")
    a = parser.parse_args()
    device = machine.choose_device(a.device)
    dtype = machine.choose_dtype(a.dtype, device)
    names = a.models or (["0.8M", "3M", "10M"] if device.type == "cpu" else ["135M", "0.5B"])
    total = a.prompts * a.samples
    page = Page("Generation", device)

    def model_of(size: str, context: int = 64 + a.new_tokens) -> Transformer:
        return make_model(size, context, device, dtype).eval()

    def growth(intro: str, column: str, variants: dict[str, Run]) -> None:
        page.head(intro, column, "tokens/s", "against the first")
        rates = compare(variants, device, a.repeats)
        first, _ = next(iter(rates.values()))
        for name, (values, _) in rates.items():
            page.row(name, spread(values), f"{ratio(values, first):.2f}x")

    limits, dtype_name = wall_rates(device, dtype), str(dtype).removeprefix("torch.")
    page.add(f"Measured here: a large product {limits[0] / 1e9:,.0f} GFLOP/s, a copy {limits[1] / 1e9:,.1f} GB/s.")
    page.head(
        f"{a.prompts} prompts x {a.samples} samples, up to {a.new_tokens} new tokens, {dtype_name}:",
        "parameters",
        "transformers, tokens/s",
        "nanopcf, tokens/s",
        "ratio",
        "of the roofline",
        "threads",
        *(["OpenVINO GenAI, tokens/s", "nanopcf against it"] if a.openvino else []),
    )
    for size in names:
        model = model_of(size)
        prompts, stop = work(model.config.vocab_size, a.prompts)
        lengths: list[int] = []
        found = {"nanopcf": ours(model, prompts, stop, a.samples, a.new_tokens, total, lengths)}
        try:
            found["transformers"] = theirs(model, prompts, stop, a.samples, a.new_tokens)
        except ImportError:
            print('(no transformers: pip install -e ".[bench]")', file=sys.stderr)
        if a.openvino:
            try:
                found["OpenVINO"] = openvino(model, prompts, stop, a.samples, a.new_tokens)
            except ImportError:
                print('(no OpenVINO GenAI: pip install -e ".[openvino]")', file=sys.stderr)
        rates = compare(found, device, a.repeats)
        mine, threads = rates["nanopcf"]
        peer, against = "–", "–"
        if "transformers" in rates:
            values, their_threads = rates["transformers"]
            peer, against = spread(values), f"{ratio(mine, values):.1f}x"
            threads = f"{their_threads}, {threads}"
        bound = sum(lengths) / roofline(model, prompts, lengths, a.samples, limits)
        share = f"{statistics.median(mine) / bound:.0%}"
        cells = [f"{model.parameter_count() / 1e6:.1f}M", peer, spread(mine), against, share, str(threads)]
        if "OpenVINO" in rates:
            values, _ = rates["OpenVINO"]
            cells += [spread(values), f"{ratio(mine, values):.2f}x"]
        elif a.openvino:
            cells += ["–", "–"]
        page.row(*cells)
    if not a.only_peers:
        size = names[0]
        model = model_of(size)
        variants = {}
        for times in (1, 4):
            prompts, stop = work(model.config.vocab_size, times * a.prompts)
            variants[f"{times * total}"] = ours(model, prompts, stop, a.samples, a.new_tokens, total, [])
        growth(f"Does cost grow with work? {size}, {total} slots:", "sequences", variants)
        prompts, stop = work(model.config.vocab_size, a.prompts)
        variants = {
            str(context): ours(model_of(size, context), prompts, stop, a.samples, a.new_tokens, total, [])
            for context in (64 + a.new_tokens, 1024, 4096, 16384)
        }
        growth(f"Does an unused context cost? {size}:", "context of the model", variants)
        size = "0.1M"
        model = model_of(size, 2048)
        page.head(
            f"Do short sequences pay for a long one? {size}, 64 slots, milliseconds:",
            "",
            "short",
            "long",
            "both",
            "ratio",
        )
        for words, lengths, new in (
            ("63 prompts of 16 tokens, one of 2,000; 32 new tokens", [16] * 63 + [2000], [32] * 64),
            ("prompts of 16 tokens; 63 answers of 20 tokens, one of 2,000", [16] * 64, [20] * 63 + [2000]),
        ):
            runs = {
                "short": beside(model, lengths[:-1], new[:-1]),
                "long": beside(model, lengths[-1:], new[-1:]),
                "both": beside(model, lengths, new),
            }
            rates = {name: values for name, (values, _) in compare(runs, device, a.repeats).items()}
            times = {name: statistics.median(1000 / rate for rate in values) for name, values in rates.items()}
            share = statistics.median(
                (1 / both) / (1 / short + 1 / long) for short, long, both in zip(*rates.values(), strict=True)
            )
            page.row(words, *(f"{ms:,.0f}" for ms in times.values()), f"{share:.2f}x of the sum")
    if a.markdown:
        page.write("sampler")


if __name__ == "__main__":
    main()
