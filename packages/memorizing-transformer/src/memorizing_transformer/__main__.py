"""``python -m memorizing_transformer`` is the command ``memorizing-transformer``; torchrun starts it this way."""

import sys

from memorizing_transformer.cli import main

sys.exit(main())
