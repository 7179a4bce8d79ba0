"""`python -m workbench.cli`: the command `workbench` where it is not installed."""

import sys

from workbench.cli import main

if __name__ == "__main__":
    sys.exit(main())
