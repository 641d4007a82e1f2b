"""Judge a finished run anew, and write its page and figures again, without any training.

    python -m nanopcf.report RUN

RUN is the folder of a pipeline run, or of a study with one folder per seed. Each report.json is read, everything that
follows from the curves in it is made anew by the rules of this version (`report.judge`), and report.json, the figures
and report.html are replaced; so are the files of the study.
"""

from dataclasses import dataclass
from pathlib import Path

from nanopcf import report
from nanopcf.report import study
from nanopcf.run import config, files
from nanopcf.run.config import Argument


@dataclass(frozen=True)
class ReportConfig(config.Config):
    run: Argument  # folder of a pipeline run


def main(c: ReportConfig) -> None:
    folder = Path(c.run)
    runs = sorted(folder.glob("seed-*/report.json"), key=lambda file: int(file.parent.name[5:])) or [
        folder / "report.json"
    ]
    if not runs[0].exists():
        raise ValueError(f"{runs[0]} is missing: is this the folder of a finished pipeline run?")
    reports = [report.judge(files.read_json(file)) for file in runs]
    for file, judged in zip(runs, reports, strict=True):
        report.publish(judged, file.parent)
        print(f"\n{file.parent / 'report.html'}\n")
    if len(runs) > 1:
        study.publish(reports, folder)


if __name__ == "__main__":
    config.run_cli(lambda: main(config.parse(ReportConfig, __doc__)))
