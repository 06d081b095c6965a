"""Where a run starts: weights of a file, a frozen body, natural epochs, a growing radius."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import randomize
from official import state_dict_to_official
from rich.console import Console
from safetensors.torch import load_file
from tiny import changed, tiny_config, tiny_trainer, with_objective
from torch import Tensor

from arat_fast.attacks import PGD
from arat_fast.command_line import apply_overrides, overrides_of
from arat_fast.config import Config
from arat_fast.models import create_model
from arat_fast.recipes import recipe
from arat_fast.run.hooks import Hook
from arat_fast.saved import save_safetensors
from arat_fast.saved.naming import to_own
from arat_fast.training.awp import AWP


def starting(source: Path | str, **settings: Any) -> Config:
    return dataclasses.replace(tiny_config(1, kind="none"), init=str(source), **settings)


def written(tmp_path: Path, kind: str) -> tuple[Path, dict[str, Tensor]]:
    """A file of a kind, and the tensors that the adversarial branch is to have."""
    norm = "split" if kind in ("official", "split") else "shared"
    model = randomize(create_model("resnet8", 10, 1, norm))  # type: ignore[arg-type]  # a norm
    state = model.state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_safetensors(model, path)
    elif kind == "official":
        torch.save(state_dict_to_official(state), path)
    elif kind == "wrapped":
        torch.save({"state_dict": {f"module.{n}": t for n, t in state.items()}}, path)
    elif kind == "robustbench":
        names = {n.replace(".shortcut_bn.", ".shortcut.1."): t for n, t in state.items()}
        names = {n.replace(".shortcut.weight", ".shortcut.0.weight"): t for n, t in names.items()}
        torch.save(names, path)
    else:
        torch.save(state, path)
    rows = norm == "split"
    return path, {n: t[1] if rows and ".bn" in f".{n}" else t for n, t in state.items()}


@pytest.mark.parametrize("kind", ["safetensors", "official", "split", "wrapped", "robustbench"])
def test_weights_of_a_file(tmp_path: Path, kind: str) -> None:
    path, expected = written(tmp_path, kind)
    run = tiny_trainer(tmp_path / "run", starting(path))
    state = run.model.state_dict()
    assert torch.equal(state["conv1.weight"], expected["conv1.weight"])
    assert torch.equal(state["linear.bias"], expected["linear.bias"])
    both = state["layer2.0.bn1.running_var"]
    assert torch.equal(both[1], expected["layer2.0.bn1.running_var"])
    assert torch.equal(both[0], both[1]) is (kind not in ("official", "split"))
    # Into one BatchNorm goes the adversarial branch.
    plain = with_objective(starting(path), "at")
    state = tiny_trainer(tmp_path / "plain", plain).model.state_dict()
    assert torch.equal(state["bn1.weight"], expected["bn1.weight"])


def test_names_of_robustbench_preact_resnet() -> None:
    with torch.device("meta"):
        own = create_model("preact-resnet18", 10, norm="shared").state_dict()
    theirs = {name.replace(".convShortcut.", ".shortcut.0."): t for name, t in own.items()}
    assert theirs.keys() != own.keys() == to_own(theirs, own).keys()


def test_another_classifier_stays_fresh_and_the_body_waits(tmp_path: Path) -> None:
    source = randomize(create_model("resnet8", 4, 1, "shared"))
    save_safetensors(source, tmp_path / "w.safetensors")
    config = starting(tmp_path / "w.safetensors", init_freeze_epochs=1)
    config = changed(config, "train", epochs=2)
    config = changed(config, "optimizer", lr_factors=("layer1=0", "layer3=0.5"))
    assert apply_overrides(recipe("digits"), overrides_of(config)) == config

    class Watch(Hook):
        def __init__(self) -> None:
            self.seen: list[dict[str, Tensor]] = []

        def before_epoch(self, run: Any, epoch: int) -> None:
            self.seen.append({n: p.detach().clone() for n, p in run.model.named_parameters()})

        def end(self, run: Any) -> None:
            self.before_epoch(run, 2)

    watch, console = Watch(), Console(file=io.StringIO(), width=200)
    run = tiny_trainer(tmp_path / "run", config, hooks=[watch], console=console)
    run.run()
    shown = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert "linear, is of 4 other classes: a fresh one of 10 takes its place" in shown
    start, frozen, trained = watch.seen
    assert torch.equal(start["conv1.weight"], source.state_dict()["conv1.weight"])
    assert start["linear.bias"].shape == (10,)
    changes = {n for n in start if not torch.equal(start[n], frozen[n])}
    assert changes == {"linear.weight", "linear.bias"}
    still = {n for n in start if torch.equal(trained[n], frozen[n])}
    assert still == {n for n in start if n.startswith("layer1.")}
    factors = {part.factor for part in run.learning_parts}
    rates = {group["lr"] / run.rate for group in run.optimizer.param_groups}
    assert factors == {0.0, 0.5, 1.0} and rates == factors


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_safetensors(create_model("resnet8", 10, 3, "shared"), tmp_path / "rgb.safetensors")
    other = {"mean": "[0.5]", "std": "[0.2]"}
    save_safetensors(create_model("resnet8", 10, 1, "shared"), tmp_path / "n.safetensors", other)
    for source, match in (
        (tmp_path / "rgb.safetensors", "does not fit"),
        (tmp_path / "n.safetensors", "normalises with mean"),
        ("timm", "timm:NAME"),
    ):
        with pytest.raises(ValueError, match=match):
            tiny_trainer(tmp_path / "run", starting(source))
    with pytest.raises(FileNotFoundError):
        tiny_trainer(tmp_path / "run", starting(tmp_path / "absent.pt"))
    with pytest.raises(ValueError, match="init_freeze_epochs"):
        dataclasses.replace(tiny_config(), init_freeze_epochs=1)
    with pytest.raises(ValueError, match="no module 'layer9'"):
        config = changed(tiny_config(), "optimizer", lr_factors=("layer9=2",))
        tiny_trainer(tmp_path / "run", config)
    for factors in (("layer1",), ("layer1=-1",), ("=2",)):
        with pytest.raises(ValueError, match="PATH=FACTOR"):
            changed(tiny_config(), "optimizer", lr_factors=factors)


def test_natural_epochs_come_first(tmp_path: Path) -> None:
    config = changed(tiny_config(1, kind="none"), "train", natural_epochs=1, eval_every=0)
    run = tiny_trainer(tmp_path / "run", config)
    seen: dict[str, Tensor] = {}
    run.hooks.append(Start(seen))
    summary = run.run()
    assert summary["natural_model"]["epochs"] == 1 and summary["epochs"] == 1
    natural = load_file(tmp_path / "run" / "natural" / "model.safetensors")
    for row in (0, 1):
        assert torch.equal(seen["bn1.running_mean"][row], natural["bn1.running_mean"])
    assert torch.equal(seen["linear.weight"], natural["linear.weight"])


class Start(Hook):
    def __init__(self, seen: dict[str, Tensor]) -> None:
        self.seen = seen

    def begin(self, run: Any) -> None:
        self.seen.update({n: t.clone() for n, t in run.model.state_dict().items()})


def test_the_radius_grows_and_a_resumed_run_has_that_of_its_epoch(tmp_path: Path) -> None:
    attack = PGD(eps=0.3, eps_warmup=2)
    radii = [attack.in_epoch(epoch).eps for epoch in range(4)]
    assert radii == pytest.approx([0.1, 0.2, 0.3, 0.3])
    assert PGD().in_epoch(0) == PGD()
    config = changed(tiny_config(2, kind="none"), "attack", eps_warmup=1)
    run = tiny_trainer(tmp_path / "run", config)
    radii = []
    for step in (1, 5):
        run.at_step(step, lambda: radii.append(run.step.attack.eps))
    run.run()
    assert radii == pytest.approx([0.06, 0.12])
    again = tiny_trainer(tmp_path / "run", config, resume=True)
    for hook in again.hooks:
        hook.begin(again)
    assert again.step.attack.eps == 0.12


def test_weights_are_perturbed_after_the_warm_up(tmp_path: Path) -> None:
    config = changed(tiny_config(2, kind="none"), "awp", gamma=0.01, warmup=1)
    run = tiny_trainer(tmp_path / "run", config)
    found: list[AWP | None] = []
    for step in (4, 5):
        run.at_step(step, lambda: found.append(run.step.awp))
    run.run()
    assert found == [None, AWP(0.01)]
    again = tiny_trainer(tmp_path / "run", config, resume=True)
    for hook in again.hooks:
        hook.begin(again)
    assert again.step.awp == AWP(0.01)
