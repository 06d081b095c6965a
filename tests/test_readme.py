"""The library examples of README and docs run as they are printed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from tiny import OPTIONS
from torch import nn
from torch.utils.data import Dataset

import arat_fast
from arat_fast import PGD, TrainStep
from arat_fast.cli import main
from arat_fast.command_line import apply_overrides

README = Path(__file__).parent.parent / "README.md"
FILES = [README, README.with_name("CHANGELOG.md"), *sorted((README.parent / "docs").glob("*.md"))]


def snippet(path: Path, number: int = 0, of: int = 1) -> str:
    """A Python block of a file, which has ``of``."""
    found = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    assert len(found) == of
    return str(found[number])


@pytest.mark.slow
def test_library_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From imports to a file whose weights the network takes; then the step of docs/step.md."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(snippet(README), names)
    found = {name: result["value"] for name, result in names["found"].record().items()}
    assert found.keys() == {"clean", "clean_branch", "pgd20"}
    assert found["clean"] > 0.95 and 0.7 < found["pgd20"] < found["clean"]
    assert re.search(rf"PGD-20 +{100 * found['pgd20']:.2f} %", capsys.readouterr().out)
    fresh = nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(1024, 10)),
    ).eval()
    fresh.load_state_dict(load_file("robust.safetensors"))
    model, x = names["model"].eval(), names["x"][:8]
    # The trained one is in channels_last.
    torch.testing.assert_close(fresh(x), model(x))

    names["loader"] = [next(iter(names["loader"]))]
    exec(snippet(README.parent / "docs" / "step.md"), names)
    step, metrics = names["step"], names["metrics"]
    assert isinstance(step, arat_fast.TrainStep)
    assert step.folded_network is not None and step.num_calls == 1
    wanted = {"loss", "ce_adv", "ce_clean", "invariance/4", "accuracy_clean", "accuracy_adv"}
    assert set(metrics) == wanted
    assert metrics["loss"].isfinite()


def test_readme_is_short() -> None:
    words = [word for word in README.read_text().split() if re.search(r"\w", word)]
    assert len(words) <= 900


def test_objective_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file as it is printed, in the current folder, named on the command line."""
    (tmp_path / "pairing.py").write_text(snippet(README.parent / "docs" / "objectives.md"))
    monkeypatch.chdir(tmp_path)
    typed = ["--objective.name", "pairing:LogitPairing", "--objective.weight", "0.3"]
    assert main(["train", "digits", *typed, *OPTIONS, "--train.epochs", "1", "--out", "run"]) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert (summary["status"], summary["objective"]) == ("finished", "pairing:LogitPairing")
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    train = next(line for line in lines if line["kind"] == "train")
    assert train["pairing"] > 0
    assert train["loss"] == pytest.approx(train["ce_adv"] + train["pairing"], rel=1e-6)
    record = json.loads(Path("run/config.json").read_text())["config"]
    assert record["objective"] == {"name": "pairing:LogitPairing", "weight": 0.3}
    assert "logit pairing" in Path("run/report.html").read_text()
    assert main(["eval", "run", "--attacks", "pgd", "--max-samples", "40"]) == 0
    evaluated = json.loads(Path("run/evaluation.json").read_text())["accuracy"]["clean"]
    assert evaluated["value"] == summary["accuracy"]["clean"]["value"]


class Digits(Dataset[Any]):
    """A few digits, as a caller has them."""

    classes = tuple("0123456789")

    def __init__(self, start: int, stop: int) -> None:
        digits = load_digits()
        self.x = torch.tensor(digits.images[start:stop] / 16).float()[:, None]
        self.y = digits.target[start:stop].tolist()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.x[index], self.y[index]


def test_your_network_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("arat_fast.models.registry.sources", {})
    images = Image.fromarray((Digits(0, 1).x[0, 0] * 255).round().to(torch.uint8).numpy())
    images.save("photo.png")
    options = [*OPTIONS, "--data.num-val", "0", "--train.epochs", "1"]
    config = apply_overrides(arat_fast.recipe("digits"), options)
    names = {
        "arat_fast": arat_fast,
        "network": nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
        ),
        "train_data": Digits(0, 64),
        "test_data": Digits(64, 96),
    }
    monkeypatch.setattr(arat_fast, "recipe", lambda name: config, raising=False)
    exec(snippet(README.parent / "docs" / "your-network.md", of=2), names)
    settings = json.loads(Path("run/config.json").read_text())["config"]["objective"]
    assert settings["layers"] == ["1"]
    assert names["label"] in Digits.classes and 0.1 <= float(str(names["confidence"])) <= 1
    printed = capsys.readouterr().out.split()
    assert 0 <= float(printed[0]) <= 1 and printed[-1] == names["label"]


def test_other_methods_in_ones_own_loop() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    names = {"TrainStep": TrainStep, "PGD": PGD, "network": network, "optimizer": optimizer}
    exec(snippet(README.parent / "docs" / "your-network.md", 1, of=2), names)
    data = Digits(0, 64)
    step, batch = names["step"], (data.x, torch.tensor(data.y))
    losses = [step(*batch)["loss"].item() for _ in range(8)]
    assert losses[-1] < losses[0]


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in headings}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_and_headings_that_are_named_exist(path: Path) -> None:
    pattern = r"""(?:\]\(|src=")(?!http)([^)#"]*)(?:#([^)]+))?[)"]"""
    for target, heading in re.findall(pattern, path.read_text()):
        page = path.parent / target if target else path
        assert page.exists(), target
        assert not heading or heading in anchors(page), f"{target}#{heading}"


def test_kernels_example() -> None:
    names: dict[str, Any] = {}
    exec(snippet(README.parent / "docs" / "kernels.md"), names)
    moved = (names["x_adv"] - names["x"]).abs().max()
    assert 0 < moved <= 8 / 255 + 1e-6 and names["loss"] > 0
    assert names["features"][0].weight.grad.abs().sum() > 0
