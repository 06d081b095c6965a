"""``python -m arat_fast`` is ``arat-fast``."""

import os
import sys

from arat_fast.cli import main
from arat_fast.stop import PARENT, end_with_parent

parent = os.environ.pop(PARENT, None)
if parent is not None:
    end_with_parent()
    # It may have ended before.
    if os.getppid() != int(parent):
        sys.exit(1)
sys.exit(main())
