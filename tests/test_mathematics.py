"""math-verify in a process that can be killed; a stand-in of the same name where it isn't installed."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, write_rows

from nanopcf import data, rewards
from nanopcf.answers import mathematics
from nanopcf.evaluate import EvaluateConfig
from nanopcf.run import config

STAND_IN = """
import time
def parse(text, parsing_timeout=5):
    assert parsing_timeout is None
    if "loop" in text:
        while True: pass
    if "hang" in text: time.sleep(100)
    if "raise" in text: raise RuntimeError
    if "die" in text: import os; os._exit(3)
    if "C" in text: sum(range(10**12))
    return text.rpartition("boxed{")[2].rstrip("}. ")
def verify(gold, said, timeout_seconds=5):
    assert timeout_seconds is None
    return gold == said
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "math_verify", raising=False)
    mathematics.installed.cache_clear()
    monkeypatch.setattr(mathematics, "shared", functools.cache(mathematics.MathVerify))  # the real one goes on
    yield
    mathematics.installed.cache_clear()


def test_a_worker_that_hangs_raises_or_dies_answers_wrong_and_goes_on(stand_in):
    mathematics.take_cut_off()
    checker = mathematics.MathVerify(limit_s=0.3)
    assert checker(r"it is \boxed{5}", "5") == 1 and checker(r"it is \boxed{5}", "6") == 0
    first = checker.process
    assert checker("raise", "5") == 0 and mathematics.take_cut_off() == 0  # it says no and lives
    assert checker("loop", "5") == 0 and mathematics.take_cut_off() == 1  # it gives up by itself
    assert checker.process is first
    began = time.perf_counter()
    assert checker("hang", "5") == 0 and mathematics.take_cut_off() == 1
    assert time.perf_counter() - began < 3 and checker.process is not first
    assert checker("die", "5") == 0 and mathematics.take_cut_off() == 1
    assert checker("\ud800 \x00 raise", "5") == 0
    # One that died between two questions is no reason to call a right answer wrong.
    assert checker(r"\boxed{5}", "5") == 1
    checker.process.kill()
    checker.process.wait()
    assert checker(r"\boxed{5}", "5") == 1 and mathematics.take_cut_off() == 0
    process = checker.process
    checker.stop()
    assert process.poll() is not None


def test_a_worker_whose_parent_was_killed_ends(stand_in):
    """In a long call of a C library it hears neither its own clock nor that nobody reads its answer."""
    checker = mathematics.MathVerify(limit_s=0.1)
    assert checker("5", "5") == 1
    checker.process.stdin.write(json.dumps(["whole", "C", "5", -1]) + "\n")
    checker.process.stdin.flush()
    assert checker.process.wait(timeout=30) == -signal.SIGVTALRM
    checker.stop()


def test_a_judge_that_loops_in_this_process_is_ended_and_counted(monkeypatch):
    def forever(_text):
        while True:
            pass

    monkeypatch.setattr(mathematics, "LIMIT_S", 0.1)
    monkeypatch.setattr(rewards, "final_answer", lambda response, strict=False: forever(response))
    mathematics.take_cut_off()
    assert rewards.verify("5", "5") == 0 and mathematics.verifier("ours")("5", "5") == 0
    assert mathematics.take_cut_off() == 2 and mathematics.take_cut_off() == 0
    monkeypatch.setattr(rewards, "final_answer", lambda *_: bool(re.match("(a|aa)*b", "a" * 60)))
    assert rewards.verify("5", "5") == 0 and mathematics.take_cut_off() == 1


def test_by_name(stand_in):
    assert mathematics.verifier("math-verify")(r"\boxed{hm}", "hm") == 1
    assert mathematics.verifier("auto") is rewards.verify
    mathematics.shared().stop()
    ours = mathematics.verifier("ours")
    assert ours(r"\boxed{1/2}", "0.5") == 1 and ours(r"\boxed{5 cm}", "5") == 1 and ours(r"\boxed{2n}", "n+n") == 0
    assert ours(r"\boxed{5 cm}", "5", strict=True) == 0


def test_without_the_extra_formulas_count_by_text_and_a_run_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mathematics, "installed", lambda: False)
    monkeypatch.setattr(data, "installed", lambda: False)
    monkeypatch.setattr(mathematics, "shared", mathematics.MathVerify)
    with pytest.raises(ValueError, match=r"pip install -e .*math"):
        mathematics.verifier("math-verify")
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--verifier needs pip install -e .*math.*got 'math-verify'"):
        EvaluateConfig(model="m", data=("d.jsonl",), verifier="math-verify")
    assert rewards.verify(r"\boxed{n+n}", "2n") == 0 and rewards.verify(r"\boxed{2 n}", "2n") == 1
    file = write_rows(tmp_path / "x.jsonl", [dict(prompt="a", answer=a) for a in ("5", "2n", r"\sqrt{2}", "Yes")])
    data.read_examples(file, need=("prompt", "answer"))
    said = capsys.readouterr().err
    assert said == f"{file}: 2 of 4 answers are formulas: {mathematics.INSTALL} compares them by value\n"
    data.read_examples(file)  # without a verifier nobody asks
    assert capsys.readouterr().err == ""


def test_answers_that_no_response_can_give_are_counted_and_named(tmp_path, capsys):
    answers = [r"\boxed{42}", "$7$", "8", "}{", "<answer>"]
    file = write_rows(tmp_path / "x.jsonl", [dict(prompt="a", answer=a) for a in answers])
    examples = data.read_examples(file, need=("prompt", "answer"))
    assert [e.answer for e in examples] == ["42", "7", "8", "}{", "<answer>"]
    said = capsys.readouterr().err
    assert f"{file}: 2 of 5 answers are never right, not even in a box: line 4 '}}{{', line 5 '<answer>'" in said


def test_a_script_without_a_main_guard_can_verify(stand_in, tmp_path):
    """The worker is a program of its own: multiprocessing would run such a script again."""
    script = tmp_path / "script.py"
    script.write_text(
        "from nanopcf.answers.mathematics import MathVerify\nprint(MathVerify()(r'it is \\boxed{5}', '5'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    result = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert result.stdout == "1.0\n" and result.returncode == 0, result.stderr


def test_the_real_one_on_answers_that_differ_in_form():
    pytest.importorskip("math_verify")
    checker = mathematics.verifier("math-verify")
    for response, answer, right in [
        ("\\boxed{\\frac{1}{2}}", "0.5", 1),
        ("\\boxed{x^2-1}", "(x-1)(x+1)", 1),
        ("\\boxed{3}", "4", 0),
        ("\\boxed{x+1}", "x+2", 0),
    ]:
        assert checker(response, answer) == right, response


def test_what_takes_too_long_is_wrong_and_soon():
    pytest.importorskip("math_verify")
    right, seconds = mathematics.asked("n^{9999^{9999}}", "n^2+1", rounds=False)
    assert not right and seconds < 5  # one where it gives up by itself, two where it is killed
