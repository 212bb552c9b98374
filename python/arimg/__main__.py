"""`python -m arimg`: the command line."""

import sys

from arimg.cli import main

if __name__ == "__main__":
    sys.exit(main())
