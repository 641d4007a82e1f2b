"""Settings: the checks of each type, from Python, from TOML and from flags; and the help."""

import importlib
import math
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Literal

import pytest
from conftest import ROOT, run_script

import train_rl
import train_sft
from nanopcf.run import config
from nanopcf.run.config import (
    Argument,
    Count,
    Device,
    DType,
    Natural,
    NonNegative,
    Positive,
    PositiveShare,
    Share,
    Text,
)


@dataclass(frozen=True)
class Everything(config.Config):
    folder: Argument  # where
    name: str  # what
    count: Count = 1  # at least 1
    natural: Natural = 0  # at least 0
    positive: Positive = 1.0  # above 0
    non_negative: NonNegative = 0.0  # at least 0
    share: Share = 0.5  # 0 to 1
    positive_share: PositiveShare = 0.5  # above 0, to 1
    text: Text = ""  # with line breaks
    word: Literal["left", "right"] = "left"  # left or right, 100 %
    device: Device = "auto"  # of the work
    dtype: DType = "auto"  # of the weights
    several: tuple[Positive, ...] = (1.0, 2.0)  # each above 0
    yes: bool = False  # or no


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(count=0), "--count must be at least 1, got 0"),
        (dict(natural=-1), "--natural must be at least 0, got -1"),
        (dict(positive=0), "--positive must be above 0, got 0.0"),
        (dict(positive=math.nan), "--positive must be above 0, got nan"),
        (dict(non_negative=-0.5), "--non-negative must be at least 0, got -0.5"),
        (dict(non_negative=math.nan), "--non-negative must be at least 0, got nan"),
        (dict(non_negative=math.inf), "--non-negative must be finite, got inf"),
        (dict(positive_share=0.0), "--positive-share must be above 0 and at most 1, got 0.0"),
        (dict(positive_share=math.nan), "--positive-share must be above 0 and at most 1, got nan"),
        (dict(share=1.01), "--share is a share from 0 to 1, got 1.01"),
        (dict(share=math.nan), "--share is a share from 0 to 1, got nan"),
        (dict(word="up"), "--word must be left or right, got 'up'"),
        (dict(device="xyz"), "--device must be auto, cpu, cuda or mps, got 'xyz'"),
        (dict(dtype="int8"), "--dtype must be auto, float32 or bfloat16, got 'int8'"),
        (dict(several=(1.0, 0.0)), "--several must be above 0, got 0.0"),
        (dict(folder=""), "--folder must not be empty, got ''"),
    ],
)
def test_values_that_break_a_rule(change, message):
    """Whoever makes the dataclass, Python or a file."""
    values = dict(folder="f", name="n") | change
    for make in (lambda: Everything(**values), lambda: config.from_dict(Everything, values, "x.toml")):
        with pytest.raises(ValueError) as caught:
            make()
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(count="3"), "count must be int, got '3'"),
        (dict(count=3.0), "count must be int, got 3.0"),
        (dict(count=True), "count must be int, got True"),
        (dict(positive=True), "positive must be float, got True"),
        (dict(yes=1), "yes must be bool, got 1"),
        (dict(name=3), "name must be str, got 3"),
        (dict(several=3.0), "several must be tuple[float, ...], got 3.0"),
        (dict(several=["a"]), "several must be float, got 'a'"),
        (dict(positive=10**400), "int too large to convert to float"),
    ],
)
def test_values_of_another_type(change, message):
    values = dict(folder="f", name="n") | change
    with pytest.raises((TypeError, OverflowError)) as caught:
        Everything(**values)
    assert str(caught.value) == message
    with pytest.raises(ValueError) as caught:
        config.from_dict(Everything, values, "x.toml")
    assert str(caught.value) == f"x.toml: {message}"


