"""What is measured: one training step of a published network, at a given size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from arat_fast.attacks.pgd import PGD
from arat_fast.models.registry import model_spec
from arat_fast.models.resnet import BasicBlock, ResNet
from arat_fast.models.wide_resnet import WideResNet
from arat_fast.recipes import GAMMA

EPS, ALPHA = 8 / 255, 2 / 255
NUM_CLASSES = 10
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4
"""SGD as published, but for the learning rate: on random images 0.1 soon leaves finite numbers."""

RESNETS = {"resnet8": ((1, 1, 1), (32, 64, 128)), "resnet18": ((2, 2, 2, 2), (64, 128, 256, 512))}
WIDE_RESNETS = {"wrn34-10": (34, 10)}
NETWORKS = (*RESNETS, *WIDE_RESNETS)


@dataclass(frozen=True)
class Workload:
    """One training step of ARAT."""

    model: str = "resnet18"
    """resnet8, resnet18 or wrn34-10."""
    batch_size: int = 128
    """Images; >= 2."""
    image_size: int = 32
    """Height and width in pixels; >= 8."""
    num_steps: int = 10
    """Steps of the attack; >= 0."""

    def __str__(self) -> str:
        return (
            f"{self.model}, batch {self.batch_size}, {self.image_size} pixels, PGD-{self.num_steps}"
        )

    def __post_init__(self) -> None:
        if self.model not in NETWORKS:
            raise ValueError(
                f"the benchmarks have baselines for {', '.join(NETWORKS)}, got model {self.model!r}"
            )
        for name, least in (("batch_size", 2), ("image_size", 8), ("num_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 3, self.image_size, self.image_size

    @property
    def gamma(self) -> float:
        """Published weight of the invariance loss."""
        return GAMMA.get(self.model, GAMMA["resnet18"])

    @property
    def layers(self) -> tuple[str, ...]:
        """Published regularised layers."""
        return model_spec(self.model).regularized_layers

    @property
    def forward_equivalents(self) -> int:
        """Forward passes that a step is worth: each attack step is a forward pass and a backward
        pass to the image; a training pass has a backward pass to the weights besides, and there are
        two, clean and adversarial."""
        return 2 * self.num_steps + 2 * 3

    def attack(self, bn: str) -> PGD:
        """The published attack; ``bn`` as :attr:`PGD.bn`."""
        return PGD(EPS, ALPHA, self.num_steps, bn=bn)  # type: ignore[arg-type]  # PGD checks it

    def network(self) -> nn.Module:
        """Our network with fresh weights, on the CPU."""
        if self.model in RESNETS:
            return ResNet(BasicBlock, *RESNETS[self.model], NUM_CLASSES)
        return WideResNet(*WIDE_RESNETS[self.model], NUM_CLASSES)

    def batches(self, count: int, device: torch.device, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Random images in [0, 1] and labels, the same for a seed on every device."""
        source = torch.Generator().manual_seed(seed)
        shape = (self.batch_size, *self.image_shape)
        return [
            (
                torch.rand(shape, generator=source).to(device),
                torch.randint(NUM_CLASSES, shape[:1], generator=source).to(device),
            )
            for _ in range(count)
        ]


def forward_flops(workload: Workload) -> int:
    """FLOPs of the forward pass of one image, two per multiply-add of convolutions and matrix
    products, counted operator by operator in the network itself."""
    with torch.device("meta"):
        network = workload.network().eval()
        images = torch.empty(1, *workload.image_shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    return int(counter.get_total_flops())
