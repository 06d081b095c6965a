"""The library examples of README and docs run as they are printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision

from arat_fast.attacks import PGD
from arat_fast.models import convert_split_batch_norm, create_model, use_branch
from arat_fast.objectives import ARAT
from arat_fast.objectives.base import Objective, ObjectiveOutput, widen
from arat_fast.training.step import TrainStep, make_train_step

README = Path(__file__).parent.parent / "README.md"
FILES = [README, *sorted((README.parent / "docs").glob("*.md"))]


def snippet(path: Path) -> str:
    """The only Python block of a file."""
    (found,) = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    return str(found)


def test_library_example() -> None:
    library = snippet(README)
    assert len(library.strip().splitlines()) <= 8
    generator = torch.Generator().manual_seed(0)
    loader = [
        (
            torch.rand(4, 3, 32, 32, generator=generator),
            torch.randint(10, (4,), generator=generator),
        )
    ]
    names = {
        "ARAT": ARAT,
        "PGD": PGD,
        "convert_split_batch_norm": convert_split_batch_norm,
        "device": "cpu",
        "loader": loader,
        "make_train_step": make_train_step,
        "torch": torch,
        "torchvision": torchvision,
    }
    exec(library, names)
    exec(snippet(README.parent / "docs" / "step.md"), names)
    step, metrics = names["step"], names["metrics"]
    assert isinstance(step, TrainStep) and isinstance(metrics, dict)
    assert step.folded_network is not None and step.num_calls == 1
    assert set(metrics) == {
        "loss",
        "ce_adv",
        "ce_clean",
        "invariance/layer4.1.bn1",
        "invariance/layer4.1.bn2",
        "accuracy_clean",
        "accuracy_adv",
    }
    assert metrics["loss"].isfinite()


def test_objective_example() -> None:
    torch.manual_seed(0)
    model = create_model("resnet8", 10, norm="shared")
    names = {
        "F": F,
        "Objective": Objective,
        "ObjectiveOutput": ObjectiveOutput,
        "PGD": PGD,
        "make_train_step": make_train_step,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "torch": torch,
        "use_branch": use_branch,
        "widen": widen,
        "x": torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        "y": torch.arange(4),
    }
    exec(snippet(README.parent / "docs" / "objectives.md"), names)
    metrics = names["metrics"]
    assert isinstance(metrics, dict)
    parts = float(metrics["ce_adv"] + metrics["pairing"])
    assert parts > 0 and abs(float(metrics["loss"]) - parts) <= 1e-6 * parts


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target
