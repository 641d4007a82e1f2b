"""Judge a finished run anew, and write its page and figures again, without any training.

    python -m nanopcf.report RUN

RUN is the folder of a pipeline run. Its report.json is read, everything that follows from the curves in it is made anew
by the rules of this version (`report.judge`), and report.json, the figures and report.html are replaced.
"""

from dataclasses import dataclass
from pathlib import Path

from nanopcf import report
from nanopcf.run import config, files
from nanopcf.run.config import Argument


@dataclass(frozen=True)
class ReportConfig(config.Config):
    run: Argument  # folder of a pipeline run


def main(c: ReportConfig) -> None:
    file = Path(c.run) / "report.json"
    if not file.exists():
        raise ValueError(f"{file} is missing: is this the folder of a finished pipeline run?")
    report.publish(report.judge(files.read_json(file)), file.parent)
    print(f"\n{file.parent / 'report.html'}")


if __name__ == "__main__":
    config.run_cli(lambda: main(config.parse(ReportConfig, __doc__)))
