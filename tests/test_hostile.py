"""Nothing let in: whatever a file or a model's answer holds, a reader gives a value or one sentence, in bounded time.

pytest -m long tests/test_hostile.py        10,000 cases a property
"""

import json
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_rl
import train_sft
from nanopcf import checkpoint, data, rewards
from nanopcf.ceiling import curves
from nanopcf.optim import Optimizer
from nanopcf.run import config, files, machine
from nanopcf.run.folder import Metrics, lock

cases = pytest.mark.parametrize("cases", [100, pytest.param(10_000, marks=pytest.mark.long)])


def check(cases: int, *strategies):
    """Run the decorated function on that many drawn inputs."""

    def run(f):
        quiet = list(HealthCheck)
        settings(max_examples=cases, deadline=None, database=None, suppress_health_check=quiet)(given(*strategies)(f))()

    return run


# ---- readers ----

texts = st.text(st.characters(exclude_categories=()), max_size=40)  # lone surrogates too
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
json_values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3), max_leaves=8
)
names = st.sampled_from(
    "prompt trajectory answer completion messages problem question solution final_answer Body Question Answer "
    "reward_model meta role content ground_truth".split()
)
rows = st.dictionaries(names | texts, json_values | st.lists(st.dictionaries(names, scalars)), max_size=5)
lines = rows.map(lambda r: json.dumps(r).encode()) | st.binary(max_size=60)


@cases
def test_jsonl(cases, tmp_path):
    path = tmp_path / "x.jsonl"

    @check(cases, st.lists(lines, max_size=4))
    def holds(content):
        path.write_bytes(b"\n".join(content))
        try:
            found = data.read_examples(path)
        except ValueError as error:
            assert str(error).startswith(str(path))
            str(error).encode()  # it can be printed
        else:
            for e in found:
                (e.prompt + e.trajectory + e.answer).encode()  # whole characters: a tokenizer can read them
                json.dumps(e.meta, ensure_ascii=False).encode()
            data.write_jsonl(tmp_path / "y.jsonl", found)
            assert [e.prompt for e in data.read_examples(tmp_path / "y.jsonl")] == [e.prompt for e in found]


cells = st.sampled_from(["sft", "rl", "0", "1", "0.5", "55", "nan", "inf", "-1", "", '"', "1e999"]) | texts


@cases
def test_csv_of_curves(cases, tmp_path):
    path = tmp_path / "x.csv"
    header = ",".join(curves.COLUMNS).encode()
    row = st.lists(cells, max_size=7).map(lambda r: ",".join(r).encode("utf-8", "surrogatepass"))

    @check(cases, st.booleans(), st.lists(row | st.binary(max_size=30), max_size=6))
    def holds(whole_header, content):
        path.write_bytes(b"\n".join([header] * whole_header + content))
        try:
            branches, errors = curves.read_curves(path)
        except ValueError as error:
            assert str(error).startswith(str(path))
            return
        assert all(e.startswith(str(path)) for e in errors)
        for b in branches.values():
            assert all(0 <= y <= 100 for y in b.y) and b.x == sorted(set(b.x))


@dataclass(frozen=True)
class Config(config.Config):
    number: int = 1  # whole
    share: float = 0.5  # real
    name: str = "a"  # text
    flag: bool = False  # yes or no
    many: tuple[int, ...] = ()  # several


@cases
def test_config_files_and_flags(cases, tmp_path):
    path = tmp_path / "x.toml"
    kinds = dict(number=int, share=float, name=str, flag=bool, many=tuple)
    line = st.tuples(st.sampled_from([*kinds, "nmae"]), json_values).map(
        lambda kv: f"{kv[0]} = {json.dumps(kv[1])}".encode()
    )

    @check(cases, st.lists(line | st.binary(max_size=30), max_size=3))
    def file(content):
        path.write_bytes(b"\n".join(content))
        try:
            c = config.from_dict(Config, config.read_toml(path), str(path))
        except ValueError as error:
            assert str(error).startswith(str(path))
        else:
            assert all(type(getattr(c, k)) is t for k, t in kinds.items())

    flags = st.sampled_from(["--number", "--share", "--name", "--flag", "--many", "--config", "--", "-h"])

    @check(cases, st.lists(flags | cells, max_size=5))
    def command_line(argv):
        try:
            c = config.parse(Config, "", argv)
        except ValueError:
            pass
        except SystemExit as ended:
            assert ended.code == 2 or "-h" in argv
        else:
            assert all(type(getattr(c, k)) is t for k, t in kinds.items())


# ---- the verifier ----

pieces = st.sampled_from(
    r"\boxed{ \frac{ \sqrt{ \binom{ \pi ^{ ^ { } ( ) [ ] \{ \} , ; : + - * / = \cup \le 1 2 0 9 .5 % $ x y ! "
    r"#### answer is \text{ \infty \left( \right] 10^{10} ^9^9^9 1e9 99999999 __import__ **".split(" ")
)
latex = st.lists(pieces | st.text(max_size=3), max_size=25).map("".join) | texts


