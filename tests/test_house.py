"""What holds for the repository as a whole."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

ROOT = Path(__file__).parent.parent

LAYERS = [
    *("files", "device", "extras", "statistics", "stop", "settings"),
    *("models", "attacks", "objectives", "datasets", "config", "recipes", "command_line"),
    *("display", "data", "distributed", "build", "training", "doctor"),
    *("saved", "evaluation", "analysis", "run"),
    *("report", "export", "compare", "cli", "__main__"),
]
"""Modules and packages of ``arat_fast``, lowest first: none imports one that stands after it."""


def imports(node: ast.AST) -> Iterator[str]:
    """Modules, and names in them, that are imported anywhere in the code, but for its types."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            for other in child.orelse:
                yield from imports(other)
        else:
            yield from imports(child)


def imported(path: Path) -> set[str]:
    return set(imports(ast.parse(path.read_text())))


def test_no_package_imports_one_above_it() -> None:
    package = ROOT / "arat_fast"
    height = {name: number for number, name in enumerate(LAYERS)}
    upwards, used = [], set()
    for path in sorted(package.rglob("*.py")):
        own = path.relative_to(package).with_suffix("").parts[0]
        if own == "__init__":
            # Hands on public names of every layer, once they are asked for.
            continue
        used.add(own)
        for name in sorted(imported(path)):
            root, other = [*name.split("."), ""][:2]
            if root == "arat_fast" and height.get(other, 0) > height.get(own, 0):
                upwards.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not upwards, "\n".join(upwards)
    assert used == set(LAYERS)


def test_kernels_do_not_need_the_trainer() -> None:
    names = {name for path in (ROOT / "kernels").rglob("*.py") for name in imported(path)}
    assert {name.partition(".")[0] for name in names}.isdisjoint({"arat_fast"})


def test_the_library_needs_no_command_line() -> None:
    """Nor progress bars, plots, DALI or AutoAttack: torch, torchvision, triton and numpy do."""
    script = """
import importlib, pkgutil, sys
for name in "tyro rich matplotlib nvidia.dali pyautoattack sklearn scipy jinja2".split():
    sys.modules[name] = None
for name in ("models", "attacks", "objectives", "datasets", "data", "training"):
    package = importlib.import_module(f"arat_fast.{name}")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"arat_fast.{name}.{module.name}")
from arat_fast import ARAT, PGD, TrainStep, convert_split_batch_norm
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_is_a_source_root() -> None:
    """A package named ``kernels`` would hide another project's."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_what_is_installed_is_checked() -> None:
    """Every dependency, of every extra, has one version and the checksums of its wheels."""
    locked = {
        re.match(r"[\w.-]+", entry)[0].lower().replace("_", "-"): entry  # type: ignore[index]
        for entry in (ROOT / "constraints.txt").read_text().replace("\\\n", "").splitlines()
        if not entry.startswith("#")
    }
    assert all(re.search(r"==[\w.]+.* --hash=sha256:[0-9a-f]{64}", e) for e in locked.values())
    wanted = {re.match(r"[\w.-]+", entry)[0] for entry in requires("arat-fast") or ()}  # type: ignore[index]
    assert len(wanted) > 20 and {name.lower() for name in wanted} - {"arat-fast"} <= locked.keys()
