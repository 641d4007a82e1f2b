"""The report of a pipeline run."""

from pathlib import Path

from nanopcf.report.claims import claims
from nanopcf.report.figures import figures
from nanopcf.report.page import page, terminal_table
from nanopcf.run import files, log

__all__ = ["claims", "figures", "page", "terminal_table", "write"]


def write(report: dict, folder: Path) -> list[Path]:
    """report.json, the figures as PNG and report.html, each whole or not at all. Returns their paths."""
    try:
        images = figures(report)
    except ImportError:
        images = {}
        log.announce('no figures: matplotlib is missing; pip install -e ".[plot]"')
    files.write_json(folder / "report.json", report | {"claims": claims(report)})
    outputs = {f"{name}.png": data for name, data in images.items()}
    outputs["report.html"] = page(report, images).encode()
    for name, data in outputs.items():
        files.write_bytes(folder / name, data)
    return [folder / "report.json", *(folder / name for name in outputs)]