@cases
def test_the_verifier_answers(cases):
    slowest = 0.0

    @check(cases, latex, latex)
    def holds(response, answer):
        nonlocal slowest
        began = time.process_time()
        for strict in (False, True):
            assert rewards.verify(response, answer, strict=strict) in (0.0, 1.0)
        slowest = max(slowest, time.process_time() - began)

    assert slowest < 1.0


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{42}" * 1000,
        "\\boxed{" * 50_000,
        "{" * 100_000 + "1",
        "\\boxed{" + "(" * 100_000 + "}",
        "\\boxed{" + "1," * 100_000 + "}",
        "\\boxed{9^{9^{9^{9}}}}",
        "\\boxed{" + "\\sqrt{" * 10_000 + "2" + "}" * 10_001,
        "\\boxed{" + "x+" * 50_000 + "x}",
        "\\boxed{99999999!}",
        "\\boxed{" + "9" * 1_000_000 + "}",
        "\\boxed{\\{" + ",".join(map(str, range(5000))) + "\\}}",
        "the answer is " * 100_000,
        "####" * 100_000,
        "\0" * 100_000,
        "\\boxed{\ud800}",
        "__import__('os').system('touch never')",
    ],
    ids=range(16),
)
def test_an_answer_made_to_hurt(text):
    began = time.process_time()
    for response, answer in ((text, "42"), (text, text[:5000]), ("\\boxed{42}", text)):
        assert rewards.verify(response, answer) in (0.0, 1.0)
    assert time.process_time() - began < 3.0
    assert not (ROOT / "never").exists()


# ---- files ----


def test_a_line_of_a_gigabyte_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "a"}\n')
        file.truncate(1 << 30)  # a hole: no disk is spent
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="line 2: longer than 64 MiB"):
        data.read_examples(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "a\xff"}',
        b"\0\0\0\0",
        b"[" * 100_000,
        b'{"prompt": ' + b"1" * 5000 + b"}",
        b'{"prompt": "a"',
        '{"prompt": "a"}'.encode("utf-16"),
    ],
)
def test_a_line_that_is_no_json_is_named(line, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "a"}\n' + line)
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: "):
        data.read_examples(tmp_path / "x.jsonl")


absurd = [
    ("vocab_size", 10**15),
    ("vocab_size", 10**30),
    ("vocab_size", 1e300),
    ("hidden_size", 10**12),
    ("hidden_size", 2**23),  # the norms alone would take 32 MiB per layer
    ("hidden_size", float("inf")),
    ("num_hidden_layers", 10**9),
    ("max_position_embeddings", 10**12),
    ("intermediate_size", 2**62),
    ("head_dim", 2**40),
    ("head_dim", 2**16),
    ("num_attention_heads", 2.0),
    ("hidden_size", -4),
    ("rope_theta", 0),
    ("rope_theta", float("nan")),
    ("rope_scaling", [1]),
    ("layer_types", 5),
    ("rms_norm_eps", "x"),
]


@pytest.mark.parametrize(("name", "value"), absurd)
def test_absurd_sizes_are_refused_before_memory_is_asked_for(name, value, model_dir):
    values = files.read_json(model_dir / "config.json")
    (model_dir / "config.json").write_text(json.dumps(values | {name: value}))
    began = time.process_time()
    with pytest.raises(ValueError, match=r"config\.json: "):
        checkpoint.load(model_dir)
    assert time.process_time() - began < 1.0


def test_positions_that_memory_cannot_hold_are_refused(model_dir, monkeypatch):
    """They are no weights, so the weights fit all the same."""
    values = files.read_json(model_dir / "config.json")
    monkeypatch.setattr(machine, "free_memory", lambda device: 2**28)
    (model_dir / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 2**22}))
    with pytest.raises(ValueError, match=r"4,194,304 positions, as config\.json has them, need"):
        checkpoint.load(model_dir)
    # a wrong folder is told before the positions take memory
    (model_dir / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 2**22, "head_dim": 512}))
    with pytest.raises(ValueError, match="weights don't match"):
        checkpoint.load(model_dir)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        ("model.safetensors", (200_000_000).to_bytes(8, "little") + b"{}"),
        ("model.safetensors", b""),
        ("model.safetensors", bytes(range(256)) * 20),
        ("config.json", b"[" * 100_000),
        ("config.json", b"\xff\xfe{}"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\0" * 100),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer_config.json", b'{"a":' * 100_000),
        ("tokenizer_config.json", b'{"eos_token": "elsewhere"}'),
        ("chat_template.jinja", b"\xff"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../../secret.safetensors"}}'),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "/etc/passwd"}}'),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "gone.safetensors"}}'),
        ("model.safetensors.index.json", b'{"weight_map": [1]}'),
    ],
)
def test_a_broken_file_of_a_model_folder_is_named(name, content, model_dir):
    (model_dir / name).write_bytes(content)
    with pytest.raises(ValueError, match=str(model_dir)):
        checkpoint.load(model_dir)


