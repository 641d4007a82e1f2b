"""The README's map is the house as it stands: every module once, and a reading path that fits an afternoon."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PATH, DOORS = README.partition("## Reading order")[2].partition("## Your own")[0].split("Behind doors:")


def modules(text: str) -> list[str]:
    return re.findall(r"\]\(((?:[\w/]+/)?\w+\.py)\)", text)


def test_every_module_stands_on_the_path_or_behind_a_door():
    there = {p.relative_to(ROOT).as_posix() for folder in ("nanopcf", "kernels") for p in (ROOT / folder).rglob("*.py")}
    there |= {"train_sft.py", "train_rl.py", "pipeline.py"}
    # The docstring of a sub-package says who needs to open it; two of them are files of the path as well.
    faces = {f for f in there if f.endswith("__init__.py")} - {"kernels/__init__.py", "nanopcf/ceiling/__init__.py"}
    listed = modules(PATH) + modules(DOORS)
    assert sorted(listed) == sorted(there - faces)


def test_the_reading_path_has_the_length_it_states():
    lines = sum(len((ROOT / f).read_text(encoding="utf-8").splitlines()) for f in modules(PATH))
    stated = int(re.search(r"([\d,]+) lines in all", PATH)[1].replace(",", ""))
    assert lines == stated <= 3_500, f"{lines} lines, the README says {stated}"


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_tests_that_docs_name_are_there():
    there = " ".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("*.py"))
    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"\btest_\w+(?:\.py)?", page.read_text(encoding="utf-8")):
            found = (ROOT / "tests" / name).exists() if name.endswith(".py") else f"def {name}" in there
            assert found or name == "test_data", f"{page.name}: {name}"  # the latter is a flag of the pipeline
