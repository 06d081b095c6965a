"""Kernels in Triton's interpreter: a process of their own, ``TRITON_INTERPRET=1 pytest <here>``."""

from pathlib import Path

import pytest

from arat_kernels.implementation import interpreting

# Triton reads the variable at import: in the process of the other tests it must stay unset.
collect_ignore_glob = [] if interpreting() else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file that is named on the command line is collected all the same."""
    here = Path(__file__).parent
    for item in items:
        if not interpreting() and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1, alone in a process"))
