"""What pip installs is the whole package, from a wheel and from an sdist."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from tiny import OPTIONS

ROOT = Path(__file__).parent.parent
SOURCES = ["arat_fast", "kernels", "pyproject.toml", "setup.py", "README.md", "LICENSE"]


def run(*command: str | Path, cwd: Path) -> str:
    """Its standard output; the packages of this process are found by no variable."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(source: Path, kind: str, out: Path) -> Path:
    """One file of the kind, "wheel" or "sdist", built of the folder."""
    script = f"import setuptools.build_meta as b; print(b.build_{kind}({str(out)!r}))"
    return out / run(sys.executable, "-c", script, cwd=source).splitlines()[-1]


def contents(wheel: Path) -> dict[str, int]:
    """Checksums of what a wheel installs."""
    with zipfile.ZipFile(wheel) as file:
        return {e.filename: e.CRC for e in file.infolist() if "dist-info" not in e.filename}


@pytest.mark.slow
def test_a_wheel_and_an_sdist_work_away_from_the_checkout(tmp_path: Path) -> None:
    tree, unpacked, environment = (tmp_path / name for name in ("tree", "unpacked", "environment"))
    tree.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=ignore)
        else:
            shutil.copy(source, tree)
    shutil.unpack_archive(build(tree, "sdist", tmp_path), unpacked)
    (source,) = unpacked.iterdir()
    (tmp_path / "again").mkdir()
    wheel, again = build(tree, "wheel", tmp_path), build(source, "wheel", tmp_path / "again")
    assert contents(wheel) == contents(again)
    files = {
        str(path.relative_to(package.parent))
        for package in (tree / "arat_fast", tree / "kernels" / "arat_kernels")
        for path in package.rglob("*")
        if path.is_file()
    }
    assert files == contents(wheel).keys() and "arat_fast/report/templates/style.css" in files

    # A clean environment, but for the dependencies, which are those of this process.
    venv.create(environment)
    python = environment / "bin" / "python"
    installed = sysconfig.get_path("purelib")
    (own,) = environment.glob("lib/*/site-packages")
    (own / "dependencies.pth").write_text(installed)
    pip = sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"
    run(*pip, "--no-deps", wheel, cwd=tmp_path)
    where = "import arat_fast, arat_kernels; print(arat_fast.__file__, arat_kernels.__file__)"
    assert all(Path(p).is_relative_to(own) for p in run(python, "-c", where, cwd=tmp_path).split())
    command = environment / "bin" / "arat-fast"
    assert run(command, "--version", cwd=tmp_path) == "arat-fast 0.1.0\n"
    run(command, "train", "digits", *OPTIONS, "--train.max-steps", "2", "--out", "r", cwd=tmp_path)
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["status"] == "finished"
    assert "<style>" in (tmp_path / "r" / "report.html").read_text()
