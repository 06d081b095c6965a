"""Methods × seeds on one recipe: the runs, the table, the robustness-accuracy plane."""

from arat_fast.compare.command import compare_command

__all__ = ["compare_command"]
