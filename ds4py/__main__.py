"""`python -m ds4py` is the `ds4` command."""

import sys

from ds4py.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
