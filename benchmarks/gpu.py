"""The first hour on a GPU, in five parts of at most 8 minutes and half an hour in all:

    tests        pytest -m cuda, and what the compiler made of the kernels: registers, spills, tensor cores
    head         the fused head against all logits, torch.compile, Liger and cut-cross-entropy
    operations   attention in packed rows and in decoding, chunk sizes of the head, drawing a token; last the Triton
                 kernels beside what they were before they were rewritten, which needs the git history
    model        where the time goes, generation against transformers, a step of SFT and of RL
    demo         the pipeline on the CPU and on the GPU beside each other

    python benchmarks/gpu.py                    every part that isn't finished yet
    python benchmarks/gpu.py head model         these parts
    python benchmarks/gpu.py --no-compile       without what torch.compile makes, which takes minutes
    python benchmarks/gpu.py --dry              every part tiny and on the CPU: does it run? No figure means anything

A part is some commands, each in a process of its own; whichever fails, the others still run. What they print becomes
the page docs/results/gpu-PART-GPU.md (--out: another folder; with --dry runs/gpu-dry), with hardware, versions, aims,
and what is missing here. The floor of each table, a large product and a copy, is measured in the same command. A page
says at its end whether all of the part ran. If so, the part is kept the next time; remove the page to run it again.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from common import ROOT, Page, clock, short_name, versions, wall_rates

from nanopcf.run import files, machine
from nanopcf.sampler import sample

SECONDS = {"tests": 330, "head": 420, "operations": 240, "model": 450, "demo": 360}  # the most each part takes
PEERS = ("triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
DRY = "**A dry run on a CPU with tiny shapes: no figure here means anything.**"
FINISHED = "All of it ran"
BEFORE = "9514ccb^"  # the last revision before the Triton kernels were rewritten, for fewer instructions per logit


def commands(part: str, dry: bool, compiled: bool) -> list[str]:
    """What a part runs, as arguments of Python."""
    own, tests = "benchmarks/gpu.py --measure", "-m pytest -m cuda -n 0 -q -p no:cacheprovider"
    if dry:
        cpu = "--device cpu --repeats 1"
        train = f"benchmarks/train.py --model 0.1M {cpu} --batch 4 --length 32 --micro 2 --no-compile"
        return {
            "tests": [f"{tests} tests/test_model.py tests/test_sampler.py", f"{own} compiler --dry"],
            "head": [f"benchmarks/kernels.py {cpu} --shapes 64,32,512 --no-compile"],
            "operations": [
                "benchmarks/attention.py --dry",
                f"benchmarks/kernels.py {cpu} --shapes 64,32,512 --passes sft rl --chunk-rows 16 64",
                f"{own} drawing --dry",
                f"benchmarks/kernels.py {cpu} --shapes 64,32,512 --before {BEFORE}",
            ],
            "model": [
                f"benchmarks/breakdown.py {cpu} --models 0.1M --rows 2 --length 32 --new-tokens 4",
                f"benchmarks/sampler.py {cpu} --models 0.1M --prompts 2 --samples 2 --new-tokens 4 --only-peers",
                f"{train} --only sft",
                f"{train} --only rl --prompts 2 --group 2 --new-tokens 8",
            ],
            "demo": [f"{own} demo --dry"],
        }[part]
    head, train = "benchmarks/kernels.py --shapes 8192,896,151936", "benchmarks/train.py --model 0.5B --repeats 1"
    return {
        "tests": [tests, f"{own} compiler"],
        "head": [
            f"{head} 4096,4096,128256 8192,4096,131072 --repeats 3 --no-compile",
            *([f"{head} --passes sft rl --repeats 3"] if compiled else []),
        ],
        "operations": [
            "benchmarks/attention.py",
            f"{head} --passes sft --chunk-rows 1024 2048 4096 8192",
            "benchmarks/kernels.py --shapes 8192,4096,131072 --passes rl --chunk-rows 1024 2048 4096 8192",
            f"{own} drawing",
            f"{head} 8192,4096,131072 --repeats 3 --before {BEFORE}",
        ],
        "model": [
            "benchmarks/breakdown.py --models 0.5B --rows 256 --length 1024 --new-tokens 128 --repeats 2"
            + " --compile" * compiled,
            "benchmarks/sampler.py --models 0.5B --new-tokens 128 --repeats 2 --only-peers",
            f"{train} --only sft --batch 64 --length 1024" + " --no-compile" * (not compiled),
            f"{train} --only rl --prompts 32 --new-tokens 256 --no-compile",
        ],
        "demo": [f"{own} demo"],
    }[part]


# ---- a part ----


def run_command(arguments: str, seconds: float, page: Path) -> str:
    """Run Python with these arguments; what it prints is shown, and added to the page as it comes.

    Returns "" or what went wrong. Ended after so many seconds, with all processes that it started.
    """
    started, killed = time.monotonic(), []
    with page.open("a", encoding="utf-8") as file, tempfile.TemporaryFile("w+") as errors:
        plain = "pytest" in arguments  # not Markdown
        print(f"\n## `python {arguments}`\n" + "\n```" * plain, file=file, flush=True)
        process = subprocess.Popen(
            [sys.executable, *arguments.split()],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )

        def kill() -> None:
            killed.append(True)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, kill)
        timer.start()
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                print(line, end="", file=file, flush=True)
            code = process.wait()
        except BaseException:
            kill()
            raise
        finally:
            timer.cancel()
        errors.seek(0)
        said = errors.read().replace("\r", "\n").splitlines()
        absent = [line.strip() for line in said if "left out" in line or line.startswith("(no ")]
        print("```" * plain, *(f"- {line}" for line in absent), sep="\n", file=file)
        if code == 0:
            return ""
        problem = f"stopped after {seconds:.0f} s" if killed else f"exit code {code}"
        print(f"\n{problem}; the end of what it said on stderr:\n\n```", *said[-20:], "```", sep="\n", file=file)
        print("\n".join(said[-20:]), file=sys.stderr)
        return f"`{arguments}`: {problem} ({time.monotonic() - started:.0f} s)"


def run_part(part: str, page: Path, device: torch.device, a: argparse.Namespace) -> list[str]:
    """Run a part and write its page. Returns what went wrong."""
    began, problems = time.monotonic(), []
    page.parent.mkdir(parents=True, exist_ok=True)
    head = [f"# First hour on a GPU, {part}", "", *([DRY, ""] if a.dry else []), f"{versions(device)}; {driver()}", ""]
    absent = [name for name in PEERS if not installed(name)]
    head += [f"Not installed here: {', '.join(absent) or 'nothing'}."]
    page.write_text("\n".join(head) + "\n", encoding="utf-8")
    print("\n" + "\n".join(head), flush=True)
    for arguments in commands(part, a.dry, not a.no_compile):
        left = SECONDS[part] - (time.monotonic() - began)
        problem = run_command(arguments, left, page) if left > 5 else f"`{arguments}`: no time was left"
        problems += [problem] if problem else []
    last = f"{FINISHED}: {time.monotonic() - began:.0f} s."
    if problems:
        last = f"Not all of it ran: {'; '.join(problems)}. The next call runs the part again."
    with page.open("a", encoding="utf-8") as file:
        print("", *([DRY, ""] if a.dry else []), last, sep="\n", file=file)
    print(f"\n{page}: {last}", flush=True)
    return problems


def installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def driver() -> str:
    """CUDA's version and what nvidia-smi says of the driver, the clock and the power limit."""
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "no NVIDIA driver"
    return f"CUDA {torch.version.cuda}, driver, clock and power limit {said.splitlines()[0]}"


