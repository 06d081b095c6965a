"""A run from its configuration to its summary: loop, state, hooks, finish."""
