"""``python -m palm_rlhf`` is the command ``palm-rlhf``; torchrun starts it as ``-m palm_rlhf``."""

import sys

from palm_rlhf.cli import main

sys.exit(main())
