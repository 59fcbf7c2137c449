"""`python -m semalign_harness` is the command `semalign`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
