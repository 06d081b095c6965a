"""Kernels in Triton's interpreter: a process of their own, ``TRITON_INTERPRET=1 pytest <here>``."""

from arat_kernels.implementation import interpreting

# Triton reads the variable at import: in the process of the other tests it must stay unset.
collect_ignore_glob = [] if interpreting() else ["test_*.py"]