# ---- what is measured here ----


def compiler(device: torch.device, dry: bool) -> None:
    """The kernels compiled for this GPU: a row each."""
    page = Page("Compiled kernels", device)
    arch = "sm_90" if dry else "sm_{}{}".format(*torch.cuda.get_device_capability())
    done = subprocess.run(
        [sys.executable, "tests/compile_kernels.py", arch], cwd=ROOT, capture_output=True, text=True, check=False
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if rows:
        page.head(f"{arch}; aims: no spills, and on sm_90 wgmma in bf16:", *rows[0])
    for row in rows:
        page.row(*map(str, row.values()))
    # What ptxas warns of as C7515. Triton hides its warnings, and its cache holds kernels without them.
    waiting = sum(0 < row["wgmma"] <= row["waits"] for row in rows)
    page.add("", f"Kernels whose tensor-core instructions wait for each other: {waiting}; aim 0.")
    if done.returncode:
        raise SystemExit(done.stderr)


def drawing(device: torch.device, dry: bool) -> None:
    """Drawing one token in every row, ours and in two other ways."""
    page = Page("Drawing a token", device)
    _, bandwidth = wall_rates(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    vocab, calls, repeats = (1000, 2, 2) if dry else (151_936, 20, 5)

    def race(logits: torch.Tensor) -> torch.Tensor:
        return (logits.softmax(-1) / torch.empty_like(logits).exponential_()).argmax(-1)

    ways = {
        "nanopcf: token and log-prob": lambda z, u: sample(z, u, 1.0, 1.0),
        "torch.multinomial: token": lambda z, u: torch.multinomial(z.softmax(-1), 1),
        "argmax of p / exponential noise: token": lambda z, u: race(z),
    }
    page.head(
        f"Vocabulary {vocab:,}, temperature 1; the floor reads the float32 logits once at {bandwidth / 1e9:,.0f} GB/s:",
        "way",
        *(f"{rows} rows, ms (of the floor)" for rows in (64, 256)),
    )
    for name, way in ways.items():
        cells = []
        for rows in (64, 256):
            z, u = torch.randn(rows, vocab, device=device) * 2.5, torch.rand(rows, device=device)

            def work(way=way, z=z, u=u) -> None:
                for _ in range(calls):
                    way(z, u)

            work()
            seconds = statistics.median(clock(work, device)[0] for _ in range(repeats)) / calls
            cells.append(f"{seconds * 1e3:.3g} ({z.nbytes / bandwidth / seconds:.0%})")
        page.row(name, *cells)


def demo(device: torch.device, dry: bool) -> None:
    """The pipeline on the CPU and on the GPU at the same time, as both have cores enough; seconds of each stage."""
    page = Page("The demo", device)
    sizes = "--preset tiny --base-steps 4 --pool 40 --candidates uniform-8 --every-regime uniform-8 --val 8 --test 8 "
    sizes += "--sft-steps 2 --sft-checkpoints 1 --rl-prompts 8 --rl-steps 1 --rl-points 1 --rl-batch 4 --corpus 100"
    runs = {"cpu": "cpu", "cpu, in place of cuda": "cpu"} if dry else {"cpu": "cpu", "cuda": "cuda"}
    began, ended, processes, limit = time.monotonic(), {}, {}, SECONDS["demo"] - 30
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, where) in enumerate(runs.items()):
            command = ["pipeline.py", *(sizes.split() if dry else []), "--device", where, "--out", f"{folder}/{i}"]
            log = (Path(folder) / f"{i}.log").open("w+")
            processes[name] = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log), log
        while len(ended) < len(runs) and time.monotonic() - began < limit:
            time.sleep(0.2)
            for name, (process, _) in processes.items():
                if name not in ended and process.poll() is not None:
                    ended[name] = time.monotonic() - began
        results = []
        for i, (process, _) in enumerate(processes.values()):
            process.kill()  # its workers end with it
            process.wait()
            paths = [Path(folder) / str(i) / f"{stage}.json" for stage in ("data", "base", "candidates", "sft", "rl")]
            stages = {path.stem: files.read_json(path) for path in paths if path.exists()}
            results.append({name: stage["elapsed_s"] for name, stage in stages.items() if stage["done"]})
        page.head("Seconds of each stage, both runs at the same time:", "stage", *runs, "GPU / CPU")
        for stage in dict.fromkeys([*results[0], *results[1]]):
            page.row(stage, *and_ratio([r.get(stage) for r in results]))
        page.row("whole, aim at most 1.0x", *and_ratio([ended.get(name) for name in runs]))
        for i, (name, (process, log)) in enumerate(processes.items()):
            report = Path(folder) / str(i) / "report.json"
            page.add("", f"{name}: {files.read_json(report)['answer'] if report.exists() else 'no report'}")
            log.seek(0)
            if process.returncode:
                print(name, *log.read().replace("\r", "\n").splitlines()[-10:], sep="\n", file=sys.stderr)
    if len(ended) < len(runs) or any(process.returncode for process, _ in processes.values()):
        raise SystemExit(f"not both ended well within {limit} s")