def test_files_and_flags_become_the_types_of_their_fields(tmp_path):
    """Lists become tuples and integers floats; a flag wins over the file; an argument has no flag."""
    (tmp_path / "c.toml").write_text('name = "file"\nseveral = [3, 4]\npositive = 2\nyes = true\n')
    c = config.parse(Everything, "", ["here", "--config", str(tmp_path / "c.toml"), "--name", "flag"])
    assert (c.folder, c.name, c.yes) == ("here", "flag", True)
    assert c.several == (3.0, 4.0) and all(type(v) is float for v in (*c.several, c.positive))
    c = config.parse(Everything, "", ["--name", "n", "--several", "5", "6", "--yes", "--word", "right", "--", "here"])
    assert (c.folder, c.several, c.word) == ("here", (5.0, 6.0), "right")
    assert config.parse(Everything, "", ["--name", "n", "--several", "--", "here"]).several == ()
    with pytest.raises(ValueError, match=r"^command line: required: --name$"):
        config.parse(Everything, "", ["here"])


@pytest.mark.parametrize("text", [r"Question: {prompt}\nAnswer:", r"a\tb", r"\\boxed \\\\ \\n", "plain"])
def test_a_text_is_the_same_from_a_flag_and_from_a_file(text, tmp_path):
    """A shell hands over a backslash and an n: once the model saw these two, and a line break from a file. A byte-order
    mark, which some editors write, is no part of the file."""
    (tmp_path / "c.toml").write_text(f'name = "n"\ntext = "{text}"\n', encoding="utf-8-sig")
    file = config.parse(Everything, "", ["here", "--config", str(tmp_path / "c.toml")])
    assert config.parse(Everything, "", ["here", "--name", "n", "--text", text]) == file
    assert config.parse(Everything, "", ["here", "--name", r"\n", "--text", r"\boxed"]).text == r"\boxed"


def test_an_argument_that_is_missing(capsys):
    with pytest.raises(SystemExit):
        config.parse(Everything, "", ["--name", "n"])
    assert capsys.readouterr().err == "error: the following arguments are required: FOLDER (see --help)\n"


def test_a_field_without_a_comment_is_an_error_that_says_so():
    @dataclass(frozen=True)
    class Silent(config.Config):
        number: int = 1  # told
        other: int = 2

    with pytest.raises(ValueError, match=r"Silent\.\w+ needs a comment at the end of its line: it is the help"):
        config.parse(Silent, "", [])


COMMANDS = {
    "nanopcf.ceiling.curves": "CurvesConfig",
    "train_sft": "SFTConfig",
    "train_rl": "RLConfig",
    "pipeline": "PipelineConfig",
    "nanopcf.evaluate": "EvaluateConfig",
    "nanopcf.generate": "GenerateConfig",
    "nanopcf.tools.clean": "CleanConfig",
    "nanopcf.tools.replay": "ReplayConfig",
    "nanopcf.tools.show": "ShowConfig",
    "nanopcf.tools.smollm2": "SmolLM2Config",
}


