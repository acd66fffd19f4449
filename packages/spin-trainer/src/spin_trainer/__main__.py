"""Entry point of ``python -m spin_trainer``, which is also the form that torchrun starts."""

import sys

from spin_trainer.cli import main

sys.exit(main())
