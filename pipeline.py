"""The paper's whole experiment at nano scale: data -> base model -> candidate sets -> SFT -> selection -> RL ->
ceilings.

    python pipeline.py                              about five minutes on two CPU cores; writes runs/demo/report.html
    python pipeline.py --preset tiny                under a minute
    python pipeline.py --preset study --seeds 3     an hour and a half
    python pipeline.py --resume                     continue; a changed flag reruns only what depends on it
    python pipeline.py --preset smollm2 --model DIR --data F.jsonl --test-data T.jsonl      a real model, real problems

`run_experiment` is the experiment, and the stages that it names stand below it in the same order. What a stage returns
is saved in the run folder (nanopcf/run/stages.py), so that --resume repeats nothing. The training runs inside a stage
are plain `train_sft.main` and `train_rl.main`, several at a time: small models are fastest with one thread each.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from nanopcf.run import config
from nanopcf.run.config import Count, Device, DType, Natural, Positive, Share, Text, Threads, Verifier

PRESETS = Path(__file__).resolve().parent / "configs"
CONTEXT = 32  # tokens; the tasks' problems and working fit


@dataclass(frozen=True)
class PipelineConfig(config.Config):
    preset: str = "demo"  # settings to start from
    out: str = ""  # run folder (default: runs/PRESET)
    task: str = "modular"  # modular or equations
    model: str = "0.1M"  # size, or with --data a folder or Org/Name
    data: str = ""  # JSONL of real problems, in place of the task
    test_data: str = ""  # JSONL to score on; needed with --data
    chat: bool = False  # put each prompt into the chat template
    template: Text = "{prompt}"  # text around each prompt
    max_new_tokens: Count = 16  # longest answer, in tokens
    pack_length: Count = 32  # tokens per packed row, and longest example
    micro_rows: Count = 128  # packed rows per forward pass
    dtype: DType = "auto"  # float32 or bfloat16; auto: bfloat16 on CUDA
    verifier: Verifier = "auto"  # auto, ours or math-verify
    known: Share = 0.5  # share of facts that all web text gets right
    corpus: Count = 8000  # web texts to pretrain on
    base_steps: Count = 1000  # optimizer steps of pretraining
    base_batch: Count = 64  # web texts per step
    base_lr: Positive = 5e-3  # peak learning rate of pretraining
    pool: Count = 2000  # problems tried per round, to fill the sets
    candidates: tuple[str, ...] = ("uniform-100", "uniform-250")  # sets, as difficulty-size
    val: Count = 256  # expert trajectories for the validation loss
    test: Count = 1000  # problems for every score
    sft_steps: Count = 330  # optimizer steps of SFT
    sft_batch: Count = 16  # trajectories per step
    sft_lr: Positive = 1e-3  # learning rate of SFT
    sft_checkpoints: Count = 11  # checkpoints of an SFT run
    passk: Count = 4  # k of pass@k, beside the validation loss
    every_regime: tuple[str, ...] = ("uniform-100",)  # sets with a branch per regime
    algo: str = "dapo_dc"  # RL algorithm, see train_rl.py --list
    rl_prompts: Count = 3000  # problems that RL trains on
    rl_steps: Count = 120  # batches of rollouts per branch (mean)
    rl_batch: Count = 128  # prompts per batch, and per round
    rl_rounds: Count = 1  # most rounds, with dynamic sampling
    rl_update: Count = 16  # prompts per optimizer step
    rl_group: Count = 8  # answers per prompt
    rl_lr: Positive = 7e-4  # learning rate of RL
    rl_points: int = 15  # points of a curve
    allocate: Literal["rounds", "off"] = "rounds"  # more where ceilings are open, or off
    paradigms: tuple[str, ...] = ()  # at equal compute; also like upt:lr=5
    paradigm_flops: Positive = 1e12  # FLOPs of each, its SFT included
    paradigm_seeds: Count = 3  # runs of each
    workers: Natural = 0  # processes at a time (0: one per core)
    threads: Threads = 0  # threads of a process (0: found by a probe)
    seed: Natural = 0  # of everything
    seeds: Count = 1  # several: pool the runs of these seeds
    device: Device = "auto"  # auto, cpu, cuda or mps
    resume: bool = False  # continue the run in --out

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data and self.model not in NANO:
            raise ValueError(f"--model: no {self.model!r}; there are {', '.join(NANO)}, and with --data model folders")
        if self.data and (self.model in NANO or not self.test_data):
            raise ValueError("--data needs --test-data, and a model folder or Org/Name as --model")
        config.one_of(self, task=FAMILIES, algo=RECIPES)
        for paradigm in self.paradigms:
            paradigms.parsed(paradigm)
        for name in self.candidates:
            splits.difficulty_and_size(name)
        if len(set(self.candidates)) < len(self.candidates) or not self.candidates:
            raise ValueError("--candidates must name at least one set, and none twice")
        config.one_of(self, every_regime=self.candidates)
        if not 1 <= self.rl_points <= self.rl_steps:
            raise ValueError(f"--rl-points must be from 1 to --rl-steps, got {self.rl_points}; a ceiling needs 4")
        if self.pack_length <= self.max_new_tokens:
            raise ValueError("--pack-length must be above --max-new-tokens: it holds a prompt and its answer")
        if self.allocate == "rounds" and RECIPES[self.algo].expert == "prefix":
            raise ValueError(f"--allocate off is needed with {self.algo}: its prefixes shrink over all steps")
        if self.sft_checkpoints > self.sft_steps:
            raise ValueError("--sft-checkpoints can't be above --sft-steps")


if __name__ == "__main__":  # --help, before torch is imported, which takes seconds
    config.show_help(PipelineConfig, __doc__, presets=PRESETS, preset="demo")

import time
from concurrent.futures import Executor

import torch

import kernels
import train_rl
import train_sft
from nanopcf import checkpoint, report, selector, splits
from nanopcf.allocate import train_in_rounds
from nanopcf.data import Format, check_disjoint, read_examples, write_jsonl
from nanopcf.evaluate import EvaluateConfig
from nanopcf.model import NANO, ModelConfig, Transformer
from nanopcf.objectives import RECIPES
from nanopcf.report import paradigms, study
from nanopcf.run import log, machine
from nanopcf.run.folder import checkpoints
from nanopcf.run.stages import Stages, open_pipeline, run_parallel, train_parallel, worker_pool
from nanopcf.scoring import score_checkpoint
from nanopcf.tasks import FAMILIES, nano_tokenizer

# ---- the experiment ----


def main(c: PipelineConfig) -> dict:
    """Run the experiment, alone in its folder, and return the report; with several seeds, run each and pool them."""
    if c.seeds > 1:
        return study.run_seeds(c, main)
    device = machine.choose_device(c.device)
    out = Path(c.out or f"runs/{c.preset}")
    with open_pipeline(out, c):
        small_model = None if c.data else nano_model(c)
        threads, workers = machine.share_cores(c.threads, c.workers, device, small_model, out)
        log.announce(log.header(device, threads))
        kernels.announce_path(device)
        with worker_pool(workers) as pool:
            return run_experiment(c, out, device, threads, pool)


def run_experiment(c: PipelineConfig, out: Path, device: torch.device, threads: int, pool: Executor) -> dict:
    """All stages in order. threads: for a run that has the machine to itself.

    stages.run(name, settings, function, *arguments) returns function(c, folder, *arguments), or what it returned in an
    earlier call with the same settings: those that the stage reads and those of all stages before it.
    """
    started = time.perf_counter()
    stages = Stages(c, out)

    settings = "task known corpus val test rl_prompts max_new_tokens pack_length seed"
    if c.data:
        settings = "data test_data model chat template max_new_tokens pack_length val test rl_prompts seed"
    data = stages.run("data", settings, make_data)

    settings = "model base_steps base_batch base_lr passk chat template micro_rows dtype verifier"
    base = stages.run("base", settings, train_base, data, threads, pool)
    log.announce(f"base model: {base['parameters']:,} parameters, P_0 = {base['p_0']:.1%}")

    sets = stages.run("candidates", "candidates pool", make_candidates, data, base, threads)
    log.announce("win rates over the pool: " + ", ".join(f"{name} {count}" for name, count in sets["counts"].items()))

    settings = "sft_steps sft_batch sft_lr sft_checkpoints"
    candidates = stages.run("sft", settings, train_candidates, data, base, sets["files"], pool)

    selection = stages.run("select", "every_regime", choose_starts, candidates)
    caution = "" if selection["saturated"] else ", still falling at the end of SFT: more --sft-steps may change this"
    log.announce(f"selector: {selection['chosen']} has the lowest validation loss{caution}")

    settings = "algo rl_steps rl_batch rl_rounds rl_update rl_group rl_lr rl_points allocate"
    branches = stages.run("rl", settings, train_branches, data, base, selection, pool)

    paradigm_runs = []
    if c.paradigms:
        settings = "paradigms paradigm_flops paradigm_seeds"

        def rl_from(start: dict, folder: Path) -> train_rl.RLConfig:
            return rl_config(c, starting_model(start, base, out), data, folder)

        given = selection, sets["files"], rl_from, train_rl.main, pool
        paradigm_runs = stages.run("paradigms", settings, paradigms.train_all, *given)

    samples = report.sample_answers(branches, data["test"], lambda model: scoring(c, model, data, out / "samples"))
    parts = base, candidates, selection, branches, paradigm_runs, samples
    result = report.assemble(c, device, *parts, problems=len(read_examples(data["test"])), elapsed_s=stages.elapsed)
    report.publish(result, out)
    log.announce(f"report: {out / 'report.html'}   ({(time.perf_counter() - started) / 60:.1f} minutes)")
    return result


# ---- what the stages share ----


def nano_model(c: PipelineConfig) -> Transformer:
    """A model of size --model with random weights."""
    return Transformer(ModelConfig(vocab_size=nano_tokenizer().vocab_size, max_length=CONTEXT, **NANO[c.model]))


def scoring(c: PipelineConfig, model: str, data: dict, folder: Path) -> EvaluateConfig:
    """How a checkpoint answers problems: at a temperature of 0.7, which is the paper's and the default."""
    # The folder keeps what is chosen by looking at the machine, threads and slots, so that a stage which is resumed
    # scores as it did before.
    folder.mkdir(exist_ok=True)
    names = ("chat", "template", "max_new_tokens", "verifier", "seed", "device", "dtype")
    settings = {name: getattr(c, name) for name in names}
    settings |= {"samples": c.passk, "threads": worker_threads(c), "out": str(folder)}
    return EvaluateConfig(model=model, data=(data["test"],), **settings)


