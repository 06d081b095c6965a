"""Conversion of networks, branches and statistics of the split BatchNorm layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from networks import TinyNet, generator, randomize
from torch import Tensor, nn

from arat_fast.models import (
    SplitBatchNorm2d,
    convert_split_batch_norm,
    create_model,
    use_branch,
    use_statistics,
)

models = torchvision.models
# Without dropout and stochastic depth: training is compared number by number.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: models.resnet18(num_classes=5),
    "mobilenet_v3_small": lambda: models.mobilenet_v3_small(num_classes=5, dropout=0.0),
    "efficientnet_b0": lambda: models.efficientnet_b0(
        num_classes=5, dropout=0.0, stochastic_depth_prob=0.0
    ),
    "with BatchNormAct2d": TinyNet,
}


def images(samples: int, seed: int = 1, size: int = 16) -> Tensor:
    return torch.rand(samples, 3, size, size, generator=generator(seed))


def split_layers(model: nn.Module) -> list[SplitBatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, SplitBatchNorm2d)]


def close(got: Tensor, expected: Tensor, relative: float, floor: float = 1e-12) -> bool:
    """Within ``relative`` of the largest expected value, or of ``floor`` where that is larger."""
    scale = max(float(expected.detach().abs().max()), floor)
    return float((got.detach() - expected.detach()).abs().max()) <= relative * scale


@pytest.fixture(scope="module", params=NETWORKS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """A network and its converted copy, in eval mode."""
    original = randomize(NETWORKS[request.param]()).eval()
    return original, convert_split_batch_norm(copy.deepcopy(original))


def test_conversion_keeps_paths_and_state(pair: tuple[nn.Module, nn.Module]) -> None:
    original, split = pair
    assert [n for n, _ in original.named_modules()] == [n for n, _ in split.named_modules()]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in split.modules())
    converted = {n for n, m in original.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(converted) == len(split_layers(split)) > 0
    state = split.state_dict()
    assert state.keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        if name.rpartition(".")[0] in converted:
            assert torch.equal(state[name], torch.stack([tensor, tensor])), name
        else:
            assert torch.equal(state[name], tensor), name
    for name in converted:
        old, new = original.get_submodule(name), split.get_submodule(name)
        assert isinstance(old, nn.BatchNorm2d) and isinstance(new, SplitBatchNorm2d)
        assert (old.eps, old.momentum, old.training) == (new.eps, new.momentum, new.training)


def test_eval_logits_are_those_of_the_original(pair: tuple[nn.Module, nn.Module]) -> None:
    original, split = pair
    x = images(4)
    with torch.no_grad():
        expected = original(x)
        assert torch.equal(split(x), expected)
        for branch in ("clean", "adv"):
            with use_branch(split, branch):  # type: ignore[arg-type]  # one of the two
                assert torch.equal(split(x), expected)
        with use_branch(split, "both"):
            assert close(split(x), expected, relative=1e-5)


def test_training_equals_two_separate_networks(pair: tuple[nn.Module, nn.Module]) -> None:
    original, split = copy.deepcopy(pair)
    # float64 has no fast depthwise convolution on a CPU: those networks are compared in float32.
    depthwise = any(m.groups > 1 for m in split.modules() if isinstance(m, nn.Conv2d))
    dtype, relative = (torch.float32, 1e-2) if depthwise else (torch.float64, 1e-9)
    original, split = original.to(dtype), split.to(dtype)
    clean, adv = copy.deepcopy(original), original
    x_clean, x_adv = (images(n, seed=n, size=32).to(dtype) for n in (6, 8))
    upstream = torch.randn(14, clean(x_clean).shape[1], generator=generator(4)).to(dtype)
    for network in (clean, adv, split):
        network.train()
    with use_branch(split, "both", num_clean=6):
        logits = split(torch.cat([x_clean, x_adv]))
    logits.backward(upstream)
    expected = torch.cat([clean(x_clean), adv(x_adv)])
    expected.backward(upstream)
    assert close(logits, expected, relative)
    layers = {n for n, m in split.named_modules() if isinstance(m, SplitBatchNorm2d)}
    states = clean.state_dict(), adv.state_dict()
    for name, tensor in split.state_dict().items():
        if name.rpartition(".")[0] in layers:
            for row, state in enumerate(states):
                assert close(tensor[row], state[name], relative), name
    grads = [{n: p.grad for n, p in network.named_parameters()} for network in (clean, adv)]
    largest = max(float(g.abs().max()) for g in grads[0].values() if g is not None)
    for name, parameter in split.named_parameters():
        pieces = [network[name] for network in grads]
        assert parameter.grad is not None and pieces[0] is not None and pieces[1] is not None
        whole = torch.stack(pieces) if name.rpartition(".")[0] in layers else sum(pieces)
        assert isinstance(whole, Tensor)
        # A bias before a BatchNorm has no gradient but rounding errors.
        assert close(parameter.grad, whole, relative, floor=1e-3 * largest), name
        if name.rpartition(".")[0] in layers:
            assert parameter.grad.abs().amax(dim=1).gt(0).all(), name


def test_sync_batch_norm_is_converted() -> None:
    network = nn.SyncBatchNorm.convert_sync_batchnorm(TinyNet())
    assert isinstance(network.bn1, nn.SyncBatchNorm)
    assert isinstance(convert_split_batch_norm(network).bn1, SplitBatchNorm2d)


def test_a_shared_layer_stays_shared_and_frozen_parameters_frozen() -> None:
    bn = nn.BatchNorm2d(4)
    bn.weight.requires_grad_(False)
    parent = nn.Module()
    parent.first, parent.second = bn, bn
    converted = convert_split_batch_norm(nn.ModuleDict({"a": parent, "b": nn.Sequential(bn)}))
    assert isinstance(parent.first, SplitBatchNorm2d)
    assert parent.first is parent.second is converted.get_submodule("b.0")
    assert parent.first.weight is not None and not parent.first.weight.requires_grad
    assert parent.first.bias is not None and parent.first.bias.requires_grad


def test_layer_without_affine() -> None:
    split = convert_split_batch_norm(nn.BatchNorm2d(3, affine=False))
    assert isinstance(split, SplitBatchNorm2d)
    assert split.weight is None and list(split.parameters()) == []
    x = images(4)
    assert torch.equal(split.train()(x), nn.BatchNorm2d(3, affine=False)(x))


class _OwnForward(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm2d(4, track_running_stats=False), "head.0 keeps no running statistics"),
        (nn.BatchNorm2d(4, momentum=None), "head.0 has momentum=None, expected a number"),
        (_OwnForward(4), "head.0 is a _OwnForward"),
    ],
)
def test_layers_that_cannot_be_split(layer: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_split_batch_norm(nn.ModuleDict({"head": nn.Sequential(layer)}))


@pytest.mark.parametrize("branch", ["clean", "adv"])
def test_a_branch_leaves_the_other_one_alone(branch: str) -> None:
    model = randomize(create_model("resnet8", 10))
    before = copy.deepcopy(model.state_dict())
    with use_branch(model, branch):  # type: ignore[arg-type]  # one of the two
        model(images(4, size=8)).sum().backward()
    used, other = (0, 1) if branch == "clean" else (1, 0)
    for layer in split_layers(model):
        assert layer.weight is not None and layer.weight.grad is not None
        assert layer.weight.grad[other].abs().max() == 0
    for name, tensor in model.state_dict().items():
        if "running" in name:
            assert torch.equal(tensor[other], before[name][other])
            assert not torch.equal(tensor[used], before[name][used])
        elif "tracked" in name:
            assert tensor[used] == before[name][used] + 1
            assert tensor[other] == before[name][other]


def modes(model: nn.Module) -> list[tuple[object, ...]]:
    return [
        (
            module.training,
            getattr(module, "branch", None),
            getattr(module, "num_clean", None),
            getattr(module, "statistics", None),
            getattr(module, "track_running_stats", None),
        )
        for module in model.modules()
    ]


def mixed_network() -> nn.Module:
    """Split and ordinary BatchNorm, dropout, and one frozen part in eval mode."""
    split = convert_split_batch_norm(TinyNet())
    network = nn.Sequential(nn.BatchNorm2d(3), split, nn.BatchNorm1d(4), nn.Dropout(0.5))
    network.train()
    network[1].bn1.eval()
    return network


def test_contexts_nest_and_end_even_after_an_exception() -> None:
    network = mixed_network()
    before = modes(network)
    for statistics in ("batch", "running", "batch_update"):
        with (
            pytest.raises(KeyError),
            use_branch(network, "both", num_clean=1),
            use_statistics(network, statistics),  # type: ignore[arg-type]  # one of the three
        ):
            inside = modes(network)
            with use_branch(network, "clean"):
                assert modes(network) != inside != before
            assert modes(network) == inside
            raise KeyError
        assert modes(network) == before


def test_statistics_batch_and_running() -> None:
    network = mixed_network()
    randomize(network)
    network[3].p = 0.0
    x = images(4, size=6)
    state = copy.deepcopy(network.state_dict())
    trained, evaluated = copy.deepcopy(network).train(), copy.deepcopy(network).eval()
    with use_statistics(network, "batch"):
        assert torch.equal(network(x), trained(x))
    with use_statistics(network, "running"):
        assert torch.equal(network(x), evaluated(x))
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    network.train()
    with use_statistics(network, "batch_update"):
        network(x)
    # `trained` has seen the same batch once.
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name
