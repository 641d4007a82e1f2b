"""A number that is not finite: kept, and replayed to the module and the gradients."""

import importlib
import math

import pytest
import torch
from conftest import character_tokenizer, command, run_script

import train_rl
from nanopcf.optim import Optimizer
from nanopcf.packing import Sequence, pack
from nanopcf.run import config
from nanopcf.run.folder import checkpoints
from nanopcf.tools import replay


def test_a_number_gone_wrong_is_replayed_to_the_module_and_the_gradients(model, tmp_path):
    with torch.no_grad():
        model.blocks[1].mlp.down.weight[3, 5] = float("nan")
    rows = pack([Sequence([1, 2, 3, 4, 5], 2), Sequence([6, 7, 8], 1)], 5)
    with pytest.raises(ValueError, match=r"step 7: the loss is nan; .*python -m nanopcf.tools.replay"):
        replay.stop(tmp_path, "step 7: the loss is nan", model, character_tokenizer(), rows)
    seen = replay.replay(tmp_path / "not-finite", torch.device("cpu"))
    assert seen["module"] == "blocks.1.mlp.down" and math.isnan(seen["gradient_norm"])
    assert "blocks.1.mlp.down.weight" in seen["gradients"] and len(seen["rows"]) == 2
    done = run_script("-m", "nanopcf.tools.replay", str(tmp_path / "not-finite"))
    assert done.returncode == 0 and "isn't finite: blocks.1.mlp.down\n" in done.stdout


@pytest.mark.parametrize("name", ["train_sft", "train_rl"])
def test_a_replay_is_the_step_that_failed(name, model_dir, tmp_path, monkeypatch):
    """A gradient said to be infinite at the third step: loss and gradient of the kept batch are those of that step."""
    module = importlib.import_module(name)
    arguments = command(f"{name}.py", model_dir, tmp_path, tmp_path / "run", steps=5)[2:]
    config_class = module.SFTConfig if name == "train_sft" else module.RLConfig
    c = config.parse(config_class, "", arguments)
    real, norms = Optimizer.step, []

    def step(self, lr, clip):
        norms.append(real(self, lr if len(norms) < 2 else 0.0, clip))
        return norms[-1] if len(norms) < 3 else math.inf

    monkeypatch.setattr(Optimizer, "step", step)
    with pytest.raises(ValueError, match="the gradient's norm is inf"):
        module.main(c)
    seen = replay.replay(tmp_path / "run" / "not-finite", torch.device("cpu"))
    assert seen["gradient_norm"] == pytest.approx(norms[2], rel=1e-4) and norms[2] > 0
    assert seen["module"] is None and seen["gradients"] == []


def test_a_policy_that_blows_up_is_caught_in_its_own_log_probs(model_dir, tmp_path):
    c = config.parse(
        train_rl.RLConfig,
        "",
        [*command("train_rl.py", model_dir, tmp_path, tmp_path / "run")[2:], "--lr", "1e30", "--warmup", "0"],
    )
    with pytest.raises(ValueError, match=r"step \d: the .* is (nan|-?inf); .*replay"):
        train_rl.main(c)
    assert not checkpoints(tmp_path / "run") or checkpoints(tmp_path / "run")[-1][0] == 1
