"""Run folders: one config each, nothing half-written."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import train_rl
import train_sft
from nanopcf.run import files
from nanopcf.run.folder import Metrics


def test_a_run_folder_belongs_to_one_config(sft, tmp_path):
    train_sft.main(replace(sft, steps=2))
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume"):
        train_sft.main(replace(sft, steps=2))
    with pytest.raises(ValueError, match=r"another config: --steps was 2, is 4"):
        train_sft.main(replace(sft, steps=4, resume=True))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(ValueError, match="not empty and not a run folder"):
        train_sft.main(replace(sft, out=str(tmp_path / "mine")))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["train", "val"])
@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_data_that_changed_are_refused_on_resume(kind, name, sft, rl, tmp_path):
    """The order of the examples follows from their number: with another file a resumed run would train another mixture.
    A run from before fingerprints, or before a setting was there, goes on."""
    c, main = (sft, train_sft.main) if kind == "sft" else (rl, train_rl.main)
    c = replace(c, val=str(tmp_path / "own.jsonl"))
    shutil.copy((sft if kind == "sft" else rl).val, c.val)
    main(c)
    path = Path(getattr(c, name))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"0", b"1"))
    assert len(path.read_bytes()) == len(whole)
    with pytest.raises(ValueError, match=rf"{path.name} has changed since the run in .* began"):
        main(replace(c, resume=True))
    path.write_bytes(whole)
    main(replace(c, resume=True))
    config = Path(c.out) / "config.json"
    files.write_json(
        config, {k: v for k, v in files.read_json(config).items() if k not in ("fingerprints", "end_token")}
    )
    path.write_bytes(whole.replace(b"0", b"1"))
    main(replace(c, resume=True))
    with pytest.raises(ValueError, match=r"--end-token was '', is '='"):
        main(replace(c, resume=True, end_token="="))


def test_trained_examples_validate_nothing(sft, tmp_path):
    """One file, or a copy of it, as --train and --val."""
    shutil.copy(sft.train, tmp_path / "copy.jsonl")
    for val in (sft.train, str(tmp_path / "copy.jsonl")):
        with pytest.raises(ValueError, match=r"--train and --val are the same file"):
            replace(sft, val=val)
    for bad in (dict(seed=-1), dict(lr=math.nan)):
        with pytest.raises(ValueError, match=rf"--{next(iter(bad))} must be"):
            replace(sft, **bad)


def test_nothing_is_written_for_bad_data(sft, rl, tmp_path):
    with pytest.raises(ValueError, match="no field 'trajectory'"):
        train_sft.main(replace(sft, train=rl.train))
    with pytest.raises(ValueError, match="at most 0 leave room for the answer"):
        train_rl.main(replace(rl, max_new_tokens=64))
    assert not (tmp_path / "sft").exists() and not (tmp_path / "rl").exists()


def test_a_failed_save_leaves_no_half_checkpoint(tmp_path, model):
    """A disk that fills up in the middle of a checkpoint: the old one stays whole, nothing is left beside it."""
    files.write_folder(tmp_path / "c", lambda f: (f / "a").write_text("old"))

    def full(folder):
        (folder / "a").write_text("new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.write_folder(tmp_path / "c", full)
    assert [p.name for p in tmp_path.iterdir()] == ["c"] and (tmp_path / "c" / "a").read_text() == "old"


def test_metrics_have_no_torn_or_repeated_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    (tmp_path / "checkpoints" / "step-2").mkdir(parents=True)
    Metrics(tmp_path).log(step=3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