def training(c: PipelineConfig) -> dict:
    """The settings that all training runs share."""
    names = ("chat", "template", "pack_length", "micro_rows", "seed", "device", "dtype")
    return {name: getattr(c, name) for name in names} | {"threads": worker_threads(c), "resume": True}


def worker_threads(c: PipelineConfig) -> int:
    """Threads of a run in a worker: one for a nano model; for a real one 0, which means as many as pay."""
    return c.threads or (0 if c.data else 1)


def score_all(label: str, c: PipelineConfig, models: dict, data: dict, pool: Executor, folder: Path) -> dict:
    """{name: scores on the test problems} for models {name: checkpoint}."""
    jobs = {n: (score_checkpoint, scoring(c, model, data, folder / f"score-{n}")) for n, model in models.items()}
    return run_parallel(label, jobs, pool, folder)


def starting_model(start: dict, base: dict, out: Path) -> str:
    """The checkpoint that RL starts from. out: the run folder."""
    if start["dataset"] == "base":
        return base["model"]
    return str(out / "sft" / start["dataset"] / "checkpoints" / f"step-{start['sft_step']}")


# ---- the stages, in order ----


def make_data(c: PipelineConfig, folder: Path) -> dict:
    """The files of test, validation, RL and pretraining problems, no prompt in two of them.

    The first three are the paper's 2,157 test problems, Val-199 and RL62K on a small scale.
    """
    sizes = {"test": c.test, "val": c.val, "rl": c.rl_prompts}
    if c.data:
        form, longest_prompt = Format(c.chat, c.template), c.pack_length - c.max_new_tokens
        parts = splits.cut_splits(c.data, c.test_data, c.model, form, longest_prompt, seed=c.seed, **sizes)
    else:
        parts = splits.make_splits(c.task, corpus=c.corpus, known=c.known, seed=c.seed, **sizes)
    check_disjoint(**parts)
    for name, examples in parts.items():
        write_jsonl(folder / f"{name}.jsonl", examples)
    return {name: str(folder / f"{name}.jsonl") for name in parts}


