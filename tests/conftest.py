import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the three scripts at the top, also when only the packages are installed

from nanopcf import checkpoint  # noqa: E402
from nanopcf.model import ModelConfig, Transformer  # noqa: E402
from nanopcf.run import machine  # noqa: E402
from nanopcf.tokenizer import nano_tokenizer  # noqa: E402

if not torch.cuda.is_available():
    # Triton's own functions are made for the interpreter, or not, when triton is first imported. Later the variable only
    # says which path is the default, which stays PyTorch: the tests of the kernels set it again.
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
    """Runs without --threads probe for them: here they find one, so that a test's numbers don't depend on the moment."""
    monkeypatch.setattr(machine, "cores", lambda: 1)


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
    checkpoint.save(model, nano_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


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
