"""Networks read back without their dataset: runs, checkpoints, exported weights, official files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from networks import generator, randomize
from official import state_dict_to_official
from torch import Tensor

import arat_fast
from arat_fast.models import create_model, use_branch
from arat_fast.models.registry import MODELS
from arat_fast.saved import export_plain, save_safetensors
from arat_fast.saved.network import describe, header, read_saved
from arat_fast.saved.weights import network_size
from arat_fast.training.checkpoint import load_checkpoint, save_checkpoint

Branch = Literal["clean", "adv"]
X = torch.rand(5, 1, 8, 8, generator=generator(3))


def assert_near(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-6


def test_a_run_is_its_deployed_network(ema_run: Path) -> None:
    """Folder, checkpoint and exported weights are one network, its normalisation included."""
    state = load_checkpoint(ema_run / "checkpoint.pt")
    network = create_model("resnet8", 10, 1, "split", (0.3,), (0.4,)).eval()

    def logits(weights: dict[str, Tensor], branch: Branch) -> Tensor:
        network.load_state_dict(weights)
        with torch.no_grad(), use_branch(network, branch):
            return network(X)  # type: ignore[no-any-return]

    deployed = logits(state["average"]["model"], "adv")
    clean, last = logits(state["average"]["model"], "clean"), logits(state["model"], "adv")
    for path in (ema_run, ema_run / "checkpoint.pt", ema_run / "model.safetensors"):
        model = arat_fast.load(path)
        assert not model.training and torch.equal(model(X), arat_fast.load(ema_run)(X))
    # The run's own network is in another memory format.
    assert_near(arat_fast.load(ema_run)(X), deployed)
    assert_near(arat_fast.load(ema_run, branch="clean")(X), clean)
    assert_near(arat_fast.load(str(ema_run), weights="last")(X), last)
    for other in (clean, last):
        assert (other - deployed).abs().max() > 1e-3


def test_what_a_file_says_of_itself(ema_run: Path) -> None:
    whole, weights = read_saved(ema_run), read_saved(ema_run / "model.safetensors")
    assert whole.weights == weights.weights == "ema"
    assert whole.name == weights.name == "resnet8"
    assert whole.facts["branch"] == "both" and weights.facts["branch"] == "adv"
    assert whole.image_shape == weights.image_shape == (1, 8, 8)
    assert whole.num_classes == 10 and whole.steps == 4 and weights.steps is None
    assert weights.config is not None and weights.config.model.mean == (0.3,)
    assert header(describe(weights.config, "ema", "adv", (1, 8, 8)))["mean"] == "[0.3]"


def test_a_run_without_its_checkpoint_is_read_from_its_weights(
    ema_run: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((ema_run / name).read_bytes())
    assert torch.equal(arat_fast.load(tmp_path)(X), arat_fast.load(ema_run)(X))


def test_an_official_checkpoint(tmp_path: Path) -> None:
    model = randomize(create_model("resnet8", 7, in_channels=1)).eval()
    torch.save(state_dict_to_official(model.state_dict()), tmp_path / "last.pt")
    saved = read_saved(tmp_path / "last.pt")
    assert saved.config is None and saved.image_shape == (1, 8, 8) and saved.weights == "file"
    assert torch.equal(arat_fast.load(tmp_path / "last.pt")(X), export_plain(model)(X))
    named = read_saved(tmp_path / "last.pt", recipe="digits")
    assert named.facts["eps"] == 0.12 and named.facts["weights"] == "file"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in ("wrn34-10", "resnet50")))
        for name in MODELS
        # As wrn34-10, and larger.
        if name not in ("wrn28-10", "wrn70-16")
    ],
)
def test_every_built_in_network_is_read_back(name: str, tmp_path: Path) -> None:
    model = create_model(name, 7, 2, norm="shared")
    path = tmp_path / "model.safetensors"
    save_safetensors(model, path, {"model": name, "branch": "shared"})
    saved = read_saved(path)
    path.unlink()
    assert (saved.num_classes, saved.image_shape[0]) == (7, 2)
    read = saved.model.state_dict()
    assert all(torch.equal(read[key], value) for key, value in model.state_dict().items())


def test_the_size_is_read_off_the_stem_and_the_classifier() -> None:
    tensors = {"conv1.weight": (16, 2, 3, 3), "fc.bias": (7,)}
    state = {key: torch.empty(shape, device="meta") for key, shape in tensors.items()}
    assert network_size(state, "wrn34-10") == (7, 2)
    with pytest.raises(ValueError, match="linear"):
        network_size(state, "resnet18")


def test_a_network_of_one_batch_norm_has_no_branch_to_choose(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = randomize(create_model("resnet8", 10, 1, norm="shared"))
    save_safetensors(model, path, {"model": "resnet8", "branch": "shared"})
    assert torch.equal(arat_fast.load(path)(X), model.eval()(X))
    with pytest.raises(ValueError, match="shared"):
        arat_fast.load(path, branch="adv")


def test_an_average_whose_statistics_were_never_estimated(ema_run: Path, tmp_path: Path) -> None:
    state = load_checkpoint(ema_run / "checkpoint.pt")
    state["average"]["statistics_fresh"] = False
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    with pytest.raises(ValueError, match="--resume") as error:
        arat_fast.load(tmp_path)
    assert "\n" not in str(error.value)
    assert torch.equal(
        arat_fast.load(tmp_path, weights="last")(X), arat_fast.load(ema_run, weights="last")(X)
    )


@pytest.mark.parametrize(
    ("metadata", "keyword"),
    [
        ({}, "--recipe"),
        ({"model": "resnet18"}, "fit"),
        ({"model": "vgg"}, "model"),
        ({"model": "resnet8", "mean": "[0.5"}, "mean"),
        ({"model": "resnet8", "image_shape": "[8, 8]"}, "image_shape"),
        ({"model": "resnet8", "branch": "main"}, "branch"),
        ({"model": "resnet8", "norm": "../../.."}, "norm"),
        ({"model": "resnet8", "eps": "-1"}, "eps"),
        ({"model": "resnet8", "eps": "NaN"}, "eps"),
        ({"model": "resnet8", "additional_data": "some"}, "additional_data"),
        ({"model": "resnet8", "mean": "[0.5]", "std": "[0.0]"}, "std"),
    ],
)
def test_metadata_that_no_run_writes(
    tmp_path: Path, metadata: dict[str, str], keyword: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors(create_model("resnet8", 10, 1, norm="shared"), path, metadata)
    with pytest.raises(ValueError, match=keyword) as error:
        arat_fast.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_what_a_recipe_says_of_bare_weights(tmp_path: Path) -> None:
    """All that the file leaves open; what the file says itself stays."""
    path = tmp_path / "model.safetensors"
    model = randomize(create_model("resnet8", 10, 1, norm="shared")).eval()
    save_safetensors(model, path)
    facts = read_saved(path, recipe="digits").facts
    assert (facts["recipe"], facts["objective"]) == ("digits", "arat")
    assert (facts["norm"], facts["eps"], facts["weights"]) == ("Linf", 0.12, "file")
    assert facts["additional_data"] is None and facts["image_shape"] == [1, 8, 8]
    save_safetensors(model, path, {"norm": "L2", "eps": "0.5", "additional_data": "true"})
    saved = read_saved(path, recipe="digits")
    assert (saved.facts["norm"], saved.facts["eps"]) == ("L2", 0.5)
    assert saved.facts["additional_data"] is True
    assert saved.config is not None and saved.config.attack.eps == 0.5


def test_what_cannot_be_read(ema_run: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(FileNotFoundError):
            arat_fast.load(path)
    with pytest.raises(ValueError, match="ema"):
        arat_fast.load(ema_run / "model.safetensors", weights="last")


@pytest.mark.parametrize(
    ("content", "keyword"),
    [
        ("{", "JSON"),
        ("[" * 100_000, "nested"),
        ("[]", "object"),
        ('{"format": "pickle"}', "robustbench"),
        ('{"format": "onnx", "weights_file": "model.onnx"}', "onnxruntime"),
        ('{"format": "hub", "weights_file": "../model.safetensors"}', "own folder"),
    ],
)
def test_records_that_are_no_export(content: str, keyword: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=keyword) as error:
        arat_fast.load(tmp_path)
    assert "\n" not in str(error.value)


def test_absurd_values_are_one_sentence(ema_run: Path, tmp_path: Path) -> None:
    state = load_checkpoint(ema_run / "checkpoint.pt")
    state["run"]["config"]["data"]["image_size"] = 10**9
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    with pytest.raises(ValueError, match=r"image_size must be in \[1, 8192\]"):
        arat_fast.load(tmp_path)
    path = tmp_path / "m.safetensors"
    save_safetensors(create_model("resnet8", 10, 1, norm="shared"), path, {"mean": "[" * 100_000})
    with pytest.raises(ValueError, match="mean=.*nested"):
        arat_fast.load(path)


def test_the_version_can_be_read_without_torch() -> None:
    program = "import sys, arat_fast; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
