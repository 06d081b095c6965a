"""BatchNorm folded into convolutions: the same attack, and what is folded where."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import BatchNormAct2d, Operations, generator, randomize
from torch import Tensor, nn
from torchvision import models

from arat_fast.attacks import PGD, RandomStart
from arat_fast.models import (
    SplitBatchNorm2d,
    convert_split_batch_norm,
    create_model,
    use_branch,
    use_statistics,
)
from arat_fast.models.folding import FoldedNetwork
from arat_fast.models.layers import StemConv2d
from arat_fast.models.wide_resnet import WideResNet


class Activated(nn.Module):
    """timm's activated BatchNorm after a convolution, and one before any."""

    def __init__(self) -> None:
        super().__init__()
        self.bn0 = BatchNormAct2d(3)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, dilation=2, padding=1)
        self.bn1 = BatchNormAct2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.bn1(self.conv(self.bn0(x))).mean((2, 3)))
        return y


class Awkward(nn.Module):
    """What must not be fused: outputs that are read twice, sums that broadcast, other padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 1, groups=4)
        self.bn3 = nn.BatchNorm2d(8)
        self.conv4 = nn.Conv2d(8, 8, 3, padding="same")
        self.bn4 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        raw = self.conv1(x)
        x = self.bn1(raw) + raw
        x = F.relu(self.bn2(self.conv2(x)) + x.mean((2, 3), keepdim=True))
        normalised = self.bn3(self.conv3(x))
        x = torch.add(normalised.relu(), normalised)
        x = self.bn4(self.conv4(x)).add(x).relu()
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


class ThreeBranches(nn.Module):
    """Three BatchNorms summed, as in RepVGG, with dropout and a BatchNorm1d behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 8, 2 * i + 1, padding=i) for i in range(3))
        self.bns = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 4)
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = (bn(conv(x)) for conv, bn in zip(self.convs, self.bns, strict=True))
        y: Tensor = self.bn(self.fc(self.dropout(F.relu(first + second + third).mean((2, 3)))))
        return y


class InPlace(nn.Module):
    """Tensors that are changed while a fused operation could have moved past them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.project = nn.Conv2d(8, 8, 1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        residual = self.project(x)
        a = self.bn1(self.conv1(x))
        residual.relu_()
        x = a + residual
        residual = self.project(x)
        total = residual.add_(self.bn2(self.conv2(x)))
        x = total + 2 * residual
        raw = self.conv3(x)
        raw.clamp_(-1, 1)
        x = self.bn3(raw) + x
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


class Strided(nn.Module):
    """The only way from images to output is a convolution of one pixel in six."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1, stride=(2, 3), bias=False)
        self.bn = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x)).flatten(1)
        return y


