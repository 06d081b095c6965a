"""Methods × seeds on one recipe: the runs, the table, the robustness-accuracy plane."""
