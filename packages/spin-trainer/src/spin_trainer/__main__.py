"""``python -m spin_trainer`` is the command ``spin-trainer``; torchrun starts it as ``-m spin_trainer``."""

import sys

from spin_trainer.cli import main

sys.exit(main())