class ByName(nn.Module):
    """A projection that is told the name of its argument, the second reader of a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, 2, padding=1)
        self.projection = nn.Conv2d(8, 8, 1, 2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv1(x)).relu()
        x = self.conv2(x).tanh() + self.projection(input=x)
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


class Doubled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = 2 * super().forward(input)
        return y


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], int, int]] = {
    # how it is made, image, BatchNorm layers folded and affine
    "resnet8": (lambda: create_model("resnet8", 4), (3, 8, 8), 9, 0),
    "resnet8 grey": (lambda: create_model("resnet8", 4, in_channels=1), (1, 8, 8), 9, 0),
    "resnet8 shared": (lambda: create_model("resnet8", 4, norm="shared"), (3, 8, 8), 9, 0),
    "resnet8 silu": (lambda: create_model("resnet8", 4, activation="silu"), (3, 8, 8), 9, 0),
    "resnet18": (lambda: create_model("resnet18", 4), (3, 16, 16), 20, 0),
    "preact": (lambda: create_model("preact-resnet18", 4), (3, 8, 8), 8, 9),
    "resnet50": (lambda: create_model("resnet50", 4), (3, 32, 32), 53, 0),
    "wrn16-2": (lambda: WideResNet(16, 2, 4), (3, 16, 16), 7, 6),
    "wrn16-2 shared": (lambda: WideResNet(16, 2, 4, norm="shared"), (3, 16, 16), 7, 6),
    "torchvision resnet18": (lambda: models.resnet18(num_classes=4), (3, 32, 32), 20, 0),
    "mobilenet_v3_small": (lambda: models.mobilenet_v3_small(num_classes=4), (3, 32, 32), 34, 0),
    "efficientnet_b0": (lambda: models.efficientnet_b0(num_classes=4), (3, 32, 32), 49, 0),
    "activated": (Activated, (3, 9, 9), 1, 1),
    "awkward": (Awkward, (3, 8, 8), 1, 3),
    "three branches": (ThreeBranches, (3, 8, 8), 3, 0),
    "in place": (InPlace, (3, 8, 8), 2, 1),
    "strided": (Strided, (3, 7, 8), 1, 0),
    "by name": (ByName, (3, 8, 8), 1, 0),
}


def make(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    build, shape, _, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = build()
    if "shared" not in name:
        model = convert_split_batch_norm(model)
    x = torch.rand(4, *shape, generator=generator(1), dtype=torch.float64)
    return randomize(model).double(), x, torch.arange(4)


SMALL = ("resnet8", "resnet8 grey", "activated", "awkward", "three branches", "in place", "strided")
SLOW = (
    "wrn16-2 shared",
    "resnet18",
    "resnet50",
    "efficientnet_b0",
    "torchvision resnet18",
    "mobilenet_v3_small",
)


@pytest.mark.parametrize(
    ("name", "constant"),
    [
        *((name, constant) for constant in (False, True) for name in SMALL),
        *((name, False) for name in ("resnet8 shared", "wrn16-2", "by name")),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in SLOW),
        pytest.param("mobilenet_v3_small", True, marks=pytest.mark.slow),
    ],
)
def test_the_folded_attack_is_the_unfolded_one(name: str, constant: bool) -> None:
    model, x, y = make(name)
    folded = FoldedNetwork(model.train(), x, constant=constant)
    assert all(module.training for module in model.modules())
    assert (len(folded.folded), len(folded.affine)) == NETWORKS[name][2:]
    assert folded.unfolded == (("bn",) if name == "three branches" else ())
    noise = 0.02 * torch.randn(x.shape, generator=generator(2), dtype=torch.float64)
    for norm, eps in (("Linf", 8 / 255), ("L2", 0.5)):
        attack = PGD(eps, eps / 4, 4, norm, bn="running")  # type: ignore[arg-type]
        expected = attack(model, x, y, RandomStart(noise=noise))
        assert (attack(folded, x, y, RandomStart(noise=noise)) - expected).abs().max() <= 1e-10
        assert (expected - x).abs().max() > 0.01
    logits = robust(model, x)
    with use_statistics(folded, "running"):
        assert (folded(x) - logits).abs().max() <= 1e-10 * logits.abs().max()


def test_only_image_gradients_and_no_batch_norm() -> None:
    model, x, y = make("resnet8")
    folded = FoldedNetwork(model, x)
    with Operations() as operations:
        PGD(num_steps=2, bn="running")(folded, x, y)
    assert len(operations.masks()) == 2 * len(folded.folded)
    assert all(mask == [True, False, False] for mask in operations.masks())
    assert not any("batch_norm" in name for name, *_ in operations.seen)
    assert all(parameter.grad is None for parameter in model.parameters())


def robust(model: nn.Module, x: Tensor) -> Tensor:
    """What a folded network computes."""
    with use_branch(model, "adv"), use_statistics(model, "running"):
        logits: Tensor = model(x)
    return logits


@pytest.mark.parametrize(("name", "constant"), [("wrn16-2", False), ("resnet8", True)])
def test_refresh_follows_the_network(name: str, constant: bool) -> None:
    model, x, _ = make(name)
    folded = FoldedNetwork(model, x, constant=constant)
    before = folded(x)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.1)
    folded.refresh()
    expected = robust(model, x)
    assert (folded(x) - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert (before - expected).abs().max() > 1e-3 * expected.abs().max()


def test_constant_weights_make_small_images_one_matrix_product() -> None:
    model, x, y = make("resnet8")
    folded = FoldedNetwork(model, x, constant=True)
    with Operations() as operations:
        PGD(num_steps=2, bn="running")(folded, x, y)
    # layer3.0.conv2 sees 2x2 pixels, fewer than its window has.
    assert len(operations.masks()) == 2 * (len(folded.folded) - 1)


def test_the_clean_branch_plays_no_part() -> None:
    model, x, _ = make("resnet8")
    before = FoldedNetwork(model, x)(x)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, SplitBatchNorm2d):
                for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                    assert tensor is not None
                    tensor[0].add_(3)
    assert torch.equal(FoldedNetwork(model, x)(x), before)


def test_what_cannot_be_folded_is_named_and_still_right() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 1),
        Doubled(8),
        nn.Flatten(),
        nn.Linear(128, 4),
        nn.BatchNorm1d(4),
    ).double()
    randomize(model)
    calls: list[int] = []
    model[3].register_forward_hook(lambda *_: calls.append(1))
    x = torch.rand(4, 3, 8, 8, generator=generator(1), dtype=torch.float64)
    folded = FoldedNetwork(model, x)
    assert folded.unfolded == ("1", "3", "5", "8") and not folded.folded and not folded.affine
    with use_statistics(model, "running"), use_statistics(folded, "running"):
        assert torch.equal(folded(x), model(x))
    assert calls


class WideResidual(nn.Module):
    """Under autocast the residual stays in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.full((4, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y: Tensor = (self.bn(x * 1) + x.float() * self.scale).mean((2, 3))
        return y


def test_a_wider_residual_under_autocast() -> None:
    model = randomize(WideResidual())
    x = torch.rand(4, 3, 8, 8, generator=generator(1))
    with torch.autocast("cpu", torch.bfloat16), use_statistics(model, "running"):
        folded = FoldedNetwork(model, x)
        expected = model(x)
        got = folded(x)
    assert folded.affine == ("bn",)
    assert (got - expected).abs().max() <= 2**-7 * expected.abs().max()


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if float(x.sum()) > 0 else x.sum((2, 3))


def test_a_network_that_cannot_be_traced_says_so() -> None:
    with pytest.raises(ValueError, match=r"Branching cannot be traced.*--step\.no-fold"):
        FoldedNetwork(Branching(), torch.rand(2, 3, 4, 4))


class Stateful(nn.Module):
    """Computes something else when it is traced: a branch on a Python number that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.fc(x.mean((2, 3)))
        return y * (1 if self.calls == 1 else 5)


class Augmented(nn.Module):
    """``y += ...`` changes x too, which tracing does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = x
        y += self.bn(self.conv(x))
        return (y * x).mean((2, 3))


@pytest.mark.parametrize("build", [Stateful, Augmented])
def test_a_network_that_was_traced_wrongly_is_refused(build: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="gives another output than the network itself"):
        FoldedNetwork(randomize(build()), torch.rand(2, 3, 4, 4, generator=generator(1)))


def test_autocast_rounds_everything_but_the_image() -> None:
    model, x, _ = make("resnet8")
    model, x = model.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        folded = FoldedNetwork(model, x)
        weights = [site.weight.dtype for site in folded.modules() if hasattr(site, "shortcut")]
        first = folded(x)
        # A tenth of bfloat16's spacing below 1, which rounding would lose.
        other = folded((x + 2.0**-12).requires_grad_())
    assert sorted(weights, key=str) == [torch.bfloat16] * 8 + [torch.float32]
    assert isinstance(model.get_submodule("conv1"), StemConv2d)
    assert first.dtype == torch.bfloat16 and other.requires_grad
    stem = next(site for site in folded.modules() if getattr(site, "shortcut", 0) is None)
    assert stem.weight.dtype == torch.float32


class OnGpu(Tensor):
    """Numbers on the CPU that take the way of a GPU."""

    is_cuda = True


def test_convolutions_that_cudnn_cannot_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run one operation after the other, and are tried once."""
    tried: list[torch.Size] = []

    def no_engine(x: Tensor, *_: object) -> Tensor:
        tried.append(x.shape)
        raise RuntimeError("GET was unable to find an engine\nfrom a library")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", no_engine)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", no_engine)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    model = randomize(create_model("resnet8", 4, norm="shared"))
    x = torch.rand(3, 3, 8, 8, generator=generator(1))
    network = FoldedNetwork(model, x, "reference")
    expected = network(x)
    with pytest.warns(UserWarning, match="unable to find an engine") as said:
        got = network(x.as_subclass(OnGpu))
    num_tried = len(tried)
    network(x.as_subclass(OnGpu))
    assert torch.equal(got.as_subclass(Tensor), expected)
    assert len(said) == 1 and 0 < num_tried == len(tried)
