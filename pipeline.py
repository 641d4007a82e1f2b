"""The whole paper at nano scale: base model -> SFT on candidate sets -> selection -> RL from checkpoints -> ceilings.

    python pipeline.py                              about five minutes on two CPU cores; writes runs/demo/report.html
    python pipeline.py --preset tiny                under a minute
    python pipeline.py --preset study --out runs/s  about an hour
    python pipeline.py --resume                     continue; a changed flag reruns only what depends on it
    python pipeline.py --preset smollm2 --model DIR --data F.jsonl --test-data T.jsonl      a real model, real problems

Stages, in order (each a function below): data, base, candidates, sft, select, rl, report. A stage's result is kept in
the run folder under a key made of the settings it reads and the keys of the stages before it. The runs inside a stage
are plain `train_sft.main` and `train_rl.main`, in parallel processes: small models are fastest with one thread each.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from nanopcf.run import config
from nanopcf.run.config import Count, Device, DType, Natural, Positive, Share

PRESETS = Path(__file__).resolve().parent / "configs"
POOL_ROUNDS = 6  # at most, of problems tried to fill the candidate sets
CONTEXT = 64  # tokens; the tasks' problems and working fit


@dataclass(frozen=True)
class PipelineConfig(config.Config):
    preset: str = "demo"  # settings to start from
    out: str = ""  # run folder (default: runs/PRESET)
    task: str = "digits"  # digits or columns (see nanopcf/tasks.py)
    model: str = "0.1M"  # size, or with --data a folder or Org/Name
    data: str = ""  # JSONL of real problems, in place of the task
    test_data: str = ""  # JSONL to score on; needed with --data
    chat: bool = False  # put each prompt into the chat template
    template: str = "{prompt}"  # text around each prompt
    max_new_tokens: Count = 32  # longest answer, in tokens
    pack_length: Count = 128  # tokens per packed row, and longest example
    micro_rows: Count = 16  # packed rows per forward pass
    dtype: DType = "auto"  # float32 or bfloat16; auto: bfloat16 on CUDA
    known: Share = 0.5  # share of facts that the web text gets right
    corpus: Count = 20000  # web texts to pretrain on
    base_steps: Count = 500  # optimizer steps of pretraining
    base_batch: Count = 64  # web texts per step
    base_lr: Positive = 5e-3  # peak learning rate of pretraining
    pool: Count = 3000  # problems tried per round, to fill the sets
    candidates: tuple[str, ...] = ("uniform-20", "uniform-60")  # sets, as difficulty-size
    val: Count = 256  # expert trajectories for the validation loss
    test: Count = 512  # problems for every score
    sft_steps: Count = 240  # optimizer steps of SFT
    sft_batch: Count = 16  # trajectories per step
    sft_lr: Positive = 1e-3  # learning rate of SFT
    sft_checkpoints: Count = 12  # checkpoints of an SFT run
    passk: Count = 8  # k of pass@k, beside the validation loss
    every_regime: tuple[str, ...] = ("uniform-20",)  # sets with a branch per regime
    algo: str = "dapo_dc"  # RL algorithm, see train_rl.py --list
    rl_prompts: Count = 128  # problems that RL trains on
    rl_steps: Count = 100  # batches of rollouts per branch
    rl_batch: Count = 32  # prompts per batch
    rl_group: Count = 8  # answers per prompt
    rl_lr: Positive = 5e-4  # learning rate of RL
    rl_points: int = 14  # points of a curve
    paradigms: tuple[str, ...] = ()  # algorithms to compare at equal compute
    paradigm_flops: Positive = 1e12  # FLOPs of each, its SFT included
    paradigm_seeds: Count = 3  # runs of each
    workers: Natural = 0  # processes at a time (0: one per core)
    threads: Natural = 0  # threads of a process (0: found by a probe)
    seed: int = 0  # of everything
    device: Device = "auto"  # auto, cpu, cuda or mps
    resume: bool = False  # continue the run in --out

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data and self.model not in NANO:
            raise ValueError(f"--model: no {self.model!r}; there are {', '.join(NANO)}, and with --data model folders")
        if self.data and (self.model in NANO or not self.test_data):
            raise ValueError("--data needs --test-data, and a model folder or Org/Name as --model")
        config.one_of(self, task=FAMILIES, algo=RECIPES, paradigms=RECIPES)
        for name in self.candidates:
            kind, _, size = name.partition("-")
            if kind not in ("uniform", "easy", "hard") or not size.isdigit() or int(size) < 1:
                raise ValueError(f"--candidates: {name!r} should be like uniform-240, easy-240 or hard-240")
        if len(set(self.candidates)) < len(self.candidates) or not self.candidates:
            raise ValueError("--candidates must name at least one set, and none twice")
        unknown = [n for n in self.every_regime if n not in self.candidates]
        if unknown:
            raise ValueError(f"--every-regime: {unknown[0]!r} is not among --candidates ({', '.join(self.candidates)})")
        if not 1 <= self.rl_points <= self.rl_steps:
            raise ValueError(
                f"--rl-points must be from 1 to --rl-steps, got {self.rl_points}; a ceiling needs 4 or more"
            )
        if self.pack_length <= self.max_new_tokens:
            raise ValueError("--pack-length must be above --max-new-tokens: it holds a prompt and its answer")
        if self.sft_checkpoints > self.sft_steps:
            raise ValueError("--sft-checkpoints can't be above --sft-steps")


if __name__ == "__main__":  # --help, before torch is imported, which takes seconds
    config.show_help(PipelineConfig, __doc__, presets=PRESETS, preset="demo")

import time
from concurrent.futures import Executor

import numpy as np
import torch

import kernels
import train_rl
import train_sft
from nanopcf import ceiling, checkpoint, report, selector
from nanopcf.data import Example, Format, check_disjoint, encode_prompts, read_examples, write_jsonl
from nanopcf.evaluate import complete, pass_at_k
from nanopcf.model import NANO, ModelConfig, Transformer
from nanopcf.objectives import RECIPES
from nanopcf.report import paradigms
from nanopcf.run import files, log, machine
from nanopcf.run.folder import checkpoints, lock
from nanopcf.run.stages import Stages, resumable, run_parallel, watch, worker_pool
from nanopcf.sampler import slots_that_fit
from nanopcf.tasks import FAMILIES, Lore, make_examples
from nanopcf.tokenizer import TextTokenizer, nano_tokenizer

# ---- threads ----


def probe(c: PipelineConfig, device: torch.device) -> tuple[int, int]:
    """(threads of a lone process, workers in parallel). On a shared machine the wrong number of threads costs a factor
    of up to 100 for small models, so time a small forward and backward pass with one thread and with all."""
    cores = machine.cores()
    if c.data:  # a real model: its products are large, one run at a time takes all cores
        threads, workers = c.threads or cores, c.workers or 1
        log.announce(f"a run at a time gets {threads} thread(s)" if workers == 1 else f"{workers} runs at a time")
        return threads, workers
    model = Transformer(ModelConfig(vocab_size=16, max_length=CONTEXT, **NANO[c.model]))
    tokens = torch.zeros(c.base_batch, 40, dtype=torch.long)
    one, all_ = (machine.step_seconds(model, tokens, threads) for threads in (1, cores))
    threads = c.threads or (cores if all_ < 0.8 * one else 1)
    workers = c.workers or (1 if device.type != "cpu" else max(1, cores // (c.threads or 1)))
    log.announce(
        f"probe: a step takes {one * 1e3:.0f} ms with 1 thread, {all_ * 1e3:.0f} ms with {cores}; a lone process gets "
        f"{threads} thread(s), branches run {workers} at a time"
    )
    return threads, workers


def common(c: PipelineConfig) -> dict:
    """Settings that every SFT and RL run of the pipeline shares."""
    names = "chat template pack_length micro_rows seed device dtype"
    return {n: getattr(c, n) for n in names.split()} | {"threads": c.threads or (0 if c.data else 1), "resume": True}


# ---- what runs in a worker ----


def open_model(c: PipelineConfig, path: str, threads: int | None = None) -> tuple[Transformer, TextTokenizer, dict]:
    """(model, tokenizer, how it is asked): what every scoring of a checkpoint needs. threads: default those of a worker."""
    device = machine.choose_device(c.device)
    model, tokenizer = checkpoint.load(path, device, machine.choose_dtype(c.dtype, device))
    machine.set_threads(common(c)["threads"] if threads is None else threads, model)
    slots = slots_that_fit(model, min(model.config.max_length, c.pack_length + c.max_new_tokens))
    return (model, tokenizer, dict(max_new_tokens=c.max_new_tokens, slots=slots, format=Format(c.chat, c.template)))


def score_checkpoint(c: PipelineConfig, path: str, data: str) -> dict:
    """pass@1 (one sample, the paper's temperature) and pass@k on the first quarter, of one checkpoint."""
    model, tokenizer, asked = open_model(c, path)
    examples = read_examples(data, need=("prompt", "answer"))
    once, _ = complete(model, tokenizer, examples, seed=c.seed, **asked)
    some = examples[: max(1, len(examples) // 4)]
    many, _ = complete(model, tokenizer, some, samples=c.passk, seed=c.seed + 1, **asked)
    return {
        "score": float(once.mean()),
        "pass_at_k": pass_at_k(many, c.passk),
        "k": c.passk,
        "parameters": model.parameter_count(),
    }


def sample_pairs(c: PipelineConfig, before: str, after: str, data: str) -> list[dict]:
    """The same problems answered by two models, greedily: two of each of fixed, kept, never right and lost."""
    examples = read_examples(data, need=("prompt", "answer"))[:128]
    sides = []
    for path in (before, after):
        model, tokenizer, asked = open_model(c, path)
        correct, texts = complete(model, tokenizer, examples, temperature=0.0, seed=c.seed, **asked)
        sides.append(list(zip(texts, correct[:, 0] == 1, strict=True)))
    kinds: dict[tuple[bool, bool], list[dict]] = {}
    for e, (b, b_right), (a, a_right) in zip(examples, *sides, strict=True):
        pair = dict(prompt=e.prompt, answer=e.answer, before=b, after=a)
        pair |= dict(before_correct=bool(b_right), after_correct=bool(a_right))
        kinds.setdefault((bool(b_right), bool(a_right)), []).append(pair)
    order = [(False, True), (True, True), (False, False), (True, False)]
    return [pair for kind in order for pair in kinds.get(kind, [])[:2]]


# ---- the stages ----


def make_data(c: PipelineConfig, folder: Path) -> dict:
    """Problems for every purpose, no prompt in two of them."""
    taken: set[str] = set()
    splits = {}
    for i, (name, count) in enumerate(dict(test=c.test, val=c.val, rl=c.rl_prompts).items()):
        splits[name] = make_examples(c.task, count, (c.seed, i), exclude=taken)
        taken |= {e.prompt for e in splits[name]}
    splits["corpus"] = make_examples(c.task, c.corpus, (c.seed, 9), lore=Lore(c.seed, c.known), exclude=taken)
    return write_splits(folder, splits)


def split_data(c: PipelineConfig, folder: Path) -> dict:
    """The same from files of real problems: --data shuffled and cut into val, rl and the pool of the candidate sets."""
    tokenizer = checkpoint.load_tokenizer_of(c.model)
    form = Format(c.chat, c.template)
    room = c.pack_length - c.max_new_tokens

    def fitting(file: str, need: tuple[str, ...]) -> list[Example]:
        return encode_prompts(read_examples(file, need=need), tokenizer, room, file, format=form, drop=True)[0]

    test = fitting(c.test_data, ("prompt", "answer"))[: c.test]
    asked = {e.prompt for e in test}
    examples = {e.prompt: e for e in fitting(c.data, ("prompt", "trajectory", "answer")) if e.prompt not in asked}
    rest = [list(examples.values())[i] for i in np.random.default_rng(c.seed).permutation(len(examples))]
    need = c.val + c.rl_prompts
    if len(rest) <= need:
        raise ValueError(
            f"{c.data}: {len(rest)} examples; --val and --rl-prompts alone take {need}, and the sets need some"
        )
    splits = dict(test=test, val=rest[: c.val], rl=rest[c.val : need], corpus=rest[need:])
    return write_splits(folder, splits)


def write_splits(folder: Path, splits: dict[str, list[Example]]) -> dict:
    check_disjoint(**splits)
    for name, examples in splits.items():
        write_jsonl(folder / f"{name}.jsonl", examples)
    return {name: str(folder / f"{name}.jsonl") for name in splits}


def train_base(c: PipelineConfig, folder: Path, data: dict, threads: int, pool: Executor) -> dict:
    """Pretraining is the same loop on web text, from random weights; then the base model's score. With --data: the score."""
    if c.data:
        job = {"base": (score_checkpoint, c, c.model, data["test"])}
        score = run_parallel("base score", job, pool, folder / "log.txt")["base"]
        return {"model": c.model, "p_0": score["score"], "pretrain_loss": None} | {
            k: score[k] for k in ("pass_at_k", "parameters")
        }
    torch.manual_seed(c.seed)
    tokenizer = nano_tokenizer()
    init = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, max_length=CONTEXT, **NANO[c.model]))
    if not (folder / "init").exists():
        checkpoint.save(init, tokenizer, folder / "init")
    job = train_sft.SFTConfig(
        model=str(folder / "init"),
        train=data["corpus"],
        val=data["val"],
        out=str(folder / "run"),
        steps=c.base_steps,
        batch=c.base_batch,
        lr=c.base_lr,
        schedule="cosine",
        warmup=20,
        checkpoint_every=max(1, c.base_steps // 10),
        **common(c) | {"threads": threads, "pack_length": CONTEXT},
    )
    live = watch({"base": folder / "run"}, c.base_steps, "val_loss", "val loss {:.3f}")
    table = run_parallel("base", {"base": (train_sft.main, job)}, pool, folder / "log.txt", live)["base"]
    model = str(checkpoints(folder / "run")[-1][1])
    score = run_parallel("base score", {"base": (score_checkpoint, c, model, data["test"])}, pool, folder / "log.txt")[
        "base"
    ]
    return {
        "model": model,
        "p_0": score["score"],
        "pass_at_k": score["pass_at_k"],
        "parameters": init.parameter_count(),
        "pretrain_loss": table[-1]["val_loss"],
    }


def make_candidates(c: PipelineConfig, folder: Path, data: dict, base: dict, threads: int) -> dict:
    """Candidate sets by the base model's win rate over 4 tries, as in the paper: easy = 1, hard <= 0.25, or any.

    Problems are drawn and tried in rounds of --pool until every set is full.
    """
    model, tokenizer, asked = open_model(c, base["model"], threads)
    source = read_examples(data["corpus"]) if c.data else []  # real problems; the task makes new ones
    taken = {e.prompt for path in data.values() for e in read_examples(path)}
    need = {kind: 0 for kind in ("uniform", "easy", "hard")}
    for name in c.candidates:
        kind, size = name.split("-")
        need[kind] = max(need[kind], int(size))
    kinds: dict[str, list] = {kind: [] for kind in need}
    for round_ in range(POOL_ROUNDS):
        if c.data:
            pool = source[round_ * c.pool : (round_ + 1) * c.pool]
        else:
            pool = make_examples(c.task, c.pool, (c.seed, 20 + round_), exclude=taken)
            taken |= {e.prompt for e in pool}
        if not pool:
            break
        correct, _ = complete(model, tokenizer, pool, samples=4, seed=c.seed + round_, **asked)
        for e, win_rate in zip(pool, correct.mean(axis=1), strict=True):
            kinds["uniform"].append(e)
            if win_rate == 1 or win_rate <= 0.25:
                kinds["easy" if win_rate == 1 else "hard"].append(e)
        if all(len(kinds[kind]) >= need[kind] for kind in need):
            break
    files = {}
    for name in c.candidates:
        kind, size = name.split("-")
        if len(kinds[kind]) < int(size):
            raise ValueError(
                f"--candidates {name}: among {len(kinds['uniform'])} problems the base model has {len(kinds[kind])} {kind} "
                "ones; make --pool larger, the set smaller, or the base model better (--base-steps, --known)"
            )
        write_jsonl(folder / f"{name}.jsonl", kinds[kind][: int(size)])
        files[name] = str(folder / f"{name}.jsonl")
    others = {n: read_examples(p) for n, p in data.items() if not (c.data and n == "corpus")}
    check_disjoint(**others, candidates=kinds["uniform"])
    return {"files": files, "counts": {k: len(v) for k, v in kinds.items()}}


def train_candidates(
    c: PipelineConfig, folder: Path, data: dict, base: dict, files: dict, pool: Executor
) -> list[dict]:
    """SFT on every candidate set, then pass@1 and pass@k of every checkpoint."""
    jobs = {
        name: (
            train_sft.main,
            train_sft.SFTConfig(
                model=base["model"],
                train=files[name],
                val=data["val"],
                out=str(folder / name),
                steps=c.sft_steps,
                batch=c.sft_batch,
                lr=c.sft_lr,
                checkpoint_every=max(1, c.sft_steps // c.sft_checkpoints),
                drop_long=True,
                **common(c),
            ),
        )
        for name in files
    }
    live = watch({n: folder / n for n in files}, c.sft_steps, "val_loss", "val loss {:.3f}")
    tables = run_parallel("SFT", jobs, pool, folder / "log.txt", live)
    jobs = {
        (name, row["step"]): (
            score_checkpoint,
            c,
            str(folder / name / "checkpoints" / f"step-{row['step']}"),
            data["test"],
        )
        for name, table in tables.items()
        for row in table
    }
    scores = run_parallel("SFT scores", jobs, pool, folder / "log.txt")
    candidates = []
    for name, table in tables.items():
        rows = [{**row, **scores[name, row["step"]]} for row in table]
        losses = [row["val_loss"] for row in rows]
        kind, size = name.split("-")
        candidates.append(
            {"name": name, "size": int(size), "difficulty": kind, "min_val_loss": min(losses), "checkpoints": rows}
        )
    return candidates


def choose_starts(c: PipelineConfig, candidates: list[dict]) -> dict:
    """The selector's ranking, and the checkpoints that RL starts from: of each set the stable one of lowest loss, of the
    sets in --every-regime also the middle adaptive one and the last one of each regime past the stable."""
    selection = selector.select(candidates)
    starts = [{"dataset": "base", "sft_step": 0, "regime": "base", "x_sft": 0.0}]
    ranking = []
    for ranked in selection.ranking:
        best = min(ranked.in_regime("stable"), key=lambda r: r["val_loss"])
        chosen = [best]
        if ranked.name in c.every_regime:
            trained = [r for r in ranked.in_regime("adaptive") if r["step"] > 0]
            chosen += trained[len(trained) // 2 :][:1]
            for regime in ("mild", "severe"):
                chosen += ranked.in_regime(regime)[-1:]
        for r in sorted(chosen, key=lambda r: r["step"]):
            starts.append({"dataset": ranked.name, "sft_step": r["step"], "regime": r["regime"], "x_sft": r["x_sft"]})
        ranking.append(
            {
                "name": ranked.name,
                "min_val_loss": ranked.min_val_loss,
                "recommended_step": best["step"],
                "recommended_regime": best["regime"],
                "score": best["score"],
                "pass_at_k": best["pass_at_k"],
            }
        )
    return {"chosen": selection.chosen, "ranking": ranking, "starts": starts, "saturated": selection.saturated}


def rl_config(c: PipelineConfig, model: str, data: dict, out: Path, **changed) -> train_rl.RLConfig:
    settings = dict(
        algo=c.algo,
        steps=c.rl_steps,
        prompts=c.rl_batch,
        update_prompts=c.rl_batch,
        round_prompts=c.rl_batch,
        group=c.rl_group,
        lr=c.rl_lr,
        eval_every=max(1, round(c.rl_steps / c.rl_points)),
        checkpoint_every=max(1, c.rl_steps // 2),
        max_new_tokens=c.max_new_tokens,
    )
    settings |= common(c) | changed
    return train_rl.RLConfig(model=model, train=data["rl"], val=data["test"], out=str(out), **settings)


def train_branches(
    c: PipelineConfig, folder: Path, data: dict, base: dict, starts: list[dict], pool: Executor
) -> list[dict]:
    """RL from every start; a branch is its start, its curve and its final policy."""
    jobs, models = {}, {}
    for s in starts:
        name = f"{s['dataset']}@{s['sft_step']}"
        sft_dir = folder.parent / "sft" / s["dataset"] / "checkpoints" / f"step-{s['sft_step']}"
        models[name] = base["model"] if s["dataset"] == "base" else str(sft_dir)
        rl = rl_config(c, models[name], data, folder / name)
        jobs[name] = (train_rl.main, rl)
    live = watch({n: folder / n for n in jobs}, c.rl_steps, "score", "score {:.1%}")
    curves = run_parallel("RL", jobs, pool, folder / "log.txt", live)
    branches = []
    for s, (name, curve) in zip(starts, curves.items(), strict=True):
        branches.append(
            {
                **s,
                "p_sft": curve[0]["score"],
                "curve": [{"x": p["x"], "score": p["score"]} for p in curve],
                "best": max(p["score"] for p in curve),
                "greedy_before": curve[0]["greedy"],
                "greedy_after": curve[-1]["greedy"],
                "before": models[name],
                "after": str(checkpoints(folder / name)[-1][1]),
            }
        )
    return branches


def compare_paradigms(
    c: PipelineConfig, folder: Path, data: dict, base: dict, start: dict, pool: Executor
) -> list[dict]:
    """Every paradigm from the base model and from `start`, the selector's checkpoint, until --paradigm-flops are spent."""
    sft = folder.parent / "sft" / start["dataset"] / "checkpoints" / f"step-{start['sft_step']}"
    if start["x_sft"] >= c.paradigm_flops:
        raise ValueError(f"--paradigm-flops {c.paradigm_flops:.3g}: SFT alone took {start['x_sft']:.3g}")
    jobs, folders = {}, {}
    for seed in range(c.seed, c.seed + c.paradigm_seeds):
        for algo in c.paradigms:
            for name, model, x_sft in (("base", base["model"], 0.0), ("sft", str(sft), start["x_sft"])):
                key = (algo, name, seed, x_sft)
                folders[key] = folder / f"{algo}-{name}-{seed}"
                budget = dict(max_flops=c.paradigm_flops - x_sft, eval_flops=c.paradigm_flops / c.rl_points)
                never = 10**6  # the budget ends it
                rl = rl_config(
                    c, model, data, folders[key], algo=algo, seed=seed, steps=never, checkpoint_every=never, **budget
                )
                jobs[key] = (train_rl.main, rl)
    live = watch(folders, c.paradigm_flops, "score", "score {:.1%}", of="x")
    curves = run_parallel("paradigms", jobs, pool, folder / "log.txt", live)
    return [
        dict(algo=algo, start=name, seed=seed, x_sft=x_sft)
        | {"curve": [{"x": x_sft + p["x"], "score": p["score"]} for p in curve]}
        for (algo, name, seed, x_sft), curve in curves.items()
    ]


def fit_ceilings(branches: list[dict]) -> list[dict]:
    """Eq. 2 fitted to each branch: the ceiling A_post, the plasticity PL_rl and a verdict."""
    fitted = []
    for b in branches:
        points = [p for p in b["curve"] if p["x"] > 0]
        if len(points) < 4:  # RL ended at once, without a signal: all that is known is what was reached
            fit = dict(a_post=b["best"], pl_rl=b["best"] - b["p_sft"], status="still rising")
            fit |= dict(a_post_low=b["best"], a_post_high=1.0)
            fit |= dict.fromkeys(("c_mid", "b", "epsilon", "law", "rmse_fit", "rmse_heldout"))
        else:
            f = ceiling.fit([p["x"] for p in points], [p["score"] for p in points], b["p_sft"], max_score=1.0)
            names = "a_post pl_rl c_mid b epsilon law rmse_fit rmse_heldout status".split()
            fit = {name: getattr(f, name) for name in names}
            fit["a_post_low"], fit["a_post_high"] = f.interval
        fitted.append({**b, **fit})
    return fitted


def main(c: PipelineConfig) -> dict:
    device = machine.choose_device(c.device)
    out = Path(c.out or f"runs/{c.preset}")
    if (out / "config.json").exists() and not c.resume:
        raise ValueError(f"{out} already holds a run; continue it with --resume, or choose another --out")
    with lock(out), resumable(out):
        files.write_json(out / "config.json", asdict(c))
        threads, workers = probe(c, device)
        with worker_pool(workers) as pool:
            return run(c, out, device, threads, pool)


def run(c: PipelineConfig, out: Path, device: torch.device, threads: int, pool: Executor) -> dict:
    """Every stage in its turn."""
    log.announce(log.header(device, threads))
    kernels.announce_path(device)
    began = time.perf_counter()

    stages = Stages(c, out)
    if c.data:
        settings = "data test_data model chat template max_new_tokens pack_length val test rl_prompts seed"
        data = stages.run("data", settings, lambda f: split_data(c, f))
    else:
        settings = "task known corpus val test rl_prompts max_new_tokens pack_length seed"
        data = stages.run("data", settings, lambda f: make_data(c, f))
    base = stages.run(
        "base",
        "model base_steps base_batch base_lr passk chat template micro_rows dtype",
        lambda f: train_base(c, f, data, threads, pool),
    )
    log.announce(f"base model: {base['parameters']:,} parameters, P_0 = {base['p_0']:.1%}")
    sets = stages.run("candidates", "candidates pool", lambda f: make_candidates(c, f, data, base, threads))
    log.announce("win rates over the pool: " + ", ".join(f"{n} {k}" for k, n in sets["counts"].items()))
    candidates = stages.run(
        "sft",
        "sft_steps sft_batch sft_lr sft_checkpoints",
        lambda f: train_candidates(c, f, data, base, sets["files"], pool),
    )
    selection = stages.run("select", "every_regime", lambda f: choose_starts(c, candidates))
    still = "" if selection["saturated"] else ", still falling at the end of SFT: more --sft-steps may change this"
    log.announce(f"selector: {selection['chosen']} has the lowest validation loss{still}")
    branches = stages.run(
        "rl",
        "algo rl_steps rl_batch rl_group rl_lr rl_points",
        lambda f: train_branches(c, f, data, base, selection["starts"], pool),
    )
    branches = fit_ceilings(branches)
    compared: list[dict] = []
    if c.paradigms:
        best = next(r for r in selection["ranking"] if r["name"] == selection["chosen"])
        at = (best["name"], best["recommended_step"])
        start = next(s for s in selection["starts"] if (s["dataset"], s["sft_step"]) == at)
        every_run = stages.run(
            "paradigms",
            "paradigms paradigm_flops paradigm_seeds",
            lambda f: compare_paradigms(c, f, data, base, start, pool),
        )
        compared = paradigms.summarise(every_run)

    recommended = {(r["name"], r["recommended_step"]): r for r in selection["ranking"]}
    for b in branches:
        if (b["dataset"], b["sft_step"]) in recommended:
            recommended[b["dataset"], b["sft_step"]] |= {"a_post": b["a_post"], "status": b["status"]}
    ranking = list(recommended.values())
    agreement = selector.agreement([r["min_val_loss"] for r in ranking], [r["a_post"] for r in ranking])
    shown = max((b for b in branches if b["dataset"] != "base"), key=lambda b: b["best"] - b["p_sft"])
    pairs = sample_pairs(c, shown["before"], shown["after"], data["test"])
    result = {
        "seed": c.seed,
        "preset": c.preset,
        "task": c.task,
        "flags": asdict(c),
        "base": {k: base[k] for k in ("p_0", "pass_at_k", "parameters", "pretrain_loss")},
        "candidates": candidates,
        "branches": [{k: v for k, v in b.items() if k not in ("before", "after")} for b in branches],
        "selector": {"chosen": selection["chosen"], "ranking": ranking, **agreement},
        "paradigms": compared,
        "samples": [{"dataset": shown["dataset"], **p} for p in pairs],
        "environment": log.environment(device),
        "elapsed_s": {**stages.elapsed, "total": round(sum(stages.elapsed.values()), 1)},
    }
    report.write(result, out)
    print(report.terminal_table(result))
    if compared:
        print("\n" + paradigms.terminal_table(compared))
    log.announce(f"report: {out / 'report.html'}   ({(time.perf_counter() - began) / 60:.1f} minutes)")
    return result


if __name__ == "__main__":
    config.run_cli(lambda: main(config.parse(PipelineConfig, __doc__, presets=PRESETS, preset="demo")))
