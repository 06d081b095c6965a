"""Pictures are seen as the test images of the run were."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import CPU
from pictures import image_folder
from PIL import Image

import arat_fast
import arat_fast.report
from arat_fast.cli import main
from arat_fast.data import load_data
from arat_fast.datasets.digits import load_digits
from arat_fast.evaluation.checkpoint import evaluate_checkpoint
from arat_fast.evaluation.pictures import predict_pictures
from arat_fast.export.folder import export_checkpoint
from arat_fast.saved.network import read_saved
from arat_fast.training.checkpoint import load_checkpoint, save_checkpoint


def test_digits_as_pictures(
    ema_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = load_digits(False)[0][:9]
    # White is 16 in the dataset and 255 in a picture.
    pixels = (images.numpy() * 255 / 16).round().astype(np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture[0]).save(tmp_path / f"{number}.png")
    # Black at both sides, where the square in the middle is cut out.
    large = Image.new("RGB", (20, 16))
    large.paste((96, 96, 96), (2, 0, 18, 16))
    large.save(tmp_path / "large.png")
    Image.new("L", (8, 8), 96).save(tmp_path / "flat.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    assert main(["predict", str(ema_run), str(tmp_path), "--json"]) == 2
    found = {Path(p["file"]).stem: p for p in json.loads(capsys.readouterr().out)}
    with torch.no_grad():
        probabilities = arat_fast.load(ema_run)(torch.from_numpy(pixels) / 255).softmax(1)
    for number, row in enumerate(probabilities):
        assert found[str(number)]["label"] == str(int(row.argmax()))
        assert found[str(number)]["confidence"] == pytest.approx(float(row.max()), abs=1e-5)
    assert "cut.png" in found["cut"]["problem"] and not found["cut"]["label"]
    assert found["large"]["confidence"] == pytest.approx(found["flat"]["confidence"], abs=1e-5)

    assert main(["predict", str(ema_run), str(tmp_path / "3.png")]) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and line.split()[-1] == found["3"]["label"]
    assert main(["predict", str(ema_run), str(tmp_path / "none")]) == 2
    told = capsys.readouterr().err
    assert "none" in told and "epoch" not in told
    state = load_checkpoint(ema_run / "checkpoint.pt")
    state["progress"]["step"] -= 1
    save_checkpoint(tmp_path / "cut.pt", state)
    assert (
        main(["predict", str(tmp_path / "cut.pt"), str(tmp_path / "3.png"), "--weights", "last"])
        == 0
    )
    assert "epoch 0 of 1 is done" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "crop"), [("folder-resnet18", "auto"), ("cifar10-resnet18", "pad")]
)
def test_pictures_of_a_folder_are_framed_as_in_evaluation(
    tmp_path: Path, recipe: str, crop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the run, and by its exported weights, which lie elsewhere."""
    monkeypatch.setattr(arat_fast.report, "write_report", lambda run: run)
    folder, out = tmp_path / "images", tmp_path / "run"
    image_folder(folder)
    options = ["--data.name", "folder", "--data.root", str(folder)]
    options += ["--data.image-size", "32", "--data.batch-size", "8"]
    options += ["--model.name", "resnet8", "--data.crop", crop, "--data.loader", "dataloader"]
    options += ["--train.epochs", "1", "--eval.num-steps", "1", "--eval.no-autoattack"]
    options += ["--attack.num-steps", "1", "--data.num-workers", "0", "--train.device", "cpu"]
    assert main(["train", recipe, *options, "--out", str(out)]) == 0
    config = read_saved(out).config
    assert config is not None
    test = load_data(config.data, device=CPU, seed=0, eval_batch_size=50).test
    (x, _), *_ = test.epoch(0)
    with torch.no_grad():
        expected = arat_fast.load(out)(x).softmax(1)
    files = [Path(test.samples.name(i)) for i in range(len(x))]  # type: ignore[attr-defined]
    answers = predict_pictures(out, files)
    for row, prediction in zip(expected, answers, strict=True):
        assert prediction.label == test.classes[int(row.argmax())]
        assert prediction.confidence == pytest.approx(float(row.max()), abs=1e-5)

    exported = tmp_path / "exported"
    export_checkpoint(out, "hub", exported)
    for other in (exported, out / "model.safetensors"):
        assert predict_pictures(other, files) == answers
    of_run, of_export = (
        evaluate_checkpoint(path, data=str(folder), num_steps=1, attacks=("pgd",), device="cpu")
        for path in (out, exported)
    )
    assert of_run["images_sha256"] == of_export["images_sha256"]
    for attack in ("clean", "pgd1"):
        assert of_run["accuracy"][attack] == of_export["accuracy"][attack]
