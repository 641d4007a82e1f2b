"""python -m nanopcf.ceiling CURVES.csv: the command line in `curves`."""

import sys

from nanopcf.ceiling import curves

if __name__ == "__main__":
    sys.exit(curves.main())
