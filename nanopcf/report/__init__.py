"""The report of a pipeline run: report.json, figures, report.html and a table for the terminal.

Only those who want to change what a report says or shows need to open this package:

assembly   what follows from the measurements: ceilings, correlation, claims (`judge`)
ceilings   the ceiling of a curve, and how probable it is that one lies above another
check      what a report.json must hold
claims     the paper's statements held against them
agreement  does the validation loss order the ceilings?
paradigms  algorithms at equal compute: their runs, rows and claims
study      several seeds of one experiment, and what they say together
page       the HTML page and the terminal's table
figures    the pictures
text       how numbers and names are written

`python -m nanopcf.report RUN` judges a finished run anew from the curves in its report.json, without any training.
"""

from pathlib import Path

from nanopcf.report import paradigms
from nanopcf.report.assembly import assemble, branch_of, judge, sample_answers
from nanopcf.report.figures import draw_figures
from nanopcf.report.page import html_page, terminal_table
from nanopcf.run import files
from nanopcf.run.untrusted import printable

__all__ = [
    "assemble",
    "branch_of",
    "draw_figures",
    "html_page",
    "judge",
    "publish",
    "sample_answers",
    "terminal_table",
    "write",
]


def publish(report: dict, folder: Path) -> None:
    """Write the report into the folder, and print its tables."""
    write(report, folder)
    print(printable(terminal_table(report)))
    if report["paradigms"]:
        print(printable("\n" + paradigms.terminal_table(report["paradigms"])))


def write(report: dict, folder: Path) -> list[Path]:
    """Write report.json, the figures as PNG and report.html, and return their paths; each whole or not at all."""
    images = draw_figures(report)
    outputs = {f"{name}.png": image for name, image in images.items()}
    outputs["report.html"] = html_page(report, images).encode()
    # only now, so that a report that cannot be shown replaces nothing
    files.write_json(folder / "report.json", files.strict(report))
    for name, content in outputs.items():
        files.write_bytes(folder / name, content)
    return [folder / "report.json", *(folder / name for name in outputs)]
