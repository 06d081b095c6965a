"""Images that are not square, from their file to the exported network."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import changed, tiny_config, tiny_trainer

import arat_fast
from arat_fast.config import DataConfig
from arat_fast.evaluation.checkpoint import evaluate_checkpoint
from arat_fast.evaluation.pictures import predict_pictures
from arat_fast.export.folder import export_checkpoint


@pytest.mark.slow
def test_a_run_on_rectangles(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 8, 14, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=pixels, labels=np.arange(48) % 4)
    data = DataConfig("npz", tmp_path / "set.npz", batch_size=16, padding=1)
    config = dataclasses.replace(
        changed(tiny_config(1), "train", epochs=1, eval_every=0), data=data
    )
    config = changed(config, "train", device="cpu")
    summary = tiny_trainer(tmp_path / "run", config).run()
    assert summary["train_samples"] == 44 and summary["test_samples"] == 4
    record = evaluate_checkpoint(
        tmp_path / "run", data=str(tmp_path / "set.npz"), attacks=["pgd"], device="cpu"
    )
    assert record["num_samples"] == 48
    x = torch.from_numpy(pixels[:3]).permute(0, 3, 1, 2) / 255
    for kind in ("hub", "torch-export"):
        export_checkpoint(tmp_path / "run", kind, tmp_path / kind)  # type: ignore[arg-type]
    model = arat_fast.load(tmp_path / "hub")
    assert model.image_shape == (3, 8, 14)
    program = torch.export.load(tmp_path / "torch-export" / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x))
    # A photo of the same shape is what the network was tested on; of another, its middle.
    Image.fromarray(pixels[0]).save(tmp_path / "same.png")
    Image.fromarray(np.pad(pixels[0], ((5, 5), (0, 0), (0, 0)))).save(tmp_path / "higher.png")
    files = [tmp_path / "same.png", tmp_path / "higher.png"]
    answers = predict_pictures(tmp_path / "run", files, device="cpu")
    assert answers[0].confidence == answers[1].confidence
    with torch.no_grad():
        expected = float(model(x[:1]).softmax(1).max())
    assert answers[0].confidence == pytest.approx(expected, rel=1e-5)
