"""``arat-fast eval`` of a network that somebody else trained, on images of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import classifier, randomize
from pyautoattack import AutoAttack

from arat_fast.cli import main


@pytest.mark.slow
def test_the_robust_set_is_that_of_the_reference_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 64 images, in two balls; the radius is that at which a linear network would lose half."""
    torch.manual_seed(0)
    model = randomize(classifier(4)).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 6, 9, 3), dtype=np.uint8)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() / 255
    with torch.no_grad():
        # So that the classes lie near each other.
        model.get_submodule("head").bias -= model(x).mean(0)  # type: ignore[operator]
    leaf = x.clone().requires_grad_(True)
    best = model(leaf).topk(2, dim=1)
    y = best.indices[:, 0].clone()
    # Three of four are wrong from the start.
    y[torch.arange(64) % 4 != 0] += 1
    y %= 4
    margin = best.values[:, 0] - best.values[:, 1]
    (grad,) = torch.autograd.grad(margin.sum(), leaf)
    margin = margin.detach()
    eps = float((margin / grad.abs().sum((1, 2, 3)))[::4].median())
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    np.savez(tmp_path / "set.npz", x=pixels, y=y.numpy())
    arguments = ["eval", "--model.name", "networks:classifier", "--weights", str(tmp_path / "w.pt")]
    arguments += ["--data", str(tmp_path / "set.npz"), "--eps", repr(eps), "L2:2"]
    arguments += ["--batch-size", "64", "--device", "cpu", "--num-steps", "2"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    # That a quarter is chance is so in both balls.
    assert printed.count("warning: ") == 1
    table = printed.splitlines()[-3:]
    assert table[0].split() == ["ball", "clean", "pgd2", "autoattack"]
    record = json.loads((tmp_path / f"w.evaluation-set-{eps:.6g}.json").read_text())
    assert (record["num_samples"], record["recipe"], record["model"]) == (64, None, "file")
    shares = [100 * record["accuracy"][name]["value"] for name in table[0].split()[1:]]
    assert table[1].split()[2::2] == [f"{share:.2f}" for share in shares] and shares[0] == 25
    arrays = np.load(tmp_path / f"w.evaluation-set-{eps:.6g}.npz")
    with torch.random.fork_rng():
        reference = AutoAttack(model, norm="Linf", eps=eps, seed=0, version="standard")
        reference.apgd_targeted.n_target_classes = reference.fab.n_target_classes = 3
        x_adv, _ = reference.run_standard_evaluation(x, y, batch_size=64)
        expected = model(x_adv).argmax(1) == y
    assert np.array_equal(arrays["autoattack_correct"], expected.numpy())
    assert 0 < int(expected.sum()) < 16


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--weights", "w.pt"], "--model.name"),
        (["run", "--weights", "w.pt", "--model.name", "resnet18"], "PATH or --weights"),
        (["--weights", "w.pt", "--model.name", "resnet18"], "--data and --eps"),
        (["run", "--eps", "L3:0.5"], "L2:0.5"),
        (["run", "--eps", "much"], "number"),
    ],
)
def test_what_is_refused(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *arguments]) == 2
    assert word in capsys.readouterr().err
