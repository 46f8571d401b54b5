"""`python -m structprune` is the command `structprune`."""

import sys

from structprune.cli import main

sys.exit(main())
