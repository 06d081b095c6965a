"""Built-in networks: shapes, sizes, features, the stem under autocast."""

from __future__ import annotations

import pytest
import torch
from networks import Operations, generator, randomize
from torch import Tensor, nn

from arat_fast.models import (
    MODELS,
    SplitBatchNorm2d,
    collect_features,
    create_model,
    model_spec,
    wide_resnet,
)
from arat_fast.models.layers import Normalize
from arat_fast.models.wide_resnet import PreActResNet, WideResNet
from arat_fast.objectives.arat import feature_widths
from arat_kernels import forks


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# The first four are the counts that are published for the plain networks; resnet8 by hand:
# stem, three blocks of two 3×3 convolutions, two projections, BatchNorms and the classifier.
@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("resnet18", 10, 11_173_962),
        ("wrn28-10", 10, 36_479_194),
        ("wrn34-10", 10, 46_160_474),
        ("resnet50", 1000, 25_557_032),
        ("resnet8", 10, 27 * 32 + 9 * (2 * 32**2 + 32 * 64 + 64**2 + 64 * 128 + 128**2)
            + 32 * 64 + 64 * 128 + 2 * (3 * 32 + 3 * 64 + 3 * 128) + 1290),
    ],
)  # fmt: skip
def test_number_of_parameters(name: str, classes: int, expected: int) -> None:
    with torch.device("meta"):
        plain = create_model(name, classes, norm="shared")
        split = create_model(name, classes)
    assert num_parameters(plain) == expected
    norms = sum(num_parameters(m) for m in plain.modules() if isinstance(m, nn.BatchNorm2d))
    assert num_parameters(split) == expected + norms
    assert not any(isinstance(m, nn.BatchNorm2d) for m in split.modules())


# The wide ones differ in numbers alone.
@pytest.mark.parametrize(
    "name",
    [n for n in MODELS if n not in ("wrn28-10", "wrn70-16")],
)
def test_shapes_and_regularised_layers(name: str) -> None:
    size = min(model_spec(name).image_size, 64)
    model = create_model(name, 7).eval()
    x = torch.rand(2, 3, size, size, generator=generator(1))
    with torch.no_grad(), collect_features(model, MODELS[name].regularized_layers) as features:
        assert model(x).shape == (2, 7)
    widths = {n: tuple(z.shape) for n, z in features.items()}
    assert widths.keys() == set(MODELS[name].regularized_layers)
    expected = {
        "resnet8": [128] * 2,
        "resnet8-s2": [64] * 2,
        "resnet18": [512] * 4,
        "preact-resnet18": [256, 512, 512, 512, 512],
        "wrn34-10": [320] + [640] * 10,
        "resnet50": [512, 512, 2048] * 3,
    }
    assert [widths[n] for n in MODELS[name].regularized_layers] == [
        (2, width) for width in expected[name]
    ]


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"'resnet81', expected one of .*did you mean resnet8\?"):
        create_model("resnet81", 10)
    with pytest.raises(ValueError, match=r"6n \+ 4 .* got 12"):
        WideResNet(12, 1, 10)
    with pytest.raises(ValueError, match="as many mean as positive std"):
        create_model("resnet8", 10, mean=(0.5,), std=(0.0,))


def test_normalisation_is_part_of_the_network() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    model = randomize(create_model("resnet8", 10, mean=mean, std=std)).eval()
    bare = create_model("resnet8", 10).eval()
    bare.load_state_dict(model.state_dict())
    x = torch.rand(2, 3, 8, 8, generator=generator(1))
    scaled = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.equal(model(x), bare(scaled))
    assert torch.equal(Normalize(mean, std)(x), scaled)


def small_wide_resnet() -> nn.Module:
    return randomize(WideResNet(10, 1, 5)).double()


