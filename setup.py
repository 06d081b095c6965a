"""Two packages from two roots; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["arat_fast", "arat_fast.*"]),
        *find_packages("kernels", include=["arat_kernels", "arat_kernels.*"]),
    ],
    package_dir={"arat_kernels": "kernels/arat_kernels"},
    package_data={"arat_fast": ["py.typed", "*/templates/*"], "arat_kernels": ["py.typed"]},
)
