"""``python -m automerge``: the command line."""

import sys

from automerge.cli import main

if __name__ == "__main__":
    sys.exit(main())
