"""Networks that are not built in, from the command line to what is loaded of their export."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from networks import generator
from pictures import image_folder

import arat_fast
from arat_fast.cli import main

OPTIONS = shlex.split(
    "--data.image-size 32 --data.batch-size 8 --data.loader dataloader --data.num-workers 0 "
    "--train.epochs 1 --train.device cpu --eval.num-steps 1 --eval.no-autoattack "
    "--attack.num-steps 1"
)

OWN = """
from torch import nn

def make(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_nets.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    # The current folder is appended where a network is looked for.
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("arat_fast.models.registry.sources", {})
    yield
    sys.modules.pop("my_nets", None)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("my_nets:make", ["1"]),
        *(
            pytest.param(name, layers, marks=pytest.mark.slow)
            for name, layers in {
                "timm:resnet18": [f"layer4.{n}.bn{i}" for n in (0, 1) for i in (1, 2)],
                "timm:convnext_pico": ["head.pre_logits"],
                "timm:vit_tiny_patch16_224": ["fc_norm"],
                "torchvision:mobilenet_v3_small": ["features.12.1"],
            }.items()
        ),
    ],
)
def test_trained_evaluated_exported_and_loaded(
    name: str, layers: list[str], own: None, capsys: pytest.CaptureFixture[str]
) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    image_folder(Path("images"), per_class=5)
    train = ["train", "folder-resnet18", "--model.name", name, "--data.root", "images", *OPTIONS]
    assert main([*train, "--out", "run"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "(objective.layers sets others)" in said and all(layer in said for layer in layers)
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["steps"] == 2 and summary["accuracy"]["clean"]["num_samples"] == 15
    typed = ["--model.name", name] if name.startswith("my_nets") else []
    registry = sys.modules["arat_fast.models.registry"]
    if typed:
        # As in another process.
        registry.sources.clear()
        assert main(["eval", "run", "--attacks", "pgd"]) == 2
        assert "not imported on a file's word" in capsys.readouterr().err
    assert main(["eval", "run", "--attacks", "pgd", *typed]) == 0
    evaluated = json.loads(Path("run/evaluation.json").read_text())["accuracy"]
    assert evaluated["clean"]["correct"] == summary["accuracy"]["clean"]["correct"]
    assert main(["export", "run", "--format", "hub", "--out", "hub", *typed]) == 0
    registry.sources.clear()
    model, read = (
        arat_fast.load(folder, model=name if typed else None) for folder in ("run", "hub")
    )
    x = torch.rand(3, 3, 32, 32, generator=generator(1))
    with torch.no_grad():
        assert torch.equal(model(x), read(x))
    assert read.classes == ("cat", "dog", "owl")
    assert main(["predict", "hub", "images/val/cat", *typed]) == 0
