"""Networks that are not built in: by name, normalised, split, and what is regularised in them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from networks import generator
from tiny import changed, tiny_config
from torch import Tensor, nn

from arat_fast.build import build_network, build_objective
from arat_fast.cli import main
from arat_fast.command_line import base_config, overrides_of
from arat_fast.config import ForeignModel, ModelConfig, config_from_dict, config_to_dict
from arat_fast.models import MODELS, SplitBatchNorm2d, create_model
from arat_fast.models.features import default_layers
from arat_fast.models.registry import import_model
from arat_fast.saved import save_safetensors
from arat_fast.saved.network import read_saved

has_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="needs timm, an extra"
)
MODULE = """
from pathlib import Path
from torch import nn
with Path(__file__).with_name("imports").open("a") as f:
    f.write("once")

def make(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6, num_classes),
    )

nothing = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    # The current folder is appended where a network is looked for.
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("arat_fast.models.registry.sources", {})
    yield "own_nets"
    sys.modules.pop("own_nets", None)


def test_what_a_file_names_is_not_imported(module: str, tmp_path: Path) -> None:
    name = f"{module}:make"
    config = config_to_dict(tiny_config())
    config["model"]["name"] = name
    read = config_from_dict(config)
    assert isinstance(read.model, ForeignModel) and read.norm == "split"
    assert config_to_dict(read) == config
    facts = {"model": name, "image_shape": "[1, 8, 8]", "classes": '["a", "b"]'}
    net = nn.Sequential(nn.Conv2d(1, 2, 8), nn.Flatten())
    save_safetensors(net, tmp_path / "x.safetensors", {**facts, "recipe": "digits"})
    for ask in (
        lambda: build_network(read, 3, (1, 8, 8)),
        lambda: create_model(name, 3),
        lambda: read_saved(tmp_path / "x.safetensors"),
        lambda: overrides_of(read),
    ):
        with pytest.raises(ValueError, match="not imported on a file's word"):
            ask()
    assert not (tmp_path / "imports").exists()
    # Typed, it is; from then on the name is known.
    assert ModelConfig(name).name == name and (tmp_path / "imports").read_text() == "once"
    assert type(config_from_dict(config).model) is ModelConfig


def test_an_own_network_is_split_and_regularised_by_rule(module: str) -> None:
    config = changed(tiny_config(), "model", name=f"{module}:make", mean=(0.5,), std=(0.2,))
    model = build_network(config, 3, (1, 8, 8))
    assert isinstance(model[1], SplitBatchNorm2d) and len(model) == 9
    objective = build_objective(config, model, 3, (1, 8, 8))
    assert objective.layers == ("5",)
    x = torch.rand(2, 1, 8, 8, generator=generator(1))
    bare = nn.Sequential(*model.eval())
    torch.testing.assert_close(model(x), bare((x - 0.5) / 0.2))
    with pytest.raises(ValueError, match="shape"):
        build_objective(config, model, 3, (3, 8, 8))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("resnet81", r"did you mean resnet8\?"),
        ("no_such_module:make", "cannot be imported"),
        ("own_nets:absent", "cannot be imported"),
        ("own_nets:nothing", "must be callable"),
        ("torch.nn:Flatten", "num_classes"),
    ],
)
def test_names_of_nothing(module: str, name: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        import_model(name)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("torchvision:resnet19", "resnet18"),
        pytest.param("timm:resnet19", "resnet18", marks=[has_timm, pytest.mark.slow]),
        # It would fetch a configuration, and code.
        pytest.param("timm:hf-hub:some/one", "no network", marks=[has_timm, pytest.mark.slow]),
    ],
)
def test_names_that_a_library_lacks(name: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        create_model(name, 3)


class Tokens(nn.Module):
    """Without BatchNorm: a mean over tokens, dropout, and the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.patch(x).flatten(2).mT)
        y: Tensor = self.head(self.drop(tokens.mean(1)))
        return y


def test_the_rule() -> None:
    """As published for ResNet-18, which the rule does not know; the pooled feature of others."""
    model = create_model("resnet18", 5)
    assert default_layers(model, (3, 32, 32)) == MODELS["resnet18"].regularized_layers
    named = create_model("torchvision:resnet18", 5)
    assert default_layers(named, (3, 64, 64)) == MODELS["resnet18"].regularized_layers
    assert named._image_std.shape == (3, 1, 1) and named.bn1.running_mean.shape == (2, 64)
    assert default_layers(Tokens(), (3, 8, 8)) == ("norm",)
    assert default_layers(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (3, 2, 2)) == ("0",)
    with pytest.raises(ValueError, match="takes no images"):
        default_layers(Tokens(), (3, 2, 2))


def test_the_layers_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "resnet8", "--image-size", "8"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    starred = tuple(line[1] for line in lines if line[0] == "*")
    assert starred == MODELS["resnet8"].regularized_layers
    assert ["layer3.0", "BasicBlock", "128", "x", "2", "x", "2"] in lines


def test_files_are_cropped_as_the_network_wants_them() -> None:
    arguments = ["--model.name", "torchvision:mobilenet_v3_small"]
    config = base_config("folder-resnet18", arguments)
    assert (config.data.image_size, config.model.name) == (224, arguments[1])
    assert base_config("digits", arguments).image_shape == (1, 8, 8)
    assert overrides_of(config) == [*arguments, "--seed", "0"]


def test_silu_is_of_built_in_networks() -> None:
    model = create_model("resnet8", 5, activation="silu")
    assert sum(isinstance(m, nn.SiLU) for m in model.modules()) == 4
    with pytest.raises(ValueError, match="activation of its own"):
        create_model("torchvision:resnet18", 5, activation="silu", norm="shared")


def test_without_timm_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[timm\]'"):
        create_model("timm:convnext_tiny", 5)