def test_wide_resnet_feature_at_bn_is_the_one_at_relu() -> None:
    """The published list says relu1, relu2: what conv1 and conv2 of the block are given."""
    model = small_wide_resnet()
    seen: dict[str, Tensor] = {}
    for i in (1, 2):
        model.get_submodule(f"block3.layer.0.conv{i}").register_forward_pre_hook(
            lambda _module, args, i=i: seen.__setitem__(f"block3.layer.0.bn{i}", args[0])
        )
    x = torch.rand(4, 3, 32, 32, generator=generator(1), dtype=torch.float64)
    with collect_features(model, ("block3.layer.0.bn1", "block3.layer.0.bn2")) as features:
        model(x)
    assert features.keys() == seen.keys()
    for name, activation in seen.items():
        assert activation.min() == 0
        torch.testing.assert_close(features[name], activation.mean(dim=(2, 3)))


def test_features_of_any_shape() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.tokens, self.flat = nn.Conv2d(3, 5, 1), nn.Identity(), nn.Identity()
            self.unused = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            x = self.tokens(x.flatten(2).mT)
            y: Tensor = self.flat(x.mean(dim=1))
            return y

    net = Net()
    x = torch.rand(2, 3, 4, 4, generator=generator(1))
    with collect_features(net, ("conv", "tokens", "flat")) as features:
        logits = net(x)
    pooled = net.conv(x).relu().mean(dim=(2, 3))
    torch.testing.assert_close(features["conv"], pooled)
    torch.testing.assert_close(features["tokens"], pooled)
    torch.testing.assert_close(features["flat"], logits.relu())
    assert feature_widths(net, ("conv", "flat"), (3, 4, 4)) == [5, 5]
    with pytest.raises(ValueError, match="never runs the layer 'unused'"):
        feature_widths(net, ("unused",), (3, 4, 4))


def test_unknown_layer_and_clean_up() -> None:
    model = create_model("resnet8", 10)
    with (
        pytest.raises(ValueError, match=r"no layer 'layer3.0.bn3'; close: .*layer3\.0\.bn2"),
        collect_features(model, ("layer3.0.bn1", "layer3.0.bn3")),
    ):
        pass
    with pytest.raises(KeyError), collect_features(model, ("layer3.0.bn1", "avgpool")):
        raise KeyError
    for module in model.modules():
        assert not module._forward_hooks
        assert not isinstance(module, SplitBatchNorm2d) or module.pooled_sink is None


@pytest.mark.parametrize("stem", ["resnet8", "resnet50", "wide"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stem_sees_the_image(stem: str, dtype: torch.dtype) -> None:
    """Neither the image nor the perturbation is rounded on its way into the network."""
    model = WideResNet(10, 1, 5) if stem == "wide" else create_model(stem, 5)
    model.eval()
    # Near 1, where bfloat16 is coarsest: its spacing is 2^-8, half an alpha of 2/255.
    x = 1 - torch.rand(2, 3, 32, 32, generator=generator(1)) / 8
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype), Operations() as operations:
        logits = model(x)
    seen = operations.arguments("convolution")[0][0]
    assert (seen.double() - x.double()).abs().max() <= 2**-12
    if dtype == torch.bfloat16:
        assert (x.to(dtype).double() - x.double()).abs().max() > 2**-10
    assert logits.dtype == dtype


@pytest.mark.parametrize("model", [WideResNet(16, 1, 4), PreActResNet(4)], ids=["wide", "usual"])
def test_the_normalisation_that_reads_a_sum_has_its_statistics(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every block, and reads what the block gave."""
    sums: dict[nn.Module, Tensor] = {}

    def add_for(norm: nn.Module, x: Tensor, addend: Tensor) -> Tensor:
        sums[norm] = x + addend
        return sums[norm]

    def note(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        read.append(sums.get(norm) is args[0])

    read: list[bool] = []
    monkeypatch.setattr(wide_resnet, "add_for", add_for)
    monkeypatch.setattr(forks, "made", True)
    blocks = [m for m in model.modules() if isinstance(m, wide_resnet.PreActBlock)]
    for norm in [m for m in model.modules() if isinstance(m, SplitBatchNorm2d)]:
        norm.register_forward_pre_hook(note)
    model(torch.rand(2, 3, 8, 8))
    assert len(sums) == len(blocks) and read == [False, *[False, True] * len(blocks)]
