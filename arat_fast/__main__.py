"""``python -m arat_fast`` is ``arat-fast``."""

import sys

from arat_fast.cli import main

sys.exit(main())
