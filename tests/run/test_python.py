"""A run from Python: the caller's network and data, and what is loaded of it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import generator
from PIL import Image
from rich.console import Console
from tiny import changed, metric_lines, tiny_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import arat_fast
from arat_fast.config import Config
from arat_fast.data.given import given_splits, images_and_labels
from arat_fast.display import Display
from arat_fast.models import SplitBatchNorm2d, convert_split_batch_norm, use_branch
from arat_fast.run.hooks import Hook
from arat_fast.saved.network import read_saved
from arat_fast.saved.plain import save_safetensors


class Striped(Dataset[Any]):
    """Grey images (1, 9, 7) with a bright column for each of three classes."""

    classes = ("left", "middle", "right")

    def __init__(self, number: int, kind: str = "float") -> None:
        self.number, self.kind = number, kind

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[Any, int]:
        label = index % 3
        x = 0.2 * torch.rand(1, 9, 7, generator=generator(index))
        x[:, :, 3 * label] += 0.7
        pixels = (x * 255).round().to(torch.uint8)
        picture = Image.fromarray(pixels[0].numpy())
        return {"float": x, "uint8": pixels, "picture": picture}[self.kind], label


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AvgPool2d(3, 2),
        nn.Flatten(),
        nn.Linear(72, 3),
    )


def config(epochs: int = 2) -> Config:
    given = tiny_config(epochs, kind="none")
    given = changed(given, "data", batch_size=12, num_workers=0, num_val=0)
    return changed(given, "attack", eps=0.05, alpha=0.03)


def quiet() -> Display:
    return Display(Console(quiet=True))


class Told(Hook):
    def __init__(self) -> None:
        self.kinds: list[str] = []

    def log(self, run: Any, line: dict[str, Any]) -> None:
        self.kinds.append(line["kind"])


def test_own_network_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arat_fast.models.registry.sources", {})
    torch.manual_seed(0)
    told, net = Told(), network()
    run = arat_fast.train(
        config(8),
        tmp_path / "run",
        model=net,
        train_data=Striped(96),
        test_data=Striped(30, "uint8"),
        hooks=[told],
        display=quiet(),
    )
    assert run.summary["classes"] == ["left", "middle", "right"]
    assert run.summary["dataset"] == "given" and run.summary["steps"] == 64
    assert "train" in told.kinds and isinstance(net[1], SplitBatchNorm2d)
    accuracy = run.summary["accuracy"]
    assert accuracy["clean"]["value"] > 0.8 >= accuracy["pgd1"]["value"] - 0.2
    assert any("invariance/1" in line for line in metric_lines(run.out, "train"))
    # As in another process, which knows no such network.
    monkeypatch.setattr("arat_fast.models.registry.sources", {})
    with pytest.raises(ValueError, match="not imported on a file's word"):
        arat_fast.load(run.out)
    model = arat_fast.load(run.out, model=network())
    assert model.classes == Striped.classes and model.image_shape == (1, 9, 7)
    x = torch.stack([Striped(30)[i][0] for i in range(30)])
    answers = model.predict(x)
    right = sum(answer.label == Striped.classes[i % 3] for i, answer in enumerate(answers))
    assert right / 30 == pytest.approx(accuracy["clean"]["value"], abs=0.04)
    assert all(1 / 3 <= answer.confidence <= 1 for answer in answers)
    suite = arat_fast.evaluate(
        model, Striped(30, "uint8"), arat_fast.ThreatModel(0.05), ["pgd"], num_steps=1, alpha=0.02
    )
    found = suite.record()
    assert found["clean"]["correct"] == accuracy["clean"]["correct"]
    # Weights alone, with the network as a callable.
    monkeypatch.setattr("arat_fast.models.registry.sources", {})
    again = arat_fast.load(run.out / "model.safetensors", model=lambda num_classes: network())
    assert torch.equal(again(x), model(x))
    save_safetensors(model, tmp_path / "bare.safetensors")
    for recipe in (None, "digits"):
        with pytest.raises(ValueError, match=r"network\.load_state_dict"):
            arat_fast.load(tmp_path / "bare.safetensors", model=network(), recipe=recipe)


def test_validation_images_choose_the_best_epoch(tmp_path: Path) -> None:
    best = changed(config(), "train", eval_every=1, keep_best=True)
    options: dict[str, Any] = {"train_data": Striped(24), "test_data": Striped(12)}
    options |= {"model": network(), "display": quiet()}
    with pytest.raises(ValueError, match="val_data"):
        arat_fast.train(best, tmp_path / "none", **options)
    run = arat_fast.train(best, tmp_path / "run", **options, val_data=Striped(9))
    (line,) = metric_lines(run.out, "eval")
    assert (line["split"], line["num_samples"]) == ("val", 9)
    assert (run.out / "checkpoint-best.pt").exists()


def test_loaders_and_pictures_give_the_same_images() -> None:
    data = Striped(20, "picture")
    x, y = images_and_labels(data)
    assert x.shape == (20, 1, 9, 7) and x.max() <= 1 and y.tolist() == [i % 3 for i in range(20)]
    assert torch.equal(images_and_labels(Striped(20, "uint8"), 7)[0], x[:7])
    loader: DataLoader[Any] = DataLoader(Striped(20, "uint8"), batch_size=8, drop_last=True)
    options: dict[str, Any] = {"seed": 0, "device": torch.device("cpu")}
    options |= {"batch_size": 8, "eval_batch_size": 3}
    splits = given_splits(loader, Subset(data, range(5)), **options)
    assert len(splits.train) == 2 and splits.train.num_samples == 16
    assert [len(b.x) for b in splits.train.epoch(0, 1)] == [8]
    assert torch.equal(torch.cat([b.x for b in splits.test.epoch(0)]), x[:5])
    splits = given_splits(data, data, **options)
    first, again = (torch.cat([b.y for b in splits.train.epoch(0)]) for _ in range(2))
    assert torch.equal(first, again) and sorted(first.tolist()) == sorted(y.tolist())


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="together"):
        arat_fast.train(config(), tmp_path, train_data=Striped(20))
    with pytest.raises(ValueError, match="together"):
        arat_fast.train(config(), tmp_path, val_data=Striped(20))
    held_out = changed(config(), "data", num_val=5)
    with pytest.raises(ValueError, match="val_data"):
        arat_fast.train(held_out, tmp_path, train_data=Striped(20), test_data=Striped(20))
    pairs: list[Any] = [(torch.rand(1, 9, 7), 5)] * 20
    for data, match in (
        (pairs, "no attribute classes"),
        (DataLoader(Striped(20), batch_size=None), "batch_size"),
    ):
        with pytest.raises(ValueError, match=match):
            arat_fast.train(
                config(), tmp_path / "a", train_data=data, test_data=data, display=quiet()
            )
    with pytest.raises(ValueError, match=r"\[0, 2\], got 5"):
        arat_fast.evaluate(network(), pairs, arat_fast.ThreatModel(0.1))
    # Of another size than the network is built for: each way in says so, and what to do.
    large: list[Any] = [(torch.rand(1, 12, 7), 0)] * 20
    settings = config(), tmp_path / "b"
    for refused in (
        lambda: arat_fast.evaluate(network(), large, arat_fast.ThreatModel(0.1)),
        lambda: arat_fast.ARAT(convert_split_batch_norm(network()), ["1"], (1, 12, 7)),
        lambda: arat_fast.train(*settings, model=network(), train_data=large, test_data=large),
    ):
        with pytest.raises(ValueError, match=r"no images of shape \(1, 12, 7\): .*; pass images"):
            refused()


def test_any_function_is_evaluated() -> None:
    data = Striped(12)

    def logits(x: Tensor) -> Tensor:
        return x.mean(2)[:, 0, [0, 3, 6]]

    suite = arat_fast.evaluate(logits, data, arat_fast.ThreatModel(0.5), ["pgd"], num_steps=9)
    assert suite.results["clean"].accuracy == 1 and suite.results["pgd9"].accuracy == 0


def test_evaluate_shows_its_progress_and_refuses_the_other_branch(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model, x, text = network().eval(), torch.rand(4, 1, 9, 7), io.StringIO()
    model[-1] = nn.Linear(72, 4)
    data, ball = TensorDataset(x, model(x).argmax(dim=1)), arat_fast.ThreatModel(0.1)
    arat_fast.evaluate(model, data, ball, ["pgd"], display=Display(Console(file=text)))
    assert text.getvalue() == "PGD-20: 4 images\n"
    suite = arat_fast.evaluate(model, data, ball, ["apgd-ce"])
    assert suite.results["clean"].accuracy == 1 and "apgd-ce" in suite.results
    assert capsys.readouterr().err == "" and not caplog.records
    convert_split_batch_norm(model)
    with use_branch(model, "clean"), pytest.raises(ValueError, match="use_branch"):
        arat_fast.evaluate(model, data, ball)


def test_evaluation_in_the_middle_of_a_training_leaves_no_trace() -> None:
    """Also where a last stage of one pixel has no statistics of a single image."""
    network = nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10))
    model = convert_split_batch_norm(network).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = TensorDataset(torch.rand(6, 1, 8, 8), torch.arange(6))
    arat_fast.evaluate(model, data, arat_fast.ThreatModel(0.1), ["pgd"], num_steps=1)
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_loaded_network_takes_pictures(tmp_path: Path) -> None:
    small = tiny_config(1)
    run = arat_fast.train(small, tmp_path / "run", display=quiet())
    model = arat_fast.load(run.out)
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    x = model.preprocess([tmp_path / "a.png", pixels, Image.fromarray(pixels)])
    assert torch.equal(x, torch.tensor(pixels / 255).float().expand(3, 1, 8, 8))
    answers = model.predict([pixels])
    assert answers[0].label in model.classes and answers == model.predict(x[:1])
    assert read_saved(run.out).num_classes == 10
    with pytest.raises(ValueError, match="float64"):
        model.preprocess([pixels / 255])
