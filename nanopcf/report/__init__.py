"""The report of a pipeline run: report.json, figures, report.html and a table for the terminal.

Only those who want to change what a report says or shows need to open this package: `assemble` computes what follows from
the measurements, `claims` holds the paper's statements against them, `figures` and `page` draw, and `paradigms` compares
algorithms at equal compute.
"""

from pathlib import Path

from nanopcf.report import paradigms
from nanopcf.report.assemble import assemble, judge, sample_pairs
from nanopcf.report.claims import claims
from nanopcf.report.figures import figures
from nanopcf.report.page import page, terminal_table
from nanopcf.run import files, log

__all__ = ["assemble", "claims", "figures", "judge", "page", "publish", "sample_pairs", "terminal_table", "write"]


def publish(report: dict, folder: Path) -> None:
    """Write the report into the folder, and print its tables."""
    write(report, folder)
    print(terminal_table(report))
    if report["paradigms"]:
        print("\n" + paradigms.terminal_table(report["paradigms"]))


def write(report: dict, folder: Path) -> list[Path]:
    """Write report.json, the figures as PNG and report.html, and return their paths. No file is ever seen half written."""
    try:
        images = figures(report)
    except ImportError:
        images = {}
        log.announce('no figures: matplotlib is missing; pip install -e ".[plot]"')
    files.write_json(folder / "report.json", report)
    outputs = {f"{name}.png": image for name, image in images.items()}
    outputs["report.html"] = page(report, images).encode()
    for name, content in outputs.items():
        files.write_bytes(folder / name, content)
    return [folder / "report.json", *(folder / name for name in outputs)]