@pytest.mark.parametrize("columns", [80, 130])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_one_line_per_flag(name, columns, monkeypatch, capsys):
    module = importlib.import_module(name)
    cls = getattr(module, COMMANDS[name])
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as ended:
        config.parse(cls, module.__doc__, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0 and max(map(len, lines)) < columns
    settings = [line.split()[0] for line in lines if line.startswith("  ")]  # a second line would add its first word
    expected = ["-h,", "--config"]
    for field in fields(cls):
        is_argument = config.NOT_EMPTY in config.take_apart(field.type)[1]
        expected.append(field.name.upper() if is_argument else config.flag(field.name))
    assert sorted(settings) == sorted(expected)


def test_a_module_is_named_as_it_is_started():
    command = [sys.executable, "-m", "nanopcf.tools.smollm2", "--help"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "COLUMNS": "80"}, capture_output=True, text=True)
    assert done.stdout.startswith("usage: python -m nanopcf.tools.smollm2 FOLDER [--flag VALUE ...]\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train_sft.py", "--model", "x"], "required: --train, --val, --out"),
        (["train_sft.py", "--stepz", "3"], "no flag --stepz; did you mean --steps"),
        (
            ["train_rl.py", "--model", "m", "--train", "t", "--val", "v", "--out", "o", "--algo", "dapo_dd"],
            "did you mean dapo_d",
        ),
        (
            ["train_rl.py", "--model", "m", "--train", "t", "--val", "v", "--out", "o", "--group", "0"],
            "--group must be at least 1",
        ),
        (
            ["train_rl.py", "--model", "m", "--train", "t", "--val", "v", "--out", "o", "--schedule", "linaer"],
            "--schedule: no 'linaer'; there are constant, cosine",
        ),
        (
            ["-m", "nanopcf.generate", "--model", "m", "--prompt", "1", "--threads", "-1"],
            "--threads must be from 0 to 1024",
        ),
        (
            ["train_sft.py", "--model", "nowhere", "--train", "t", "--val", "v", "--out", "o"],
            "nowhere: no such model folder",
        ),
        (["pipeline.py", "--task", "modula"], "did you mean modular?"),
        (["pipeline.py", "--candidates", "medium-3"], "should be like uniform-240"),
        (["pipeline.py", "--steps", "a"], "no flag --steps"),
        (["pipeline.py", "--sft-steps", "many"], "invalid int value: 'many'"),
        (["pipeline.py", "--config", "nowhere.toml"], "nowhere.toml: can't be read"),
    ],
)
def test_bad_command_lines(arguments, message):
    result = run_script(*arguments)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_bad_config_file(tmp_path):
    (tmp_path / "c.toml").write_text("stepss = 3\n")
    with pytest.raises(ValueError, match=r"c\.toml: no setting 'stepss'; did you mean steps"):
        config.parse(train_sft.SFTConfig, "", ["--config", str(tmp_path / "c.toml")])
    (tmp_path / "c.toml").write_text('steps = "3"\n')
    with pytest.raises(ValueError, match=r"steps must be int, got '3'"):
        config.parse(train_sft.SFTConfig, "", ["--config", str(tmp_path / "c.toml")])
    (tmp_path / "c.toml").write_text("steps = \n")
    with pytest.raises(ValueError, match="not valid TOML"):
        config.parse(train_sft.SFTConfig, "", ["--config", str(tmp_path / "c.toml")])


def test_flags_override_the_file(tmp_path):
    (tmp_path / "c.toml").write_text('model = "m"\ntrain = "t"\nval = "v"\nout = "o"\nlr = 1\nsteps = 5\n')
    c = config.parse(train_sft.SFTConfig, "", ["--config", str(tmp_path / "c.toml"), "--steps", "7"])
    assert (c.steps, c.lr, c.model) == (7, 1.0, "m") and isinstance(c.lr, float)


def test_every_setting_has_help():
    from nanopcf.evaluate import EvaluateConfig
    from nanopcf.generate import GenerateConfig
    from pipeline import PipelineConfig

    for cls in (train_sft.SFTConfig, train_rl.RLConfig, PipelineConfig, EvaluateConfig, GenerateConfig):
        assert set(config.field_help(cls)) >= set(cls.__dataclass_fields__), cls
    with pytest.raises(ValueError, match="--data needs at least one value"):  # a list without a default
        EvaluateConfig(model="m", data=())


@pytest.mark.parametrize("script", ["train_sft.py", "train_rl.py", "pipeline.py"])
def test_help_needs_no_torch(script):
    code = f"import sys, runpy; sys.modules['torch'] = None; sys.argv = ['{script}', '--help']; runpy.run_path('{script}', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "--resume" in result.stdout, result.stderr


def test_settings_of_the_papers_own_model_are_whole():
    """configs/qwen2.5-7b is for the training scripts; the numbers are the paper's (Sec. 5, Table 2)."""
    files = {name: str(ROOT / "configs" / "qwen2.5-7b" / f"{name}.toml") for name in ("sft", "rl")}
    rest = ["--train", "t", "--val", "v", "--out", "o"]
    sft = config.parse(train_sft.SFTConfig, "", ["--config", files["sft"], *rest])
    rl = config.parse(train_rl.RLConfig, "", ["--config", files["rl"], "--model", "m", *rest])
    assert (sft.lr, sft.batch, sft.checkpoint_every) == (1e-5, 512, 360)
    assert (rl.lr, rl.round_prompts, rl.update_prompts, rl.group, rl.max_new_tokens) == (1e-6, 128, 64, 8, 8192)
    assert sft.shard_optimizer and rl.shard_optimizer
