"""math-verify in a process that can be killed; a stand-in of the same name where it isn't installed."""

import importlib.util
import sys
import time

import pytest

from nanopcf.interop import mathematics

STAND_IN = """
import time
def parse(text, parsing_timeout=5):
    assert parsing_timeout is None
    if "hang" in text: time.sleep(100)
    if "raise" in text: raise RuntimeError
    if "die" in text: import os; os._exit(3)
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


def test_a_worker_that_hangs_raises_or_dies_answers_wrong_and_is_replaced(stand_in):
    with mathematics.MathVerify(limit_s=1.0) as checker:
        assert checker(r"it is \boxed{5}", "5") == 1 and checker(r"it is \boxed{5}", "6") == 0
        began = time.perf_counter()
        assert checker("hang", "5") == 0 and checker.killed == 1
        assert time.perf_counter() - began < 3
        assert checker("raise", "5") == 0 and checker.killed == 1  # it says no and lives
        assert checker("die", "5") == 0 and checker.killed == 2
        assert checker("\ud800 \x00 hang", "5") == 0
        assert checker(r"\boxed{5}", "5") == 1
        process = checker.process
    assert not process.is_alive()


def test_by_name(stand_in):
    either = mathematics.verifier("either")
    assert either(r"\boxed{1/2}", "0.5") == 1 and either(r"\boxed{hm}", "hm") == 1 and either(r"\boxed{1}", "2") == 0
    assert mathematics.verifier("ours")("\\boxed{1/2}", "0.5") == 1
    with pytest.raises(ValueError, match="must be ours, math-verify or either, got 'x'"):
        mathematics.verifier("x")


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is not None, reason="math-verify is installed")
def test_without_the_extra_it_says_what_to_install():
    with pytest.raises(ValueError, match=r"pip install -e .*math"):
        mathematics.verifier("math-verify")


def test_the_real_one_on_answers_that_differ_in_form():
    pytest.importorskip("math_verify")
    with mathematics.MathVerify(limit_s=5.0) as checker:
        for response, answer, right in [
            ("\\boxed{\\frac{1}{2}}", "0.5", 1),
            ("\\boxed{x^2-1}", "(x-1)(x+1)", 1),
            ("\\boxed{3}", "4", 0),
            ("\\boxed{x+1}", "x+2", 0),
        ]:
            assert checker(response, answer) == right, response
