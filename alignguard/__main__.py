"""``python -m alignguard``."""

import sys

from alignguard.cli import main

sys.exit(main())
