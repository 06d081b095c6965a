"""arat_fast: fast training of adversarially robust image classifiers with ARAT."""

__version__ = "0.1.0"
