"""Measurements beside what a user would otherwise run; no part of the installed package.

Each module with options is a command: ``python -m benchmarks.step --help``.
"""
