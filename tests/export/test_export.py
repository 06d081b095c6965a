"""The plain network of one branch, and safetensors files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
import torchvision
from networks import TinyNet, generator, randomize
from torch import nn

from arat_fast.models import (
    SplitBatchNorm2d,
    convert_split_batch_norm,
    create_model,
    use_branch,
)
from arat_fast.saved import export_plain, save_safetensors
from arat_fast.saved.weights import read_safetensors

NETWORKS = {
    "resnet8": lambda: create_model("resnet8", 10),
    "resnet18": lambda: create_model("resnet18", 10),
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
    "efficientnet_b0": lambda: torchvision.models.efficientnet_b0(num_classes=5),
    "with BatchNormAct2d": TinyNet,
}


@pytest.mark.parametrize("branch", ["adv", "clean"])
@pytest.mark.parametrize("name", NETWORKS)
def test_exported_logits_are_those_of_the_branch(
    name: str, branch: Literal["clean", "adv"]
) -> None:
    model = randomize(convert_split_batch_norm(NETWORKS[name]())).eval()
    plain = export_plain(model, branch)
    x = torch.rand(3, 3, 32, 32, generator=generator(1))
    with torch.no_grad(), use_branch(model, branch):
        expected = model(x)
    assert torch.equal(plain(x), expected)
    other: Literal["clean", "adv"] = "clean" if branch == "adv" else "adv"
    assert not torch.equal(export_plain(model, other)(x), expected)
    norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == sum(isinstance(m, SplitBatchNorm2d) for m in model.modules()) > 0
    assert not any(isinstance(m, SplitBatchNorm2d) for m in plain.modules())
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in model.named_modules()]


def test_a_built_in_network_exports_to_its_shared_form() -> None:
    model = randomize(create_model("resnet8", 10))
    plain = export_plain(model)
    shared = create_model("resnet8", 10, norm="shared")
    shared.load_state_dict(plain.state_dict())
    x = torch.rand(3, 3, 8, 8, generator=generator(2))
    assert torch.equal(shared.eval()(x), plain.eval()(x))


def test_export_leaves_the_model_alone() -> None:
    model = randomize(create_model("resnet8", 10))
    model.get_parameter("bn1.weight").requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = export_plain(model)
    assert plain.training
    assert not plain.get_parameter("bn1.weight").requires_grad
    assert plain.get_parameter("bn1.bias").requires_grad
    plain(torch.rand(2, 3, 8, 8, generator=generator(1))).sum().backward()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None for p in model.parameters())


def test_a_shared_layer_stays_shared_and_a_bare_layer_is_replaced() -> None:
    layer = SplitBatchNorm2d(4, eps=1e-3, momentum=0.2, affine=False)
    plain = export_plain(nn.Sequential(layer, nn.ReLU(), nn.Sequential(layer)))
    assert isinstance(plain, nn.Sequential) and plain[0] is plain[2][0]
    bare = export_plain(layer)
    assert isinstance(bare, nn.BatchNorm2d)
    assert (bare.eps, bare.momentum, bare.affine) == (1e-3, 0.2, False)


def test_export_errors() -> None:
    with pytest.raises(ValueError, match="split"):
        export_plain(create_model("resnet8", 10, norm="shared"))
    with pytest.raises(ValueError, match="both"):
        export_plain(create_model("resnet8", 10), "both")  # type: ignore[arg-type]


def test_safetensors_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    plain = export_plain(randomize(create_model("resnet8", 10)))
    # A non-contiguous tensor, and one that two names share.
    plain = plain.to(memory_format=torch.channels_last)
    plain.register_buffer("alias", plain.get_buffer("bn1.running_mean"))
    save_safetensors(plain, path, {"model": "resnet8"})
    tensors, metadata = read_safetensors(path)
    assert metadata == {"model": "resnet8"} and tensors.keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_equal_tensors_make_equal_files(tmp_path: Path) -> None:
    model, metadata = nn.Linear(3, 2), dict.fromkeys("a header's order was chance", "")
    for number in range(8):
        save_safetensors(model, tmp_path / f"{number}", metadata)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_a_bit_that_flips_is_found(tmp_path: Path) -> None:
    """Or changes nothing that is read: of the checksum's own name, or of the padding."""
    path = tmp_path / "model.safetensors"
    save_safetensors(nn.Sequential(nn.Linear(9, 5), nn.BatchNorm1d(5)), path, {"eps": "0.03"})
    content, (tensors, metadata) = path.read_bytes(), read_safetensors(path)
    accepted = 0
    for bit in range(0, 8 * len(content), 7):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            got, said = read_safetensors(path)
        except ValueError as error:
            assert "whole safetensors" in str(error)
            continue
        accepted += 1
        assert got.keys() == tensors.keys() and metadata.items() <= said.items()
        assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())
    assert accepted < 0.02 * 8 / 7 * len(content)


def test_a_safetensors_file_cut_in_half(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors(create_model("resnet8", 10), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="safetensors") as error:
        read_safetensors(path)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        read_safetensors(tmp_path / "none")
