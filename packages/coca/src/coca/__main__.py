"""``python -m coca`` is the command ``coca``; torchrun starts it as ``-m coca``."""

import sys

from coca.cli import main

sys.exit(main())
