"""What holds for the repository as a whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_kernels_is_a_source_root() -> None:
    """A package named ``kernels`` would hide another project's."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_do_not_need_the_trainer() -> None:
    program = (
        "import sys, arat_kernels.split_batch_norm; "
        "sys.exit(any(name.partition('.')[0] == 'arat_fast' for name in sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0
