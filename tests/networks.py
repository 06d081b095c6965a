"""Networks and weights shared by the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from official import predictors_to_official
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from arat_fast.models import SplitBatchNorm2d
from arat_fast.models.batch_norm import PlainBatchNorm2d


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill BatchNorm layers with numbers that differ between channels, branches and layers."""
    source = generator(seed)
    for module in model.modules():
        if not isinstance(module, (SplitBatchNorm2d, _BatchNorm)):
            continue
        with torch.no_grad():
            for tensor, mean in (
                (module.weight, 1.0),
                (module.bias, 0.0),
                (module.running_mean, 0.0),
            ):
                if tensor is not None:
                    noise = torch.randn(tensor.shape, generator=source, dtype=torch.float64)
                    tensor.copy_(mean + 0.2 * noise)
            if module.running_var is not None:
                noise = torch.rand(module.running_var.shape, generator=source)
                module.running_var.copy_(0.8 + noise)
            if module.num_batches_tracked is not None:
                shape = module.num_batches_tracked.shape
                module.num_batches_tracked.copy_(torch.randint(1, 9, shape, generator=source))
    return model


class Operations(TorchDispatchMode):
    """Name, arguments and keywords of every operation of PyTorch, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any, dict[str, Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name().removeprefix("aten::").split(".")[0]
        self.seen.append((name, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def arguments(self, name: str) -> list[Any]:
        """Those of every call of one operation."""
        return [args for seen, args, _ in self.seen if seen == name]

    def masks(self, name: str = "convolution_backward") -> list[list[bool]]:
        """Which gradients were asked of every call."""
        return [list(args[-1]) for args in self.arguments(name)]


class BatchNormAct2d(nn.BatchNorm2d):
    """Same attributes and forward as timm's layer of this name."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.drop = nn.Identity()
        self.act = nn.SiLU()

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(input)))
        return y


class SeenBatchNorm2d(PlainBatchNorm2d):
    """Keeps what it normalises, before the residual; a plain layer can become one."""

    seen: Tensor

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        y = self.seen = nn.BatchNorm2d.forward(self, input)
        if residual is not None:
            y = y + residual
        return y.relu() if relu else y

    @classmethod
    def feature(cls, model: nn.Module, path: str) -> Tensor:
        """The pooled feature of the pass before."""
        layer = model.get_submodule(path)
        assert isinstance(layer, cls)
        return layer.seen.relu().mean(dim=(2, 3))

    @classmethod
    def put(cls, model: nn.Module, paths: Sequence[str]) -> nn.Module:
        """Watch layers of a network, in place."""
        for path in paths:
            model.get_submodule(path).__class__ = cls
        return model


class TinyNet(nn.Module):
    """Two convolutions, an ordinary and an activated BatchNorm, a classifier; any image size."""

    def __init__(self, channels: int = 3, classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.bn2 = BatchNormAct2d(6)
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def tiny_network(seed: int = 3) -> nn.Module:
    """:class:`TinyNet` in float64, with BatchNorm layers that do something."""
    torch.manual_seed(seed)
    return randomize(TinyNet(), seed).double()


def triples(samples: int = 6, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Images, what could be adversarial ones, and labels of four classes; float64."""
    source = generator(1)
    x = torch.rand(samples, 3, size, size, generator=source, dtype=torch.float64)
    noise = 0.1 * torch.randn(x.shape, generator=source, dtype=torch.float64)
    return x, (x + noise).clamp(0, 1), torch.randint(0, 4, (samples,), generator=source)


def assert_same_gradients(got: nn.Module, expected: nn.Module) -> None:
    """Of parameters, to 1e-10 of the largest; running statistics, to 1e-12."""
    for (name, a), b in zip(got.named_parameters(), expected.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is None or b.grad is None:
            continue
        # A bias before a BatchNorm has no gradient but rounding.
        bound = 1e-10 * max(1e-3, float(b.grad.abs().max()))
        assert (a.grad - b.grad).abs().max() <= bound, name
    for (name, a), b in zip(got.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


def published_predictors(predictors: nn.Module) -> list[nn.Sequential]:
    """ARAT's predictors as the separate modules that they are in the official code."""
    modules = []
    for state in predictors_to_official(predictors):
        hidden, width = state["predictor_x.0.weight"].shape
        module = nn.Sequential(
            nn.Linear(width, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, width),
        ).double()
        module.load_state_dict({k.removeprefix("predictor_x."): v for k, v in state.items()})
        modules.append(module)
    return modules


def classifier(num_classes: int) -> nn.Module:
    """One's own network, as a command names it: ``networks:classifier``."""
    return TinyNet(classes=num_classes)
