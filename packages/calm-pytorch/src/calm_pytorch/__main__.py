"""``python -m calm_pytorch`` is the command ``calm-pytorch``."""

import sys

from calm_pytorch.cli import main

if __name__ == "__main__":
    sys.exit(main())
