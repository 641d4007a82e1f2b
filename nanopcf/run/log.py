"""What a run prints on stderr: with what and where it runs, and how far it is."""

import contextlib
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from kernels.products import ONEDNN
from nanopcf.run import parallel
from nanopcf.run.untrusted import printable


def bar(start: int, end: int, total: int, label: str) -> tqdm:
    """The steps from `start` up to `end`, with a progress bar that counts them out of `total`."""
    hidden = parallel.rank() > 0
    return tqdm(
        range(start, end),
        initial=start,
        total=total,
        desc=printable(label),
        leave=False,
        mininterval=0.5,
        disable=hidden,
    )


def environment(device: torch.device) -> dict:
    """What a reader must know to repeat a number: command, versions, device and commit."""
    root = Path(__file__).resolve().parents[2]
    try:
        git = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        commit = git.stdout.strip() or "unknown"
    except OSError:  # git is not installed
        commit = "unknown"
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": f"{device.type} ({name})",
        "commit": commit,
    }


def header(device: torch.device, threads: int, dtype: torch.dtype = torch.float32) -> str:
    """The first lines of a run's log."""
    e = environment(device)
    versions = ", ".join(f"{name} {version}" for name, version in e["versions"].items())
    products = ", products by oneDNN" if ONEDNN and device.type == "cpu" else ""
    numbers = f"{str(dtype).removeprefix('torch.')}, {threads} thread(s){products}"
    return f"{e['command']}\n{versions}, commit {e['commit']}; {e['device']}, {numbers}"


def announce(text: str) -> None:
    """Print to stderr, once where there are several processes."""
    if parallel.rank() == 0:
        with contextlib.suppress(OSError):  # the terminal was closed: no reason not to save
            print(printable(text), file=sys.stderr, flush=True)


@cache
def announce_once(text: str) -> None:
    """`announce` what concerns many examples; said again, it is not printed again."""
    announce(text)
