"""Run the command line with ``python -m mambacus``."""

import sys

from mambacus.cli import main

sys.exit(main())
