"""Exported folders on a hub: a double of huggingface_hub that keeps them as its cache does."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import arat_fast
from arat_fast.cli import main
from arat_fast.models import create_model
from arat_fast.recipes import recipe
from arat_fast.saved import save_safetensors
from arat_fast.saved.network import describe, header


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = create_model("resnet8", 10, 1, "shared")
    facts = describe(recipe("digits"), "ema", "adv", (1, 8, 8), tuple("0123456789"))
    save_safetensors(model, tmp_path / "weights.safetensors", header(facts))
    return tmp_path / "weights.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of repositories; a snapshot is of links, and holds what was asked for."""
    root, double = tmp_path / "hub", ModuleType("huggingface_hub")

    def create_repo(name: str, exist_ok: bool) -> str:
        (root / name).mkdir(parents=True, exist_ok=exist_ok)
        return f"https://hub/{name}"

    def upload_folder(repo_id: str, folder_path: Path, commit_message: str) -> None:
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        if not (root / name).is_dir():
            raise RuntimeError(f"no repository {name}")
        snapshot = tmp_path / "cache" / name / str(revision)
        snapshot.mkdir(parents=True)
        for pattern in allow_patterns:
            for file in (root / name).glob(pattern):
                (snapshot / file.name).symlink_to(file)
        return str(snapshot)

    functions: Any = (create_repo, upload_folder, snapshot_download)
    for function in functions:
        setattr(double, function.__name__, function)
    monkeypatch.setitem(sys.modules, "huggingface_hub", double)
    return root


def test_there_and_back(
    weights: Path, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["export", str(weights), "--format", "hub", "--out", str(out)]
    assert main([*arguments, "--push", "me/digits"]) == 0
    assert "https://hub/me/digits" in capsys.readouterr().out
    names = sorted(path.name for path in (hub / "me" / "digits").iterdir())
    assert names == ["README.md", "config.json", "example.py", "model.safetensors"]
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        expected, found = arat_fast.load(out)(x), arat_fast.load("hf:me/digits@v1")(x)
    assert torch.equal(found, expected)
    cached = [path.name for path in (tmp_path / "cache" / "me" / "digits" / "v1").iterdir()]
    assert sorted(cached) == ["config.json", "model.safetensors"]


def test_what_goes_wrong(
    weights: Path,
    hub: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(OSError, match="no repository me/absent"):
        arat_fast.load("hf:me/absent")
    arguments = ["export", str(weights), "--out", str(tmp_path / "out"), "--push", "me/digits"]
    assert main([*arguments, "--format", "timm"]) == 2
    assert "--format hub" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main([*arguments, "--format", "hub"]) == 2
    assert "[hub]" in capsys.readouterr().err and not (tmp_path / "out").exists()
