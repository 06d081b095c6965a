"""BatchNorm that clean and adversarial images share is named, or refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import TinyNet
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from arat_fast.models import SplitBatchNorm2d, convert_split_batch_norm, create_model
from arat_fast.models.split_batch_norm import SharedBatchNormWarning
from arat_fast.objectives import ARAT


class Functional(nn.Module):
    """Keeps its statistics under names of its own."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, training=self.training)


class Own(nn.Module):
    """Computes it itself."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(8))
        self.register_buffer("running_var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean[:, None, None]) / self.running_var[:, None, None].sqrt()


def with_second(*layers: nn.Module) -> nn.Module:
    """A network with one BatchNorm2d that is split, and further layers before its head."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *layers, nn.Flatten(), nn.LazyLinear(4)
    )


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Sequential(nn.BatchNorm2d(8)))


SHARED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "1d": (lambda: with_second(nn.Flatten(), nn.BatchNorm1d(288)), "3"),
    "3d": (lambda: with_second(nn.Unflatten(1, (8, 1)), nn.BatchNorm3d(8)), "3"),
    "functional": (lambda: with_second(Functional()), "2"),
    "its own": (lambda: with_second(Own()), "2"),
    "scripted": (lambda: with_second(scripted()), r"2\.0"),
    "without statistics": (
        lambda: with_second(nn.Flatten(), nn.BatchNorm1d(288, track_running_stats=False)),
        "3",
    ),
}


@pytest.mark.parametrize("kind", SHARED)
def test_layers_left_shared_are_named(kind: str) -> None:
    make, name = SHARED[kind]
    with pytest.warns(SharedBatchNormWarning, match=f": {name};"):
        model = convert_split_batch_norm(make())
    assert isinstance(model.get_submodule("1"), SplitBatchNorm2d)
    with pytest.warns(SharedBatchNormWarning, match=f": {name};"):
        ARAT(model, ["1"], (3, 8, 8))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten()),
        lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(192), nn.Linear(192, 8)),
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, track_running_stats=True)),
    ],
)
def test_a_network_without_batch_norm_is_told(make: Callable[[], nn.Module]) -> None:
    for build in (convert_split_batch_norm, lambda model: ARAT(model, ["1"], (3, 8, 8))):
        with pytest.warns(SharedBatchNormWarning, match="no BatchNorm"):
            build(make())


def test_arat_names_what_was_never_converted() -> None:
    with pytest.warns(
        SharedBatchNormWarning, match=r"2 BatchNorm layers.* bn1, bn2;.*convert_split"
    ):
        ARAT(TinyNet(), ["bn1"], (3, 8, 8))


def test_whole_networks_are_split_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = convert_split_batch_norm(TinyNet())
        ARAT(convert_split_batch_norm(copy.deepcopy(model)), ["bn1"], (3, 8, 8))
        ARAT(create_model("resnet8", 4), ["layer3.0.bn1"], (3, 8, 8))
        convert_split_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.SyncBatchNorm(8)))


def hooked() -> nn.Module:
    layer = nn.BatchNorm2d(8)
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("layer", "keyword"),
    [
        (lambda: nn.LazyBatchNorm2d(), "LazyBatchNorm2d"),
        (lambda: nn.LazyBatchNorm1d(), "LazyBatchNorm1d"),
        (lambda: nn.LazyBatchNorm3d(), "LazyBatchNorm3d"),
        (lambda: weight_norm(nn.BatchNorm2d(8), dim=-1), "parametri"),
        (hooked, "hooks"),
    ],
)
def test_layers_that_cannot_be_split_are_refused(
    layer: Callable[[], nn.Module], keyword: str
) -> None:
    with pytest.raises(ValueError, match=f"2.*{keyword}") as error:
        convert_split_batch_norm(with_second(layer()))
    assert "\n" not in str(error.value)


def test_a_lazy_network_that_has_run_is_split() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(4))
    model(torch.rand(2, 3, 8, 8))
    assert isinstance(convert_split_batch_norm(model).get_submodule("1"), SplitBatchNorm2d)