def train_base(c: PipelineConfig, folder: Path, data: dict, threads: int, pool: Executor) -> dict:
    """The base model and its score P_0 (Eq. 1), where every route starts. With --data it is given and only scored."""
    model, pretrain_loss = (c.model, None) if c.data else pretrain(c, folder, data, threads, pool)
    score = score_all("base score", c, {"base": model}, data, pool, folder)["base"]
    base = {"model": model, "p_0": score["score"], "pass_at_k": score["pass_at_k"]}
    return base | {"parameters": score["parameters"], "pretrain_loss": pretrain_loss}


def pretrain(c: PipelineConfig, folder: Path, data: dict, threads: int, pool: Executor) -> tuple[str, float]:
    """(checkpoint, validation loss) of pretraining, which is the SFT loop on web text from random weights."""
    torch.manual_seed(c.seed)
    if not (folder / "init").exists():
        checkpoint.save(nano_model(c), nano_tokenizer(), folder / "init")
    settings = train_sft.SFTConfig(
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
        **training(c) | {"threads": threads, "pack_length": CONTEXT},
    )
    table = train_parallel("base", train_sft.main, {"base": settings}, pool, folder, "val_loss")["base"]
    _, last_checkpoint = checkpoints(folder / "run")[-1]
    return str(last_checkpoint), table[-1]["val_loss"]


