"""A run goes on with the images that it began with; images that grow during the training."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import CLASSES, encoded, image_folder, picture
from rich.console import Console
from tiny import changed, tiny_config, tiny_trainer, with_objective
from torch import Tensor

from arat_fast.attacks.pgd import check_images
from arat_fast.config import Config, DataConfig
from arat_fast.data.fingerprint import fingerprint, names_below
from arat_fast.datasets.encoded import EncodedImages
from arat_fast.evaluation.checkpoint import evaluate_checkpoint
from arat_fast.run.hooks import Remarks
from arat_fast.training.checkpoint import load_checkpoint


def config_for(name: Any, root: Path, epochs: int = 1, **options: Any) -> Config:
    """On images of 8 × 8 pixels, where no other size is asked for."""
    options = {"batch_size": 8, "image_size": 8, **options}
    data = DataConfig(name, root, num_workers=0, loader="dataloader", **options)
    return dataclasses.replace(tiny_config(epochs=epochs, kind="none"), data=data)


def arrays(root: Path, number: int = 40) -> Path:
    root.mkdir()
    rng = np.random.default_rng(5)
    np.save(root / "images.npy", rng.integers(0, 256, (number, 8, 8, 3), dtype=np.uint8))
    np.save(root / "labels.npy", np.arange(number) % 4)
    return root


@pytest.mark.parametrize(
    ("epochs", "init", "said"), [(99, "", True), (100, "", False), (99, "weights", False)]
)
def test_so_few_steps_that_nothing_may_be_learned_are_said(
    epochs: int, init: str, said: bool, tmp_path: Path
) -> None:
    """Of 36 images, five batches an epoch."""
    config = config_for("arrays", arrays(tmp_path / "set"), epochs)
    if init:
        first = tiny_trainer(tmp_path / "first", config)
        torch.save(first.model.state_dict(), tmp_path / "weights.pt")
        config = dataclasses.replace(config, init=str(tmp_path / "weights.pt"))
    console = Console(file=io.StringIO(), width=200)
    Remarks().begin(tiny_trainer(tmp_path / "run", config, console=console))
    shown = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert ("only 495 update steps in all, 5 an epoch" in shown) == ("--init" in shown) == said
    # An arrow to the left may be of another class than one to the right.
    assert "--data.no-flip" in shown


@pytest.mark.parametrize(
    ("epoch", "correct", "said"), [(25, 12, True), (25, 30, False), (24, 12, False)]
)
def test_a_training_at_chance_is_said_when_a_quarter_is_done(
    epoch: int, correct: int, said: bool, tmp_path: Path
) -> None:
    """Of four classes, 36 images an epoch, 99 epochs."""
    console = Console(file=io.StringIO(), width=200)
    run = tiny_trainer(
        tmp_path / "run", config_for("arrays", arrays(tmp_path / "set"), 99), console=console
    )
    run.metrics.load_state_dict({"epoch_samples": 36, "epoch_sums": {"accuracy_clean": correct}})
    Remarks().before_epoch(run, epoch)
    shown = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert ("still at chance after 25 of 99 epochs, 33.3 %" in shown) == said


def test_a_run_refuses_to_go_on_with_other_images(tmp_path: Path) -> None:
    root, out = arrays(tmp_path / "set"), tmp_path / "run"
    tiny_trainer(out, config_for("arrays", root)).run()
    moved = root.rename(tmp_path / "moved")
    assert tiny_trainer(out, config_for("arrays", moved), resume=True).progress.step == 5
    np.save(moved / "labels.npy", np.load(moved / "labels.npy")[::-1])
    with pytest.raises(ValueError, match="36 training images, got as many"):
        tiny_trainer(out, config_for("arrays", moved), resume=True)
    shutil.rmtree(moved)
    arrays(moved, 50)
    with pytest.raises(ValueError, match="36 training images, got 45"):
        tiny_trainer(out, config_for("arrays", moved), resume=True)


def test_names_and_order_count_and_the_folder_does_not() -> None:
    def of(*samples: tuple[str, int], root: str = "a") -> str:
        names, labels = zip(*samples, strict=True)
        source = EncodedImages([Path(root) / name for name in names], torch.tensor(labels))
        return fingerprint(source.labels, names_below(source, Path(root))).sha256

    first = of(("x/1.png", 0), ("y/2.png", 1))
    assert first == of(("x/1.png", 0), ("y/2.png", 1), root="elsewhere/b")
    others = [
        of(("x/1.png", 0), ("y/3.png", 1)),
        of(("x/1.png", 0), ("y/2.png", 0)),
        of(("y/2.png", 1), ("x/1.png", 0)),
        of(("x/1.png", 0)),
    ]
    assert len({first, *others}) == 5
    assert fingerprint(torch.tensor([1, 2])) != fingerprint(torch.tensor([2, 1]))


def test_bad_files_are_looked_for_once_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the natural run before it, where there is no checkpoint yet."""
    root, out = tmp_path / "set", tmp_path / "run"
    for split, first in (("train", 0), ("val", 50)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for index in range(8):
                path = root / split / name / f"{index}.png"
                path.write_bytes(encoded(picture(first + 8 * label + index, 8, 8), ".png"))
    bad = root / "train" / "dog" / "5.png"
    bad.write_bytes(b"")
    config = with_objective(
        config_for("folder", root, crop="pad", bad_images="skip"), "arrest", teacher_epochs=1
    )
    tiny_trainer(out, config)
    bad.write_bytes(encoded(picture(13, 8, 8), ".png"))
    with monkeypatch.context() as patch:
        patch.setattr("arat_fast.data.bad_images.unreadable", None)
        tiny_trainer(out, config, resume=True).run()
        assert evaluate_checkpoint(out, attacks=(), device="cpu")["split"] == "test"
    for folder in (out, out / "natural"):
        state = load_checkpoint(folder / "checkpoint.pt")
        assert state["run"]["dataset"]["num_samples"] == 23
        assert (folder / "bad_images.json").exists()
        assert not (folder / "held_out.json").exists()
    assert tiny_trainer(tmp_path / "anew", config).data.train.num_samples == 24


def test_the_run_names_the_files_held_out(tmp_path: Path) -> None:
    root, out = image_folder(tmp_path / "set", 8, splits=("train",)), tmp_path / "run"
    data = tiny_trainer(out, config_for("folder", root, crop="pad", num_val=3)).data
    named = json.loads((out / "held_out.json").read_text())
    assert {split: len(files) for split, files in named.items()} == {"test": 2, "val": 3}
    for split, files in named.items():
        part = getattr(data, split)
        assert {str(root / file) for file in files} == {
            part.samples.name(i) for i in range(len(files))
        }


def test_sizes_follow_the_epochs(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set", per_class=4)
    config = config_for("folder", root, 3, batch_size=6, image_size=16, progressive=(8, 12, 16))
    run = tiny_trainer(tmp_path / "run", changed(config, "train", eval_every=0))
    seen: list[int] = []

    def watched(module: object, inputs: tuple[Tensor, ...]) -> None:
        # The training pass of clean and adversarial images, not the attack's.
        if run.model.training and len(inputs[0]) == 12:
            check_images(inputs[0][:6])
            seen.append(inputs[0].shape[-1])

    run.model.register_forward_pre_hook(watched)
    run.run()
    per_epoch = len(run.data.train)
    assert seen == [8] * per_epoch + [12] * per_epoch + [16] * per_epoch


def test_a_dataset_on_the_device_keeps_its_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.progressive"):
        tiny_trainer(tmp_path / "run", changed(tiny_config(), "data", progressive=(4, 8)))
