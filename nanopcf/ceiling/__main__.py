"""python -m nanopcf.ceiling CURVES.csv: the command line in `curves`."""

import sys

from nanopcf.ceiling import curves
from nanopcf.run import config

if __name__ == "__main__":
    config.run_cli(lambda: sys.exit(curves.main()))
