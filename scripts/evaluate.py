"""`structprune evaluate` for those who like to start a script."""

import sys

from structprune.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
