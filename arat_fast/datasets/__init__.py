"""Datasets by name: a file each, which registers itself; ``DATASETS`` finds them."""

from importlib import import_module
from pkgutil import iter_modules

from arat_fast.datasets.base import DATASETS, Content, Dataset, register

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["DATASETS", "Content", "Dataset", "register"]
