"""A run goes on with the images that it began with, and with no others."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import CLASSES, encoded, picture
from tiny import tiny_config, tiny_trainer

from arat_fast.config import Config, DataConfig, ObjectiveConfig
from arat_fast.data.fingerprint import fingerprint, names_below
from arat_fast.datasets.encoded import FileImages
from arat_fast.evaluation.checkpoint import evaluate_checkpoint
from arat_fast.training.checkpoint import load_checkpoint, save_checkpoint


def config_for(name: Any, root: Path, **options: Any) -> Config:
    """One epoch on 8 × 8 images."""
    data = DataConfig(
        name, root, batch_size=8, image_size=8, num_workers=0, loader="dataloader", **options
    )
    return dataclasses.replace(tiny_config(epochs=1), data=data)


def arrays(root: Path, number: int = 40) -> Path:
    root.mkdir()
    rng = np.random.default_rng(5)
    np.save(root / "images.npy", rng.integers(0, 256, (number, 8, 8, 3), dtype=np.uint8))
    np.save(root / "labels.npy", np.arange(number) % 4)
    return root


def test_a_run_refuses_to_go_on_with_other_images(tmp_path: Path) -> None:
    root, out = arrays(tmp_path / "set"), tmp_path / "run"
    tiny_trainer(out, config_for("arrays", root)).run()
    moved = root.rename(tmp_path / "moved")
    assert tiny_trainer(out, config_for("arrays", moved), resume=True).step == 5
    labels = np.load(moved / "labels.npy")
    np.save(moved / "labels.npy", labels[::-1])
    with pytest.raises(ValueError, match="36 training images, got as many with other labels"):
        tiny_trainer(out, config_for("arrays", moved), resume=True)
    shutil.rmtree(moved)
    arrays(moved, 50)
    with pytest.raises(ValueError, match="a run on 36 training images, got 45: .* --out") as error:
        tiny_trainer(out, config_for("arrays", moved), resume=True)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, tiny_config(epochs=1)).run()
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state.pop("dataset")["num_samples"] == 237
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    assert tiny_trainer(tmp_path, tiny_config(epochs=1), resume=True).step == 4


def test_names_and_order_count_and_the_folder_does_not() -> None:
    def of(*samples: tuple[str, int], root: str = "a") -> str:
        source = FileImages([(Path(root) / name, label) for name, label in samples])
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


def folder_with_a_bad_file(root: Path) -> Path:
    """24 files to train on, one of which is empty; it is returned."""
    for split, first in (("train", 0), ("val", 50)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for index in range(8):
                path = root / split / name / f"{index}.png"
                path.write_bytes(encoded(picture(first + 8 * label + index, 8, 8), ".png"))
    bad = root / "train" / "dog" / "5.png"
    bad.write_bytes(b"")
    return bad


def test_bad_files_are_looked_for_once_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = tmp_path / "set", tmp_path / "run"
    bad = folder_with_a_bad_file(root)
    config = config_for("folder", root, crop="pad", bad_images="skip")
    tiny_trainer(out, config).run()
    bad.write_bytes(encoded(picture(13, 8, 8), ".png"))
    monkeypatch.setattr("arat_fast.data.bad_images.unreadable", None)
    assert tiny_trainer(out, config, resume=True).data.train.num_samples == 23
    assert evaluate_checkpoint(out, attacks=(), device="cpu")["split"] == "test"
    monkeypatch.undo()
    anew = tiny_trainer(tmp_path / "anew", config)
    assert anew.data.train.num_samples == 24


def test_the_natural_run_before_takes_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run goes on without a checkpoint of its own, and a file was put right."""
    root, out = tmp_path / "set", tmp_path / "run"
    bad = folder_with_a_bad_file(root)
    config = dataclasses.replace(
        config_for("folder", root, crop="pad", bad_images="skip"),
        objective=ObjectiveConfig("arrest"),
    )
    trainer = tiny_trainer(out, config)
    bad.write_bytes(encoded(picture(13, 8, 8), ".png"))
    monkeypatch.setattr("arat_fast.data.bad_images.unreadable", None)
    trainer._train_natural_model()
    assert not (out / "checkpoint.pt").exists()
    tiny_trainer(out, config, resume=True).run()
    for run in (out, out / "natural"):
        assert load_checkpoint(run / "checkpoint.pt")["dataset"]["num_samples"] == 23
        assert (run / "bad_images.json").exists()