def make_candidates(c: PipelineConfig, folder: Path, data: dict, base: dict, threads: int) -> dict:
    """The files of the candidate sets of expert trajectories, which differ in difficulty and size (RQ3).

    In the paper they are SFT889K, Uniform102K, Easy102K, Hard102K and S1K.
    """
    if c.data:
        rounds = splits.given_problems(read_examples(data["corpus"]), c.pool)
    else:
        taken = {e.prompt for file in data.values() for e in read_examples(file)}
        rounds = splits.new_problems(c.task, c.pool, c.seed, taken)
    asked = replace(scoring(c, base["model"], data, folder), threads=threads)
    problems = splits.sort_by_difficulty(asked, rounds, c.candidates)

    set_files = {name: splits.write_set(folder, name, problems) for name in c.candidates}
    # with --data the sets come from the corpus, which nothing else uses
    others = {name: read_examples(file) for name, file in data.items() if not (c.data and name == "corpus")}
    check_disjoint(**others, candidates=problems["uniform"])
    return {"files": set_files, "counts": {difficulty: len(examples) for difficulty, examples in problems.items()}}


def train_candidates(
    c: PipelineConfig, folder: Path, data: dict, base: dict, set_files: dict, pool: Executor
) -> list[dict]:
    """SFT on every candidate set (Fig. 3): for each checkpoint its compute x_sft, validation loss and score P_sft."""
    runs = {}
    for name, file in set_files.items():
        runs[name] = train_sft.SFTConfig(
            model=base["model"],
            train=file,
            val=data["val"],
            out=str(folder / name),
            steps=c.sft_steps,
            batch=c.sft_batch,
            lr=c.sft_lr,
            checkpoint_every=max(1, c.sft_steps // c.sft_checkpoints),
            drop_long=True,
            **training(c),
        )
    tables = train_parallel("SFT", train_sft.main, runs, pool, folder, "val_loss")
    models = {f"{name}@{step}": str(path) for name in runs for step, path in checkpoints(folder / name)}
    scores = score_all("SFT scores", c, models, data, pool, folder)

    candidates = []
    for name, table in tables.items():
        difficulty, size = splits.difficulty_and_size(name)
        candidate = {"name": name, "size": size, "difficulty": difficulty}
        candidate["min_val_loss"] = min(row["val_loss"] for row in table)
        candidate["checkpoints"] = [{**row, **scores[f"{name}@{row['step']}"]} for row in table]
        candidates.append(candidate)
    return candidates


def choose_starts(c: PipelineConfig, folder: Path, candidates: list[dict]) -> dict:
    """The candidate sets ranked by minimum validation loss (RQ3), and the checkpoints to start RL from (RQ2, Eqs. 5-9).

    Of every set that is the stable checkpoint of lowest loss. For comparison, the sets in --every-regime also start
    from their middle adaptive, last mild and last severe checkpoint.
    """
    selection = selector.select(candidates)
    starts = [{"dataset": "base", "sft_step": 0, "regime": "base", "x_sft": 0.0}]  # pure RL
    ranking = []
    for ranked in selection.ranking:
        best = min(ranked.in_regime("stable"), key=lambda row: row["val_loss"])
        chosen = [best]
        if ranked.name in c.every_regime:
            adaptive = [row for row in ranked.in_regime("adaptive") if row["step"] > 0]
            chosen += adaptive[len(adaptive) // 2 :][:1]
            chosen += ranked.in_regime("mild")[-1:] + ranked.in_regime("severe")[-1:]
        for row in sorted(chosen, key=lambda row: row["step"]):
            start = {"dataset": ranked.name, "sft_step": row["step"], "regime": row["regime"], "x_sft": row["x_sft"]}
            starts.append(start)
        entry = {"name": ranked.name, "min_val_loss": ranked.min_val_loss}
        entry |= {"recommended_step": best["step"], "recommended_regime": best["regime"]}
        ranking.append(entry | {"score": best["score"], "pass_at_k": best["pass_at_k"]})
    return {"chosen": selection.chosen, "ranking": ranking, "starts": starts, "saturated": selection.saturated}


def rl_config(c: PipelineConfig, model: str, data: dict, out: Path) -> train_rl.RLConfig:
    """RL from a checkpoint, scored on the test problems at --rl-points points of its curve."""
    return train_rl.RLConfig(
        model=model,
        train=data["rl"],
        val=data["test"],
        out=str(out),
        algo=c.algo,
        steps=c.rl_steps,
        prompts=c.rl_batch,
        update_prompts=c.rl_update,
        round_prompts=c.rl_batch,
        max_rounds=c.rl_rounds,
        group=c.rl_group,
        lr=c.rl_lr,
        eval_every=max(1, round(c.rl_steps / c.rl_points)),
        checkpoint_every=max(1, c.rl_steps // 2),
        max_new_tokens=c.max_new_tokens,
        verifier=c.verifier,
        **training(c),
    )


def train_branches(
    c: PipelineConfig, folder: Path, data: dict, base: dict, selection: dict, pool: Executor
) -> list[dict]:
    """RL from every start (Fig. 8): a branch is a start with the curve of its score against compute x_rl."""
    runs = {}
    for start in selection["starts"]:
        out = folder / f"{start['dataset']}@{start['sft_step']}"
        runs[out.name] = rl_config(c, starting_model(start, base, folder.parent), data, out)
    curves, steps = train_in_rounds(
        runs,
        lambda some: train_parallel("RL", train_rl.main, some, pool, folder, "score"),
        folder / "granted.json",
        problems=len(read_examples(data["test"])),
        even=c.allocate == "off",
    )
    branches = []
    for start, (name, curve) in zip(selection["starts"], curves.items(), strict=True):
        policies = {"before": runs[name].model, "after": str(checkpoints(folder / name)[-1][1])}
        branches.append(start | report.branch_of(curve, steps[name]) | policies)
    return branches


if __name__ == "__main__":
    config.run_cli(lambda: main(config.parse(PipelineConfig, __doc__, presets=PRESETS, preset="demo")))
