"""Checkpoints of the official code: names, round trips, damaged files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import generator, randomize
from official import (
    official_predictors_to_state_dict,
    predictors_to_official,
    state_dict_to_official,
)
from torch import Tensor

from arat_fast.models import create_model, use_branch
from arat_fast.objectives.predictor import Predictors
from arat_fast.saved.network import read_saved
from arat_fast.saved.official import official_to_state_dict
from arat_fast.training.checkpoint import read_tensor_file

DATA = Path(__file__).parents[1] / "data"
BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def bn_keys(path: str) -> list[str]:
    return [f"{path}.{branch}.{name}" for branch in ("clean", "adv") for name in BN]


def wide_resnet_keys() -> list[str]:
    """The official WRN-34-10's keys, written from its layout."""
    keys = ["conv1.weight"]
    for stage in (1, 2, 3):
        for index in range(5):
            block = f"block{stage}.layer.{index}"
            keys += bn_keys(f"{block}.bn1") + [f"{block}.conv1.weight"]
            keys += bn_keys(f"{block}.bn2") + [f"{block}.conv2.weight"]
            if index == 0:
                keys.append(f"{block}.convShortcut.weight")
    return [*keys, *bn_keys("bn1"), "fc.weight", "fc.bias"]


@pytest.fixture(scope="module")
def small() -> dict[str, Tensor]:
    """An official state dict of resnet8, seven classes."""
    return state_dict_to_official(randomize(create_model("resnet8", 7, in_channels=1)).state_dict())


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_resnet18_has_the_official_names_and_shapes() -> None:
    layout = json.loads((DATA / "golden_keys.json").read_text())["state_dict"]
    official = state_dict_to_official(create_model("resnet18", 10).state_dict())
    assert {name: list(t.shape) for name, t in official.items()} == layout


def test_wide_resnet_has_the_official_names() -> None:
    with torch.device("meta"):
        state = create_model("wrn34-10", 10).state_dict()
    official = state_dict_to_official(state)
    assert sorted(official) == sorted(wide_resnet_keys())
    assert official["block3.layer.0.bn1.adv.weight"].shape == (320,)
    assert official["block3.layer.0.convShortcut.weight"].shape == (640, 320, 1, 1)


def test_round_trip_is_exact(small: dict[str, Tensor]) -> None:
    ours = official_to_state_dict(small)
    assert equal(state_dict_to_official(ours), small)
    assert equal(official_to_state_dict(state_dict_to_official(ours)), ours)
    assert torch.equal(ours["bn1.weight"][0], small["bn1.clean.weight"])
    assert torch.equal(ours["bn1.weight"][1], small["bn1.adv.weight"])


@pytest.mark.parametrize("wrap", ["bare", "module", "model", "module.model", "nested", "base"])
def test_load_finds_architecture_and_classes(
    wrap: str, small: dict[str, Tensor], tmp_path: Path
) -> None:
    content: dict[str, object] = dict(small)
    if wrap in ("module", "model", "module.model"):
        content = {f"{wrap}.{name}": tensor for name, tensor in small.items()}
    elif wrap == "base":
        content = {
            n.replace(".clean.", ".base.").replace(".adv.", ".base_adv."): t
            for n, t in small.items()
        }
    elif wrap == "nested":
        content = {"state_dict": small, "epoch": 3}
    model = read_saved(save(tmp_path / "last.pt", content)).model
    assert not model.training
    assert equal(state_dict_to_official(model.state_dict()), small)
    x = torch.rand(3, 1, 8, 8, generator=generator(1))
    original = randomize(create_model("resnet8", 7, in_channels=1)).eval()
    original.load_state_dict(model.state_dict())
    with use_branch(model, "clean"), use_branch(original, "clean"):
        assert torch.equal(model(x), original(x))
    assert model(x).shape == (3, 7)


def test_load_wide_resnet(tmp_path: Path) -> None:
    with torch.device("meta"):
        state = state_dict_to_official(create_model("wrn34-10", 100).state_dict())
    # One stored number per tensor: the file is small.
    content = {
        f"module.{name}": torch.ones((), dtype=tensor.dtype).expand(tensor.shape)
        for name, tensor in state.items()
    }
    model = read_saved(save(tmp_path / "wrn.pt", content)).model
    assert type(model).__name__ == "WideResNet"
    assert model.get_parameter("fc.weight").shape == (100, 640)
    assert bool((model.get_parameter("fc.weight") == 1).all())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damage_of_any_kind_is_one_line(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bytes changed anywhere, in both of torch's formats: read, or refused by name."""
    buffer = io.BytesIO()
    torch.save(
        {"a": torch.arange(6.0), "b": {"c": [1, 2.5]}},
        buffer,
        _use_new_zipfile_serialization=data.draw(st.booleans()),
    )
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "damaged.pt"
    path.write_bytes(content)
    try:
        read_tensor_file(path)
    except ValueError as error:
        assert "\n" not in str(error)
        assert f"{path} is not a whole checkpoint" in str(error)


@pytest.mark.parametrize(
    ("change", "keyword"),
    [
        ([1, 2], "list"),
        ({"epoch": 3}, "epoch"),
        (lambda _: create_model("resnet8", 7, norm="shared").state_dict(), "clean"),
        ({}, "no tensor"),
        (lambda s: {n: t for n, t in s.items() if ".adv." not in n}, "bn1.adv.weight"),
        (lambda s: {**s, "bn1.base.weight": torch.ones(2)}, "both"),
        (lambda s: {n: t for n, t in s.items() if n != "layer2.0.conv1.weight"}, "resnet8"),
        (lambda s: {**s, "conv1.weight": torch.ones(32, 1, 7, 7)}, r"\(32, 1, 3, 3\)"),
        (lambda s: {**s, "extra.weight": torch.ones(2)}, "extra.weight"),
        (lambda s: {n: t for n, t in s.items() if n != "linear.bias"}, "linear.bias"),
        (lambda s: {**s, "bn1.adv.weight": torch.ones(3)}, "shape"),
    ],
)
def test_other_content_is_refused_in_one_sentence(
    change: Any, keyword: str, small: dict[str, Tensor], tmp_path: Path
) -> None:
    path = save(tmp_path / "other.pt", change(small) if callable(change) else change)
    with pytest.raises(ValueError, match=keyword) as error:
        read_saved(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_predictors_round_trip() -> None:
    predictors = Predictors([16, 32, 16])
    for tensor in predictors.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator(3)))
        else:
            tensor.fill_(5)
    official = predictors_to_official(predictors)
    widths = [state["predictor_x.0.weight"].shape for state in official]
    assert widths == [(4, 16), (8, 32), (4, 16)]
    assert all(int(s["predictor_x.1.num_batches_tracked"]) == 5 for s in official)
    assert equal(official_predictors_to_state_dict(official), dict(predictors.state_dict()))