def and_ratio(seconds: list[float | None]) -> list[str]:
    both = None not in seconds and min(seconds) > 0
    shown = ["-" if s is None else f"{s:.1f}" for s in seconds]
    return [*shown, f"{seconds[1] / seconds[0]:.2f}x" if both else "-"]


MEASURES = {"compiler": compiler, "drawing": drawing, "demo": demo}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(SECONDS)}; default: all")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile makes")
    parser.add_argument("--out", type=Path, help="folder of the pages")
    parser.add_argument("--measure", choices=MEASURES, help="one table of this file; the parts call it")
    a = parser.parse_args()
    unknown = set(a.parts) - set(SECONDS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(SECONDS)}")
    if not a.dry and not torch.cuda.is_available():
        parser.error("this machine or this build of torch has no GPU; --dry runs every part tiny on the CPU")
    device = machine.choose_device("cpu" if a.dry else "cuda")
    if a.measure:
        MEASURES[a.measure](device, a.dry)
        return 0
    out = a.out or ROOT / ("runs/gpu-dry" if a.dry else "docs/results")
    problems = []
    for part in a.parts or SECONDS:
        page = out / f"gpu-{part}-{'dry' if a.dry else short_name(device)}.md"
        if page.exists() and page.read_text(encoding="utf-8").splitlines()[-1].startswith(FINISHED):
            print(f"{page}: kept; remove it to run the part again")
        else:
            problems += run_part(part, page, device, a)
    print("\n" + (DRY if a.dry else "") + "\n".join(["", *problems]).rstrip())
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
