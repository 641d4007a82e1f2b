"""Tiny models, data and runs that many tests share, and scripts run in this process."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the three scripts at the top, also when only the packages are installed

import train_rl  # noqa: E402
import train_sft  # noqa: E402
from nanopcf import checkpoint  # noqa: E402
from nanopcf.data import Example, write_jsonl  # noqa: E402
from nanopcf.model import ModelConfig, Transformer  # noqa: E402
from nanopcf.run import log, machine  # noqa: E402
from nanopcf.run.folder import checkpoints  # noqa: E402
from nanopcf.tokenizer import END, TextTokenizer  # noqa: E402

if not torch.cuda.is_available():
    # Triton's own functions are made for the interpreter, or not, when triton is first imported. Later the variable
    # only says which path is the default, which stays PyTorch: the tests of the kernels set it again.
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        import kernels.gpu.token_loss  # noqa: F401
    del os.environ["TRITON_INTERPRET"]

torch.set_num_threads(1)  # small tensors: a second thread costs more than it brings


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """Runs without --threads probe for them: here they find one, so that a test's numbers don't depend on the
    moment."""
    monkeypatch.setattr(machine, "cores", lambda: 1)


@pytest.fixture(autouse=True)
def nothing_said():
    """What a run says once, each test may see."""
    log.announce_once.cache_clear()


def character_tokenizer() -> TextTokenizer:
    """One token per character of small sums, and the end token: a vocabulary of 16."""
    vocabulary = {symbol: i for i, symbol in enumerate([*"0123456789+-*= ", END])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END])
    return TextTokenizer(tokenizer)


def sums(count: int, seed: int) -> list[Example]:
    """Different problems that the characters can spell: "12+7=", worked as "7+12=19"."""
    rng = np.random.default_rng(seed)
    pairs = [divmod(int(i), 100) for i in rng.choice(10_000, count, replace=False)]
    return [Example(f"{a}+{b}=", f"{b}+{a}={a + b}", f"{a + b}") for a, b in pairs]


@pytest.fixture
def tiny_config() -> ModelConfig:
    return ModelConfig(vocab_size=16, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, max_length=64)


@pytest.fixture
def model(tiny_config) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(tiny_config)
    with torch.no_grad():  # sharpen it, so that mistakes show
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(2)
    return model


@pytest.fixture
def model_dir(model, tmp_path) -> Path:
    checkpoint.save(model, character_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sft(model_dir, tmp_path) -> train_sft.SFTConfig:
    write_jsonl(tmp_path / "train.jsonl", sums(40, 0))
    write_jsonl(tmp_path / "val.jsonl", sums(10, 1))
    return train_sft.SFTConfig(
        model=str(model_dir),
        train=str(tmp_path / "train.jsonl"),
        val=str(tmp_path / "val.jsonl"),
        out=str(tmp_path / "sft"),
        steps=6,
        batch=8,
        checkpoint_every=2,
        device="cpu",
    )


@pytest.fixture
def rl(model_dir, tmp_path) -> train_rl.RLConfig:
    """One-token problems ("+" -> "0", "-" -> "1"), so that a random model finds signal at once."""
    rows = [{"prompt": p, "answer": a} for p, a in (("+", "0"), ("-", "1"), ("*", "2"), ("=", "3"))]
    path = write_rows(tmp_path / "rl.jsonl", rows)
    return train_rl.RLConfig(
        model=str(model_dir),
        train=path,
        val=path,
        out=str(tmp_path / "rl"),
        algo="grpo",
        steps=4,
        prompts=4,
        update_prompts=2,
        group=8,
        eval_every=2,
        checkpoint_every=2,
        max_new_tokens=3,
        device="cpu",
    )


@pytest.fixture
def init_dir(tmp_path) -> str:
    """A model that samples nearly uniformly: one answer in sixteen is right, so RL has a signal."""
    torch.manual_seed(0)
    init = Transformer(ModelConfig(vocab_size=16, width=32, heads=2, kv_heads=1, mlp_width=64, max_length=16))
    with torch.no_grad():
        init.embedding.weight.mul_(0.2)  # the head too
    checkpoint.save(init, character_tokenizer(), tmp_path / "init")
    return str(tmp_path / "init")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(vocab_size=16, width=16, layers=1, heads=2, kv_heads=1, mlp_width=24, max_length=32)
    )
    checkpoint.save(model, character_tokenizer(), tmp_path / "m")
    return tmp_path / "m"


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    """`python SCRIPT ...` or `python -m MODULE ...`, run in this process: a new one imports torch for seconds."""
    said, complained = io.StringIO(), io.StringIO()
    script, *rest = arguments
    if script == "-m":
        script, *rest = rest
        script = script.replace(".", "/")
        script += "/__main__.py" if (ROOT / script).is_dir() else ".py"
    before, code = sys.argv, 0
    sys.argv = [script, *rest]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            sys.argv = before
    return subprocess.CompletedProcess(arguments, code, said.getvalue(), complained.getvalue())


# columns of metrics.jsonl that a clock wrote
TIMED = {"seconds", "tokens_per_s", "generation_share", "scoring_share", "update_share"}


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def last_weights(out) -> dict:
    return load_file(checkpoints(out)[-1][1] / "model.safetensors")


def stop_after(monkeypatch, module, checkpoints: int) -> None:
    """Simulate a kill: the process dies right after its n-th checkpoint."""
    save, count = checkpoint.save_training, [0]

    def save_and_die(*arguments):
        save(*arguments)
        count[0] += 1
        if count[0] == checkpoints:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.checkpoint, "save_training", save_and_die)


X = np.linspace(1e12 / 14, 1e12, 14)


def law(x: np.ndarray, p: float, a: float, c: float, b: float) -> np.ndarray:
    with np.errstate(divide="ignore"):  # at x = 0
        return p + (a - p) / (1 + (x / c) ** -b)


def command(script: str, model_dir: Path, tmp_path: Path, out: Path, steps: int = 40) -> list[str]:
    flags = dict(model=model_dir, out=out, steps=steps, checkpoint_every=1, device="cpu", threads=1)
    if script == "train_sft.py":
        if not (tmp_path / "train.jsonl").exists():
            write_jsonl(tmp_path / "train.jsonl", sums(40, 0))
            write_jsonl(tmp_path / "val.jsonl", sums(10, 1))
        flags |= dict(train=tmp_path / "train.jsonl", val=tmp_path / "val.jsonl", batch=8)
    else:
        rows = [{"prompt": p, "trajectory": a, "answer": a} for p, a in zip("+-*=", "0123", strict=True)]
        path = write_rows(tmp_path / "rl.jsonl", rows)
        flags |= dict(
            train=path, val=path, algo="upt", prompts=4, update_prompts=2, group=4, max_new_tokens=3, eval_every=7
        )
    return [sys.executable, script, *(part for k, v in flags.items() for part in ("--" + k.replace("_", "-"), str(v)))]


def change(folder, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
