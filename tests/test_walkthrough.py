"""docs/walkthrough.md is what its script makes, so that the numbers on the board are those of the code."""

import re
import runpy

from conftest import ROOT

NUMBER = re.compile(r"[-+]?\d+\.\d+")


def test_the_page_is_what_the_code_computes():
    """Words to the letter; numbers to a unit of their fourth digit, since processors round sums differently. The script
    itself holds the gradient of a weight and the combined tiles against sums by hand."""
    made = runpy.run_path(str(ROOT / "docs" / "walkthrough.py"))["page"]()
    kept = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
    again = "after a change of the code: python docs/walkthrough.py --write"
    assert NUMBER.sub("0", made) == NUMBER.sub("0", kept), again
    for a, b in zip(NUMBER.findall(made), NUMBER.findall(kept), strict=True):
        assert abs(float(a) - float(b)) < 2e-4, f"{a} is {b} in the page; {again}"
    assert len(kept.splitlines()) <= 120
