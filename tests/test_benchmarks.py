"""The benchmarks that others call: every command of benchmarks/gpu.py names a script and flags that exist."""

import importlib

import pytest
from conftest import ROOT


@pytest.mark.parametrize("dry", [True, False])
def test_the_commands_of_a_gpu_s_first_hour(dry, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu = importlib.import_module("gpu")
    assert sum(gpu.SECONDS.values()) <= 1800
    for part in gpu.SECONDS:
        for command in gpu.commands(part, dry, compiled=True):
            script, *arguments = command.split()
            if script == "-m":
                assert arguments[0] == "pytest"
                continue
            source = (ROOT / script).read_text(encoding="utf-8")
            for flag in (a for a in arguments if a.startswith("--")):
                assert f'"{flag}"' in source, f"{script} has no {flag}"