def test_every_truncation_of_the_weights_is_refused(model_dir):
    whole = (model_dir / "model.safetensors").read_bytes()
    for size in range(0, len(whole), max(1, len(whole) // 40)):
        (model_dir / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            checkpoint.load(model_dir)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("optimizer.safetensors", b"\0" * 30),
        ("state.json", b"{}"),
        ("state.json", b'{"step": "3"}'),
        ("state.json", b"[3]"),
    ],
)
def test_a_broken_training_state_is_named(name, content, model, tmp_path):
    optimizer = Optimizer(model)
    tokenizer = checkpoint.load_tokenizer_of(save(model, tmp_path))
    checkpoint.save_training(tmp_path / "c", model, tokenizer, checkpoint.optimizer_tensors(optimizer), {"step": 3})
    (tmp_path / "c" / name).write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path / "c" / name)):
        checkpoint.load_training(tmp_path / "c", model, optimizer, {"step": 0})


def save(model: torch.nn.Module, tmp_path: Path) -> Path:
    from conftest import character_tokenizer

    checkpoint.save(model, character_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def test_an_optimizer_of_another_model_is_refused(model, tmp_path):
    optimizer = Optimizer(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.0, 1.0)
    tensors = checkpoint.optimizer_tensors(optimizer)
    for wrong in (
        {k: v for k, v in tensors.items() if not k.startswith("3.")},
        {k: v[:-1] if v.dim() else v for k, v in tensors.items()},
        tensors | {"99.exp_avg": torch.zeros(1)},
        tensors | {"nonsense": torch.zeros(1)},
    ):
        with pytest.raises(ValueError, match="optimizer"):
            checkpoint.fill_optimizer(optimizer, wrong)
    checkpoint.fill_optimizer(optimizer, tensors)


def test_links_in_a_run_folder_lead_nowhere(sft, tmp_path):
    """What a run writes, it writes in its folder: a link that waits under a file's name is not followed."""
    outside = tmp_path / "outside"
    outside.write_text("precious")
    out = tmp_path / "run"
    out.mkdir()
    for name in ("config.json.tmp", "metrics.jsonl", "metrics.jsonl.tmp"):
        (out / name).symlink_to(outside)
    files.write_json(out / "config.json", {"written_by": "nanopcf SFTConfig"})
    Metrics(out).log(step=1)
    assert outside.read_text() == "precious" and not (out / "metrics.jsonl").is_symlink()
    (out / "lock").symlink_to(outside)
    with pytest.raises(OSError, match="symbolic"), lock(out, sft):
        pass
    assert outside.read_text() == "precious"


# ---- the scripts ----


def ends_well(arguments: list[str], *said: str) -> None:
    done = run_script(*arguments)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    assert all(text in last for text in said), last


def flags(model_dir: Path, tmp_path: Path, out: object) -> list[str]:
    rows = [data.Example(p, a, a) for p, a in zip("+-*=", "0123", strict=True)]
    data.write_jsonl(tmp_path / "d.jsonl", rows)
    data.write_jsonl(tmp_path / "v.jsonl", rows[:2])
    train, val = str(tmp_path / "d.jsonl"), str(tmp_path / "v.jsonl")
    return ["--model", str(model_dir), "--train", train, "--val", val, "--out", str(out), "--device", "cpu"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
@pytest.mark.parametrize("script", ["train_sft.py", "train_rl.py"])
def test_a_folder_that_cannot_be_written_is_one_sentence(script, model_dir, tmp_path):
    ends_well([script, *flags(model_dir, tmp_path, "/proc/nanopcf/run")], "/proc/nanopcf")


@pytest.mark.parametrize("name", ["train_sft", "train_rl"])
def test_a_run_folder_deleted_meanwhile_is_one_sentence_and_is_not_made_again(name, model_dir, tmp_path, monkeypatch):
    module = {"train_sft": train_sft, "train_rl": train_rl}[name]
    kind = train_sft.SFTConfig if name == "train_sft" else train_rl.RLConfig
    c = config.parse(kind, "", [*flags(model_dir, tmp_path, tmp_path / "run"), "--steps", "40"])
    real = Optimizer.step

    def step(self, *arguments):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return real(self, *arguments)

    monkeypatch.setattr(Optimizer, "step", step)
    with pytest.raises(OSError, match="No such file"):
        module.main(c)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["train_sft.py", "train_rl.py", "pipeline.py"])
def test_the_scripts_on_corrupt_files(script, model_dir, tmp_path):
    """A truncated model, through each script: one sentence, exit code 2, no run folder."""
    whole = (model_dir / "model.safetensors").read_bytes()
    (model_dir / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    arguments = flags(model_dir, tmp_path, tmp_path / "run")
    if script == "pipeline.py":
        data.write_jsonl(tmp_path / "t.jsonl", [data.Example("12", "3", "3")])
        files = ["--data", str(tmp_path / "d.jsonl"), "--test-data", str(tmp_path / "t.jsonl")]
        arguments = ["--preset", "tiny", "--model", str(model_dir), *files, "--val", "1", "--rl-prompts", "1"]
        arguments += ["--out", str(tmp_path / "run"), "--max-new-tokens", "8", "--pack-length", "64"]
    ends_well([script, *arguments], str(model_dir))
    assert script == "pipeline.py" or not (tmp_path / "run").exists()
